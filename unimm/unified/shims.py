"""Small modules beside a model's files, by which `from_pretrained(trust_remote_code=True)` finds the classes of unimm
where nobody has imported it.
"""

from __future__ import annotations

import json
from pathlib import Path

# One auto class per entry; `register_for_auto_class` would keep a single one.
AUTO_MAPS = {
    "config.json": {
        "AutoConfig": "configuration_unimm.UniMMConfig",
        "AutoModel": "modeling_unimm.UniMMModel",
        "AutoModelForCausalLM": "modeling_unimm.UniMMForConditionalGeneration",
        "AutoModelForImageTextToText": "modeling_unimm.UniMMForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_unimm.UniMMForConditionalGeneration",
    },
    "processor_config.json": {"AutoProcessor": "processing_unimm.UniMMProcessor"},
}
MODULES = {
    "configuration_unimm.py": "from unimm.unified.configuration import UniMMConfig  # noqa: F401\n",
    "modeling_unimm.py": "from unimm.unified.modeling import UniMMForConditionalGeneration, UniMMModel  # noqa: F401\n",
    "processing_unimm.py": "from unimm.sequence.processing import UniMMProcessor  # noqa: F401\n",
}


def write_shims(folder: Path) -> None:
    """Make a saved model, with its processor, one that loads with or without an earlier `import unimm`."""
    for name, auto_map in AUTO_MAPS.items():
        settings = json.loads((folder / name).read_text(encoding="utf-8")) | {"auto_map": auto_map}
        (folder / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for name, text in MODULES.items():
        (folder / name).write_text(text, encoding="utf-8")
