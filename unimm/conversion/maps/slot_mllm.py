"""Slot-MLLM: its queries, which compete for the features of a vision tower; tower, codes and drawing are no part."""

from __future__ import annotations

from unimm.codec import VisualCodecConfig
from unimm.conversion.maps.seed import BERT_BASE, qformer_renames
from unimm.conversion.upstream import Plan, Rename, Upstream, UpstreamConfig, first, under

FEATURES = 1408  # channels that the tower's features are mapped to
QUERY_COUNT = 32
SIDE = 16  # cells per side of a picture of 256 pixels
SLOT_LAYERS = (0, 2, 4, 6, 8, 10)
SLOTS = {"T": 1, "num_iterations": 3}
# Every attention has the parts of a competition, which only those to the picture use.
WITHOUT_EFFECT = (
    r"embeddings\.position_ids",
    r"encoder\.layer\.\d+\.attention\.self\.(?:gru|mlp|norm_slots|norm_mlp)\..*",
    r"encoder\.layer\.\d+\.(?:cross)?attention\.self\.(?:key|value)_proj\..*",
)


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of the slot Q-Former.

    Raises:
        ValueError: half of the queries as slots, several rounds of several iterations, or other layers that look at the
            picture than compete for it.
    """
    bert = {name: upstream.get(f"bert_config.{name}", value) for name, value in BERT_BASE.items()}
    depth, every, width = bert["num_hidden_layers"], bert["cross_attention_freq"], bert["hidden_size"]
    upstream.require({"slot_config.T": SLOTS["T"], "slot_config.use_half_slot": False})
    competing = list(upstream.literal("slot_attention_layers", [layer for layer in SLOT_LAYERS if layer < depth]))
    if competing != list(range(0, depth, every)):
        raise ValueError(
            f"Layers {competing} compete, and one in {every} of {depth} looks; only equal ones are converted."
        )
    tokens = upstream.get("bert_config.query_length", QUERY_COUNT)
    config = VisualCodecConfig(
        image_size=SIDE,
        encoder={"kind": "given", "latent_channels": upstream.get("bert_config.encoder_width", FEATURES)},
        resampler={
            "kind": "qformer",
            "tokens": tokens,
            "dim": width,
            "width": width,
            "depth": depth,
            "num_heads": bert["num_attention_heads"],
            "mlp_width": bert["intermediate_size"],
            "cross_every": every,
            "causal": True,
            "eps": bert["layer_norm_eps"],
            "project": False,
            "slot_iterations": upstream.get("slot_config.num_iterations", SLOTS["num_iterations"]),
        },
        quantizer={"kind": "continuous"},
        length={"kind": "any_sequence", "tokens": tokens},
        decoder={"kind": "features", "width": width, "blocks": 0},
    )
    renames = (
        Rename("query_tokens", "resampler.queries", first),
        *under("embeddings", "resampler", {"LayerNorm": "norm"}),
        *qformer_renames("encoder", "resampler"),
    )
    parts = {"query_tokens": "the queries, which upstream keeps beside the network"}
    return Plan(config, renames, WITHOUT_EFFECT, parts=parts)


QUERIES = Upstream(
    system="slot_qformer",
    repository="asdfasdf127/Slot-MLLM",
    licence="MIT, with files that derive from BLIP-2 and SEED",
    paper="arXiv 2505.17726",
    plan=plan,
    aliases=("slot_mllm",),
)
