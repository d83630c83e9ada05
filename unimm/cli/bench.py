"""`unimm bench`: which model, how it is drawn with, and what the report says of that."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from unimm.evaluation.random_models import random_model
from unimm.evaluation.scaling import LENGTHS
from unimm.evaluation.speed import BEGUN, REQUESTS, TASKS, Bench, SpeedReport
from unimm.evaluation.timing import Machine
from unimm.nn.stored import check_format
from unimm.pipelines import UniMM

CODES = 256  # of a picture of random weights


def measure(arguments: argparse.Namespace, place: dict[str, Any], load: Callable[[], UniMM]) -> SpeedReport:
    """The report, which is saved too where a folder is named.

    Args:
        place: dtype and device.
        load: gives the saved model.

    Raises:
        ValueError: unknown tasks, numbers out of range, or a saved model and random weights together.
    """
    _check(arguments)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    tasks, scales = arguments.tasks, "scaling" in arguments.tasks
    codes = (max(LENGTHS) if scales else CODES) if arguments.codes is None else arguments.codes
    draws = "draw" in tasks
    formats = arguments.formats if draws else []
    requests = None
    if arguments.config:
        model = random_model(arguments.config, codes=codes, **place)
    else:
        loaded = load()
        model = loaded.model
        requests = [loaded.processor.drawing_inputs([request])["input_ids"] for request in REQUESTS]
    machine = Machine.measure(model.device)
    bench = Bench(
        model,
        machine,
        rounds=arguments.rounds,
        batch=arguments.batch,
        codes=arguments.drawn,
        formats=formats,
        window=arguments.window,
        requests=requests,
    )
    report = SpeedReport(
        command=_command(arguments, codes, formats),
        model=arguments.config or arguments.model or "unimm-tiny",
        clock="processor time" if torch.get_num_threads() == 1 and model.device.type == "cpu" else "wall time",
        threads=torch.get_num_threads(),
        gigabytes_per_second=machine.bandwidth / 1e9,
        gigaflops=machine.flops / 1e9,
        speeds=tuple(bench.run([task for task in tasks if task in TASKS])),
        scaling=bench.scaling() if scales else None,
        agreement=bench.agreement(),
        codes_per_pass=bench.codes_per_pass() if draws else None,
    )
    if arguments.folder:
        report.save(Path(arguments.folder))
    return report


def _check(arguments: argparse.Namespace) -> None:
    known, tasks = (*TASKS, "scaling"), arguments.tasks
    unknown = [task for task in tasks if task not in known]
    drawn = BEGUN + 1 if arguments.drawn is None else arguments.drawn
    if unknown or min(arguments.batch, arguments.rounds, arguments.window) < 1 or drawn <= BEGUN:
        raise ValueError(
            f"--tasks are {tasks}, --batch {arguments.batch}, --rounds {arguments.rounds}, --window {arguments.window} "
            f"and --drawn {arguments.drawn}; name some of {', '.join(known)}, a batch, rounds and a window of 1 or "
            f"more, and more than {BEGUN} codes."
        )
    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError(f"--threads is {arguments.threads}; give 1 or more.")
    if arguments.config and (arguments.model is not None or arguments.weights or arguments.offload):
        raise ValueError("--config is a model of random weights: leave out --model, --weights and --offload.")
    if arguments.codes is not None and arguments.codes < 1:
        raise ValueError(f"--codes is {arguments.codes}; a picture has 1 or more.")
    if arguments.codes is not None and not arguments.config:
        raise ValueError("--codes sizes the pictures of --config; a saved model has its own.")
    for name in arguments.formats:
        check_format(name)


def _command(arguments: argparse.Namespace, codes: int, formats: list[str]) -> str:
    """The command that measures the same again."""
    own = {"config": arguments.config, "model": arguments.model, "codes": codes if arguments.config else None}
    own |= {
        name: vars(arguments)[name] for name in ("weights", "device", "drawn", "batch", "rounds", "threads", "window")
    }
    options = [f"--{name} {value}" for name, value in own.items() if value is not None]
    options += ["--offload"] if arguments.offload else []
    return " ".join(["unimm bench", *options, "--formats", *formats, "--tasks", *arguments.tasks])
