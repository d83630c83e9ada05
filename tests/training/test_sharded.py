"""A model whose weights lie in pieces in two processes draws and learns what the whole one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sharded_step import draw_and_learn

from unimm import UniMMForConditionalGeneration

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow
def test_a_spread_model_draws_and_learns_as_the_whole_one(worlds_folder, tmp_path):
    model = UniMMForConditionalGeneration.from_pretrained(worlds_folder)
    vocabulary = model.config.vocabulary
    torch.manual_seed(0)
    ids = torch.randint(20, vocabulary.image_token_offset, (4, 12))
    ids[:, 3:7] = vocabulary.blocks[0].start + torch.randint(0, vocabulary.codebook_sizes[0], (4, 4))
    batch = {"input_ids": ids, "prompt": ids[:2, :3].contiguous()}
    save_file(batch, tmp_path / "batch.safetensors")
    script, result = Path(__file__).with_name("sharded_step.py"), tmp_path / "result.safetensors"
    command = [
        sys.executable,
        *TORCHRUN,
        str(script),
        str(worlds_folder),
        str(tmp_path / "batch.safetensors"),
        str(result),
    ]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    spread = load_file(result)
    drawn = draw_and_learn(model, batch, slice(None))
    assert spread.pop("drawn").equal(drawn)
    weights = model.state_dict()
    assert spread
    for name, weight in spread.items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-6)
