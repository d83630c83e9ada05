"""`python -m unimm.cli` and `accelerate launch -m unimm.cli`."""

import sys

from unimm.cli.main import main

sys.exit(main())
