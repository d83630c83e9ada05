"""What a recipe takes before it is run: weights, tokens, arithmetic, memory and time, from its shapes alone.

Language models are built on the meta device, so nothing is downloaded or held. Models of earlier stages are read off
the recipes that lie beside this one, and a language model off the `config.json` there. Activations of language models
are estimated from the widths of their layers, time from the share of the GPU's peak that training reaches
(`UTILISATION`); neither was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from unimm.codec import VisualCodecConfig, VisualCodecModel
from unimm.config import read_yaml
from unimm.sequence import SpanShape, VisualVocabulary, shape_fields
from unimm.training.adapter import AdapterConfig, begin_adapter
from unimm.training.begin import BackboneConfig
from unimm.training.codec import CodecRecipe
from unimm.training.detokenizer import DetokenizerRecipe, begin_transformer
from unimm.training.dpo import DpoRecipe
from unimm.training.grpo import GrpoRecipe
from unimm.training.language import LanguageRecipe, share_batch
from unimm.training.recipe import read_recipe
from unimm.training.run_directory import RunDirectory
from unimm.unified import UniMMConfig, UniMMForConditionalGeneration
from unimm.unified.losses import CHUNK_TARGETS

UTILISATION = 0.4
WORDS = 48  # text tokens beside a picture, where the rows are not known yet
FROZEN_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "nf4": 0.55}  # the scales of nf4 included
MASTER_BYTES, ADAM_BYTES, COMPUTE_BYTES = 4, 8, 2
STRUCTURAL = (1, 2, 3, 0)  # any ids will do


@dataclass(frozen=True)
class Gpu:
    """Dense bfloat16 operations per second, bytes of memory, and bytes per second, from the maker's data sheet."""

    flops: float
    memory: float
    bandwidth: float


GPUS = {
    "rtx4090": Gpu(165e12, 24e9, 1.0e12),
    "a100": Gpu(312e12, 80e9, 2.0e12),
    "h100": Gpu(989e12, 80e9, 3.35e12),
    "h200": Gpu(989e12, 141e9, 4.8e12),
}


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU of one way to spread a model."""

    engine: str
    states: float
    activations: float

    @property
    def total(self) -> float:
        return self.states + self.activations


@dataclass(frozen=True)
class Work:
    """What a whole run does.

    Args:
        unit, units: what is counted, and how much of it the run sees.
        flops: operations.
        seconds: how long they take.
    """

    unit: str
    units: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a recipe takes.

    Args:
        total, trainable: weights.
        work: of the whole run.
        memory: per GPU, by engine.
    """

    recipe: str
    gpu: str
    world_size: int
    total: int
    trainable: int
    work: Work
    memory: tuple[Memory, ...]

    def to_text(self) -> str:
        """A short table."""
        lines = [
            f"recipe      {self.recipe}, {self.world_size} x {self.gpu}",
            f"weights     {self.total:,}, of which {self.trainable:,} are trained",
            f"{self.work.unit:<11} {self.work.units:.3g}",
            f"operations  {self.work.flops:.3g}",
            f"time        {self._time()} at {UTILISATION:.0%} of the peak",
        ]
        limit = GPUS[self.gpu].memory
        for way in self.memory:
            verdict = "fits" if way.total <= limit else f"does not fit into {limit / 1e9:.0f} GB"
            lines.append(
                f"{way.engine:<11} {way.total / 1e9:.1f} GB per GPU: {way.states / 1e9:.1f} of weights, gradients and "
                f"optimiser, {way.activations / 1e9:.1f} of activations; {verdict}"
            )
        return "\n".join(lines)

    def _time(self) -> str:
        for name, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
            if self.work.seconds >= 2 * size:
                return f"{self.work.seconds / size:.1f} {name}"
        return f"{self.work.seconds:.0f} seconds"


def plan(recipe_path: str | Path, overrides: Sequence[str] = (), *, world_size: int = 1, gpu: str = "h100") -> Plan:
    """The plan of a recipe on some GPUs.

    Raises:
        ValueError: an unknown GPU, a recipe that is wrong, or an earlier stage that is neither saved nor beside it.
    """
    if gpu not in GPUS or world_size < 1:
        raise ValueError(
            f"--gpu is {gpu!r} and --world-size {world_size}; name one of {', '.join(GPUS)}, and 1 or more."
        )
    recipe = read_recipe(recipe_path, overrides)
    folder = Path(recipe_path).parent
    name = str(recipe_path)
    if isinstance(recipe, CodecRecipe | DetokenizerRecipe):
        return _plan_visual(recipe, folder, name, world_size, gpu)
    if isinstance(recipe, GrpoRecipe):
        return _plan_grpo(recipe, folder, name, world_size, gpu)
    if isinstance(recipe, DpoRecipe):
        return _plan_dpo(recipe, folder, name, world_size, gpu)
    return _plan_language(recipe, folder, name, world_size, gpu)


@dataclass(frozen=True)
class _Shape:
    """What the arithmetic of a language model needs.

    Args:
        body: weights of the text model's linear layers.
        total, codec, trainable: weights in all, of the codec, and those that are trained.
        frozen_bytes: of a weight that is not trained.
    """

    config: UniMMConfig
    body: int
    total: int
    codec: int
    trainable: int
    frozen_bytes: float

    @property
    def picture_tokens(self) -> int:
        """Ids of the largest picture, with its opening and end."""
        return self.config.grammar.longest

    def forward_flops(self, tokens: float, context: float) -> float:
        """Of `tokens`, each of which attends to half of `context`, under the factored head."""
        text, vocabulary = self.config.text_config, self.config.vocabulary
        layers, queries = text.num_hidden_layers, text.num_attention_heads * _head_dim(text)
        pictures = self.picture_tokens / (self.picture_tokens + WORDS)
        rows = pictures * max(vocabulary.codebook_sizes) + (1 - pictures) * vocabulary.image_token_offset
        return tokens * (2 * self.body + 2 * context * layers * queries + 2 * rows * text.hidden_size)

    @property
    def training_factor(self) -> float:
        """Passes per forward pass: gradients of activations, and of weights where most of them are trained."""
        return 3.0 if self.trainable > self.total / 2 else 2.0 + self.trainable / self.total

    def states(self, world_size: int) -> dict[str, float]:
        """Bytes of weights, gradients and optimiser per GPU, by engine."""
        held = self.total - self.codec - self.trainable
        frozen = max(0, held) * self.frozen_bytes + self.codec * MASTER_BYTES
        weights, gradients, adam = (self.trainable * size for size in (MASTER_BYTES, MASTER_BYTES, ADAM_BYTES))
        copies = self.trainable * COMPUTE_BYTES  # what autocast keeps
        ways = {"ddp": frozen + weights + copies + gradients + adam}
        if self.trainable == self.total - self.codec and world_size > 1:
            ways["zero2"] = frozen + weights + copies + (gradients + adam) / world_size
            ways["fsdp2/zero3"] = frozen + (weights + copies + gradients + adam) / world_size
        return ways

    def activations(self, tokens: int, checkpointing: bool) -> float:
        """Bytes of one forward and backward pass over `tokens`, with attention that keeps no scores."""
        text = self.config.text_config
        queries = text.num_attention_heads * _head_dim(text)
        keys = 2 * text.num_key_value_heads * _head_dim(text)
        per_layer = COMPUTE_BYTES * tokens * (6 * text.hidden_size + 2 * (queries + keys) + 4 * text.intermediate_size)
        stored = COMPUTE_BYTES * tokens * text.hidden_size
        layers = text.num_hidden_layers
        body = layers * stored + per_layer if checkpointing else layers * per_layer
        logits = 3 * 4 * min(CHUNK_TARGETS, tokens) * self.config.vocabulary.image_token_offset
        return body + logits + 4 * tokens * text.hidden_size

    def plan(
        self, name: str, gpu: str, world_size: int, work: Work, activations: float, reference: float = 0.0
    ) -> Plan:
        """The plan of a run with this model; `reference` are bytes of a second one that is only read."""
        states = self.states(world_size)
        memory = tuple(Memory(engine, held + reference, activations) for engine, held in states.items())
        return Plan(name, gpu, world_size, self.total, self.trainable, work, memory)


def _plan_language(recipe: LanguageRecipe, folder: Path, name: str, world_size: int, gpu: str) -> Plan:
    shape = _shape(_model_config(recipe, folder), recipe.adapter)
    micro_batch, _ = share_batch(recipe.batch_size, recipe.micro_batch, world_size)
    item = recipe.pack_length or shape.picture_tokens + WORDS
    context = min(item, shape.picture_tokens + WORDS)  # packs are isolated
    tokens = float(recipe.optimizer.steps) * recipe.batch_size * item
    passes = shape.training_factor + recipe.gradient_checkpointing
    flops = shape.forward_flops(tokens, context) * passes
    activations = shape.activations(micro_batch * item, recipe.gradient_checkpointing)
    seconds = flops / (world_size * GPUS[gpu].flops * UTILISATION)
    return shape.plan(name, gpu, world_size, Work("tokens", tokens, flops, seconds), activations)


def _plan_grpo(recipe: GrpoRecipe, folder: Path, name: str, world_size: int, gpu: str) -> Plan:
    """Drawing reads all weights once per token, beside its arithmetic; scoring and the reference are forward passes."""
    shape = _shape(_saved_config(recipe.init_from, folder), recipe.adapter)
    rollout, steps = recipe.rollout, recipe.optimizer.steps
    drawings = rollout.prompts * rollout.group_size
    length = shape.picture_tokens + WORDS
    rounds = -(-steps // recipe.objective.updates)
    tokens = float(drawings) * world_size * length
    once = shape.forward_flops(tokens, length)
    scored = once * (1 + (recipe.objective.kl > 0)) * rounds
    learned = once * (shape.training_factor + recipe.gradient_checkpointing) * steps
    text = shape.config.text_config
    weight_bytes = COMPUTE_BYTES if recipe.bf16 else MASTER_BYTES
    reading = shape.picture_tokens * shape.body * weight_bytes / GPUS[gpu].bandwidth * rounds
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * _head_dim(text) * length * drawings * weight_bytes
    flops = once * rounds + scored + learned
    logits = 2 * MASTER_BYTES * rollout.micro_batch * shape.picture_tokens * shape.config.vocabulary.size
    learning = shape.activations(rollout.micro_batch * length, recipe.gradient_checkpointing) + logits
    activations = max(cache, learning)
    reference = 0.0
    if recipe.objective.kl > 0 and recipe.adapter is None:
        reference = shape.total * MASTER_BYTES
    seconds = flops / (world_size * GPUS[gpu].flops * UTILISATION) + reading
    work = Work("drawings", float(drawings) * world_size * rounds, flops, seconds)
    return shape.plan(name, gpu, world_size, work, activations, reference)


def _plan_dpo(recipe: DpoRecipe, folder: Path, name: str, world_size: int, gpu: str) -> Plan:
    """The pairs are drawn by the first process while the others wait; a pair is two drawings, each scored twice."""
    shape = _shape(_saved_config(recipe.init_from, folder), recipe.adapter)
    micro_batch, _ = share_batch(recipe.batch_size, recipe.micro_batch, world_size)
    length = shape.picture_tokens + WORDS
    pairs = float(recipe.optimizer.steps) * recipe.batch_size
    scored = shape.forward_flops(2 * pairs * length, length)
    learned = scored * (1 + shape.training_factor + recipe.gradient_checkpointing)
    groups = recipe.pairs
    drawn = shape.forward_flops(float(groups.prompts) * groups.group_size * length, length)
    batches = -(-groups.prompts // groups.prompts_at_once)
    weight_bytes = MASTER_BYTES if recipe.adapter is None else FROZEN_BYTES[recipe.adapter.frozen]
    reading = batches * shape.picture_tokens * shape.body * weight_bytes / GPUS[gpu].bandwidth
    logits = 2 * MASTER_BYTES * 2 * micro_batch * shape.picture_tokens * shape.config.vocabulary.size
    activations = shape.activations(2 * micro_batch * length, recipe.gradient_checkpointing) + logits
    reference = shape.total * MASTER_BYTES if recipe.adapter is None else 0
    peak = GPUS[gpu].flops * UTILISATION
    work = Work("pairs", pairs, drawn + learned, drawn / peak + reading + learned / (world_size * peak))
    return shape.plan(name, gpu, world_size, work, activations, reference)


def _plan_visual(recipe: CodecRecipe | DetokenizerRecipe, folder: Path, name: str, world_size: int, gpu: str) -> Plan:
    """Arithmetic and activations are counted on one picture, which does pass through a model of random weights."""
    inputs: tuple[torch.Tensor, ...]
    if isinstance(recipe, CodecRecipe):
        codec = VisualCodecModel(VisualCodecConfig(**recipe.model))
        model: nn.Module = codec
        frozen, inputs = 0, (_blank(codec),)
    else:
        codec = VisualCodecModel(_codec_config(recipe.codec, folder)).eval()
        model = begin_transformer(recipe, codec)
        noise, drop = torch.zeros(1), torch.zeros(1, dtype=torch.bool)
        frozen, inputs = _count(codec), (_blank(codec), noise, codec.encode(_blank(codec)).ids, drop)
    forward, kept = _measure(model, inputs)
    trainable = _count(model)
    pictures = float(recipe.optimizer.steps) * recipe.data.batch_size * world_size
    flops = 3 * forward * pictures
    states = trainable * (MASTER_BYTES + COMPUTE_BYTES + MASTER_BYTES + ADAM_BYTES) + frozen * MASTER_BYTES
    half = 1.0 if recipe.bf16 is False else COMPUTE_BYTES / MASTER_BYTES
    return Plan(
        recipe=name,
        gpu=gpu,
        world_size=world_size,
        total=trainable + frozen,
        trainable=trainable,
        work=Work("pictures", pictures, flops, flops / (world_size * GPUS[gpu].flops * UTILISATION)),
        memory=(Memory("ddp", states, kept * half * recipe.data.batch_size),),
    )


def _shape(config: UniMMConfig, adapter: AdapterConfig | None) -> _Shape:
    with torch.device("meta"):
        bare = UniMMForConditionalGeneration(config)
        layers = [layer for layer in bare.model.language_model.modules() if isinstance(layer, nn.Linear)]
        body, total = sum(layer.weight.numel() for layer in layers), _count(bare)
        codec = 0 if bare.visual is None else _count(bare.visual)
        model = bare if adapter is None else begin_adapter(bare, adapter)
    return _Shape(
        config=config,
        body=body,
        total=total,
        codec=codec,
        trainable=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        frozen_bytes=MASTER_BYTES if adapter is None else FROZEN_BYTES[adapter.frozen],
    )


def _model_config(recipe: LanguageRecipe, folder: Path) -> UniMMConfig:
    """Of the model that a recipe trains."""
    if recipe.init_from is not None:
        return _saved_config(recipe.init_from, folder)
    if recipe.codec is None:
        raise ValueError("The recipe names neither codec nor init_from; name the saved codec to begin a model with.")
    codec = _codec_config(recipe.codec, folder)
    before = after = 0
    if recipe.backbone is None:
        text = CONFIG_MAPPING[recipe.model.model_type](**recipe.model.options, vocab_size=recipe.model.vocab_size)
    else:
        text = _text_config(recipe.backbone, folder)
        before, after = recipe.backbone.vision_layers_before, recipe.backbone.vision_layers_after
    with torch.device("meta"):
        sizes = VisualCodecModel(codec).spec_without_fingerprint.sizes
    boi, eoi, image, pad = STRUCTURAL
    vocabulary = VisualVocabulary(text.vocab_size, sizes, boi, eoi, image, pad)
    fields = text.to_dict() | {"vocab_size": vocabulary.size, "tie_word_embeddings": False}
    fields["num_hidden_layers"] += before + after
    if types := fields.get("layer_types"):
        fields["layer_types"] = types[:1] * before + types + types[-1:] * after
    policy = codec.length_policy
    if policy.layout == "grid":
        shapes = [SpanShape(grid, (), grid[0] * grid[1], grid[0] * grid[1]) for grid in policy.grids()]
    else:
        shapes = [SpanShape(None, (), policy.min_length, policy.max_length)]
    return UniMMConfig(
        text_config=fields,
        codec_config=codec.to_dict(),
        image_token_offset=text.vocab_size,
        codebook_sizes=list(sizes),
        span_shapes=[shape_fields(shape) for shape in shapes],
        vision_layers_before=before,
        vision_layers_after=after,
        vision_norm=bool(before + after),
    )


def _saved_config(path: str, folder: Path) -> UniMMConfig:
    """Of a saved model, or of the recipe beside this one that will save it."""
    if (Path(path) / "config.json").is_file():
        config = UniMMConfig.from_pretrained(path)
        assert isinstance(config, UniMMConfig)
        return config
    recipe = _recipe_of(path, folder)
    if isinstance(recipe, LanguageRecipe):
        return _model_config(recipe, folder)
    return _saved_config(recipe.init_from, folder)


def _codec_config(path: str, folder: Path) -> VisualCodecConfig:
    """Of a saved codec, or of the recipe beside this one that will save it."""
    if (Path(path) / "config.json").is_file():
        config = VisualCodecConfig.from_pretrained(path)
        assert isinstance(config, VisualCodecConfig)
        return config
    return VisualCodecConfig(**_recipe_of(path, folder).model)


def _recipe_of(path: str, folder: Path) -> Any:
    """The recipe in `folder` whose run saves the model `path`.

    Raises:
        ValueError: there is none.
    """
    for file in sorted(folder.glob("*.yaml")):
        recipe = read_recipe(file) if "task" in read_yaml(file) else None
        if recipe is not None and RunDirectory(recipe.run).model == Path(path):
            return recipe
    raise ValueError(
        f"{path} is not saved yet, and no recipe in {folder} makes it; run the stage before this one first."
    )


def _text_config(backbone: BackboneConfig, folder: Path) -> PreTrainedConfig:
    """Sizes of a language model: `config.json` beside the recipe, so that a plan needs no network, or its own."""
    beside = folder / "config.json"
    return AutoConfig.from_pretrained(str(beside if beside.is_file() else backbone.llm))


def _measure(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Operations of one forward pass, and bytes that it keeps for the backward pass."""
    weights = {weight.data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        model(*inputs)
    return float(counter.get_total_flops()), float(sum(kept.values()))


def _blank(codec: VisualCodecModel) -> torch.Tensor:
    """One grey picture `[1, 3, H, W]`."""
    side = codec.config.image_size
    return torch.zeros(1, 3, side, side)


def _count(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def _head_dim(text: PreTrainedConfig) -> int:
    """Width of an attention head, which older configurations leave to be divided out."""
    fields = text.to_dict()
    return fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
