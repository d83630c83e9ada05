"""Codes, strict configuration and atomic files."""

import errno
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unimm.codes import CodeSpec, VisualCodes
from unimm.config import from_dict, load_config, to_dict
from unimm.files import atomic_directory, atomic_write


@dataclass(frozen=True)
class Inner:
    lr: float = 1e-3
    levels: tuple[int, ...] = (8, 8)


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    limit: int | None = None


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_codes_from_grid_keep_every_id(batch, rows, columns):
    ids = torch.arange(batch * rows * columns).view(batch, rows, columns, 1)
    codes = VisualCodes.from_grid(ids)
    assert codes.grid == [(rows, columns)] * batch
    assert codes.ids.flatten().equal(ids.flatten())
    assert codes.select(slice(0, 1)).lengths.tolist() == [rows * columns]


def test_codes_are_equal_where_all_their_numbers_are():
    def codes(first, **side_info):
        return VisualCodes(torch.tensor([[[first], [1]]]), torch.ones(1, 2, dtype=torch.bool), None, side_info)

    assert codes(0) == codes(0)
    assert codes(0) != codes(2)
    assert codes(0) != VisualCodes.from_grid(torch.tensor([[[[0], [1]]]]))  # has a grid
    assert codes(0, level=torch.ones(1)) == codes(0, level=torch.ones(1))
    assert codes(0, level=torch.ones(1)) not in (codes(0, level=torch.zeros(1)), codes(0), "codes")


def test_codes_outside_the_codebook_are_refused():
    codes = VisualCodes.from_grid(torch.full((1, 2, 2, 1), 64))
    with pytest.raises(ValueError, match="ids 0 to 63"):
        codes.validate(CodeSpec((64,), "grid", 4, 8))


def test_a_grid_that_does_not_hold_the_codes_is_refused():
    ids = torch.zeros(1, 4, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="2 x 3"):
        VisualCodes(ids, torch.ones(1, 4, dtype=torch.bool), [(2, 3)])


def test_config_reads_overrides_and_round_trips(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: a\ninner: {lr: 2e-3, levels: [4, 4]}\n")
    config = load_config(Outer, path, ["inner.lr=1e-4", "limit=3"])
    assert config == Outer("a", Inner(1e-4, (4, 4)), 3)
    assert from_dict(Outer, to_dict(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\ninner: {learning_rate: 1}", "unknown key 'learning_rate'"),
        ("nam: a\ninner: {}", "Did you mean name"),
        ("inner: {}", "missing key 'name'"),
        ("name: a\ninner: {lr: fast}", "must be float"),
        ("- a", "must hold a YAML mapping"),
        ("name: [", "not valid YAML"),
    ],
)
def test_config_errors_name_the_key(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(Outer, path)


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write_half():
        with atomic_write(path) as temporary:
            temporary.write_text("ne")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with atomic_directory(target) as folder:
        (folder / "a").write_text("1")

    def write_half():
        with atomic_directory(target) as folder:
            (folder / "b").write_text("2")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_half()
    assert [path.name for path in target.iterdir()] == ["a"]
    assert list(tmp_path.iterdir()) == [target]
