"""Reinforcement learning on drawings with TRL's GRPO (2402.03300), scored under the distribution that was sampled from.

Rollouts are pictures that the codec's own decoder paints, rewards are functions of `unimm.rewards`. Each reward is
normalised within its group before they are summed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from unimm.pipelines import UniMM
from unimm.rewards import Drawing, Reward, RewardMixture
from unimm.scorers.facts import SceneFacts
from unimm.sequence import UniMMProcessor
from unimm.training.adapter import AdapterConfig, hold_in_float32, load_model, lora_config
from unimm.training.begin import SamplingConfig
from unimm.training.language import LanguageLoggingConfig, RunCallback, run_to_end, shared_arguments
from unimm.training.loop import ON_CPU
from unimm.training.optimizer import OptimizerConfig, build_optimizer
from unimm.training.plots import plot_metrics
from unimm.training.policy import SamplingPolicy
from unimm.training.prompts import JudgesConfig, PromptsConfig, check_judged, choose_rewards, draw, make_prompts
from unimm.training.run_directory import RunConfig, RunDirectory
from unimm.unified import UniMMForConditionalGeneration

LOGGED = (
    "reward",
    "entropy",
    "kl",
    "diversity",
    "group_reward_std",
    "equal_groups",
    "ratio_deviation",
    "step_time",
    "rollout_time",
    "reward_time",
    "rollout_share",
)
EQUAL = 1e-6  # rewards of a group that differ less teach nothing


@dataclass(frozen=True)
class RolloutConfig:
    """Drawings of one step and process.

    Args:
        prompts: different ones.
        group_size: drawings of each.
        micro_batch: drawings per forward and backward pass; it divides prompts times group size.
    """

    prompts: int = 16
    group_size: int = 8
    micro_batch: int = 32


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is optimised.

    Args:
        kl: weight of the divergence from the model that the run began with; 0 spares its forward pass, and both
            passes of drawings in groups with equal rewards, which teach nothing then.
        clip: how far a probability ratio counts.
        updates: optimiser steps on the same rollouts.
        score_under_grammar: False scores the full softmax, as TRL does; for comparison only.
        ratio_tolerance: largest deviation from 1 of a ratio at the first step.
    """

    kl: float = 0.01
    clip: float = 0.2
    updates: int = 1
    score_under_grammar: bool = True
    ratio_tolerance: float = 1e-3


@dataclass(frozen=True)
class GuardConfig:
    """Floors below which the policy has collapsed; a run that stays below one for `patience` log lines stops.

    Args:
        diversity: share of codes in which two drawings of a group differ.
        entropy: nats per sampled id.
        group_reward_std: mean deviation of the weighted reward within a group.
    """

    diversity: float = 0.02
    entropy: float = 0.01
    group_reward_std: float = 0.0
    patience: int = 10


@dataclass(frozen=True)
class GrpoLoggingConfig(LanguageLoggingConfig):
    """The same with fewer steps between, since each draws many pictures."""

    every: int = 1
    sample_every: int = 20
    save_every: int = 20


@dataclass(frozen=True)
class GrpoRecipe:
    """A recipe with `task: grpo`.

    Args:
        init_from: the saved model that the run begins with, which is also the reference of the divergence.
        rewards: names and weights; `alignment` needs `alignment_model`.
        alignment_model: folder or Hub name of a CLIP-like model.
        judges: of `aesthetic` and `remote`.
        sampling: of the rollouts.
        adapter: train a part of the weights only; without this section all of them are trained.
        gradient_checkpointing: compute activations twice rather than keep them.
        bf16: faster, but cached sampling and scoring then differ by more than a thousandth.
    """

    task: str
    run: RunConfig
    init_from: str
    prompts: PromptsConfig
    rewards: dict[str, float]
    optimizer: OptimizerConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    logging: GrpoLoggingConfig = field(default_factory=GrpoLoggingConfig)
    alignment_model: str | None = None
    judges: JudgesConfig = field(default_factory=JudgesConfig)
    adapter: AdapterConfig | None = None
    bf16: bool = False
    gradient_checkpointing: bool = False


class PictureReward:
    """A reward in the form that TRL calls: columns of the batch in, numbers out."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.__name__ = reward.name

    def __call__(
        self,
        prompts: Sequence[list[dict[str, str]]],
        completions: Sequence[Any],
        *,
        picture: Sequence[Image.Image | None],
        facts: Sequence[str],
        **_: Any,
    ) -> list[float | None]:
        """One number per drawing; None where the reward does not apply."""
        return self.reward(
            [
                Drawing(image, prompt[-1]["content"], SceneFacts.from_json(text))
                for image, prompt, text in zip(picture, prompts, facts, strict=True)
            ]
        )


class DrawingGRPOTrainer(GRPOTrainer):
    """GRPO whose rollouts are pictures and whose log-probabilities are those of the sampling distribution.

    Times are in seconds: `step_time` is all of a step, of which `rollout_time` is drawing, pixels included, and
    `reward_time` judging; what is left is the scores of the reference, and the update.
    """

    def __init__(
        self,
        *,
        model: UniMMForConditionalGeneration,
        processor: UniMMProcessor,
        recipe: GrpoRecipe,
        arguments: GRPOConfig,
        prompts: Dataset,
        rewards: RewardMixture,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.processor, self.recipe = processor, recipe
        self.policy = SamplingPolicy(
            model.config.grammar,
            tuple(model.config.null_prompt_ids or ()),
            temperature=recipe.sampling.temperature,
            top_p=recipe.sampling.top_p,
            guidance_scale=recipe.sampling.guidance_scale,
            guidance_interval=recipe.sampling.guidance_interval,
            levels=model.config.drawing_levels,
        )
        self.front = UniMM(model, processor, Path(recipe.init_from))
        self._scored: torch.Tensor | None = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*'rollout_func'.*experimental")
            super().__init__(
                model=model,
                reward_funcs=[PictureReward(reward) for reward in rewards.rewards.values()],
                args=arguments,
                train_dataset=prompts,
                processing_class=processor.tokenizer,
                callbacks=callbacks,
                rollout_func=self._roll_out,
                peft_config=None if recipe.adapter is None else lora_config(model, recipe.adapter),
            )
        hold_in_float32(self.model)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = build_optimizer(model or self.model, self.recipe.optimizer)
        return self.optimizer

    def _roll_out(self, prompts: list[list[dict[str, str]]], trainer: GRPOTrainer) -> dict[str, list | None]:
        """Draw all prompts as one batch. The log-probabilities of the very first drawings are kept for the check."""
        begin = time.perf_counter()
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            step = self.state.global_step  # TRL's own counter begins anew in a resumed run
            drawn = draw(model, self.front, prompts, self.recipe.sampling, seed=step, log_probs=step == 0)
        self._log_metric("rollout_time", time.perf_counter() - begin)
        self._log_metric("diversity", group_diversity(drawn.ids[:, :-1], self.num_generations))
        return {
            "prompt_ids": drawn.prompt_ids,
            "completion_ids": drawn.completion_ids,
            "logprobs": drawn.log_probs,
            "picture": drawn.pictures,
        }

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **pictures: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if not self.recipe.objective.score_under_grammar:
            stock = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss
            )
            self._scored = stock[0].detach()
            return stock
        batches = zip(
            input_ids.split(batch_size or len(input_ids)),
            attention_mask.split(batch_size or len(input_ids)),
            strict=True,
        )
        with self.accelerator.autocast():
            scores = [self.policy.score(model, ids, mask, logits_to_keep) for ids, mask in batches]
        log_probs = torch.cat([score.log_probs for score in scores])
        self._scored = log_probs.detach()
        return log_probs, torch.cat([score.entropies for score in scores]) if compute_entropy else None, None

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        share = 1.0
        if not self.beta:
            inputs, share = without_idle_rows(inputs)
        loss = share * super()._compute_loss(model, inputs)
        recorded = inputs.get("sampling_per_token_logps")
        if recorded is not None and self.state.global_step == 0:
            assert self._scored is not None
            ratios = ((self._scored - recorded) * inputs["completion_mask"]).exp()
            self._check_ratio(float((ratios - 1).abs().max()))
        return loss

    def _check_ratio(self, deviation: float) -> None:
        """Before the first update the policy is the one that was sampled from.

        Raises:
            ValueError: its log-probabilities are not those of the sampling.
        """
        objective = self.recipe.objective
        self._metrics["train"]["ratio_deviation"].append(deviation)
        if objective.score_under_grammar and not deviation <= objective.ratio_tolerance:
            raise ValueError(
                f"At the first step importance ratios deviate from 1 by {deviation:.2e}, more than "
                f"objective.ratio_tolerance = {objective.ratio_tolerance:.0e}: rollouts are scored under another "
                "distribution than they were sampled from. Set bf16: false, or allow more where that is the precision."
            )

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        begin = time.perf_counter()
        rewards = super()._calculate_rewards(*args, **kwargs)  # [B, rewards], of all processes
        self._log_metric("reward_time", time.perf_counter() - begin)
        weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        spread = weighted.view(-1, self.num_generations).std(dim=1)
        self._metrics["train"]["group_reward_std"].append(float(spread.mean()))
        self._metrics["train"]["equal_groups"].append(float((spread < EQUAL).float().mean()))
        return rewards

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Leave out what nobody asked for, and add the share of the time that drawing takes."""
        metrics = self._metrics["train"]
        if metrics.get("rollout_time") and metrics.get("step_time"):
            metrics["rollout_share"].append(sum(metrics["rollout_time"]) / sum(metrics["step_time"]))
        for name in [n for n in metrics if n not in LOGGED and not (n.startswith("rewards/") and n.endswith("/mean"))]:
            del metrics[name]
        super().log(logs, start_time)


class GuardCallback(TrainerCallback):
    """Stops a run that has collapsed. Logged metrics are means over all processes, so all of them stop together; those
    of before a restart are read back, so a resumed run stops where the whole one would.
    """

    def __init__(self, directory: RunDirectory, guards: GuardConfig) -> None:
        self.directory, self.patience = directory, guards.patience
        self.floors = {
            "diversity": guards.diversity,
            "entropy": guards.entropy,
            "group_reward_std": guards.group_reward_std,
        }
        self.seen: list[dict[str, float]] = []
        self.tripped: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen = [record for record in self.directory.metrics() if self.floors.keys() <= record.keys()]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if not logs or not self.floors.keys() <= logs.keys():
            return
        self.seen = [*self.seen, logs][-self.patience :]
        if len(self.seen) < self.patience:
            return
        for name, floor in self.floors.items():
            if all(record[name] < floor for record in self.seen):
                self.tripped = name
                control.should_training_stop = True


def train_grpo(recipe: GrpoRecipe) -> RunDirectory:
    """Run a `grpo` recipe and save model and processor under `model/` of the run directory.

    Raises:
        ValueError: a recipe whose numbers do not fit, unknown categories or rewards, rewards that judge none of the
            prompts, or a first step that is off-policy.
    """
    check_recipe(recipe)
    set_seed(recipe.run.seed)
    directory = RunDirectory(recipe.run)
    directory.start(recipe)
    rewards = choose_rewards(recipe.rewards, recipe.alignment_model, recipe.judges, recipe.init_from)
    rounds = -(-recipe.optimizer.steps // recipe.objective.updates)
    number = rounds * recipe.rollout.prompts * PartialState(cpu=ON_CPU).num_processes
    prompts = make_prompts(recipe.prompts, number)
    check_judged(prompts, rewards)
    model = load_model(recipe.init_from, recipe.adapter)
    if model.config.levels is not None and not recipe.objective.score_under_grammar:
        raise ValueError(
            f"{recipe.init_from} draws by levels of {model.config.levels}, which stock scoring knows nothing of; set "
            "objective.score_under_grammar: true."
        )
    processor = UniMMProcessor.from_pretrained(recipe.init_from)
    arguments = grpo_arguments(recipe, directory, rewards, processor.grammar.longest)
    guard = GuardCallback(directory, recipe.guards)
    trainer = DrawingGRPOTrainer(
        model=model,
        processor=processor,
        recipe=recipe,
        arguments=arguments,
        prompts=prompts,
        rewards=rewards,
        callbacks=[guard],
    )
    trainer.add_callback(RunCallback(directory, trainer.front, recipe.logging.sample_every))
    run_to_end(trainer, directory, processor, recipe.adapter)
    if guard.tripped and trainer.is_world_process_zero():
        plot_metrics(directory.metrics(), directory.plots / "metrics.png")
        print(f"Stopped at step {trainer.state.global_step}: {guard.tripped} stayed below guards.{guard.tripped}.")
    return directory


def check_recipe(recipe: GrpoRecipe) -> None:
    """Refuse numbers that do not fit before a model is loaded.

    Raises:
        ValueError: what does not fit and what would.
    """
    rollout, objective, sampling = recipe.rollout, recipe.objective, recipe.sampling
    drawings = rollout.prompts * rollout.group_size
    if rollout.group_size < 2 or drawings % rollout.micro_batch:
        raise ValueError(
            f"rollout.group_size is {rollout.group_size} and rollout.micro_batch {rollout.micro_batch}; groups need 2 "
            f"drawings or more, and the micro batch must divide {rollout.prompts} x {rollout.group_size} = {drawings}."
        )
    if recipe.logging.save_every % objective.updates:
        raise ValueError(
            f"logging.save_every is {recipe.logging.save_every} and objective.updates {objective.updates}; a run that "
            "goes on between updates has lost their drawings, so save_every must be a multiple of updates."
        )
    if sampling.top_p < 1 and (objective.kl or objective.updates > 1):
        raise ValueError(
            f"sampling.top_p is {sampling.top_p}, and two models keep different nuclei, between which neither a "
            "divergence nor a ratio exists; set top_p: 1, or objective.kl: 0 and objective.updates: 1."
        )


def grpo_arguments(
    recipe: GrpoRecipe, directory: RunDirectory, rewards: RewardMixture, completion_length: int
) -> GRPOConfig:
    """TRL's arguments; one optimiser step sees all drawings of its rollouts."""
    rollout, objective = recipe.rollout, recipe.objective
    return GRPOConfig(
        **shared_arguments(recipe, directory),
        per_device_train_batch_size=rollout.micro_batch,
        gradient_accumulation_steps=rollout.prompts * rollout.group_size // rollout.micro_batch,
        num_generations=rollout.group_size,
        num_iterations=objective.updates,
        max_completion_length=completion_length,
        temperature=recipe.sampling.temperature,
        top_p=recipe.sampling.top_p,
        beta=objective.kl,
        epsilon=objective.clip,
        loss_type="grpo",
        multi_objective_aggregation="normalize_then_sum",
        reward_weights=list(rewards.weights.values()),
        disable_dropout=True,
        shuffle_dataset=False,
    )


def without_idle_rows(inputs: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The rows whose advantage is not zero, at least one, and their share of all.

    Without a divergence the others have no gradient, so that share times the mean loss of these is the mean of all.
    """
    advantages = inputs["advantages"]
    busy = advantages.nonzero().flatten()
    kept = busy if len(busy) else torch.zeros_like(advantages[:1], dtype=torch.long)
    rows = {
        name: value[kept] if torch.is_tensor(value) and value.shape[:1] == advantages.shape else value
        for name, value in inputs.items()
    }
    return rows, len(kept) / len(advantages)


def group_diversity(drawn: torch.Tensor, group_size: int) -> float:
    """Share of ids `[P G, C]` in which two different drawings of the same prompt differ, in [0, 1]."""
    groups = drawn.view(-1, group_size, drawn.shape[1])
    differ = (groups[:, :, None] != groups[:, None]).float().mean(dim=-1)  # [P, G, G], 0 on the diagonal
    return float(differ.sum(dim=(1, 2)).mean()) / (group_size * (group_size - 1))
