"""The comparison of the trainer with a bare loop runs and counts; its figures are for reports."""

import pytest

from unimm import UniMMForConditionalGeneration
from unimm.config import from_dict
from unimm.data.rows import write_rows
from unimm.training.language import LanguageRecipe
from unimm.training.throughput import measure_throughput


@pytest.mark.parametrize("pack_length", [None, 512])
def test_both_loops_are_measured_on_the_same_batches(worlds_folder, tmp_path, pack_length):
    codec = UniMMForConditionalGeneration.from_pretrained(worlds_folder).codec
    write_rows(codec, {"shapes": 1.0}, num_rows=4, seed=0, folder=tmp_path / "rows")
    data = {
        "task": "sft",
        "run": {"name": "run", "directory": str(tmp_path)},
        "init_from": str(worlds_folder),
        "data": {"worlds": {"shapes": 1.0}, "folder": str(tmp_path / "rows"), "num_rows": 4},
        "batch_size": 2,
        "pack_length": pack_length,
        "optimizer": {"steps": 9, "warmup": 1},
        "bf16": False,
    }
    found = measure_throughput(from_dict(LanguageRecipe, data), rounds=2, steps=3)
    assert found.steps == 6
    assert min(found.trainer, found.loop, found.ratio) > 0
    with pytest.raises(ValueError, match="without adapter"):
        measure_throughput(from_dict(LanguageRecipe, data | {"adapter": {"rank": 2}}))
