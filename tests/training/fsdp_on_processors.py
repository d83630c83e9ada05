"""`unimm` in processes that accelerate takes for GPUs: on processors it spreads no weights, whatever it is told.

torchrun --nproc-per-node 2 fsdp_on_processors.py train RECIPE
"""

import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from unimm.cli.main import main

START = PartialState.__init__


def start(state, *args, **options):
    START(state, *args, **options)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = start
    sys.exit(main(sys.argv[1:]))
