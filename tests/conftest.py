"Shapes in the signatures are checked while testing; GPU tests need a GPU; real photos are tried where they are."
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("maskrcnn_course", "beartype.beartype")

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco3"


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def photos():
    "The folder of real photos beside the checkout; where it is missing the test is skipped."
    if not PHOTOS.is_dir(): pytest.skip("the real photos (coco3) are not on this machine")
    return PHOTOS
