"""The factored loss equals plain cross-entropy over each target's own rows, and never holds all logits."""

import pytest
import torch
import torch.nn.functional as F

from unimm.sequence import VisualVocabulary
from unimm.unified import factored_cross_entropy, losses

VOCABULARIES = {
    "one slot": VisualVocabulary(20, (12,), 1, 2, 3, 0),
    "two slots": VisualVocabulary(20, (12, 6), 1, 2, 3, 0),
    "specials after the codes": VisualVocabulary(20, (12,), 32, 33, 34, 0, num_special_rows=4),
}


def plain(hidden, weight, labels, vocabulary, image_weight, z_weight):
    """Per target, from all logits."""
    logits = (hidden[:, :-1] @ weight.T).flatten(0, 1)
    total, divisor = 0, 0
    for row, target in zip(logits, labels[:, 1:].flatten().tolist(), strict=True):
        for blocks, scale in (
            (vocabulary.text_blocks, 1.0),
            *(((block,), image_weight) for block in vocabulary.blocks),
        ):
            rows = [index for block in blocks for index in range(block.start, block.stop)]
            if target in rows:
                log_divisor = row[rows].logsumexp(0)
                total = total + scale * (log_divisor - row[target] + z_weight * log_divisor**2)
                divisor += scale
    return total / divisor


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize(("image_weight", "z_weight"), [(1.0, 0.0), (0.25, 1e-2)])
def test_loss_and_gradients_are_those_of_plain_cross_entropy(name, image_weight, z_weight, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_TARGETS", 5)
    vocabulary = VOCABULARIES[name]
    torch.manual_seed(0)
    hidden = torch.randn(2, 20, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocabulary.size, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, vocabulary.special_token_end, (2, 20))
    labels[0, 3:6] = -100
    mine = factored_cross_entropy(hidden, weight, labels, vocabulary, image_weight=image_weight, z_weight=z_weight)
    (3 * mine.loss).backward()
    gradients, hidden.grad, weight.grad = (hidden.grad, weight.grad), None, None
    theirs = plain(hidden, weight, labels, vocabulary, image_weight, z_weight)
    (3 * theirs).backward()
    assert float(mine.loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for one, other in zip(gradients, (hidden.grad, weight.grad), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_text_alone_is_stock_cross_entropy_and_a_frozen_head_gets_no_gradient():
    vocabulary = VOCABULARIES["one slot"]
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 9, 8, requires_grad=True), torch.randn(vocabulary.size, 8)
    labels = torch.randint(0, 20, (2, 9))
    mine = factored_cross_entropy(hidden, weight, labels, vocabulary)
    logits = hidden[:, :-1] @ weight[:20].T
    assert torch.allclose(mine.loss, F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()), atol=1e-6)
    mine.loss.backward()
    assert hidden.grad is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = factored_cross_entropy(hidden, weight.requires_grad_(), labels, vocabulary)
    half.loss.backward()
    assert weight.grad.dtype == torch.float32
    assert torch.allclose(half.loss, mine.loss, rtol=2e-2)


def test_labels_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"labels are \(1, 4\) for input of \(1, 5\)"):
        factored_cross_entropy(
            torch.zeros(1, 5, 8), torch.zeros(128, 8), torch.zeros(1, 4, dtype=torch.int64), VOCABULARIES["one slot"]
        )
