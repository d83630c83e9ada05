"""Rows of a codebook that come to lie to each other as the features of a frozen model do."""

import numpy as np
import pytest
import torch
from test_heads import BRANCHES, GRID, pixels, recipe_of
from towers import write_tower

from unimm.config import from_dict
from unimm.training.codec import CodecRecipe, CodecTask, train_codec
from unimm.training.pool import Pool
from unimm.training.relations import Relation, RelationConfig, relation_histogram


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return write_tower(tmp_path_factory.mktemp("tower"))


def shown():
    return ((pixels(4).permute(0, 2, 3, 1) + 1) * 127.5).byte().numpy()


def test_a_histogram_counts_cosines_of_pairs():
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])  # cosines 0, 1 and 0
    shares = relation_histogram(rows, 21)
    assert shares.sum() == pytest.approx(1)
    assert shares[10] == shares.max()  # of cosine 0
    assert shares[10] > 1.9 * shares[20] > 5 * shares[15]
    assert relation_histogram(rows * 5, 21).equal(shares)


def test_rows_that_lie_as_the_features_do_lose_nothing(tower):
    relation = Relation(RelationConfig(tower, clusters=12, pictures=4), shown(), 0)
    assert relation.wanted.equal(Relation(RelationConfig(tower, clusters=12, pictures=4), shown(), 0).wanted)
    torch.manual_seed(0)
    rows = torch.randn(12, 8, requires_grad=True)
    optimizer = torch.optim.Adam([rows], lr=0.05)
    curve = []
    for _ in range(120):
        loss = relation._divergence(rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    assert 0 <= curve[-1] < 0.1 * curve[0]


@pytest.mark.parametrize("model", [GRID, BRANCHES])
def test_a_recipe_moves_every_codebook(tower, tmp_path, model):
    relation = {"model": tower, "clusters": 8, "pictures": 4, "weight": 1.0}
    recipe = from_dict(CodecRecipe, recipe_of(tmp_path, "run", model, relation=relation))
    task = CodecTask(recipe, Pool(shown(), {}))
    task.losses(task.model, 0, 0)["relation"].backward()
    books = [weight for name, weight in task.codec.quantizer.named_parameters() if name.endswith("codebook")]
    assert len(books) == (2 if model is BRANCHES else 1)
    assert all(book.grad.any() for book in books)


def test_codecs_without_rows_that_learn_are_refused(tower, tmp_path):
    for quantizer in ({"kind": "fsq", "levels": [4, 4]}, {**GRID["quantizer"], "ema_decay": 0.9}):
        fields = recipe_of(tmp_path, "run", GRID | {"quantizer": quantizer}, relation={"model": tower})
        with pytest.raises(ValueError, match="no rows that learn by a gradient"):
            train_codec(from_dict(CodecRecipe, fields))
    with pytest.raises(ValueError, match="1 clusters"):
        RelationConfig(tower, clusters=1)
    assert not np.any([*tmp_path.iterdir()])
