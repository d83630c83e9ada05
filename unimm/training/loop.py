"""The loop of the stages that learn pictures (codec, detokenizer), on accelerate.

A task owns a model, makes its batches as a pure function of the step, and names its losses; the loop owns everything
else: precision, optimiser, logs, plots, sheets, checkpoints and exact resumption.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm

from unimm.files import atomic_directory
from unimm.nn.processor import has_fast_bf16
from unimm.training.optimizer import OptimizerConfig, build_optimizer, build_schedule
from unimm.training.plots import plot_metrics
from unimm.training.run_directory import RunConfig, RunDirectory

ON_CPU = not torch.accelerator.is_available()  # said aloud, accelerate joins several processes on CPUs too


@dataclass(frozen=True)
class LoggingConfig:
    """Steps between log lines, between validations with a sample sheet and plots, and between checkpoints.

    Raises:
        ValueError: less than one step.
    """

    every: int = 20
    validate_every: int = 500
    save_every: int = 500

    def __post_init__(self) -> None:
        check_intervals(self.every, self.validate_every, self.save_every)


def check_intervals(*intervals: int) -> None:
    """Raise `ValueError` where steps between two lines of a log, sheets or checkpoints are less than one."""
    if min(intervals) < 1:
        raise ValueError(f"logging has {', '.join(map(str, intervals))} steps in between; each must be 1 or more.")


class Critic(Protocol):
    """Learns to tell what the model makes from what it should."""

    network: nn.Module

    def losses(self, network: nn.Module, step: int) -> dict[str, torch.Tensor] | None:
        """Named losses of what the model made last; `critic` is minimised. None where it does not learn yet."""


@dataclass(frozen=True)
class LoopConfig:
    """What the loop reads of a recipe.

    Args:
        bf16: whether to compute in it; None where the processor decides.
        ema_decay: of the moving average of the weights; None for none.

    Raises:
        ValueError: a decay that is no share.
    """

    run: RunConfig
    optimizer: OptimizerConfig
    logging: LoggingConfig
    bf16: bool | None
    ema_decay: float | None

    def __post_init__(self) -> None:
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay:g}; give 0 or more and less than 1, 0.999 for example.")


class VisualTask(Protocol):
    """What the loop asks of a stage.

    Args:
        critic: a network that learns against the model, at every step after it; None for none.
    """

    model: nn.Module
    critic: Critic | None

    def losses(self, model: nn.Module, step: int, rank: int) -> dict[str, torch.Tensor]:
        """Named losses of one batch; `loss` is minimised."""

    def validate(self) -> dict[str, float]:
        """Named figures on pictures that training never shows."""

    def draw_sheet(self, path: Path) -> None:
        """Write a picture of samples."""

    def save(self, path: Path) -> None:
        """Write the model into an empty directory."""


def computes_in_bf16(asked: bool | None) -> bool:
    """What a recipe asks for, or what the processor is fast in where it asks for nothing."""
    return has_fast_bf16(PartialState(cpu=ON_CPU).device) if asked is None else asked


def run_loop(task: VisualTask, config: LoopConfig, recipe: Any) -> RunDirectory:
    """Train `task.model` to the end, resuming from the last checkpoint where there is one, and save it under `model/`.

    Raises:
        ValueError: a loss that is not finite, a run directory of another recipe, or a broken checkpoint.
    """
    set_seed(config.run.seed)
    directory = RunDirectory(config.run)
    accelerator = Accelerator(mixed_precision="bf16" if computes_in_bf16(config.bf16) else "no", cpu=ON_CPU)
    if accelerator.is_main_process:
        directory.start(recipe)
    optimizer = build_optimizer(task.model, config.optimizer)
    schedule = build_schedule(optimizer, config.optimizer)
    model, optimizer, schedule = accelerator.prepare(task.model, optimizer, schedule)
    rival = None if task.critic is None else _Rival(accelerator, task.critic, config.optimizer)
    average = _Average(accelerator, task.model, config.ema_decay)
    start = _resume(accelerator, directory)
    bar = tqdm(
        range(start, config.optimizer.steps),
        initial=start,
        total=config.optimizer.steps,
        desc=config.run.name,
        disable=not accelerator.is_local_main_process,
    )
    began = time.monotonic()
    for step in bar:
        losses = task.losses(model, step, accelerator.process_index)
        accelerator.backward(losses["loss"])
        norm = accelerator.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step()
        if rival is not None:
            losses |= rival.learn(step)
        done = step + 1
        saves = done % config.logging.save_every == 0 or done == config.optimizer.steps
        if done % config.logging.every == 0 or saves:  # what is saved is finite
            record = {name: float(value.detach()) for name, value in losses.items()}
            record["gradient_norm"] = float(norm)
            check_finite(record, done)
            record["lr"] = schedule.get_last_lr()[0]
            bar.set_postfix(loss=f"{record['loss']:.4f}")
            if accelerator.is_main_process:
                directory.log({"step": done, "seconds": round(time.monotonic() - began, 1), **record})
        if done % config.logging.validate_every == 0 or done == config.optimizer.steps:
            with average.shown():
                _look(accelerator, task, directory, done)
        if saves:
            _save(accelerator, directory, done)
    if accelerator.is_main_process:
        with average.shown():
            with atomic_directory(directory.model) as path:
                task.save(path)
            directory.finish(task.validate())
    accelerator.wait_for_everyone()
    return directory


class _Average:
    """A moving average of the model's weights, which stands in for them where the model is judged or saved."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, decay: float | None) -> None:
        self.weights = [*model.parameters()]
        self.ema: EMAModel | None = None
        if decay is not None:
            self.ema = EMAModel(self.weights, decay=decay)
            accelerator.register_for_checkpointing(self.ema)

    def step(self) -> None:
        if self.ema is not None:
            self.ema.step(self.weights)

    @contextmanager
    def shown(self) -> Iterator[None]:
        if self.ema is None:
            yield
            return
        self.ema.store(self.weights)
        self.ema.copy_to(self.weights)
        try:
            yield
        finally:
            self.ema.restore(self.weights)


class _Rival:
    """A critic with the optimiser and the schedule that the model has."""

    def __init__(self, accelerator: Accelerator, critic: Critic, config: OptimizerConfig) -> None:
        self.accelerator, self.critic, self.clip = accelerator, critic, config.clip
        optimizer = build_optimizer(critic.network, config)
        schedule = build_schedule(optimizer, config)
        self.network, self.optimizer, self.schedule = accelerator.prepare(critic.network, optimizer, schedule)

    def learn(self, step: int) -> dict[str, torch.Tensor]:
        """One step; the losses, if it learns already."""
        losses = self.critic.losses(self.network, step)
        self.optimizer.zero_grad()  # of what the model's own step left in it
        if losses is None:
            return {}
        self.accelerator.backward(losses["critic"])
        self.accelerator.clip_grad_norm_(self.network.parameters(), self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return losses


def check_finite(record: dict[str, float], step: int) -> None:
    """Raise `ValueError` where a loss or the norm of its gradient is NaN or infinite, naming the way out."""
    bad = [name for name, value in record.items() if not abs(value) < float("inf")]
    if bad:
        raise ValueError(
            f"{', '.join(bad)} is not finite at step {step}. Lower optimizer.lr, raise optimizer.warmup, or set "
            "bf16: false, in a run of another run.name."
        )


def _resume(accelerator: Accelerator, directory: RunDirectory) -> int:
    checkpoint = directory.last_checkpoint()
    if checkpoint is None:
        if accelerator.is_main_process:
            directory.rewind(0)
        return 0
    try:
        accelerator.load_state(str(checkpoint))
    except Exception as error:  # of whatever reads a file that is cut short
        raise ValueError(
            f"The checkpoint {checkpoint} cannot be loaded ({type(error).__name__}: {error}); delete it, to go on from "
            "the one before."
        ) from error
    step = int(checkpoint.name.removeprefix("step-"))
    if accelerator.is_main_process:
        directory.rewind(step)
        accelerator.print(f"{directory.root}: resuming at step {step}")
    return step


def _look(accelerator: Accelerator, task: VisualTask, directory: RunDirectory, step: int) -> None:
    if accelerator.is_main_process:
        directory.log({"step": step, **task.validate()})
        task.draw_sheet(directory.samples / f"step-{step:08d}.png")
        plot_metrics(directory.metrics(), directory.plots / "metrics.png")
    accelerator.wait_for_everyone()


def _save(accelerator: Accelerator, directory: RunDirectory, step: int) -> None:
    accelerator.save_state(str(directory.half_checkpoint(step)))  # every process keeps its own RNG state
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        directory.commit(step)
    accelerator.wait_for_everyone()
