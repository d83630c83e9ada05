"""The language stages on transformers' Trainer: `pretrain` from nothing, `sft` on answers only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    CONFIG_MAPPING,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from unimm.codec import VisualCodecImageProcessor, VisualCodecModel
from unimm.data.conversations import TaskRates, converse
from unimm.data.pictures import to_pictures
from unimm.data.rows import read_rows, row_codes, row_texts, write_rows
from unimm.files import atomic_directory
from unimm.sequence import UniMMProcessor, train_text_tokenizer
from unimm.training.adapter import AdapterConfig, lora_config, merge_adapter
from unimm.training.loop import ON_CPU
from unimm.training.optimizer import OptimizerConfig, build_optimizer
from unimm.training.plots import contact_sheet, plot_metrics
from unimm.training.run_directory import RunConfig, RunDirectory
from unimm.unified import UniMMForConditionalGeneration, config_for

IGNORED_LABEL = -100
WORDS_PER_ANSWER = 64  # room beside one picture
TEXT_SAMPLES = 4_000  # rows whose words the text vocabulary is learned from
SAMPLE_PROMPTS = (
    "a red circle",
    "three blue stars",
    "a green heart above a pink square",
    "pizza",
    "dog",
    'the word "CAKE" in red',
)


@dataclass(frozen=True)
class RowsConfig:
    """Pre-tokenised pictures, written into `folder` where they are missing."""

    worlds: dict[str, float]
    folder: str = "runs/tiny-rows"
    num_rows: int = 60_000
    seed: int = 0


@dataclass(frozen=True)
class TextModelConfig:
    """A text model from nothing: an architecture of transformers, its sizes, and at most `vocab_size` text rows."""

    model_type: str = "qwen3"
    vocab_size: int = 2048
    max_length: int = 512
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplingConfig:
    """How the trained model samples unless told otherwise; saved in its generation config."""

    temperature: float = 1.0
    top_p: float = 1.0
    guidance_scale: float = 1.0


@dataclass(frozen=True)
class LanguageLoggingConfig:
    """Steps between log lines, between sample sheets, and between checkpoints."""

    every: int = 20
    sample_every: int = 500
    save_every: int = 500


@dataclass(frozen=True)
class LanguageRecipe:
    """A recipe with `task: pretrain` or `task: sft`.

    Args:
        codec: a saved codec (pretrain).
        model: the text model to begin (pretrain).
        init_from: a saved unified model to go on from (sft).
        adapter: train a low-rank adapter of the model in `init_from`; without this section all weights are trained.
        answers_only: learn the assistant's turns only.
        batch_size: conversations per step and process.
    """

    task: str
    run: RunConfig
    data: RowsConfig
    optimizer: OptimizerConfig
    batch_size: int = 64
    codec: str | None = None
    init_from: str | None = None
    adapter: AdapterConfig | None = None
    model: TextModelConfig = field(default_factory=TextModelConfig)
    tasks: TaskRates = field(default_factory=TaskRates)
    answers_only: bool = False
    image_loss_weight: float = 1.0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    logging: LanguageLoggingConfig = field(default_factory=LanguageLoggingConfig)
    bf16: bool = True


class ConversationDataset(torch.utils.data.Dataset):
    """Row and task of item i are pure functions of the seed and i, so that a resumed run goes on exactly."""

    def __init__(self, rows: Dataset, processor: UniMMProcessor, recipe: LanguageRecipe, length: int) -> None:
        self.rows, self.processor, self.recipe, self.length = rows, processor, recipe, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        rng = np.random.default_rng([self.recipe.run.seed, 1, index])
        row = self.rows[int(rng.integers(len(self.rows)))]
        messages = converse(row_texts(row), self.recipe.tasks, rng)
        encoded = self.processor.encode_messages(messages, [row_codes(row)], answers_only=self.recipe.answers_only)
        return {"input_ids": encoded.input_ids, "labels": encoded.labels}


@dataclass(frozen=True)
class PadRight:
    """Batches of unequal rows; causal attention needs no mask for padding on the right."""

    pad_token_id: int

    def __call__(self, items: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(item["input_ids"]) for item in items)
        ids = torch.full((len(items), length), self.pad_token_id)
        labels = torch.full((len(items), length), IGNORED_LABEL)
        for row, item in enumerate(items):
            ids[row, : len(item["input_ids"])] = torch.tensor(item["input_ids"])
            labels[row, : len(item["labels"])] = torch.tensor(item["labels"])
        return {"input_ids": ids, "labels": labels}


class LanguageTrainer(Trainer):
    """Takes its optimiser from the recipe, adds the two halves of the loss to the log, and reads its data in order: the
    dataset itself is the shuffle.
    """

    def __init__(self, *args: Any, optimizer_config: OptimizerConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer_config = optimizer_config
        self._halves: dict[str, list[torch.Tensor]] = {"text_loss": [], "image_loss": []}

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = build_optimizer(model or self.model, self.optimizer_config)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        for name, values in self._halves.items():
            values.append(outputs[name].detach())
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= {name: float(torch.stack(values).mean()) for name, values in self._halves.items() if values}
            self._halves = {name: [] for name in self._halves}
        super().log(logs, *args, **kwargs)


class RunCallback(TrainerCallback):
    """Writes metrics, plots and sample sheets into the run directory."""

    def __init__(self, directory: RunDirectory, processor: UniMMProcessor, sample_every: int) -> None:
        self.directory, self.processor, self.sample_every = directory, processor, sample_every

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            numbers = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
            if not abs(numbers["loss"]) < float("inf"):
                raise ValueError(
                    f"loss is not finite at step {state.global_step}; lower optimizer.lr or set bf16: false."
                )
            self.directory.log({"step": state.global_step, **numbers})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = state.global_step == state.max_steps
        if state.is_world_process_zero and (state.global_step % self.sample_every == 0 or last):
            draw_samples(kwargs["model"], self.processor, self.directory.samples / f"step-{state.global_step:08d}.png")
            plot_metrics(self.directory.metrics(), self.directory.plots / "metrics.png")


@torch.no_grad()
def draw_samples(model: UniMMForConditionalGeneration, processor: UniMMProcessor, path: Path) -> None:
    """A sheet of the fixed prompts, four drawings each."""
    training, state = model.training, torch.get_rng_state()
    model.eval()
    torch.manual_seed(0)
    messages = [[{"role": "user", "content": prompt}] for prompt in SAMPLE_PROMPTS for _ in range(4)]
    inputs = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    ).to(model.device)
    output = model.generate(**inputs, generation_mode="image")
    pixels = torch.cat([model.decode_image_tokens(row) for row in output])
    labels = [prompt for prompt in SAMPLE_PROMPTS for _ in range(4)]
    contact_sheet(to_pictures(pixels), path, columns=8, labels=labels)
    torch.set_rng_state(state)
    model.train(training)


def train_language(recipe: LanguageRecipe) -> RunDirectory:
    """Run a `pretrain` or `sft` recipe and save model and processor under `model/` of the run directory.

    Raises:
        ValueError: a recipe without the model or codec it needs, or rows of another codec.
    """
    set_seed(recipe.run.seed)
    directory = RunDirectory(recipe.run)
    directory.start(recipe)
    model, processor = load_model(recipe) if recipe.init_from else begin_model(recipe)
    model.config.image_loss_weight = recipe.image_loss_weight
    model.generation_config = generation_config(processor, recipe.sampling)
    rows = read_rows(Path(recipe.data.folder), model.codec)
    arguments = training_arguments(recipe, directory)
    length = recipe.optimizer.steps * recipe.batch_size * arguments.world_size
    adapted = model if recipe.adapter is None else get_peft_model(model, lora_config(model, recipe.adapter))
    trainer = LanguageTrainer(
        model=adapted,
        args=arguments,
        train_dataset=ConversationDataset(rows, processor, recipe, length),
        data_collator=PadRight(processor.vocabulary.pad_token_id),
        callbacks=[RunCallback(directory, processor, recipe.logging.sample_every)],
        optimizer_config=recipe.optimizer,
    )
    run_to_end(trainer, directory, processor)
    return directory


def run_to_end(trainer: Trainer, directory: RunDirectory, processor: UniMMProcessor) -> None:
    """Train from the last whole checkpoint, or from the start, and save model and processor.

    An adapter is saved by itself under `adapter/`, and merged under `model/`.
    """
    checkpoint = last_whole_checkpoint(directory.checkpoints)
    if checkpoint and trainer.is_world_process_zero():
        directory.rewind(checkpoint_step(checkpoint))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        if isinstance(model, PeftModel):
            model.save_pretrained(directory.root / "adapter")
        with atomic_directory(directory.model) as path:
            merge_adapter(model).eval().save_pretrained(path)
            processor.save_pretrained(path)
        last = [record for record in directory.metrics() if "loss" in record][-1]
        directory.finish(last)


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


def training_arguments(recipe: LanguageRecipe, directory: RunDirectory) -> TrainingArguments:
    """The Trainer's arguments; bf16 is autocast on CPUs and GPUs alike."""
    return TrainingArguments(
        output_dir=str(directory.checkpoints),
        max_steps=recipe.optimizer.steps,
        per_device_train_batch_size=recipe.batch_size,
        warmup_steps=recipe.optimizer.warmup,
        lr_scheduler_type="cosine",
        max_grad_norm=recipe.optimizer.clip,
        bf16=recipe.bf16,
        logging_steps=recipe.logging.every,
        logging_nan_inf_filter=False,  # it would hide what RunCallback looks for
        save_steps=recipe.logging.save_every,
        save_total_limit=2,
        report_to="none",
        seed=recipe.run.seed,
        remove_unused_columns=False,
        dataloader_num_workers=1,
        dataloader_prefetch_factor=4,
        use_cpu=ON_CPU,
    )


def begin_model(recipe: LanguageRecipe) -> tuple[UniMMForConditionalGeneration, UniMMProcessor]:
    """A text model from nothing around a trained codec, with a vocabulary learned from the rows' words."""
    if recipe.codec is None:
        raise ValueError("The recipe names neither codec nor init_from; name the saved codec to begin a model with.")
    if recipe.adapter is not None:
        raise ValueError("An adapter needs a trained model; name one in init_from, or leave the adapter section out.")
    codec = VisualCodecModel.from_pretrained(recipe.codec)
    data = recipe.data
    with PartialState(cpu=ON_CPU).local_main_process_first():
        write_rows(codec, data.worlds, num_rows=data.num_rows, seed=data.seed, folder=Path(data.folder))
    rows = read_rows(Path(data.folder), codec)
    tokenizer = train_text_tokenizer(
        texts_of(rows), vocab_size=recipe.model.vocab_size, max_length=recipe.model.max_length
    )
    processor = processor_for(tokenizer, codec)
    text_config = CONFIG_MAPPING[recipe.model.model_type](**recipe.model.options)
    model = UniMMForConditionalGeneration(config_for(text_config, codec, processor))
    model.model.visual = codec.eval().requires_grad_(False)
    model.begin_code_rows()
    return model, processor


def load_model(recipe: LanguageRecipe) -> tuple[UniMMForConditionalGeneration, UniMMProcessor]:
    """The saved model that the recipe goes on from."""
    assert recipe.init_from is not None
    model = UniMMForConditionalGeneration.from_pretrained(recipe.init_from, dtype=torch.float32)
    return model, UniMMProcessor.from_pretrained(recipe.init_from)


def processor_for(tokenizer: PreTrainedTokenizerBase, codec: VisualCodecModel) -> UniMMProcessor:
    """The processor of a text vocabulary and a codec."""
    return UniMMProcessor.from_tokenizer(
        tokenizer,
        VisualCodecImageProcessor.for_codec(codec.config),
        grids=codec.config.length_policy.grids(),
        codebook_sizes=codec.spec_without_fingerprint.sizes,
        downsample=codec.config.downsample,
    )


def generation_config(processor: UniMMProcessor, sampling: SamplingConfig) -> GenerationConfig:
    """Defaults of `generate` that are saved with the model."""
    return GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0,  # transformers would keep the 50 likeliest ids only
        guidance_scale=sampling.guidance_scale,
        max_new_tokens=processor.grammar.longest + WORDS_PER_ANSWER,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )


def texts_of(rows: Dataset) -> Iterator[str]:
    """Everything that is said about a sample of the rows, in the chat's phrasings."""
    rng = np.random.default_rng(0)
    for index in rng.permutation(len(rows))[:TEXT_SAMPLES].tolist():
        row = rows[index]
        texts = row_texts(row)
        yield from texts.captions
        for _ in range(2):
            for message in converse(texts, TaskRates(), rng):
                content = message["content"]
                parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
                yield from (part["text"] for part in parts if part["type"] == "text")
