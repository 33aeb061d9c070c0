"Shapes in signatures are checked while testing; GPU tests need a GPU; real photos are tried where they are."
import os
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("maskrcnn_course", "beartype.beartype")

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # pytest -n 2: they share the cores
    threads = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that a test starts

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco3"
REHEARSAL = bool(os.environ.get("GPU_REHEARSAL"))  # the GPU's tests run on the CPU, to find typing errors


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available() and not REHEARSAL:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def gpu():
    "The device of a test that is marked gpu."
    if REHEARSAL: return "cpu"
    torch.backends.cudnn.allow_tf32 = False
    return "cuda"


@pytest.fixture
def photos():
    "The folder of real photos beside the checkout; where it is missing the test is skipped."
    if not PHOTOS.is_dir(): pytest.skip("the real photos (coco3) are not on this machine")
    return PHOTOS
