"""unimm: one causal language model that reads and draws.

Importing it makes the Auto classes of transformers load its models, codecs and processors, and imports neither them nor
torch: both wait until somebody asks for one.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unimm.codec import VisualCodecConfig, VisualCodecImageProcessor, VisualCodecModel
    from unimm.codes import CodeSpec, VisualCodes
    from unimm.pipelines import load
    from unimm.sequence import ImagePart, TextPart, UniMMProcessor
    from unimm.unified import UniMMConfig, UniMMForConditionalGeneration

__version__ = "0.1.0"
__all__ = [
    "CodeSpec",
    "ImagePart",
    "TextPart",
    "UniMMConfig",
    "UniMMForConditionalGeneration",
    "UniMMProcessor",
    "VisualCodecConfig",
    "VisualCodecImageProcessor",
    "VisualCodecModel",
    "VisualCodes",
    "load",
]

_ROOMS = {
    "codec": ("VisualCodecConfig", "VisualCodecImageProcessor", "VisualCodecModel"),
    "codes": ("CodeSpec", "VisualCodes"),
    "pipelines": ("load",),
    "sequence": ("ImagePart", "TextPart", "UniMMProcessor"),
    "unified": ("UniMMConfig", "UniMMForConditionalGeneration"),
}
_ROOM = {name: room for room, names in _ROOMS.items() for name in names}
_CONFIGS = {"unimm": "UniMMConfig", "unimm_codec": "VisualCodecConfig"}  # by model type
_AUTO = "transformers.models.auto."
_CONFIGURATION, _IMAGES, _PROCESSING = (
    _AUTO + name for name in ("configuration_auto", "image_processing_auto", "processing_auto")
)


def __getattr__(name: str) -> Any:
    if name not in _ROOM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _register()
    return getattr(importlib.import_module(f"{__name__}.{_ROOM[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _register() -> None:
    """Tell the Auto classes of everything: what importing this room does."""
    importlib.import_module(f"{__name__}.unified")


def _announce(auto: str) -> None:
    """Tell one module of Auto classes, which was just executed, of ours.

    Configurations are announced by name, as transformers announces its own: the class is taken from here when a
    checkpoint asks for it, which registers the rest. Processors are looked up without a configuration, so that they
    are registered as soon as there is a register.
    """
    if auto == _CONFIGURATION:
        mapping = sys.modules[auto].CONFIG_MAPPING
        mapping._mapping.update(_CONFIGS)
        mapping._modules.update(dict.fromkeys(_CONFIGS, sys.modules[__name__]))
    elif auto == _PROCESSING or _PROCESSING not in sys.modules:  # the module of processors imports that of images
        _register()


class _AutoLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _announce(module.__name__)


class _AutoFinder(MetaPathFinder):
    """Finds the modules of Auto classes where they are, and announces ours once they are executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (_CONFIGURATION, _IMAGES, _PROCESSING):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None:
            return spec
        return spec_from_file_location(fullname, spec.origin, loader=_AutoLoader(fullname, spec.origin))


sys.meta_path.insert(0, _AutoFinder())
for _auto in (_CONFIGURATION, _IMAGES, _PROCESSING):
    if _auto in sys.modules:
        _announce(_auto)
