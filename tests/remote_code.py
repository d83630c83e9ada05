"""A model's folder as somebody sees it who has never imported unimm."""

import subprocess
import sys

CLASSES = {
    "AutoConfig": "UniMMConfig",
    "AutoModelForMultimodalLM": "UniMMForConditionalGeneration",
    "AutoProcessor": "UniMMProcessor",
}
LOADS = """
import sys
import transformers
for auto in sys.argv[2:]:
    loaded = getattr(transformers, auto).from_pretrained(sys.argv[1], trust_remote_code=True)
    print(type(loaded).__name__)
"""


def check_loads_without_unimm(folder, home):
    """Every auto class finds its class, in a fresh process."""
    environment = {"HF_HOME": str(home), "PATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOADS, str(folder), *CLASSES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == list(CLASSES.values()), done.stderr
