"""What the trainer costs: steps of a language recipe beside those of a bare loop on the same model and batches.

python -m unimm.training.throughput RECIPE [key=value ...]
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import tempfile
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from unimm.config import load_config
from unimm.sequence import UniMMProcessor
from unimm.training.language import LanguageRecipe, LanguageTrainer, begin_or_load, training_arguments
from unimm.training.language_data import ConversationDataset, PackInOneRow, PadRight, open_mixture
from unimm.training.loop import computes_in_bf16
from unimm.training.optimizer import build_optimizer
from unimm.training.run_directory import RunConfig, RunDirectory
from unimm.unified import UniMMForConditionalGeneration

WARM_STEPS = 3  # of every round, which are not counted


@dataclass(frozen=True)
class Throughput:
    """Medians over steps that alternate, round by round.

    Args:
        trainer, loop: tokens per second, padding left out.
        ratio: median over the steps of the loop's time by the trainer's, on the same batch.
        steps: counted of each.
        gigabytes: of an accelerator that were in use at most; 0 on a CPU.
    """

    trainer: float
    loop: float
    ratio: float
    steps: int
    gigabytes: float


class _Clock(TrainerCallback):
    """Notes when every step of a trainer ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def measure_throughput(recipe: LanguageRecipe, *, rounds: int = 3, steps: int = 20) -> Throughput:
    """Train copies of the recipe's model: by the trainer, its loader included, and by a bare loop with batches at hand.
    Neither draws nor saves.

    Args:
        recipe: without adapter or micro-batches.
        rounds: of the trainer, then the loop.
        steps: counted in each round.

    Raises:
        ValueError: an adapter or micro-batches.
    """
    if recipe.adapter is not None or recipe.micro_batch not in (None, recipe.batch_size):
        raise ValueError(
            "The bare loop has neither adapter nor micro-batches; measure a recipe without adapter and micro_batch."
        )
    set_seed(recipe.run.seed)
    model, processor = begin_or_load(recipe)
    count = WARM_STEPS + steps
    trainer_times, loop_times, tokens = [], [], []
    for index in range(rounds):
        dataset = _dataset(recipe, model, processor, recipe.run.seed + index, count)
        collator = PackInOneRow() if recipe.pack_length else PadRight(processor.vocabulary.pad_token_id)
        places = range(0, count * recipe.batch_size, recipe.batch_size)
        batches = [collator([dataset[i] for i in range(place, place + recipe.batch_size)]) for place in places]
        trainer_times += _trainer_times(recipe, copy.deepcopy(model), dataset, collator, count)
        loop_times += _loop_times(recipe, copy.deepcopy(model), batches)
        tokens += [_tokens(batch) for batch in batches[WARM_STEPS:]]
    return Throughput(
        trainer=median(number / seconds for number, seconds in zip(tokens, trainer_times, strict=True)),
        loop=median(number / seconds for number, seconds in zip(tokens, loop_times, strict=True)),
        ratio=median(bare / whole for bare, whole in zip(loop_times, trainer_times, strict=True)),
        steps=len(tokens),
        gigabytes=torch.accelerator.max_memory_allocated() / 1e9 if torch.accelerator.is_available() else 0.0,
    )


def _dataset(
    recipe: LanguageRecipe, model: UniMMForConditionalGeneration, processor: UniMMProcessor, seed: int, steps: int
) -> ConversationDataset:
    return ConversationDataset(
        open_mixture(recipe.data, model.codec),
        processor,
        tasks=recipe.tasks,
        answers_only=recipe.answers_only,
        pack_length=recipe.pack_length,
        seed=seed,
        length=steps * recipe.batch_size,
    )


def _tokens(batch: dict[str, torch.Tensor]) -> int:
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None or mask.dim() != 2 else int(mask.sum())


def _trainer_times(
    recipe: LanguageRecipe,
    model: UniMMForConditionalGeneration,
    dataset: ConversationDataset,
    collator: Any,
    count: int,
) -> list[float]:
    """Seconds of every step after the warm ones."""
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(recipe, RunDirectory(RunConfig("throughput", folder)))
        arguments.max_steps, arguments.save_strategy = count, "no"
        trainer = LanguageTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=collator,
            callbacks=[clock],
            optimizer_config=recipe.optimizer,
        )
        trainer.train()
    return [after - before for before, after in zip(clock.ends[:-1], clock.ends[1:], strict=True)][WARM_STEPS - 1 :]


def _loop_times(
    recipe: LanguageRecipe, model: UniMMForConditionalGeneration, batches: list[dict[str, torch.Tensor]]
) -> list[float]:
    """The same of a loop without loader, log, schedule or checks."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model.to(device).train()
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer, times = build_optimizer(model, recipe.optimizer), []
    for batch in batches:
        begin = time.perf_counter()
        placed = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bf16(recipe.bf16)):
            loss = model(**placed, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for an accelerator
        times.append(time.perf_counter() - begin)
    return times[WARM_STEPS:]


def main(arguments: list[str]) -> None:
    """Print the throughput of a recipe."""
    recipe = load_config(LanguageRecipe, arguments[0], arguments[1:])
    found = dataclasses.asdict(measure_throughput(recipe))
    print(" ".join(f"{name}={value:.4g}" for name, value in found.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
