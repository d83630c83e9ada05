"""`unimm VERB ...`: parses, calls the verb, and turns errors into one line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from unimm.cli import verbs
from unimm.files import check_model_name

USER_ERRORS = (ValueError, OSError, ImportError)


def build_parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    with_model = argparse.ArgumentParser(add_help=False, parents=[common])
    with_model.add_argument("--model", help="model folder or Hub name (default: the shipped unimm-tiny)")
    with_model.add_argument("--device", help="where it runs; in bfloat16 but on a CPU (default: a GPU if there is one)")
    stored = "store its weights so: int8 and bfloat16 are faster, int8 and nf4 (four bits) smaller; approximate"
    with_model.add_argument("--weights", choices=["int8", "bfloat16", "nf4"], help=f"{stored} (default: as they are)")
    with_model.add_argument("--offload", action="store_true", help="keep what is not at work in the CPU's memory")
    parser = argparse.ArgumentParser(prog="unimm", description="One language model that reads and draws.")
    parsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in verbs.VERBS:
        sub = parsers.add_parser(
            verb.name,
            help=verb.help,
            description=verb.help,
            epilog=f"example: {verb.example}",
            parents=[with_model if verb.needs_model else common],
        )
        verb.add_arguments(sub)
        sub.set_defaults(verb=verb)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 for what the user can mend, 1 for the rest."""
    arguments = build_parser().parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels for CPUs whenever it is installed
    try:
        if getattr(arguments, "model", None) is not None:
            check_model_name(arguments.model)
        arguments.verb.run(arguments)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
            return 1
        line = " ".join(own_words(error).split()) or type(error).__name__
        known = isinstance(error, USER_ERRORS)
        print(
            f"unimm: {line}" if known else f"unimm: {type(error).__name__}: {line} (--debug shows where)",
            file=sys.stderr,
        )
        return 2 if known else 1
    return 0


def own_words(error: Exception) -> str:
    """The message of an error, without the traceback that a worker process of torch has put before it."""
    text = str(error)
    if "Original Traceback" not in text:
        return text
    return text.strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")


if __name__ == "__main__":
    sys.exit(main())
