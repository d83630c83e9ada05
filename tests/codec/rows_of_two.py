"""Rows that batches move directly, over two processes that see half of the vectors each.

torchrun --nproc-per-node 2 rows_of_two.py VECTORS RESULT
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from torch.distributed import all_gather, destroy_process_group, get_rank, init_process_group

from unimm.codec.quantizers import VQ, VQConfig

QUANTIZERS = {
    "ema": VQConfig(size=6, dim=4, project=False, normalize=False, ema_decay=0.5),
    "restarted": VQConfig(size=6, dim=4, project=False, normalize=False, ema_decay=0.5, restart_below=1e3),
    "reanchored": VQConfig(size=6, dim=4, project=False, normalize=False, reanchor=True),
    "started": VQConfig(size=6, dim=4, project=False, normalize=False, ema_decay=0.5, kmeans_steps=3),
}


def moved(name, halves):
    """The rows after two batches, those of one process or of the rank-th of two."""
    torch.manual_seed(0)
    quantizer = VQ(QUANTIZERS[name], dim=4).train()
    torch.manual_seed(1 + (get_rank() if len(halves) == 1 else 0))
    for _ in range(2):
        quantizer(torch.cat(halves, dim=1))
    return quantizer.codebook.detach()


if __name__ == "__main__":
    init_process_group("gloo")
    half = load_file(sys.argv[1])["vectors"].chunk(2, dim=1)[get_rank()]
    result = {}
    for name in QUANTIZERS:
        rows = moved(name, [half])
        both = [torch.empty_like(rows) for _ in range(2)]
        all_gather(both, rows.contiguous())
        result |= {f"{name}.{rank}": rows for rank, rows in enumerate(both)}
    if get_rank() == 0:
        save_file(result, sys.argv[2])
    destroy_process_group()
