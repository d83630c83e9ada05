"""Published weights to models of ours: a folder of upstream's config and safetensors in, a saved model out.

Names of keys, sizes and formulas of an upstream live in one map file each; nothing is unpickled and no upstream code
runs. Knows the codec and the unified model, never data or training.
"""

from unimm.conversion.convert import Report, convert
from unimm.conversion.registry import UPSTREAMS, find_upstream
from unimm.conversion.restore import restore

__all__ = ["UPSTREAMS", "Report", "convert", "find_upstream", "restore"]
