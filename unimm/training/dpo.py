"""Preference learning on pairs of drawings (DPO, 2305.18290) with TRL's trainer, scored as they were sampled.

The pairs are the model's own: a group of drawings of every prompt is judged, and its best drawing is preferred to its
worst.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from datasets import Dataset, load_dataset
from tqdm import tqdm
from transformers import set_seed
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import pad

from unimm.files import atomic_write
from unimm.pipelines import UniMM
from unimm.rewards import Drawing, RewardMixture
from unimm.scorers.facts import SceneFacts
from unimm.sequence import UniMMProcessor
from unimm.training.adapter import AdapterConfig, hold_in_float32, load_model, lora_config
from unimm.training.begin import SamplingConfig
from unimm.training.language import LanguageLoggingConfig, RunCallback, run_to_end, share_batch, shared_arguments
from unimm.training.loop import ON_CPU
from unimm.training.optimizer import OptimizerConfig, build_optimizer
from unimm.training.policy import SamplingPolicy
from unimm.training.prompts import JudgesConfig, PromptsConfig, check_judged, choose_rewards, draw, make_prompts
from unimm.training.run_directory import RunConfig, RunDirectory
from unimm.unified import UniMMForConditionalGeneration


@dataclass(frozen=True)
class PairsConfig:
    """Pairs to learn from.

    Args:
        prompts: whose groups are judged; a group without a difference makes no pair.
        group_size: drawings of each.
        prompts_at_once: whose drawings are one batch.
        margin: least difference of the rewards, brought to [0, 1], of a pair.
    """

    prompts: int = 2_000
    group_size: int = 8
    prompts_at_once: int = 8
    margin: float = 0.1


@dataclass(frozen=True)
class DpoRecipe:
    """A recipe with `task: dpo`.

    Args:
        init_from: the saved model that the run begins with, which draws the pairs and is the reference.
        prompts, rewards, alignment_model, judges, sampling: as of GRPO.
        beta: how strongly the model is held to the reference.
        batch_size: pairs per step, over all processes.
        micro_batch: pairs per forward pass and process; None takes the process's share of the batch at once.
        adapter: train a part of the weights only; without this section all of them are trained.
    """

    task: str
    run: RunConfig
    init_from: str
    prompts: PromptsConfig
    rewards: dict[str, float]
    optimizer: OptimizerConfig
    pairs: PairsConfig = field(default_factory=PairsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    beta: float = 0.1
    batch_size: int = 32
    micro_batch: int | None = None
    alignment_model: str | None = None
    judges: JudgesConfig = field(default_factory=JudgesConfig)
    adapter: AdapterConfig | None = None
    logging: LanguageLoggingConfig = field(default_factory=LanguageLoggingConfig)
    bf16: bool = False
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class PairCollator:
    """Preferred drawings, then the others: prompts padded on the left, drawings on the right."""

    pad_token_id: int

    def __call__(self, items: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        prompts = [torch.tensor(item["prompt_ids"]) for item in items] * 2
        drawn = [torch.tensor(item[name]) for name in ("chosen_ids", "rejected_ids") for item in items]
        return {
            "prompt_ids": pad(prompts, padding_value=self.pad_token_id, padding_side="left"),
            "prompt_mask": pad([torch.ones_like(row) for row in prompts], padding_value=0, padding_side="left"),
            "completion_ids": pad(drawn, padding_value=self.pad_token_id),
            "completion_mask": pad([torch.ones_like(row) for row in drawn], padding_value=0),
        }


class DrawingDPOTrainer(DPOTrainer):
    """DPO whose log-probabilities are those of the sampling distribution; its pairs are ids already."""

    def __init__(
        self,
        *,
        model: UniMMForConditionalGeneration,
        reference: UniMMForConditionalGeneration | None,
        processor: UniMMProcessor,
        recipe: DpoRecipe,
        arguments: DPOConfig,
        pairs: Dataset,
        callbacks: list[Any],
    ) -> None:
        self.recipe = recipe
        self.policy = SamplingPolicy(
            model.config.grammar,
            tuple(model.config.null_prompt_ids or ()),
            temperature=recipe.sampling.temperature,
            guidance_scale=recipe.sampling.guidance_scale,
            guidance_interval=recipe.sampling.guidance_interval,
            levels=model.config.drawing_levels,
        )
        super().__init__(
            model=model,
            ref_model=reference,
            args=arguments,
            data_collator=PairCollator(processor.vocabulary.pad_token_id),
            train_dataset=pairs,
            processing_class=processor.tokenizer,
            callbacks=callbacks,
            peft_config=None if recipe.adapter is None else lora_config(model, recipe.adapter),
        )
        hold_in_float32(self.model)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = build_optimizer(model or self.model, self.recipe.optimizer)
        return self.optimizer

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool) -> torch.Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        num_drawn = inputs["completion_ids"].shape[1]
        scores = self.policy.score(model, ids, mask, num_drawn)
        with torch.no_grad():
            if self.ref_model is not None:
                reference = self.policy.score(self.ref_model, ids, mask, num_drawn)
            else:
                with self.accelerator.unwrap_model(model).disable_adapter():
                    reference = self.policy.score(model, ids, mask, num_drawn)
        rewards = self.beta * (scores.log_probs - reference.log_probs).sum(dim=1)
        chosen, rejected = rewards.chunk(2)
        margins = self.accelerator.gather_for_metrics(chosen - rejected).detach()
        drawn = inputs["completion_mask"].sum()
        self._metrics["train"]["rewards/accuracies"].append(float((margins > 0).float().mean()))
        self._metrics["train"]["rewards/margins"].append(float(margins.mean()))
        self._metrics["train"]["entropy"].append(float(scores.entropies.sum() / drawn))
        return -F.logsigmoid(chosen - rejected).mean()


def train_dpo(recipe: DpoRecipe) -> RunDirectory:
    """Run a `dpo` recipe and save model and processor under `model/` of the run directory.

    Raises:
        ValueError: a nucleus, unknown categories or rewards, drawings without a difference, or a batch that does not
            divide.
    """
    if recipe.sampling.top_p < 1:
        raise ValueError(
            f"sampling.top_p is {recipe.sampling.top_p}, and two models keep different nuclei, between which no ratio "
            "exists; set top_p: 1."
        )
    micro_batch, accumulation = share_batch(
        recipe.batch_size, recipe.micro_batch, PartialState(cpu=ON_CPU).num_processes
    )
    set_seed(recipe.run.seed)
    directory = RunDirectory(recipe.run)
    directory.start(recipe)
    model = load_model(recipe.init_from, recipe.adapter)
    processor = UniMMProcessor.from_pretrained(recipe.init_from)
    rewards = choose_rewards(recipe.rewards, recipe.alignment_model, recipe.judges, recipe.init_from)
    front = UniMM(model, processor, Path(recipe.init_from))
    path = directory.root / "pairs.parquet"
    with PartialState(cpu=ON_CPU).local_main_process_first():
        if not path.exists():
            pairs = make_pairs(model.to(PartialState(cpu=ON_CPU).device), front, recipe, rewards)
            with atomic_write(path) as temporary:
                Dataset.from_list(pairs).to_parquet(str(temporary))
    trainer = DrawingDPOTrainer(
        model=model,
        reference=None if recipe.adapter is not None else load_model(recipe.init_from, None),
        processor=processor,
        recipe=recipe,
        arguments=DPOConfig(
            **shared_arguments(recipe, directory),
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            beta=recipe.beta,
            max_length=None,
        ),
        pairs=read_pairs(path),
        callbacks=[RunCallback(directory, front, recipe.logging.sample_every)],
    )
    run_to_end(trainer, directory, processor, recipe.adapter)
    return directory


def make_pairs(
    model: UniMMForConditionalGeneration, front: UniMM, recipe: DpoRecipe, rewards: RewardMixture
) -> list[dict[str, list[int]]]:
    """The best and the worst drawing of every group, as ids.

    Raises:
        ValueError: rewards that judge none of the prompts, or no group with a difference.
    """
    config, pairs = recipe.pairs, []
    found = make_prompts(recipe.prompts, config.prompts)
    check_judged(found, rewards)
    prompts = found.to_list()
    set_seed(recipe.run.seed)
    for start in tqdm(range(0, len(prompts), config.prompts_at_once), desc="drawing pairs", unit="batch"):
        asked = [row for row in prompts[start : start + config.prompts_at_once] for _ in range(config.group_size)]
        requests = [row["prompt"] for row in asked]
        drawn = draw(model, front, requests, recipe.sampling, seed=recipe.run.seed + start)
        marks = rewards.total(
            [
                Drawing(picture, row["prompt"][-1]["content"], SceneFacts.from_json(row["facts"]))
                for picture, row in zip(drawn.pictures, asked, strict=True)
            ]
        )
        for first in range(0, len(asked), config.group_size):
            judged = [(mark, first + place) for place, mark in enumerate(marks[first : first + config.group_size])]
            known = [(mark, place) for mark, place in judged if mark is not None]
            (best, chosen), (worst, rejected) = (max(known), min(known)) if known else ((0.0, 0), (0.0, 0))
            if known and best - worst >= max(config.margin, 1e-6):
                pairs.append(
                    {
                        "prompt_ids": drawn.prompt_ids[chosen],
                        "chosen_ids": drawn.completion_ids[chosen],
                        "rejected_ids": drawn.completion_ids[rejected],
                    }
                )
    if not pairs:
        raise ValueError(
            f"No group of {config.group_size} drawings has a difference of pairs.margin = {config.margin} between its "
            "rewards; raise pairs.group_size or sampling.temperature, or lower the margin."
        )
    return pairs


def read_pairs(path: Path) -> Dataset:
    """The pairs of a file."""
    return load_dataset("parquet", data_files=str(path), split="train")
