"""What each verb is called, takes and does."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TRIALS = 200  # per category


@dataclass(frozen=True)
class Verb:
    """A verb of the command line."""

    name: str
    help: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    needs_model: bool = True


def _load(arguments: argparse.Namespace) -> Any:
    from transformers.utils import logging

    import unimm

    logging.disable_progress_bar()
    return unimm.load(arguments.model)


def _draw_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument("-o", "--output", default="out.png", help="PNG to write (default: out.png)")
    parser.add_argument("--n", type=int, default=1, help="pictures, side by side in one file")
    parser.add_argument("--seed", type=int, help="repeats a drawing")
    parser.add_argument("--guidance", type=float, help="strength of guidance, 1 is none (default: the model's own)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the model's own)")
    parser.add_argument(
        "--diffusion-steps",
        type=int,
        default=0,
        help="0: the codec decodes in one pass (default); 4 to 20: the diffusion detokenizer draws the pixels",
    )


def _draw(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from PIL import Image

    from unimm.files import atomic_write

    if arguments.n < 1:
        raise ValueError(f"--n is {arguments.n}; draw at least one picture.")
    replies = _load(arguments).generate(
        arguments.prompt,
        n=arguments.n,
        seed=arguments.seed,
        guidance=arguments.guidance,
        temperature=arguments.temperature,
        diffusion_steps=arguments.diffusion_steps,
    )
    pictures = [image for reply in replies for image in reply.images]
    sheet = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index * picture.width, 0))
    with atomic_write(Path(arguments.output)) as path:
        sheet.save(path)
    print(arguments.output)


def _describe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="picture file")
    parser.add_argument("--question", default="describe the picture", help="ask something else")


def _describe(arguments: argparse.Namespace) -> None:
    from unimm.pipelines import open_image

    image = open_image(arguments.image)
    print(_load(arguments).understand(image, arguments.question)[0].text)


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", default="chat_pictures", help="where pictures are saved (default: chat_pictures)")
    parser.add_argument("--seed", type=int, help="repeats a conversation")


def _chat(arguments: argparse.Namespace) -> None:
    from unimm.cli.chat import converse

    converse(_load(arguments), folder=arguments.folder, seed=arguments.seed)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", help="key=value, for example optimizer.lr=1e-3")


def _train(arguments: argparse.Namespace) -> None:
    from unimm.training.recipe import train

    print(train(arguments.recipe, arguments.overrides).root)


def _tokenize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a picture, or a .json file of codes")
    parser.add_argument("-o", "--output", required=True, help="a .json file of codes, or a picture")


def _tokenize(arguments: argparse.Namespace) -> None:
    from unimm.cli.tokenize import codes_to_picture, picture_to_codes

    convert = codes_to_picture if arguments.source.endswith(".json") else picture_to_codes
    convert(_load(arguments), arguments.source, arguments.output)
    print(arguments.output)


def _limit_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=int, default=TRIALS, help=f"trials per category (default: {TRIALS})")


def _measuring(limit: int) -> str:
    """The command that measures the same again."""
    return "unimm evaluate tiny" + (f" --limit {limit}" if limit != TRIALS else "")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "benchmark",
        choices=["tiny", "codec"],
        help="tiny: drawing and reading rendered worlds; codec: copies of pictures",
    )
    _limit_argument(parser)
    parser.add_argument("--folder", help="where the report and its pictures go")
    codec = parser.add_argument_group("of codec")
    codec.add_argument("--vae", help="judge this autoencoder of diffusers, in place of --model")
    codec.add_argument("--side", type=int, default=256, help="of the pictures for --vae, in pixels (default: 256)")
    codec.add_argument("--references", help="judge the copies in --copies against the pictures in this folder")
    codec.add_argument("--copies", help="folder of copies, under the names of the references")
    codec.add_argument("--pictures", nargs="+", default=["shapes", "words", "photographs"], help="sets to copy")
    codec.add_argument("--extractor", help="a vision model for the Fréchet distance (default: thumbnails)")
    codec.add_argument("--text", action="store_true", help="also read words of several heights with an OCR")


def _evaluate(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from unimm.evaluation import evaluate_tiny

    if arguments.benchmark == "codec":
        from unimm.cli.judge import judge_codec

        print(judge_codec(arguments).to_markdown())
        return
    folder = Path(arguments.folder) if arguments.folder else None
    command, limit = _measuring(arguments.limit), arguments.limit
    print(evaluate_tiny(_load(arguments), command=command, limit=limit, folder=folder).to_markdown())


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a trained model, for example runs/tiny-sft/model")
    parser.add_argument("target", help="folder that becomes the Hub repository")
    parser.add_argument("--detokenizer", help="a trained one, for example runs/tiny-detokenizer/model")
    _limit_argument(parser)


def _export(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    import unimm
    from unimm.evaluation import evaluate_tiny
    from unimm.hub import write_card, write_repository
    from unimm.scorers.glyphs import NUM_GLYPHS

    detokenizer = Path(arguments.detokenizer) if arguments.detokenizer else None
    folder = write_repository(Path(arguments.source), Path(arguments.target), detokenizer)
    limit = arguments.limit
    report = evaluate_tiny(unimm.load(folder), command=_measuring(limit), limit=limit, folder=folder)
    write_card(folder, report.to_markdown(), num_emoji=NUM_GLYPHS)
    print(report.to_markdown())


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("system", help="the published system, for example llamagen_vq")
    parser.add_argument("source", help="folder of upstream's config.json and weights.safetensors")
    parser.add_argument("target", help="folder to write, which AutoModel then loads")
    parser.add_argument("--back", action="store_true", help="the other way: a converted model to upstream's files")
    parser.add_argument("--accept-licence", action="store_true", help="agree to a licence that limits the use")


def _convert(arguments: argparse.Namespace) -> None:
    from unimm.conversion import convert, restore

    if arguments.back:
        print(restore(arguments.system, arguments.source, arguments.target))
        return
    print(convert(arguments.system, arguments.source, arguments.target, accept_licence=arguments.accept_licence))


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["codec"], help="codec: a visual tokenizer")
    parser.add_argument("name", help="a preset, or the folder of a saved codec")


def _inspect(arguments: argparse.Namespace) -> None:
    from unimm.cli.inspect import inspect_codec

    print(inspect_codec(arguments.name))


VERBS = (
    Verb("draw", "draw a picture", 'unimm draw "a red heart above a blue star" -o heart.png', _draw_arguments, _draw),
    Verb("describe", "say what a picture shows", "unimm describe heart.png", _describe_arguments, _describe),
    Verb("chat", "talk, with pictures in the answers", "unimm chat", _chat_arguments, _chat),
    Verb(
        "train",
        "run a recipe, or go on where it stopped",
        "unimm train recipes/tiny/codec.yaml optimizer.steps=100",
        _train_arguments,
        _train,
        needs_model=False,
    ),
    Verb("tokenize", "picture to codes and back", "unimm tokenize a.png -o a.json", _tokenize_arguments, _tokenize),
    Verb("evaluate", "measure a model", "unimm evaluate tiny --limit 20", _evaluate_arguments, _evaluate),
    Verb(
        "export",
        "lay a trained model out as a Hub repository, measured",
        "unimm export runs/tiny-sft/model model_cards/unimm-tiny",
        _export_arguments,
        _export,
        needs_model=False,
    ),
    Verb(
        "convert",
        "turn published weights into a model",
        "unimm convert llamagen_vq SOURCE TARGET",
        _convert_arguments,
        _convert,
        needs_model=False,
    ),
    Verb(
        "inspect",
        "say what a codec is made of",
        "unimm inspect codec smallest",
        _inspect_arguments,
        _inspect,
        needs_model=False,
    ),
)
