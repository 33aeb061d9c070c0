"""Mask R-CNN from the first box to COCO AP: the library that the course's notebooks export.

The names below can be imported from here; each module is loaded when one of its names is first asked for.
"""
from importlib import import_module

__version__ = "0.1.0"

_MODULE_OF = {
    "MaskRCNN": "mask_rcnn", "build_model": "presets", "load_model": "presets", "save_model": "presets",
    "train": "training", "evaluate": "evaluation", "predict": "prediction",
    "InstanceDataset": "data", "import_coco": "importers", "import_cis680": "importers",
    "import_mask_folder": "folders",
    "write_scenes": "scenes",
}
__all__ = list(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name):
    if name not in _MODULE_OF: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__(): return sorted({*globals(), *__all__})
