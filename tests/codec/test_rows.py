"""Rows of a codebook that batches move directly: where they start, and what several processes make of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rows_of_two import QUANTIZERS, moved
from safetensors.torch import load_file, save_file

from unimm.codec.quantizers import VQ, VQConfig

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def codebook(**options):
    return VQ(VQConfig(**{"size": 12, "dim": 4, "project": False, "normalize": False} | options), dim=4).train()


def clusters(number, size=40):
    """Vectors `[1, number * size, 4]` around `number` points far from each other and from zero, and these points."""
    generator = torch.Generator().manual_seed(3)
    points = torch.randn(number, 4, generator=generator) * 30 + 100
    return (points.repeat_interleave(size, dim=0) + torch.randn(number * size, 4, generator=generator) * 0.1)[
        None
    ], points


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}])
def test_rows_start_as_means_of_the_first_batch_and_only_once(options):
    cloud, points = clusters(6)
    torch.manual_seed(0)
    plain, started = codebook(**options), codebook(kmeans_steps=10, **options)
    assert len(plain(cloud).ids.unique()) == 1  # all vectors are far from all rows
    before = started.codebook.detach().clone()
    started.eval()(cloud)
    assert started.codebook.equal(before)
    started.train()(cloud)
    assert torch.cdist(points, started.codebook).amin(dim=1).median() < 0.1
    assert len(started(cloud).ids.unique()) == 12
    rows = started.codebook.detach().clone()
    again = codebook(kmeans_steps=10, **options)
    again.load_state_dict(started.state_dict())
    for quantizer in (started, again):  # a second start would be from other rows, in another order
        quantizer(cloud)
        assert torch.cdist(rows, quantizer.codebook).diag().max() < 1


def test_rows_that_a_batch_moves_are_moved_by_the_batches_of_all_processes(tmp_path):
    cloud, _ = clusters(6, size=4)
    save_file({"vectors": cloud}, tmp_path / "vectors.safetensors")
    files = [str(tmp_path / name) for name in ("vectors.safetensors", "rows.safetensors")]
    command = [*TORCHRUN, str(Path(__file__).with_name("rows_of_two.py")), *files]
    subprocess.run([sys.executable, *command], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    rows = load_file(files[1])
    for name in QUANTIZERS:
        assert rows[f"{name}.0"].equal(rows[f"{name}.1"])
    torch.testing.assert_close(rows["ema.0"], moved("ema", cloud.chunk(2, dim=1)), atol=1e-4, rtol=1e-5)
    assert torch.cdist(rows["started.0"], cloud[0]).amin(dim=1).max() < 40
