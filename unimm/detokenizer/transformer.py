"""The denoiser: noisy pixels, a time and visual codes to a velocity.

A small diffusion transformer (DiT, 2212.09748) with one modulation shared by all blocks (2310.00426). Inside, it
predicts the clean picture, from which the velocity follows: pictures lie on far fewer dimensions than noise, so a
narrow network can carry them (2511.13720). That picture is a sketch, drawn from the codes alone by convolutions shaped
as a codec's decoder, plus what the transformer, which sees the sketch beside the noisy pixels, adds to it (regression
first, diffusion of what it misses second: 2309.15214). Patches overlap where they are read and are emitted with their
neighbours in view, or drawings would be torn along their borders.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from unimm.codec.decoders import ConvDecoder, ConvDecoderConfig
from unimm.nn.blocks import MLP, SelfAttention
from unimm.nn.conv import ChannelsToSpace
from unimm.nn.positions import sincos_2d

MIN_SIGMA = 0.05  # below this noise level the division by it is held, so that velocities stay bounded
TIME_CHANNELS = 128


class ModulatedBlock(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the time."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = SelfAttention(width, num_heads)
        self.mlp_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(width, mlp_ratio * width)
        self.modulation_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, hidden: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """Hidden `[B, N, D]` under modulation `[B, 6, D]`."""
        parts = (self.modulation_table + modulation).unsqueeze(2).unbind(dim=1)  # six of [B, 1, D]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        hidden = hidden + gate * self.attention(self.attention_norm(hidden) * (1 + scale) + shift)
        return hidden + mlp_gate * self.mlp(self.mlp_norm(hidden) * (1 + mlp_scale) + mlp_shift)


class CodesToImageTransformer2DModel(ModelMixin, ConfigMixin):
    """Velocity of noisy pictures, given the codes of the pictures they hide.

    Args:
        sample_size: side of the picture in pixels.
        patch_size: side of a patch; one patch is one position of the transformer.
        width, depth, num_heads, mlp_ratio: of the transformer.
        codebook_sizes: number of visual codes of each slot of a position.
        code_dim: width of the embeddings of a position's codes together, an equal part for each.
        code_grid: positions per side of the picture.
        sketch_channels, sketch_blocks: of the `ConvDecoder` that sketches the picture from its codes alone; its last
            unfold takes what its stages leave of a position's pixels.
        num_train_timesteps: the scheduler's; a timestep divided by it is the noise level sigma in [0, 1].

    Raises:
        ValueError: sizes that do not divide one another.
    """

    _no_split_modules = ["ModulatedBlock"]
    _repeated_blocks = ["ModulatedBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 8,
        width: int = 192,
        depth: int = 6,
        num_heads: int = 3,
        mlp_ratio: int = 3,
        codebook_sizes: tuple[int, ...] = (4096,),
        code_dim: int = 128,
        code_grid: int = 8,
        sketch_channels: tuple[int, ...] = (256, 128),
        sketch_blocks: int = 1,
        num_train_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        _check_sizes(sample_size, patch_size, width, num_heads, code_grid)
        sketch_patch = _sketch_patch(sample_size // code_grid, len(sketch_channels))
        self.rows = sample_size // patch_size
        margin = patch_size // 2  # a patch is read with half of its neighbours
        self.patches_in = nn.Conv2d(6, width, patch_size + 2 * margin, stride=patch_size, padding=margin)
        self.code_embeddings = nn.ModuleList(
            nn.Embedding(size, code_dim // len(codebook_sizes)) for size in codebook_sizes
        )
        self.codes_in = nn.Linear(code_dim, width * (self.rows // code_grid) ** 2)
        self.sketch_in = nn.Linear(code_dim, sketch_channels[0])
        self.sketch = ConvDecoder(ConvDecoderConfig(sketch_patch, tuple(sketch_channels), sketch_blocks))
        self.time_features = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(TIME_CHANNELS, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(ModulatedBlock(width, num_heads, mlp_ratio) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width)
        self.patches_out = ChannelsToSpace(width, 3, patch_size)
        nn.init.zeros_(self.patches_out.conv.weight)
        assert self.patches_out.conv.bias is not None
        nn.init.zeros_(self.patches_out.conv.bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        codes: torch.Tensor,
        drop_codes: torch.Tensor | None = None,
    ) -> Transformer2DModelOutput:
        """Velocity, noise minus picture, of the shape of the input.

        Args:
            hidden_states: noisy pixels `[B, 3, H, W]`.
            timestep: `[B]` in [0, num_train_timesteps].
            codes: int64 `[B, N, K]` in raster order.
            drop_codes: bool `[B]`, True where the picture must be drawn without its codes.
        """
        time = self.time_embedding(self.time_features(timestep).to(hidden_states.dtype))  # [B, D]
        modulation = self.modulation(nn.functional.silu(time)).unflatten(1, (6, -1))  # [B, 6, D]
        embedded = self.embed_codes(codes, drop_codes)
        sketch = self.sketch(self._to_grid(self.sketch_in(embedded)))  # [B, 3, H, W]
        patches = self.patches_in(torch.cat([hidden_states, sketch.to(hidden_states.dtype)], dim=1))
        patches = patches.flatten(2).transpose(1, 2)  # [B, rows * rows, D]
        positions = sincos_2d(self.rows, self.rows, patches.shape[-1], patches.device)
        hidden = patches + positions.to(patches.dtype) + self._spread(self.codes_in(embedded))
        for block in self.blocks:
            hidden = block(hidden, modulation)
        grid = self.norm_out(hidden).transpose(1, 2).unflatten(2, (self.rows, self.rows))  # [B, D, rows, rows]
        clean = sketch + self.patches_out(grid)
        sigma = (timestep.float() / self.config.num_train_timesteps).clamp(min=MIN_SIGMA).view(-1, 1, 1, 1)
        velocity = (hidden_states.float() - clean.float()) / sigma
        return Transformer2DModelOutput(sample=velocity.to(hidden_states.dtype))

    def embed_codes(self, codes: torch.Tensor, drop_codes: torch.Tensor | None) -> torch.Tensor:
        """Codes `[B, N, K]` to embeddings `[B, N, code_dim]`, zeros where dropped."""
        slots = zip(self.code_embeddings, codes.unbind(dim=-1), strict=True)
        embedded = torch.cat([embedding(slot) for embedding, slot in slots], dim=-1)  # [B, N, code_dim]
        if drop_codes is not None:
            embedded = embedded.masked_fill(drop_codes[:, None, None], 0)
        return embedded

    def _to_grid(self, positions: torch.Tensor) -> torch.Tensor:
        """`[B, N, D]` to `[B, D, side, side]`."""
        return positions.transpose(1, 2).unflatten(2, (self.config.code_grid, self.config.code_grid))

    def _spread(self, positions: torch.Tensor) -> torch.Tensor:
        """`[B, N, D * factor**2]` to the patches that each position stands for, `[B, rows * rows, D]`."""
        factor = self.rows // self.config.code_grid
        return nn.functional.pixel_shuffle(self._to_grid(positions), factor).flatten(2).transpose(1, 2)


def _check_sizes(sample_size: int, patch_size: int, width: int, num_heads: int, code_grid: int) -> None:
    if sample_size % patch_size or (sample_size // patch_size) % code_grid:
        raise ValueError(
            f"sample_size {sample_size}, patch_size {patch_size} and code_grid {code_grid} do not fit: the picture "
            "must be whole patches, and the patches of a side a multiple of code_grid. Choose another patch_size."
        )
    if width % num_heads or width % 4:
        raise ValueError(f"width is {width}; it must be a multiple of 4 and of num_heads, which is {num_heads}.")


def _sketch_patch(cell: int, stages: int) -> int:
    """Pixels per side of the sketch's last unfold, under `cell` pixels per side of a position."""
    factor = 2 ** (stages - 1)
    if cell % factor:
        raise ValueError(
            f"A position is {cell} pixels wide, and the {stages} stages of sketch_channels divide it by {factor}; "
            "name fewer of them."
        )
    return cell // factor
