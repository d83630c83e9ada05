"""Any vision tower of transformers as an encoder: the hidden states of some of its layers, laid out as a grid.

The Auto classes are imported where they are used: their first import registers the codec, which this one is a part of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from unimm.codec.encoders import EncoderOptions

# Reads pictures as rows of flattened patches, of any shape (SigLIP 2 in its NaFlex form, 2502.14786).
FLATTENED = "siglip2_vision_model"
# Reads films as rows of flattened patches in blocks, of any shape, and merges each block in the end (2409.12191).
MERGING = "qwen2_vl_vision"
MERGING_SIDE = 16  # blocks of a side, where the tower itself has no size
STAGES = ("out_features", "out_indices", "stage_names")  # of a backbone, which follow from the number of layers


@dataclass(frozen=True)
class TowerEncoderConfig(EncoderOptions):
    """A vision model that reads squares of pixels: SigLIP 1 and 2, CLIP, DINOv2, DINOv3, ViT and others of their form,
    and that of Qwen2-VL, to which a picture is a film of equal frames.

    Args:
        tower: its configuration in transformers, `model_type` and fields.
        layers: whose hidden states are read, side by side, counted from 1; later ones than all of them are not built.
            0 reads what the tower gives, behind its last norm; of Qwen2-VL's, its merged blocks, and so 0 alone.
        learns: whether its weights are trained.
    """

    tower: dict[str, Any]
    layers: tuple[int, ...] = (0,)
    learns: bool = False

    def __post_init__(self) -> None:
        config = self.tower_config
        shown = {FLATTENED: "num_patches", MERGING: "spatial_merge_size"}.get(config.model_type, "image_size")
        sizes = (shown, "patch_size", "hidden_size", layers_name(config))
        if missing := [name for name in sizes if not isinstance(getattr(config, name, None), int)]:
            raise ValueError(
                f"tower is of model_type {config.model_type!r}, which has no {', '.join(missing)}; take a vision "
                "transformer over square patches."
            )
        count = getattr(config, layers_name(config))
        if not self.layers or not all(0 <= layer <= count for layer in self.layers):
            raise ValueError(f"layers are {self.layers}; the tower has layers 1 to {count}, and 0 is its output.")
        if config.model_type == MERGING and len(self.layers) > 1 and 0 in self.layers:
            raise ValueError(f"layers are {self.layers}; 0 has larger cells than the others here, and is read alone.")

    @cached_property
    def tower_config(self) -> PreTrainedConfig:
        """As transformers builds it."""
        from transformers import CONFIG_MAPPING

        model_type = self.tower.get("model_type")
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"tower.model_type is {model_type!r}; transformers knows no such model.")
        return CONFIG_MAPPING[model_type](**without_stages(self.tower))

    @property
    def side(self) -> int:
        """Of the square whose patches have a position each in the tower's own table, in pixels."""
        if self.tower_config.model_type == FLATTENED:
            return math.isqrt(self.tower_config.num_patches) * self.tower_config.patch_size
        if self.tower_config.model_type == MERGING:
            return MERGING_SIDE * self.tower_config.spatial_merge_size * self.tower_config.patch_size
        return self.tower_config.image_size

    @property
    def downsample(self) -> int:
        merges = self.tower_config.model_type == MERGING and self.layers == (0,)
        return self.tower_config.patch_size * (self.tower_config.spatial_merge_size if merges else 1)

    @property
    def width(self) -> int:
        inner = self.tower_config.model_type == MERGING and self.layers != (0,)
        return (self.tower_config.embed_dim if inner else self.tower_config.hidden_size) * len(self.layers)


def layers_name(config: PreTrainedConfig) -> str:
    """The field that counts a tower's layers; that of Qwen2-VL has no other name for it before transformers 5.23."""
    return "depth" if config.model_type == MERGING else "num_hidden_layers"


def without_stages(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a configuration that do not follow from others."""
    return {name: value for name, value in fields.items() if name not in STAGES}


class TowerEncoder(nn.Module):
    """Pixels `[B, 3, H, W]` to `[B, width, H / patch_size, W / patch_size]`; class and register tokens fall out.

    Of a tower that learns, only weights that the chosen states depend on are trained.
    """

    def __init__(self, config: TowerEncoderConfig) -> None:
        super().__init__()
        self.config = config
        built = config.tower_config
        if all(config.layers):
            built = type(built)(**without_stages(built.to_dict()) | {layers_name(built): max(config.layers)})
        self.tower = _unfilled(built)
        self._set_trained()

    def load(self, name: str | Path) -> None:
        """Take the weights of a saved model, by folder or Hub name.

        Raises:
            ValueError: it lacks some.
        """
        config, kind = self.tower.config, type(self.tower)
        self.tower, found = kind.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
        if missing := sorted(self._read_weights() & set(found["missing_keys"])):
            raise ValueError(f"{name} has no weights {missing[0]!r}; save its vision model alone and name that.")
        self._set_trained()

    def _set_trained(self) -> None:
        reached = self._read_weights() if self.config.learns else set()
        for name, weight in self.tower.named_parameters():
            weight.requires_grad_(name in reached)

    def _read_weights(self) -> set[str]:
        """Names of the weights that the chosen states depend on; heads that pool are not among them."""
        if self.config.tower_config.model_type == MERGING:  # which counts places, and so does not run without weights
            names = (name for name, _ in self.tower.named_parameters())
            return {name for name in names if self.config.layers == (0,) or not name.startswith("merger.")}
        with torch.enable_grad(), torch.device("meta"):
            probe = _unfilled(self.tower.config)
            self._states(probe, torch.zeros(1, 3, self.config.side, self.config.side)).sum().backward()
        return {name for name, weight in probe.named_parameters() if weight.grad is not None}

    def _states(self, tower: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.config.tower_config.model_type == MERGING:
            return merging_states(tower, pixel_values, self.config)
        given: dict[str, torch.Tensor | None] = {"pixel_values": pixel_values}
        if self.config.tower_config.model_type == FLATTENED:
            given = flattened(pixel_values, self.config.downsample)
        output = tower(**given, output_hidden_states=any(self.config.layers))
        states = [output.hidden_states[layer] if layer else output.last_hidden_state for layer in self.config.layers]
        return torch.cat(states, dim=2)

    def train(self, mode: bool = True) -> TowerEncoder:
        super().train(mode)
        if not self.config.learns:
            self.tower.eval()
        return self

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        rows, columns = (side // self.config.downsample for side in pixel_values.shape[2:])
        with torch.set_grad_enabled(self.config.learns and torch.is_grad_enabled()):
            states = self._states(self.tower, pixel_values)
        cells = states[:, states.shape[1] - rows * columns :]  # class and register tokens come first
        return cells.transpose(1, 2).unflatten(2, (rows, columns)).contiguous()


def flattened(pixel_values: torch.Tensor, patch: int) -> dict[str, torch.Tensor | None]:
    """What `Siglip2VisionModel` reads of pictures `[B, 3, H, W]` of one shape: patches with their channels last."""
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // patch, width // patch
    cells = pixel_values[:, :, : rows * patch, : columns * patch].view(batch, channels, rows, patch, columns, patch)
    return {
        "pixel_values": cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1),
        "pixel_attention_mask": None,  # all patches are there
        "spatial_shapes": torch.tensor([[rows, columns]] * batch, device="cpu"),  # read as numbers
    }


def merging_states(tower: nn.Module, pixel_values: torch.Tensor, config: TowerEncoderConfig) -> torch.Tensor:
    """States `[B, cells, width]` of Qwen2-VL's tower for pictures `[B, 3, H, W]` of one shape, row by row."""
    built, batch = config.tower_config, len(pixel_values)
    patch, block = built.patch_size, built.spatial_merge_size
    rows, columns = (side // (patch * block) for side in pixel_values.shape[2:])  # of blocks
    cells = pixel_values[:, :, : rows * block * patch, : columns * block * patch]
    cells = cells.reshape(batch, 3, rows, block, patch, columns, block, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
    frames = cells.unsqueeze(6).expand(*cells.shape[:6], built.temporal_patch_size, patch, patch)
    film = torch.tensor([[1, rows * block, columns * block]] * batch, device=pixel_values.device)
    output = tower(frames.reshape(batch * rows * columns * block**2, -1), film, output_hidden_states=True)
    if config.layers == (0,):
        return output.pooler_output.unflatten(0, (batch, -1))
    states = torch.cat([output.hidden_states[layer] for layer in config.layers], dim=1)
    in_blocks = states.view(batch, rows, columns, block, block, -1)
    return in_blocks.transpose(2, 3).reshape(batch, rows * block * columns * block, -1)


def _unfilled(config: PreTrainedConfig) -> PreTrainedModel:
    from transformers import AutoModel

    if config.model_type == MERGING:  # the Auto classes know it as a part of Qwen2-VL only
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

        return Qwen2VisionTransformerPretrainedModel(config)
    return AutoModel.from_config(config)


def vision_config(name: str | Path) -> PreTrainedConfig:
    """Of a saved vision model, by folder or Hub name; of a model of pictures and texts, that of the part that sees."""
    from transformers import AutoConfig

    whole = AutoConfig.from_pretrained(name)
    return getattr(whole, "vision_config", whole)


def channel_statistics(name: str | Path) -> tuple[list[float], list[float]]:
    """Mean and spread of each channel of pixels in [0, 1], as a saved vision model knows them.

    Raises:
        ValueError: there is no image processor, which says them.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except OSError as error:
        raise ValueError(
            f"{name} has no image processor, and it alone knows the range of the model's pixels; save one there."
        ) from error
    return list(processor.image_mean), list(processor.image_std)


def around_tower(name: str | Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a codec's configuration around a saved vision model: encoder, side and normalisation of its pictures.

    Args:
        name: folder or Hub name; of a model of pictures and texts, the part that sees is taken.
        fields: the others, and those that are to be otherwise; `encoder` may hold `layers` and `learns`.

    Raises:
        ValueError: a model of another form, or without an image processor.
    """
    tower = vision_config(name).to_dict()
    tower.pop("_name_or_path", None)  # where it lay is nobody's business
    side = TowerEncoderConfig(tower).side
    mean, std = channel_statistics(name)
    around = {"image_size": side, "pixel_mean": mean, "pixel_std": std}
    return around | fields | {"encoder": fields.get("encoder", {}) | {"kind": "tower", "tower": tower}}
