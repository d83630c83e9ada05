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


def _place(arguments: argparse.Namespace) -> dict[str, Any]:
    """The device that is asked for, or the fastest there is, and the precision to work in there."""
    import torch

    from unimm.nn.processor import check_device

    device = arguments.device or str(torch.accelerator.current_accelerator() or "cpu")
    check_device(device)
    return {"device": device, "dtype": torch.float32 if device == "cpu" else torch.bfloat16}


def _load(arguments: argparse.Namespace) -> Any:
    from transformers.utils import logging

    import unimm

    logging.disable_progress_bar()
    return unimm.load(arguments.model, weights=arguments.weights, offload=arguments.offload, **_place(arguments))


def _check_picture(output: str) -> None:
    """Raise `ValueError` where Pillow writes no picture of that name, before it is drawn."""
    from pathlib import Path

    from PIL import Image

    writable = [suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE]
    if Path(output).suffix.lower() not in writable or Path(output).is_dir():
        raise ValueError(f"The picture is to be {output!r}; name a file that ends in .png, .jpg or .webp.")


def _check_folder(folder: str | None) -> None:
    """Raise `ValueError` where results are to go into a folder that is a file, before they are worked for."""
    from pathlib import Path

    if folder is not None and Path(folder).is_file():
        raise ValueError(f"The folder {folder} is a file; name another.")


def _alone(arguments: argparse.Namespace) -> None:
    """Raise `ValueError` where a codec that works alone is asked for what is done to language models."""
    if arguments.weights or arguments.offload:
        raise ValueError("A codec works alone here, with its weights as they are: leave out --weights and --offload.")


def _draw_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument("-o", "--output", default="out.png", help="PNG to write (default: out.png)")
    parser.add_argument("--n", type=int, default=1, help="pictures, side by side in one file")
    parser.add_argument("--seed", type=int, help="repeats a drawing")
    parser.add_argument("--guidance", type=float, help="strength of guidance, 1 is none (default: the model's own)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the model's own)")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="in pixels (default: the model's own, or choice)"
    )
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
    _check_picture(arguments.output)
    replies = _load(arguments).generate(
        arguments.prompt,
        n=arguments.n,
        seed=arguments.seed,
        guidance=arguments.guidance,
        temperature=arguments.temperature,
        diffusion_steps=arguments.diffusion_steps,
        size=None if arguments.size is None else tuple(arguments.size),
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

    _check_folder(arguments.folder)
    converse(_load(arguments), folder=arguments.folder, seed=arguments.seed)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", help="key=value, for example optimizer.lr=1e-3")
    parser.add_argument("--plan", action="store_true", help="say what it would take, and train nothing")
    parser.add_argument("--world-size", type=int, help="of the plan: GPUs (default: 1)")
    parser.add_argument("--gpu", help="of the plan: rtx4090, a100, h100 or h200 (default: h100)")


def _train(arguments: argparse.Namespace) -> None:
    from unimm.training.plan import plan
    from unimm.training.recipe import train

    world_size, gpu = arguments.world_size, arguments.gpu
    if arguments.plan:
        planned = plan(
            arguments.recipe,
            arguments.overrides,
            world_size=1 if world_size is None else world_size,
            gpu=gpu or "h100",
        )
        print(planned.to_text())
        return
    if world_size is not None or gpu is not None:
        raise ValueError(
            "--world-size and --gpu are of a plan: add --plan, or train by several processes with accelerate launch -m "
            "unimm.cli train."
        )
    print(train(arguments.recipe, arguments.overrides).root)


def _tokenize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a picture, a .json file of codes, or a data set (Hub name, folder, file)")
    parser.add_argument("-o", "--output", required=True, help="a .json file of codes, a picture, or a folder of rows")
    data = parser.add_argument_group(
        "data sets", "pictures to rows of codes; --model is a model with a codec, or a codec"
    )
    data.add_argument("--image", default="image", help="column of the pictures (default: image)")
    data.add_argument("--text", help="column of captions")
    data.add_argument("--messages", help="column of chat messages")
    data.add_argument("--split", default="train", help="split (default: train)")
    data.add_argument("--config", help="configuration of a data set on the Hub")
    data.add_argument("--streaming", action="store_true", help="read in order, without a copy in the cache")
    data.add_argument("--num-proc", type=int, default=1, help="processes (default: 1); torchrun adds more")


def _tokenize(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from PIL import Image

    from unimm.cli.tokenize import codes_to_picture, picture_to_codes, source_to_rows

    if arguments.source.endswith(".json"):
        _check_picture(arguments.output)
        codes_to_picture(_load(arguments), arguments.source, arguments.output)
    elif Path(arguments.output).suffix == ".json":
        picture_to_codes(_load(arguments), arguments.source, arguments.output)
    else:
        _alone(arguments)
        if Path(arguments.output).is_file() or Path(arguments.output).suffix.lower() in Image.registered_extensions():
            raise ValueError(
                f"The output is {arguments.output!r}; name a new folder for rows, or a .json file for the codes of "
                "one picture."
            )
        print(source_to_rows(arguments))
    print(arguments.output)


def _trials(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} trials; give 1 or more")
    return int(text)


def _limit_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=_trials, default=TRIALS, help=f"trials per category (default: {TRIALS})")


def _measuring(
    limit: int, weights: str | None = None, temperature: float | None = None, best_of: int | None = None
) -> str:
    """The command that measures the same again."""
    options = {
        "limit": None if limit == TRIALS else limit,
        "weights": weights,
        "temperature": temperature,
        "best-of": best_of,
    }
    return " ".join(
        ["unimm evaluate tiny", *(f"--{name} {value}" for name, value in options.items() if value is not None)]
    )


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "benchmark",
        choices=["tiny", "codec"],
        help="tiny: drawing and reading rendered worlds; codec: copies of pictures",
    )
    _limit_argument(parser)
    parser.add_argument("--folder", help="where the report and its pictures go")
    tiny = parser.add_argument_group("of tiny")
    tiny.add_argument("--temperature", type=float, help="of what is drawn, 0 is greedy (default: the model's own)")
    tiny.add_argument(
        "--best-of",
        type=int,
        help="judge the one of so many drawings that a reward likes most, which knows the facts as the judge does: "
        "what choosing could reach at best, beside reinforcement learning (default: 1)",
    )
    codec = parser.add_argument_group("of codec")
    codec.add_argument("--vae", help="judge this autoencoder of diffusers, in place of --model")
    codec.add_argument("--side", type=int, help="of the pictures for --vae, in pixels (default: 256)")
    codec.add_argument("--references", help="judge the copies in --copies against the pictures in this folder")
    codec.add_argument("--copies", help="folder of copies, under the names of the references")
    sets = "sets to copy: shapes, words, photographs, emoji, or folders of pictures (default: the first three)"
    codec.add_argument("--pictures", nargs="+", help=sets)
    codec.add_argument("--extractor", help="a vision model for the Fréchet distance (default: thumbnails)")
    codec.add_argument("--inception", metavar="FILE", help="NVIDIA's inception-2015-12-05.pt, to report rFID instead")
    codec.add_argument("--lpips", metavar="FILE", help="NVIDIA's vgg16.pt, to report LPIPS too")
    codec.add_argument(
        "--text", action="store_true", default=None, help="also read words of several heights with an OCR"
    )


def _check_benchmark(arguments: argparse.Namespace) -> None:
    """Raise `ValueError` where an option is of the other benchmark."""
    others = {
        "codec": ("temperature", "best_of"),
        "tiny": ("vae", "side", "references", "copies", "pictures", "extractor", "inception", "lpips", "text"),
    }[arguments.benchmark]
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(arguments, name) is not None]
    if given:
        raise ValueError(f"{', '.join(given)} is not of the benchmark {arguments.benchmark}; leave it out.")


def _evaluate(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from unimm.evaluation import evaluate_tiny

    _check_folder(arguments.folder)
    _check_benchmark(arguments)
    if arguments.benchmark == "codec":
        from unimm.cli.judge import judge_codec

        _alone(arguments)
        print(judge_codec(arguments, _place(arguments)["device"]).to_markdown())
        return
    folder = Path(arguments.folder) if arguments.folder else None
    temperature, best_of = arguments.temperature, arguments.best_of
    report = evaluate_tiny(
        _load(arguments),
        command=_measuring(arguments.limit, arguments.weights, temperature, best_of),
        limit=arguments.limit,
        folder=folder,
        temperature=temperature,
        best_of=1 if best_of is None else best_of,
    )
    print(report.to_markdown())


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of run directories; NAME-1, NAME-2, ... are seeds of one variant")


def _compare(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from unimm.training.comparison import compare_runs

    print(compare_runs(Path(arguments.folder)).to_markdown())


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    from_scratch = "random weights of this size instead of a model: tiny, 20m, 150m, 0.6b or 7b"
    parser.add_argument("--config", help=from_scratch)
    parser.add_argument("--tasks", nargs="+", default=["draw"], help="draw, read, train, tokenize, detokenize, scaling")
    parser.add_argument("--codes", type=int, help="codes per picture (default: 256, or 4096 for scaling)")
    parser.add_argument(
        "--drawn", type=int, help="codes that a timed drawing stops after, for less waiting (default: all)"
    )
    parser.add_argument("--batch", type=int, default=1, help="pictures at once (default: 1)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way, taking turns (default: 3)")
    parser.add_argument("--formats", nargs="*", default=["bfloat16", "int8"], help="of weights to draw with besides")
    parser.add_argument(
        "--window", type=int, default=1, help="of Jacobi iteration to draw with besides (default: none)"
    )
    parser.add_argument("--threads", type=int, help="threads of a CPU; 1 is timed in processor seconds")
    parser.add_argument("--folder", help="where speed.md, speed.json and the plots go")


def _bench(arguments: argparse.Namespace) -> None:
    from functools import partial

    from unimm.cli.bench import measure

    _check_folder(arguments.folder)
    print(measure(arguments, _place(arguments), partial(_load, arguments)).to_markdown())


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
    from unimm.scorers.outlines import SHAPES
    from unimm.scorers.palette import COLOURS

    detokenizer = Path(arguments.detokenizer) if arguments.detokenizer else None
    folder = write_repository(Path(arguments.source), Path(arguments.target), detokenizer)
    limit = arguments.limit
    report = evaluate_tiny(unimm.load(folder), command=_measuring(limit), limit=limit, folder=folder)
    write_card(folder, report.to_markdown(), num_shapes=len(SHAPES), num_colours=len(COLOURS), num_emoji=NUM_GLYPHS)
    print(report.to_markdown())


def _push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="directory of a finished run, for example runs/tiny-sft")
    parser.add_argument("repository", help="owner/name on the Hub")
    parser.add_argument("--folder", help="lay the repository out here instead of uploading it")
    parser.add_argument("--detokenizer", help="a trained one, for example runs/tiny-detokenizer/model")
    parser.add_argument("--licence", default="apache-2.0", help="as the Hub spells it (default: apache-2.0)")
    parser.add_argument("--private", action="store_true", help="keep the repository private")


def _push(arguments: argparse.Namespace) -> None:
    from pathlib import Path

    from unimm.hub import push_run, write_run_repository

    run, repository, licence = Path(arguments.run), arguments.repository, arguments.licence
    detokenizer = Path(arguments.detokenizer) if arguments.detokenizer else None
    if arguments.folder:
        target = Path(arguments.folder)
        print(write_run_repository(run, target, repository=repository, licence=licence, detokenizer=detokenizer))
        return
    print(push_run(run, repository, private=arguments.private, licence=licence, detokenizer=detokenizer))


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("system", help="the published system, for example llamagen_vq")
    parser.add_argument("source", help="folder of upstream's config.json and weights")
    parser.add_argument("target", help="folder to write, which AutoModel then loads")
    parser.add_argument("--back", action="store_true", help="the other way: a converted model to upstream's files")
    parser.add_argument("--accept-licence", action="store_true", help="agree to a licence that limits the use")
    parser.add_argument("--detokenizer", help="folder of the diffusion model, where upstream keeps it apart")


def _convert(arguments: argparse.Namespace) -> None:
    from unimm.conversion import convert, restore

    if arguments.back:
        print(restore(arguments.system, arguments.source, arguments.target))
        return
    report = convert(
        arguments.system,
        arguments.source,
        arguments.target,
        accept_licence=arguments.accept_licence,
        detokenizer=arguments.detokenizer,
    )
    print(report)


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["codec", "system"], help="codec: a visual tokenizer; system: a published one")
    parser.add_argument(
        "name",
        nargs="?",
        help="codec: a preset, ours or of a published tokenizer, or the folder of a saved codec; left out, the presets "
        "are listed. system: a published one",
    )


def _inspect(arguments: argparse.Namespace) -> None:
    from unimm.cli.inspect import inspect_codec, inspect_system, list_codecs

    if arguments.what == "system":
        print(inspect_system(arguments.name or ""))
    else:
        print(list_codecs() if arguments.name is None else inspect_codec(arguments.name))


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
    Verb(
        "tokenize",
        "picture to codes and back; data set to rows",
        "unimm tokenize pictures/ -o rows/ --text caption --num-proc 4",
        _tokenize_arguments,
        _tokenize,
    ),
    Verb("evaluate", "measure a model", "unimm evaluate tiny --limit 20", _evaluate_arguments, _evaluate),
    Verb(
        "compare",
        "put judged runs side by side, with their curves",
        "unimm compare runs/tiny-grpo",
        _compare_arguments,
        _compare,
        needs_model=False,
    ),
    Verb(
        "bench",
        "measure speed, beside stock transformers and what the machine allows",
        "unimm bench --config 20m --threads 1",
        _bench_arguments,
        _bench,
    ),
    Verb(
        "export",
        "lay a trained model out as a Hub repository, measured",
        "unimm export runs/tiny-sft/model model_cards/unimm-tiny",
        _export_arguments,
        _export,
        needs_model=False,
    ),
    Verb(
        "push",
        "publish a finished run on the Hub, with a card made of it",
        "unimm push runs/tiny-sft owner/name",
        _push_arguments,
        _push,
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
        "say what a codec is made of, or what a published system weighs",
        "unimm inspect codec smallest",
        _inspect_arguments,
        _inspect,
        needs_model=False,
    ),
)
