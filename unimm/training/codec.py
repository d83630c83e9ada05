"""The codec stage: reconstruct rendered pictures through a few dozen codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import nn

from unimm.codec import VisualCodecConfig, VisualCodecImageProcessor, VisualCodecModel, socket_config
from unimm.codec.dual import TwoSidedDecoder
from unimm.codec.quantizers import VQ, VQConfig
from unimm.codes import VisualCodes
from unimm.data.pictures import to_pictures, to_pixel_values
from unimm.nn.scripted import Lpips
from unimm.scorers.reconstruction import psnr
from unimm.training.captions import CaptionFeatures, TextConfig, check_text
from unimm.training.continuing import Pivot, check_held, continued, continued_fields, hold
from unimm.training.contrast import CaptionEmbeddings, ContrastConfig, ContrastHead, text_tower
from unimm.training.heads import (
    AlignmentConfig,
    AlignmentHead,
    CodecWithHeads,
    check_alignment,
    check_branches,
    check_length,
    count_vectors,
    disentangling_loss,
)
from unimm.training.loop import ON_CPU, Critic, LoggingConfig, LoopConfig, run_loop
from unimm.training.objectives import (
    CellFeatures,
    CriticConfig,
    FeatureConfig,
    PerceptualConfig,
    PixelCritic,
    distillation_loss,
    patch_tower,
    perceptual_features,
    perceptual_loss,
    vision_tower,
)
from unimm.training.optimizer import OptimizerConfig
from unimm.training.painting import FrozenPainter, PaintingConfig, check_painting
from unimm.training.plots import contact_sheet, plot_usage
from unimm.training.pool import Pool, PoolConfig, prepare_pool
from unimm.training.relations import Relation, RelationConfig, check_relation
from unimm.training.run_directory import RunConfig, RunDirectory

SHEET_SIZE = 16
HELD_OUT = 96  # pictures per world, or of the source
WEIGHED = ("vq", "product")  # quantizers whose codebooks all see the vectors themselves
COUNTED, COUNT_BATCH = 2_000, 50  # pictures whose codes say which rows stay, and how many are encoded at once


@dataclass(frozen=True)
class CodecLossConfig:
    """Weights of squared error, absolute error, and absolute error of the differences between neighbouring pixels."""

    squared: float = 1.0
    absolute: float = 0.1
    edges: float = 0.1


@dataclass(frozen=True)
class LengthsConfig:
    """Numbers of codes that pictures are drawn from in training, so that few codes stand for a picture too (nested
    dropout, 1402.0915).

    Args:
        values: to choose from; empty for the codec's own number.
        chances: of each of them; empty for equal ones.
        by_picture: whether each picture has its own, which needs `length.filled`; else a batch has one.

    Raises:
        ValueError: not as many chances as values, or none above 0.
    """

    values: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()
    by_picture: bool = False

    def __post_init__(self) -> None:
        if self.chances and (len(self.chances) != len(self.values) or min(self.chances) < 0 or not any(self.chances)):
            raise ValueError(
                f"lengths.chances are {self.chances} for lengths.values {self.values}; give one of 0 or more for each."
            )
        if self.by_picture and not self.values:
            raise ValueError("lengths.by_picture chooses among lengths.values; name some.")

    def drawn(self, rng: np.random.Generator, batch: int) -> int | torch.Tensor | None:
        """A number, or int64 `[batch]`, or None for the codec's own."""
        if not self.values:
            return None
        chances = np.array(self.chances or [1.0] * len(self.values))
        picked = rng.choice(self.values, size=batch if self.by_picture else None, p=chances / chances.sum())
        return torch.from_numpy(picked) if self.by_picture else int(picked)


@dataclass(frozen=True)
class CodecRecipe:
    """A recipe with `task: codec`.

    Args:
        model: keys of `VisualCodecConfig`; `encoder.tower` may name a saved vision model, `vae` a saved autoencoder.
        perceptual: a frozen network whose features of the copy should be those of the picture.
        distill: a frozen model whose features the codec's own decoder of features rebuilds.
        align: frozen models whose features a head beside the codec reads from the codes, by a name for the log.
        disentangle: weight of the mean squared cosine between the branches of a product (FQGAN, 2411.16681).
        contrast: a frozen model of texts, whose embedding of a caption should be nearest to the codes of its picture.
        critic: a network that learns to tell copies from pictures.
        lengths: numbers of codes that pictures are drawn from.
        relation: a frozen model whose features say how the rows of the codebooks should lie to each other.
        text: a frozen model of texts, for a codec that reads or draws under the features of captions.
        painting: a frozen text-to-image model that codes of a decoder of kind `prompt` are words to.
        weigh_channels: number of pictures over which the channels of a quantizer with `channel_weights` are weighed
            before the first step; 0 leaves the weights as they are.
        begin: a saved codec that training goes on from, by folder or Hub name; `model` then says what is otherwise.
        held: sockets that stay as they begin.
        pivot: weight of the mean squared distance of an encoder that learns from what it begins as.
        bf16: whether to compute in it; None where the processor is fast in it.
        ema_decay: of a moving average of the weights, which is what is judged and saved; None for none.

    Raises:
        ValueError: a contrast with captions that nothing names.
    """

    task: str
    run: RunConfig
    data: PoolConfig
    optimizer: OptimizerConfig
    model: dict[str, Any] = field(default_factory=dict)
    loss: CodecLossConfig = field(default_factory=CodecLossConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    distill: FeatureConfig = field(default_factory=FeatureConfig)
    align: dict[str, AlignmentConfig] = field(default_factory=dict)
    disentangle: float = 0.0
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    lengths: LengthsConfig = field(default_factory=LengthsConfig)
    relation: RelationConfig = field(default_factory=RelationConfig)
    text: TextConfig = field(default_factory=TextConfig)
    painting: PaintingConfig = field(default_factory=PaintingConfig)
    weigh_channels: int = 0
    begin: str = ""
    held: tuple[str, ...] = ()
    pivot: float = 0.0
    bf16: bool | None = None
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        if self.contrast.model and not self.data.has_captions:
            raise ValueError(
                f"contrast.model is {self.contrast.model}, and the pictures of {self.data.source} come without "
                "captions; name their column in data.text."
            )


class CodecTask:
    """Reconstruction losses, and figures on held-out scenes."""

    def __init__(self, recipe: CodecRecipe, pool: Pool) -> None:
        self.recipe = recipe
        self.pool, self.texts, self.held_out_texts = pool.pictures, pool.captions, pool.held_out_captions
        self.codec = continued(recipe.begin, recipe.model).to(memory_format=torch.channels_last)
        size = self.codec.condition_size
        self.text = None if size is None else CaptionFeatures(recipe.text, size[0])
        if recipe.weigh_channels:
            weigh_channels(self.codec.eval(), self._encoded(recipe.weigh_channels))
        hold(self.codec, recipe.held)
        self.pivot = Pivot(self.codec) if recipe.pivot else None
        self.relation = Relation(recipe.relation, self.pool, recipe.run.seed) if recipe.relation.model else None
        side = self.codec.config.image_size
        self.held_out = {name: resized(pixels, side) for name, pixels in pool.held_out.items()}
        self.perceptual = perceptual_features(recipe.perceptual)
        self.distill = CellFeatures(recipe.distill) if recipe.distill.model else None
        self.painter = FrozenPainter(recipe.painting) if recipe.painting.model else None
        self.teachers = {f"align_{name}": CellFeatures(config) for name, config in recipe.align.items()}
        self.captions: CaptionEmbeddings | None = None
        if recipe.contrast.model:
            with PartialState(cpu=ON_CPU).local_main_process_first():
                path = RunDirectory(recipe.run).root / "captions.npy"
                self.captions = CaptionEmbeddings(recipe.contrast, pool.captions, path)
        self.model: nn.Module = CodecWithHeads(self.codec, self._heads())
        self.judge = PixelCritic(recipe.critic) if recipe.critic.weight else None
        self.critic: Critic | None = self.judge
        # A VAE takes longer to draw pixels than a flow to learn its latents.
        self.compares_pixels = self.codec.config.draws_pixels and (self.codec.vae is None or needs_pixels(recipe))
        self.weights = {
            "perceptual": recipe.perceptual.weight,
            "distill": recipe.distill.weight,
            "painting": recipe.painting.weight,
            "disentangle": recipe.disentangle,
            "contrast": recipe.contrast.weight,
            "pivot": recipe.pivot,
            "relation": recipe.relation.weight,
            **{f"align_{name}": config.weight for name, config in recipe.align.items()},
        }

    def _heads(self) -> dict[str, nn.Module]:
        """By the names of their losses."""
        heads: dict[str, nn.Module] = {}
        length = count_vectors(self.codec) if self.teachers else 0
        for (name, features), config in zip(self.teachers.items(), self.recipe.align.values(), strict=True):
            heads[name] = AlignmentHead(config, self.codec, length, features)
        if self.captions is not None:
            size = self.recipe.data.batch_size
            heads["contrast"] = ContrastHead(self.codec.dim, self.captions.width, batch_size=size)
        return heads

    def losses(self, model: nn.Module, step: int, rank: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.recipe.run.seed, step, rank])
        picked = np.sort(rng.integers(len(self.pool), size=self.recipe.data.batch_size))
        pixels = resized(to_pixel_values(self.pool[picked]), self.codec.config.image_size)
        pixels = pixels.to(self.codec.device, memory_format=torch.channels_last)
        length = self.recipe.lengths.drawn(rng, len(pixels))
        wanted = {name: features(pixels) for name, features in self.teachers.items()}
        if self.captions is not None:
            wanted["contrast"] = self.captions[picked].to(pixels.device)
        given = self.codec.from_shown(pixels)
        output, headed = model(
            given, length, wanted, self._condition([self.texts[number] for number in picked] if self.texts else [])
        )
        losses, drawn = {"loss": pixels.new_zeros(())}, pixels
        if self.compares_pixels:
            drawn = self.codec.to_shown(self.codec.pixels_of(output.reconstruction.float()))
            losses = reconstruction_losses(drawn, pixels, self.recipe.loss)
        named = {"quantizer": output.quantizer_loss}
        if output.velocity_loss is not None:
            named["velocity"] = output.velocity_loss
        if output.halting_loss is not None:
            named["halting"] = output.halting_loss
        if self.perceptual is not None:
            named["perceptual"] = perceptual_loss(self.perceptual, drawn, pixels)
        if self.distill is not None:
            named["distill"] = distillation_loss(self.distill, output.features, pixels)
        if self.painter is not None:
            named["painting"] = self.painter.loss(output.reconstruction, pixels)
        if self.recipe.disentangle:
            named["disentangle"] = disentangling_loss(output.vectors, len(self.codec.quantizer.sizes))
        if self.pivot is not None:
            named["pivot"] = self.pivot.loss(output.cells, given)
        if self.relation is not None:
            named["relation"] = self.relation.loss(self.codec)
        named |= headed
        total = losses["loss"]
        for name, loss in named.items():
            total = total + self.weights.get(name, 1.0) * loss
        if self.judge is not None:
            named["judged"] = self.judge.judgement(drawn, pixels, total, last_weight(self.codec.decoder), step)
            total = total + named["judged"]
        return losses | named | {"loss": total}

    def validate(self) -> dict[str, float]:
        self.codec.eval()
        figures, used = {}, []
        for name, pixels in self.held_out.items():
            codes, copies = self._copy(pixels, self.held_out_texts.get(name, []))
            if copies is not None:
                figures[f"psnr_{name}"] = float(psnr(copies, pixels).mean())
            if self.painter is not None:
                figures[f"painting_{name}"] = self.painter.figure(self.codec.decode(codes), pixels)
            used.append(codes.ids[codes.mask])
        hold(self.codec, self.recipe.held)
        spec = self.codec.spec_without_fingerprint
        if spec.sizes:
            figures["codes_used_in_validation"] = spec.share_used(torch.cat(used))
            plot_usage(torch.cat(used), spec.sizes, RunDirectory(self.recipe.run).plots / "codes.png")
        return figures

    def draw_sheet(self, path: Path) -> None:
        """Originals above their reconstructions, for every world; nothing of a codec that draws none."""
        self.codec.eval()
        each = SHEET_SIZE // len(self.held_out) + 1
        shown = torch.cat([pixels[:each] for pixels in self.held_out.values()])
        copies = self._copy(shown, [text for texts in self.held_out_texts.values() for text in texts[:each]])[1]
        hold(self.codec, self.recipe.held)
        if copies is not None:
            contact_sheet([*to_pictures(shown), *to_pictures(copies)], path, columns=len(shown))

    def save(self, path: Path) -> None:
        self.codec.eval()
        if "quantizer" not in self.recipe.held:
            retire_duplicates(self.codec, self._encoded(COUNTED))
        self.codec.to(memory_format=torch.contiguous_format).save_pretrained(path)
        VisualCodecImageProcessor.for_codec(self.codec.config).save_pretrained(path)

    def _condition(self, texts: Sequence[str]) -> torch.Tensor | None:
        """What a conditioned codec knows of pictures with these captions, `[B, L, D]`."""
        return None if self.text is None else self.text(texts)

    def _copy(self, pixels: torch.Tensor, texts: Sequence[str]) -> tuple[VisualCodes, torch.Tensor | None]:
        """Codes of shown pictures `[B, 3, H, W]`, and what is drawn of them, of the same shape, where anything is."""
        reading, drawing = self.codec.conditions(self._condition(texts))
        codes = self.codec.encode(self.codec.from_shown(pixels.to(self.codec.device)), condition=reading)
        draws = self.codec.config.draws_pixels
        return codes, self.codec.pictures(codes, condition=drawing).cpu() if draws else None

    @torch.no_grad()
    def _encoded(self, number: int) -> Iterator[VisualCodes]:
        """Codes of so many pictures to learn from, some at a time."""
        side, pictures = self.codec.config.image_size, self.pool[:number]
        for start in range(0, len(pictures), COUNT_BATCH):
            batch = slice(start, min(start + COUNT_BATCH, len(pictures)))
            shown = resized(to_pixel_values(pictures[batch]), side).to(self.codec.device)
            reading, _ = self.codec.conditions(self._condition(self.texts[batch]))
            yield self.codec.encode(self.codec.from_shown(shown), condition=reading)


def check_objectives(recipe: CodecRecipe, codec: VisualCodecConfig) -> None:
    """Raise `ValueError` where a codec cannot be trained towards what the recipe names, before anything is loaded."""
    grid = codec.grid(codec.image_size, codec.image_size)
    for length in recipe.lengths.values:
        codec.length_policy.arrange_learned(grid, length)
    if recipe.lengths.by_picture and not codec.length_policy.filled:
        raise ValueError("lengths.by_picture draws pictures of several lengths together; set length.filled: true.")
    check_held(recipe.held, recipe.pivot, codec)
    check_text(recipe.text, recipe.data.has_captions, codec)
    check_weighed(recipe, codec)
    if not codec.draws_pixels and needs_pixels(recipe):
        raise ValueError(
            "loss, perceptual and critic compare pixels, and this codec draws none; set loss.squared, loss.absolute "
            "and loss.edges to 0 and leave the others out."
        )
    if recipe.painting.model:
        check_painting(recipe.painting, codec)
    if recipe.relation.model:
        check_relation(recipe.relation, codec)
    if recipe.distill.model and not socket_config("decoder", codec.decoder).makes_features:
        raise ValueError("distill names a model, and this codec rebuilds no features; take a decoder of kind 'dual'.")
    for name, config in recipe.align.items():
        check_alignment(name, config, codec)
    if recipe.disentangle:
        check_branches(f"disentangle is {recipe.disentangle:g}", codec)
    if recipe.contrast.model:
        check_length("contrast", codec)
        text_tower(recipe.contrast.model)
    if recipe.perceptual.model:
        vision_tower(recipe.perceptual.model)
    if recipe.perceptual.lpips:
        Lpips(recipe.perceptual.lpips)
    for teacher in (recipe.distill, recipe.relation, *recipe.align.values()):
        if teacher.model:
            patch_tower(teacher.model)


def needs_pixels(recipe: CodecRecipe) -> bool:
    """Whether an objective looks at what is drawn."""
    seen = recipe.perceptual.model or recipe.perceptual.lpips or recipe.critic.weight
    return any(astuple(recipe.loss)) or bool(seen)


def check_weighed(recipe: CodecRecipe, codec: VisualCodecConfig) -> None:
    """Raise `ValueError` where channels should be weighed that have no weights, or would never be."""
    quantizer = socket_config("quantizer", codec.quantizer)
    asks = isinstance(quantizer, VQConfig) and quantizer.channel_weights
    weighs = asks and codec.quantizer["kind"] in WEIGHED
    if recipe.weigh_channels < 0 or ((asks or recipe.weigh_channels) and not weighs):
        raise ValueError(
            f"weigh_channels is {recipe.weigh_channels}, and the quantizer of kind {codec.quantizer['kind']!r} has no "
            f"weights to measure; take kind: {' or '.join(WEIGHED)} with channel_weights: true, or leave it out."
        )
    if weighs and not (recipe.weigh_channels or recipe.begin):
        raise ValueError("quantizer.channel_weights are to be measured; name a number of pictures in weigh_channels.")


def weigh_channels(codec: VisualCodecModel, batches: Iterator[VisualCodes]) -> None:
    """Weigh the channels of every codebook by the vectors that it is given while the codes are made."""
    books = [part for part in codec.quantizer.modules() if isinstance(part, VQ)]
    seen: list[list[torch.Tensor]] = [[] for _ in books]
    hooks = [
        book.register_forward_pre_hook(lambda _, inputs, vectors=vectors: vectors.append(inputs[0].flatten(0, 1)))
        for book, vectors in zip(books, seen, strict=True)
    ]
    for _ in batches:
        pass
    for book, hook, vectors in zip(books, hooks, seen, strict=True):
        hook.remove()
        book.weigh_channels(torch.cat(vectors))


def retire_duplicates(codec: VisualCodecModel, batches: Iterator[VisualCodes]) -> None:
    """Leave one of every group of rows that cannot be told apart: the one that occurs most in the codes."""
    books = [part for part in codec.quantizer.modules() if isinstance(part, VQ) and part.config.ema_decay is not None]
    if not books:
        return
    ids = torch.cat([codes.ids.flatten(0, 1) for codes in batches])
    for book, slot in zip(books, ids.unbind(dim=1), strict=True):
        book.retire_duplicates(torch.bincount(slot, minlength=book.config.size))


def resized(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Rendered pictures `[B, 3, H, W]` at the size of a codec."""
    if pixels.shape[2:] == (side, side):
        return pixels
    return F.interpolate(pixels, (side, side), mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)


def last_weight(decoder: nn.Module) -> torch.Tensor:
    """Of the layer that draws the pixels."""
    drawing = decoder.pixels if isinstance(decoder, TwoSidedDecoder) else decoder
    return [weight for weight in drawing.parameters() if weight.ndim > 1][-1]


def reconstruction_losses(
    reconstruction: torch.Tensor, pixel_values: torch.Tensor, weights: CodecLossConfig
) -> dict[str, torch.Tensor]:
    """Named losses and their weighted sum, of two `[B, 3, H, W]`."""
    error = reconstruction - pixel_values
    squared, absolute = error.square().mean(), error.abs().mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    loss = weights.squared * squared + weights.absolute * absolute + weights.edges * edges
    return {"loss": loss, "squared": squared, "absolute": absolute, "edges": edges}


def train_codec(recipe: CodecRecipe) -> RunDirectory:
    """Train a codec and save it, with its image processor, under `model/` of the run directory."""
    torch.manual_seed(recipe.run.seed)
    config = VisualCodecConfig(**continued_fields(recipe.begin, recipe.model))
    check_objectives(recipe, config)
    loop = LoopConfig(recipe.run, recipe.optimizer, recipe.logging, recipe.bf16, recipe.ema_decay)
    pool = prepare_pool(recipe.data, config, RunDirectory(recipe.run), seed=recipe.run.seed, held_out=HELD_OUT)
    return run_loop(CodecTask(recipe, pool), loop, recipe)
