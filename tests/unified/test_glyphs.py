"""An embedding whose rows are pictures of their texts, and that never learns (Emergent Semantics)."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from unimm import UniMMForConditionalGeneration
from unimm.training.adapter import AdapterConfig, begin_adapter
from unimm.training.optimizer import OptimizerConfig, build_optimizer
from unimm.unified.glyphs import glyph_bits, glyph_rows, texts_of_tokens

TEXTS = ["O", "Q", "i", "red", "rad", "a longer text", "", " "]


def test_bits_are_the_ink_of_a_text_side_by_side():
    one, pair = glyph_bits("H").reshape(32, 32), glyph_bits("H.").reshape(32, 32)
    assert 0.05 < one.mean() < 0.6
    left, right = pair[:, :16], pair[:, 16:]
    assert left.sum() > 5 * right.sum() > 0
    assert (one[:, ::2] == left).mean() > 0.9
    assert not glyph_bits("").any()


def test_rows_lie_as_the_bits_of_their_texts_do():
    rows = glyph_rows(TEXTS, 64, 3.0)
    assert rows.shape == (8, 64)
    torch.testing.assert_close(rows.norm(dim=1), torch.full((8,), 3.0))
    assert len(rows.unique(dim=0)) == 8  # of the two without ink too
    unit = F.normalize(rows, dim=1)
    near = unit @ unit.T
    assert near[0, 1] > near[0, 2]  # O is more like Q than like i
    assert near[3, 4] > near[3, 5]
    bits = torch.stack([torch.from_numpy(glyph_bits(text)) for text in TEXTS]).float()
    plain = F.normalize(bits - bits.mean(dim=0), dim=1)
    assert torch.corrcoef(torch.stack([(plain @ plain.T).flatten(), near.flatten()]))[0, 1] > 0.9
    narrow = glyph_rows(TEXTS, 4, 1.0)
    assert narrow.shape == (8, 4)


@pytest.fixture
def begun(tiny, tokenizer):
    model = deepcopy(tiny[0])
    model.begin_glyph_rows(tokenizer)
    return model.train()


def step(model):
    """One step of every weight that learns, codes among the targets."""
    optimizer = build_optimizer(model, OptimizerConfig(steps=1, lr=1e-2))
    ids = torch.randint(8, model.config.vocabulary.image_token_end, (2, 12), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids).loss.backward()
    optimizer.step()


def test_rows_are_the_glyphs_and_no_step_moves_them(begun, tiny, tokenizer):
    offset = begun.config.vocabulary.image_token_offset
    norm = tiny[0].get_input_embeddings().weight[:offset].norm(dim=1).mean().item()
    texts = texts_of_tokens(tokenizer, offset)
    assert len(texts) == offset
    assert {" red", "<|pad|>"} <= {*texts}
    before = {name: weight.detach().clone() for name, weight in begun.named_parameters()}
    embedding = next(name for name in before if name.endswith("embed_tokens.weight"))
    torch.testing.assert_close(before[embedding][:offset], glyph_rows(texts, 32, norm))
    assert before[embedding][offset:].equal(tiny[0].get_input_embeddings().weight[offset:])
    step(begun)
    after = dict(begun.named_parameters())
    assert after[embedding].equal(before[embedding])
    assert not after["lm_head.weight"].equal(before["lm_head.weight"])
    plain = deepcopy(tiny[0]).train()
    step(plain)  # a model without them learns its rows
    assert not plain.get_input_embeddings().weight.equal(tiny[0].get_input_embeddings().weight)


def test_they_stay_frozen_after_a_reload_and_under_an_adapter(begun, tmp_path):
    begun.save_pretrained(tmp_path)
    again = UniMMForConditionalGeneration.from_pretrained(tmp_path)
    assert not again.get_input_embeddings().weight.requires_grad
    assert again.get_input_embeddings().weight.equal(begun.get_input_embeddings().weight)
    adapted = begin_adapter(again, AdapterConfig(rank=2, target_modules=("q_proj",)))
    learns = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert any("lm_head" in name for name in learns)
    assert not any("embed_tokens" in name for name in learns)
