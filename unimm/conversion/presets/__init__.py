"""Published tokenizers as data: upstream's configuration of each released size, which its map reads.

A file names the system in the registry, what stands in upstream's own configuration under `args`, and, where upstream
states it, the number of weights in millions. Paper, repository and licence are the system's; nothing is said twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unimm.codec import VisualCodecConfig
from unimm.codec.presets import names_in, read_preset
from unimm.conversion.registry import UPSTREAMS
from unimm.conversion.upstream import Upstream, UpstreamConfig


@dataclass(frozen=True)
class PublishedCodec:
    """A tokenizer at a size that was released.

    Args:
        upstream: the system that it belongs to.
        args: upstream's configuration.
        parameters: weights as upstream states them, in millions; None where it does not.
    """

    upstream: Upstream
    args: Mapping[str, Any]
    parameters: float | None = None

    @property
    def config(self) -> VisualCodecConfig:
        """The codec it becomes."""
        config = self.upstream.plan(UpstreamConfig(self.args)).config
        assert isinstance(config, VisualCodecConfig)
        return config


def published_names() -> list[str]:
    """Names of the published tokenizers, one for each released size."""
    return names_in(__name__)


def load_published(name: str) -> PublishedCodec:
    """A published tokenizer, without weights.

    Raises:
        ValueError: none of that name.
    """
    fields = read_preset(__name__, name)
    return PublishedCodec(upstream=UPSTREAMS[fields.pop("system")], **fields)
