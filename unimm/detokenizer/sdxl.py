"""LaVIT's second detokenizer (2309.04669): what Stable Diffusion XL reads in the place of two prompts."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from unimm.nn.blocks import CrossAttention


class PooledCondition(ModelMixin, ConfigMixin):
    """Features of a picture as the states of two text encoders, side by side, and as the one vector of the second.

    Args:
        in_features: width of a feature.
        tokens: features of a picture.
        widths: of the two text encoders' states.
        pooled_width: of the vector.
        num_heads: of the attention that pools.
    """

    @register_to_config
    def __init__(
        self,
        in_features: int = 1408,
        tokens: int = 256,
        widths: tuple[int, int] = (768, 1280),
        pooled_width: int = 1280,
        num_heads: int = 16,
    ) -> None:
        super().__init__()
        self.first = nn.Linear(in_features, widths[0])
        self.second = nn.Linear(in_features, widths[1])
        self.positions = nn.Parameter(torch.zeros(tokens + 1, in_features))
        self.pool = CrossAttention(in_features, num_heads, context_width=in_features, out_width=pooled_width)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, tokens, in_features]` to states `[B, tokens, sum(widths)]` and vectors `[B, pooled_width]`.

        The vector is read by one query, the mean of the features, from that mean and all of them.
        """
        seen = torch.cat([features.mean(dim=1, keepdim=True), features], dim=1) + self.positions
        states = torch.cat([self.first(features), self.second(features)], dim=-1)
        return states, self.pool(seen[:, :1], seen)[:, 0]
