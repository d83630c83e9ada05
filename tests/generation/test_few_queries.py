"""Attention of a few queries over a cache on a GPU."""

import pytest
import torch
from torch.nn import functional as F

from unimm.nn.few_queries import few_queries_attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "heads", "groups", "width", "head_width", "places", "filled"),
    [(2, 4, 7, 1, 128, 512, 264), (3, 2, 1, 4, 64, 256, 252), (1, 1, 2, 16, 32, 4352, 4000), (2, 2, 3, 1, 16, 256, 0)],
)
def test_it_equals_attention_under_a_mask(rows, heads, groups, width, head_width, places, filled, dtype):
    query = torch.randn(rows, groups * width, heads, head_width, device="cuda", dtype=dtype).transpose(1, 2)
    keys, values = torch.randn(2, rows, heads, places, head_width, device="cuda", dtype=dtype)
    seen = torch.rand(rows, 1, places, device="cuda") > 0.3
    seen[..., filled:] = True
    reached = torch.arange(places, device="cuda") <= filled + torch.arange(width, device="cuda")[:, None]
    mask = (seen & reached)[:, None].repeat(1, 1, groups, 1)
    scale = head_width**-0.5
    wanted = F.scaled_dot_product_attention(query.double(), keys.double(), values.double(), attn_mask=mask, scale=scale)
    found = few_queries_attention(query, keys, values, seen, torch.tensor([filled], device="cuda"), width, scale)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-5 if dtype == torch.float32 else 1e-2)
