"""What defines a published codec, checked on our own classes: oracles of other libraries, gradients, memory."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModel, GlmImageVisionConfig, GlmImageVQVAE, GlmImageVQVAEConfig
from transformers.models.glm_image.modeling_glm_image import GlmImageVisionModel

from unimm import VisualCodecConfig, VisualCodecModel
from unimm.codec.qformer import QFormerResampler, QFormerResamplerConfig
from unimm.codec.quantizers.vector import best_rows, nearest_rows
from unimm.conversion import convert
from unimm.conversion.convert import rename
from unimm.conversion.maps.seed import qformer_renames
from unimm.conversion.upstream import Plan, WeightFile, under
from unimm.conversion.weights import stored_tensors

GOLDEN = Path(__file__).parent.parent / "golden"
GIBIBYTE = 2**30
PYRAMID = {"channels": [32, 32, 32], "blocks": 1, "code_channels": 8, "middle_attention": False}


@torch.no_grad()
def test_transformers_own_glm_image_gives_x_omnis_codes_from_the_same_weights(tmp_path):
    source = GOLDEN / "xomni_tokenizer"
    codec = AutoModel.from_pretrained(convert("xomni_tokenizer", source, tmp_path / "codec").target).eval()
    weights = load_file(source / "weights.safetensors")
    patch, width = 16, 64
    tower = GlmImageVisionModel(
        GlmImageVisionConfig(
            depth=2, hidden_size=width, num_heads=4, intermediate_size=128, image_size=128, patch_size=patch
        )
    ).eval()
    vit = {name.removeprefix("vit."): tensor for name, tensor in weights.items() if name.startswith("vit.")}
    vit["embeddings.position_embedding.weight"] = vit.pop("pos_embed")[0]
    tower.load_state_dict({name: tensor for name, tensor in vit.items() if name in tower.state_dict()})
    quantizer = GlmImageVQVAE(GlmImageVQVAEConfig(embed_dim=16, num_embeddings=64, latent_channels=width)).eval()
    projector = {name.removeprefix("vqproj."): tensor for name, tensor in weights.items() if "post_conv" not in name}
    quantizer.load_state_dict({name: projector[name] for name in quantizer.state_dict()})
    for rows, columns in ((8, 8), (3, 7), (10, 4)):  # of the table, smaller, larger on one side
        generator = torch.Generator().manual_seed(rows)
        pixels = torch.rand(1, 3, rows * patch, columns * patch, generator=generator) * 2 - 1
        patches = F.unfold(pixels, patch, stride=patch)[0].T  # [rows * columns, 3 * patch * patch]
        features = tower(patches, torch.tensor([[1, rows, columns]])).last_hidden_state
        expected = quantizer.encode(features.T.unflatten(1, (rows, columns))[None]).image_tokens
        assert codec.encode(pixels).ids.flatten().equal(expected)


def slot_qformer(queries, *, causal, slot_iterations):
    """The layers of Slot-MLLM's fixture over its `[1, N, D]` queries, without the map to positions, which it lacks."""
    source = GOLDEN / "slot_qformer"
    sizes = json.loads((source / "config.json").read_text())["args"]["bert_config"]
    config = QFormerResamplerConfig(
        tokens=queries.shape[1],
        width=sizes["hidden_size"],
        depth=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        mlp_width=sizes["intermediate_size"],
        cross_every=sizes["cross_attention_freq"],
        causal=causal,
        slot_iterations=slot_iterations,
    )
    resampler = QFormerResampler(config, encoder_width=sizes["encoder_width"], decoder_width=config.dim)
    resampler.to_positions = torch.nn.Identity()
    rules = (*under("embeddings", "", {"LayerNorm": "norm"}), *qformer_renames("encoder", ""))
    rules = tuple(replace(rule, target=rule.target.removeprefix(".")) for rule in rules)
    pieces, _ = rename(Plan(VisualCodecConfig(), rules), stored_tensors(source, (WeightFile(),)))
    state = {name: torch.cat([piece.read() for piece in parts]) for name, parts in pieces.items()}
    slots = {name for name in state if ".cross.update." in name or ".cross.norm." in name or ".cross.mlp" in name}
    kept = state if slot_iterations else {name: state[name] for name in state.keys() - slots}
    resampler.load_state_dict(kept | {"queries": queries[0]})
    return resampler


@torch.no_grad()
@pytest.mark.parametrize(
    ("output", "queries", "options"),
    [
        ("slots", "query_tokens", {"causal": True, "slot_iterations": 3}),
        ("slots_short_causal", "query_tokens_short", {"causal": True, "slot_iterations": 3}),
        ("slots_short_bidirectional", "query_tokens_short", {"causal": False, "slot_iterations": 3}),
        ("plain_cross_attention", "query_tokens", {"causal": True, "slot_iterations": 0}),
    ],
)
def test_competing_queries_equal_slot_mllms(output, queries, options):
    expected = load_file(GOLDEN / "slot_qformer" / "io.safetensors")
    features = expected["encoder_hidden_states"].transpose(1, 2)[..., None]  # [B, C, cells, 1]
    hidden = slot_qformer(expected[queries], **options).sample(features)
    torch.testing.assert_close(hidden, expected[output], atol=1e-4, rtol=0)


def test_a_competing_query_moves_those_before_it():
    torch.manual_seed(0)
    config = QFormerResamplerConfig(tokens=6, dim=4, width=16, depth=1, num_heads=2, mlp_width=8, slot_iterations=2)
    resampler = QFormerResampler(config, encoder_width=8, decoder_width=4)
    features = torch.randn(2, 8, 3, 3)
    before = resampler.sample(features)
    before.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in resampler.parameters())
    with torch.no_grad():
        resampler.queries[5] = 1.0
    assert not torch.allclose(resampler.sample(features)[:, :5], before[:, :5])
    with pytest.raises(ValueError, match="slot_iterations is -1"):
        QFormerResamplerConfig(slot_iterations=-1)


def factorised(**decoder):
    """Two branches with a codebook each; the pixels are drawn from the second, features rebuilt from the first."""
    torch.manual_seed(0)
    features = {"dim": 8, "width": 16, "depth": 1, "num_heads": 2, "mlp_width": 24, "table_side": 4}
    return VisualCodecModel(
        VisualCodecConfig(
            image_size=16,
            encoder={
                "kind": "branches",
                **PYRAMID,
                "stem_channels": 32,
                "rows": 4,
                "columns": 4,
                "depth": 1,
                "num_heads": 2,
            },
            resampler={"kind": "grid", "dim": 16, "groups": 2, "norm": False, "project_back": False},
            quantizer={"kind": "product", "sizes": [8, 8], "dim": 8, "project": False},
            decoder={
                "kind": "dual",
                "pixel_dim": 8,
                "pixels_first": False,
                "pixels": PYRAMID,
                "features": features,
                **decoder,
            },
        )
    )


def test_each_objective_reaches_its_own_branch_and_no_other():
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for objective, own, other in (("features", 0, 1), ("reconstruction", 1, 0)):
        codec = factorised().train()
        for block in codec.encoder.branches[own].blocks:  # fresh residual branches begin at zero
            torch.nn.init.normal_(block.mlp.down.weight, std=0.1)
        getattr(codec(pixels), objective).square().mean().backward()
        reached = [weight.grad for weight in codec.encoder.branches[own].parameters()]
        assert all(grad is not None for grad in reached)
        assert sum(float(grad.abs().sum()) for grad in reached) > 0
        assert all(
            weight.grad is None or not weight.grad.any() for weight in codec.encoder.branches[other].parameters()
        )
        assert codec.encoder.trunk.stem.weight.grad.abs().sum() > 0


def test_a_search_in_chunks_is_the_search_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    vectors, rows = torch.randn(50, 6, generator=generator), torch.randn(33, 6, generator=generator)
    at_once = nearest_rows(vectors, rows), best_rows(vectors, rows)
    monkeypatch.setattr("unimm.codec.quantizers.vector.SEARCH_SCORES", 70)  # two vectors at a time
    assert nearest_rows(vectors, rows).equal(at_once[0])
    assert best_rows(vectors, rows).equal(at_once[1])
    assert at_once[0].equal(torch.cdist(vectors, rows).argmin(dim=1))


SEARCH = """
import resource, torch
from unimm.codec.quantizers.vector import nearest_rows
vectors, rows = torch.randn(4096, 8), torch.randn(2**18, 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nearest_rows(vectors, rows)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is counted in other units elsewhere")
def test_a_large_codebook_is_searched_within_a_gibibyte():
    done = subprocess.run([sys.executable, "-c", SEARCH], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < GIBIBYTE
