"""SEED's tokenizer: causal queries over an EVA-CLIP tower, and a decoder to the image embedding of unCLIP."""

from __future__ import annotations

from unimm.codec import VisualCodecConfig
from unimm.conversion.maps.eva import CLIP_MEAN, CLIP_STD, EVA_G, tower_options, tower_renames
from unimm.conversion.maps.pyramids import CODEBOOK
from unimm.conversion.upstream import LEAVES, Plan, Rename, Upstream, UpstreamConfig, first, under

BERT_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "cross_attention_freq": 2,
    "layer_norm_eps": 1e-12,
}
CAUSAL_QUERIES = 32  # upstream masks its queries when it has this many, and lets any other number see each other
DECODER_HEADS = 12
DECODER_EPS = 1e-6
FINAL_EPS = 1e-5  # of the norm between tower and queries
NARROWING = (256, 128, 32)
DECODER_PARTS = {
    "norm1": "attention_norm",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "norm2": "mlp_norm",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}
# A second objective of training, and BERT's text side.
WITHOUT_EFFECT = (
    r"pos_embed",
    r"blocks\..*",
    r"Qformer\.bert\.embeddings\.(?:position_ids|(?:word|position)_embeddings\..*)",
    r"Qformer\.bert\.encoder\.layer\.\d+\.(?:intermediate|output)\..*",
    r"Qformer\.cls\..*",
)


def qformer_renames(source: str, target: str) -> tuple[Rename, ...]:
    """The layers of a BLIP-2 Q-Former, whose query, key and value are one map in self-attention here.

    Where queries compete for cells (Slot-MLLM), its cross-attention has parts of its own.
    """
    theirs, ours = source + r"\.layer\.(?P<index>\d+)", target + r".layers.\g<index>"
    fused = (
        Rename(rf"{theirs}\.attention\.self\.{name}\.{LEAVES}", rf"{ours}.attention.qkv.\g<leaf>", part=part)
        for part, name in enumerate(("query", "key", "value"))
    )
    names = {
        "attention.output.dense": "attention.out",
        "attention.output.LayerNorm": "attention_norm",
        "crossattention.self.query": "cross.query",
        "crossattention.self.key": "cross.key",
        "crossattention.self.value": "cross.value",
        "crossattention.self.norm_slots": "cross.norm",
        "crossattention.self.norm_mlp": "cross.mlp_norm",
        "crossattention.self.mlp.0": "cross.mlp.0",
        "crossattention.self.mlp.2": "cross.mlp.2",
        "crossattention.output.dense": "cross.out",
        "crossattention.output.LayerNorm": "cross_norm",
        "intermediate_query.dense": "mlp.up",
        "output_query.dense": "mlp.down",
        "output_query.LayerNorm": "mlp_norm",
    }
    unit = Rename(rf"{theirs}\.crossattention\.self\.gru\.(?P<part>\w+)", rf"{ours}.cross.update.\g<part>")
    return (*fused, unit, *under(theirs, ours, names))


def plan(upstream: UpstreamConfig) -> Plan:
    """The plan of `Blip2QformerQuantizer`."""
    size, tokens = upstream.get("img_size", 224), upstream.get("num_query_token", CAUSAL_QUERIES)
    tower = {**EVA_G, **upstream.field("vision_tower_args", {})}
    bert = {**BERT_BASE, **upstream.field("qformer_bert_config", {})}
    dim, side = upstream.get("codebook_embed_dim", 32), size // tower["patch_size"]
    config = VisualCodecConfig(
        image_size=size,
        pixel_mean=CLIP_MEAN,
        pixel_std=CLIP_STD,
        encoder={**tower_options(tower, size), "final_eps": FINAL_EPS, "keep_class_token": True},
        resampler={
            "kind": "qformer",
            "tokens": tokens,
            "dim": dim,
            "width": bert["hidden_size"],
            "depth": bert["num_hidden_layers"],
            "num_heads": bert["num_attention_heads"],
            "mlp_width": bert["intermediate_size"],
            "cross_every": bert["cross_attention_freq"],
            "causal": tokens == CAUSAL_QUERIES,
            "eps": bert["layer_norm_eps"],
        },
        quantizer={
            "kind": "vq",
            "size": upstream.get("n_embed", 8192),
            "dim": dim,
            "normalize": False,
            "project": False,
        },
        length={"kind": "sequence", "rows": side, "columns": side, "tokens": tokens},
        decoder={
            "kind": "embedding",
            "dim": dim,
            "tokens": tokens,
            "width": bert["hidden_size"],
            "depth": upstream.get("decode_depth", 4),
            "num_heads": DECODER_HEADS,
            "eps": DECODER_EPS,
            "narrowing": NARROWING,
            "out_dim": upstream.get("image_features_dim", 1024),
        },
    )
    renames = (
        *tower_renames("visual_encoder"),
        Rename(rf"ln_vision\.{LEAVES}", r"encoder.norm.\g<leaf>"),
        Rename("query_tokens", "resampler.queries", first),
        *under(r"Qformer\.bert\.embeddings", "resampler", {"LayerNorm": "norm"}),
        *qformer_renames(r"Qformer\.bert\.encoder", "resampler"),
        *under("encode_task_layer", "resampler.to_positions", {"0": "0", "2": "2"}),
        *CODEBOOK,
        *under("decode_task_layer", "decoder.embed", {"0": "0", "2": "2"}),
        Rename("pos_embed_image", "decoder.positions", first),
        *under(r"blocks_image\.(?P<index>\d+)", r"decoder.blocks.\g<index>", DECODER_PARTS),
        Rename(r"image_down\.(?P<index>\d+)\.weight", r"decoder.narrow.\g<index>.weight"),
        Rename(rf"distill_image_proj\.{LEAVES}", r"decoder.head.\g<leaf>"),
    )
    return Plan(config, renames, WITHOUT_EFFECT, stretch=True)


TOKENIZER = Upstream(
    system="seed_tokenizer",
    repository="AILab-CVC/SEED",
    licence="Apache-2.0 with a clause that limits use to research; the language models carry the LLaMA-2 licence",
    paper="arXiv 2307.08041, 2310.01218",
    plan=plan,
    restricted=True,
    aliases=("seed", "seed_2"),
)
