"""The language stages on transformers' Trainer: `pretrain` from nothing or from a language model, `sft` from there."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import PartialState
from peft import PeftModel
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from unimm.data.conversations import TaskRates
from unimm.files import atomic_directory
from unimm.pipelines import UniMM
from unimm.sequence import IGNORED_LABEL, ImagePart, UniMMProcessor
from unimm.training.adapter import AdapterConfig, begin_adapter, load_model, merge_adapter
from unimm.training.begin import BackboneConfig, SamplingConfig, TextModelConfig, begin_model, generation_config
from unimm.training.language_data import ConversationDataset, PackInOneRow, PadRight, RowsConfig, open_mixture
from unimm.training.loop import ON_CPU, check_finite, check_intervals, computes_in_bf16
from unimm.training.optimizer import OptimizerConfig, build_optimizer
from unimm.training.plots import contact_sheet, plot_metrics
from unimm.training.run_directory import RunConfig, RunDirectory
from unimm.unified import UniMMConfig, UniMMForConditionalGeneration

logger = logging.getLogger(__name__)

SAMPLES_EACH = 4
SAMPLE_STEPS = 8  # of a diffusion detokenizer, where the codec makes no pixels; one sample each then
SAMPLE_PROMPTS = (
    "a red circle",
    "three blue stars",
    "a green heart above a pink square",
    "pizza",
    "dog",
    'the word "CAKE" in red',
)


@dataclass(frozen=True)
class LanguageLoggingConfig:
    """Steps between log lines, between sample sheets, and between checkpoints; and who else gets the log.

    `report_to` names loggers of transformers, as `tensorboard` or `trackio`; the run directory has the log anyway.

    Raises:
        ValueError: less than one step.
    """

    every: int = 20
    sample_every: int = 500
    save_every: int = 500
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_intervals(self.every, self.sample_every, self.save_every)


@dataclass(frozen=True)
class LanguageRecipe:
    """A recipe with `task: pretrain` or `task: sft`.

    Args:
        codec: a saved codec, to begin a model with.
        model: the text model to begin from nothing.
        backbone: a language model to begin with in its place.
        init_from: a saved unified model to go on from.
        adapter: train a part of the weights only; without this section all of them are trained.
        tasks: shares of drawing, reading and both, and of drawing without a prompt.
        answers_only: learn the assistant's turns only.
        levels: sizes of the levels that pictures are drawn by from here on, for a codec whose codes of a level can be
            drawn without knowing each other (see `Levels`); None keeps what the model does, one code after the other
            where it begins.
        image_loss_weight, z_loss_weight: see `factored_cross_entropy`.
        batch_size: items per step, over all processes: conversations, or packs of them.
        micro_batch: items per forward pass and process; None takes the process's share of the batch at once.
        pack_length: tokens per pack; None pads conversations instead.
        bf16: whether to compute in it; None where the processor is fast in it.
        compile: by TorchInductor: minutes at the start, then steps that wait less for memory.
        gradient_checkpointing: compute activations twice rather than keep them.
        attention: how transformers computes it, as `flash_attention_2`, which is what keeps packs cheap, or
            `flex_attention`, which needs no other package and compiles first: `sdpa`, the default, computes the whole
            pack and masks it.
    """

    task: str
    run: RunConfig
    data: RowsConfig
    optimizer: OptimizerConfig
    batch_size: int = 64
    micro_batch: int | None = None
    pack_length: int | None = None
    codec: str | None = None
    init_from: str | None = None
    backbone: BackboneConfig | None = None
    adapter: AdapterConfig | None = None
    model: TextModelConfig = field(default_factory=TextModelConfig)
    tasks: TaskRates = field(default_factory=TaskRates)
    answers_only: bool = False
    levels: tuple[int, ...] | None = None
    image_loss_weight: float = 1.0
    z_loss_weight: float = 0.0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    logging: LanguageLoggingConfig = field(default_factory=LanguageLoggingConfig)
    bf16: bool | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    attention: str | None = None


class LanguageTrainer(Trainer):
    """Takes its optimiser from the recipe, adds the two halves of the loss to the log, and reads its data in order: the
    dataset itself is the shuffle.

    The loss is a mean over the targets of a whole step, however micro-batches and processes share them.
    """

    def __init__(self, *args: Any, optimizer_config: OptimizerConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # it divides by the targets of the step, and not by micro-batches again
        self.optimizer_config = optimizer_config
        self._halves: list[torch.Tensor] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = build_optimizer(model or self.model, self.optimizer_config)
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The micro-batches of a step, and their weighted targets, those of other processes included."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.stack([self._count_targets(batch).to(device) for batch in batches])  # [micro-batches, 2]
        counts = self.accelerator.gather(counts).sum(dim=0)
        return batches, counts[0] + self._config.image_loss_weight * counts[1]

    def compute_loss(
        self,
        model: Any,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        # With a cache, packs would not be told apart.
        outputs = model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch)
        means, counts = torch.stack([outputs.text_loss, outputs.image_loss]).detach(), self._count_targets(inputs)
        self._halves.append(torch.stack([means * counts, counts]))
        # Gradients are averaged over processes, which then share the targets of a step.
        loss = outputs.loss if num_items_in_batch is None else outputs.loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._halves:
            sums, counts = self.accelerator.gather(torch.stack(self._halves).sum(dim=0)[None]).sum(dim=0)
            logs["text_loss"], logs["image_loss"] = (sums / counts.clamp_min(1)).tolist()
            self._halves = []
        super().log(logs, *args, **kwargs)

    @property
    def _config(self) -> UniMMConfig:
        return self.accelerator.unwrap_model(self.model).config

    def _count_targets(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """How many targets are text, and how many codes, `[2]`."""
        targets = batch["labels"][:, 1:]
        blocks = self._config.vocabulary.blocks
        codes = sum(((block.start <= targets) & (targets < block.stop)).sum() for block in blocks)
        return torch.stack([(targets != IGNORED_LABEL).sum() - codes, codes]).float()


class RunCallback(TrainerCallback):
    """Writes metrics, plots and, where the system makes pixels, sample sheets into the run directory."""

    def __init__(self, directory: RunDirectory, front: UniMM, sample_every: int) -> None:
        self.directory, self.front, self.sample_every = directory, front, sample_every
        if not front.makes_pixels:
            logger.warning("This model has no way from codes to pixels, so there are no sample sheets.")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            numbers = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
            check_finite({name: numbers[name] for name in ("loss", "grad_norm") if name in numbers}, state.global_step)
            self.directory.log({"step": state.global_step, **numbers})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # What is saved is finite, and a mean that went on over a checkpoint would be lost with a kill.
        control.should_log |= control.should_save
        last = state.global_step == state.max_steps
        if (state.global_step % self.sample_every and not last) or not self.front.makes_pixels:
            return
        sheet = draw_samples(kwargs["model"], self.front)  # by all processes: weights may be spread over them
        if state.is_world_process_zero:
            path = self.directory.samples / f"step-{state.global_step:08d}.png"
            contact_sheet(sheet, path, columns=2 * SAMPLES_EACH, labels=sample_prompts(self.front))
            plot_metrics(self.directory.metrics(), self.directory.plots / "metrics.png")


def sample_prompts(front: UniMM) -> list[str]:
    """The fixed prompts, each as often as it is drawn."""
    return [prompt for prompt in SAMPLE_PROMPTS for _ in range(SAMPLES_EACH if front.codec_draws else 1)]


@torch.no_grad()
def draw_samples(model: UniMMForConditionalGeneration, front: UniMM) -> list[Image.Image]:
    """Drawings of the fixed prompts.

    Args:
        model: that is trained, wrapped as it may be.
        front: of the same weights, with their detokenizer where the codec makes no pixels.
    """
    training, state = model.training, torch.get_rng_state()
    model.eval()
    torch.manual_seed(0)
    prompts = sample_prompts(front)
    inputs = front.processor.drawing_inputs(prompts).to(model.device)
    output = model.generate(**inputs, generation_mode="image")
    parts = [part for row in output.tolist() for part in front.processor.parse(row)]
    drawn = [part.codes for part in parts if isinstance(part, ImagePart)]
    pictures = front.decode(drawn, diffusion_steps=0 if front.codec_draws else SAMPLE_STEPS, seed=0, prompts=prompts)
    torch.set_rng_state(state)
    model.train(training)
    return [picture.image for picture in pictures]


def train_language(recipe: LanguageRecipe) -> RunDirectory:
    """Run a `pretrain` or `sft` recipe and save model and processor under `model/` of the run directory.

    Raises:
        ValueError: a recipe without the model or codec it needs, or rows of another codec.
    """
    set_seed(recipe.run.seed)
    directory = RunDirectory(recipe.run)
    directory.start(recipe)
    model, processor = begin_or_load(recipe)
    model.generation_config = generation_config(processor, recipe.sampling)
    dataset = ConversationDataset(
        open_mixture(recipe.data, model.codec),
        processor,
        tasks=recipe.tasks,
        answers_only=recipe.answers_only,
        pack_length=recipe.pack_length,
        seed=recipe.run.seed,
        length=recipe.optimizer.steps * recipe.batch_size,
    )
    trainer = LanguageTrainer(
        model=model if recipe.adapter is None else begin_adapter(model, recipe.adapter),
        args=training_arguments(recipe, directory),
        train_dataset=dataset,
        data_collator=PackInOneRow() if recipe.pack_length else PadRight(processor.vocabulary.pad_token_id),
        callbacks=[RunCallback(directory, UniMM(model, processor, _folder(recipe)), recipe.logging.sample_every)],
        optimizer_config=recipe.optimizer,
    )
    run_to_end(trainer, directory, processor, recipe.adapter)
    return directory


def _folder(recipe: LanguageRecipe) -> Path | None:
    """Where a detokenizer of the model may lie."""
    return None if recipe.init_from is None else Path(recipe.init_from)


def begin_or_load(recipe: LanguageRecipe) -> tuple[UniMMForConditionalGeneration, UniMMProcessor]:
    """The model that a recipe begins with or goes on from, with the recipe's levels, attention and weights of losses.

    Raises:
        ValueError: neither or both, or an adapter of weights that are not trained yet.
    """
    model, processor = _begun_or_loaded(recipe)
    if recipe.levels is not None:
        model.config.levels = list(recipe.levels)
    model.config.image_loss_weight = recipe.image_loss_weight
    model.config.z_loss_weight = recipe.z_loss_weight
    if recipe.attention is not None:
        model.set_attn_implementation({"text_config": recipe.attention})
    return model, processor


def _begun_or_loaded(recipe: LanguageRecipe) -> tuple[UniMMForConditionalGeneration, UniMMProcessor]:
    if recipe.init_from is not None:
        if recipe.backbone is not None or recipe.codec is not None:
            raise ValueError("The recipe names init_from beside codec or backbone; a saved model has both, drop them.")
        return load_model(recipe.init_from, recipe.adapter), UniMMProcessor.from_pretrained(recipe.init_from)
    if recipe.codec is None:
        raise ValueError("The recipe names neither codec nor init_from; name the saved codec to begin a model with.")
    if recipe.adapter is not None and (recipe.backbone is None or recipe.adapter.quantized):
        raise ValueError(
            "An adapter needs a trained model; name one in init_from, or leave the adapter section out. Beside a "
            "backbone it needs adapter.frozen float32 or bfloat16."
        )
    return begin_model(recipe.codec, recipe.data, recipe.model, recipe.backbone, recipe.adapter)


def run_to_end(
    trainer: Trainer, directory: RunDirectory, processor: UniMMProcessor, adapter: AdapterConfig | None
) -> None:
    """Train from the last whole checkpoint, or from the start, and save model and processor.

    An adapter is saved by itself under `adapter/`, and merged under `model/`.

    Raises:
        ValueError: an adapter of weights that are spread over processes.
    """
    sharded = is_sharded(trainer)
    if trainer.is_fsdp_enabled:  # the codec does not learn, and is called by itself, so that it stays whole
        trainer.accelerator.state.fsdp_plugin.ignored_modules = r"model\.visual"
    checkpoint = last_whole_checkpoint(directory.checkpoints)
    if trainer.is_world_process_zero():
        directory.rewind(checkpoint_step(checkpoint) if checkpoint else 0)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        if isinstance(model, PeftModel):
            assert adapter is not None
            model.save_pretrained(directory.root / "adapter")
            model = merge_adapter(model, adapter, directory.root / "adapter")
        with atomic_directory(directory.model) as path:
            model.eval().save_pretrained(path, state_dict=state)
            processor.save_pretrained(path)
        last = [record for record in directory.metrics() if "loss" in record][-1]
        directory.finish(last)


def is_sharded(trainer: Trainer) -> bool:
    """Whether weights are spread over processes.

    Raises:
        ValueError: an adapter of spread weights, which could not be merged into them.
    """
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharded and isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel):
        raise ValueError("An adapter trains under DDP only; launch with recipes/accelerate/ddp.yaml.")
    return sharded


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of the Trainer that a kill did not cut short: it writes in place, its own state last."""
    for path in sorted(folder.glob("checkpoint-*"), key=checkpoint_step, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, json.JSONDecodeError):
            continue
        return path
    return None


def checkpoint_step(path: Path) -> int:
    return int(path.name.rsplit("-", 1)[1])


class StageRecipe(Protocol):
    """What the recipes of all stages on a trainer of transformers or TRL have."""

    @property
    def run(self) -> RunConfig: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def logging(self) -> LanguageLoggingConfig: ...
    @property
    def bf16(self) -> bool | None: ...
    @property
    def gradient_checkpointing(self) -> bool: ...


def shared_arguments(recipe: StageRecipe, directory: RunDirectory) -> dict[str, Any]:
    """What every stage tells its trainer; bf16 is autocast on CPUs and GPUs alike."""
    return {
        "output_dir": str(directory.checkpoints),
        "max_steps": recipe.optimizer.steps,
        "warmup_steps": recipe.optimizer.warmup,
        "lr_scheduler_type": recipe.optimizer.schedule,
        "max_grad_norm": recipe.optimizer.clip,
        "bf16": computes_in_bf16(recipe.bf16),
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "logging_steps": recipe.logging.every,
        "logging_nan_inf_filter": False,  # it would hide what RunCallback looks for
        "save_steps": recipe.logging.save_every,
        "save_total_limit": 2,
        "report_to": list(recipe.logging.report_to) or "none",
        "seed": recipe.run.seed,
        "remove_unused_columns": False,
        "use_cpu": ON_CPU,
    }


def training_arguments(recipe: LanguageRecipe, directory: RunDirectory) -> TrainingArguments:
    """The Trainer's arguments.

    Raises:
        ValueError: a batch that the processes cannot share evenly.
    """
    micro_batch, accumulation = share_batch(
        recipe.batch_size, recipe.micro_batch, PartialState(cpu=ON_CPU).num_processes
    )
    return TrainingArguments(
        **shared_arguments(recipe, directory),
        torch_compile=recipe.compile,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        average_tokens_across_devices=False,  # the trainer counts targets by their weights itself
        dataloader_num_workers=1,
        dataloader_prefetch_factor=4,
    )


def share_batch(batch_size: int, micro_batch: int | None, world_size: int) -> tuple[int, int]:
    """Items per forward pass and process, and forward passes per step.

    Raises:
        ValueError: a batch that does not divide.
    """
    share, rest = divmod(batch_size, world_size)
    micro = share if micro_batch is None else micro_batch
    if rest or not share or micro < 1 or share % micro:
        raise ValueError(
            f"batch_size is {batch_size} and micro_batch {micro_batch}; {world_size} processes share a batch, each in "
            "equal micro-batches. Choose a batch_size that is a multiple of processes times micro_batch."
        )
    return micro, share // micro
