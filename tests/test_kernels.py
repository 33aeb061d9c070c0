"The Triton kernels against the plain versions: by the interpreter, on a GPU, and compiled for one."
import os
import subprocess
import sys

import pytest
import torch
import torchvision

from helpers import never_waits
from maskrcnn_course.boxes import nms_mask
from maskrcnn_course.kernels import nms_mask_by_kernel
from maskrcnn_course.roi_align import multiscale_roi_align

pytest.importorskip("triton")

NMS = """
import torch
from maskrcnn_course.boxes import nms_mask
from maskrcnn_course.kernels import _nms_of_rows
for n in (1, 2, 7, 40):
    for dtype in (torch.float32, torch.float64):
        for iou_threshold in (0., .5, 1.):
            corners = torch.randint(-9, 90, (5, n, 2))
            boxes = torch.cat([corners, corners + torch.randint(0, 60, (5, n, 2))], -1).to(dtype)
            scores = torch.rand(5, n, dtype=dtype).round(decimals=1)  # with ties: the first goes first
            valid = torch.rand(5, n) > .3
            valid[0], valid[1] = False, True
            keep = _nms_of_rows(boxes, scores, valid, iou_threshold)
            case = n, dtype, iou_threshold
            assert torch.equal(keep, nms_mask(boxes, scores, valid, iou_threshold)), case
            # padding never matters
            boxes[~valid], scores[~valid] = torch.tensor([0., 0, 90, 90], dtype=dtype), 2.
            assert torch.equal(keep, _nms_of_rows(boxes, scores, valid, iou_threshold)), case
"""

ROI_ALIGN = """
import torch
from test_kernels import problem, with_gradients
from maskrcnn_course.kernels import roi_align_by_kernel
from maskrcnn_course.roi_align import multiscale_roi_align
case = problem(4, "cpu")
for bins in (1, 3):
    by_kernel, plain = (with_gradients(f, *case, bins) for f in (roi_align_by_kernel, multiscale_roi_align))
    for a, b in zip(by_kernel, plain):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
"""


SIZE = 100, 160  # no multiple of 8: maps of 25, 13, 7 and 4 rows


def problem(n, device, channels=16, dtype=torch.float32):
    "Four maps of two images, and n boxes of all sizes, some of them over the edge."
    g = torch.Generator().manual_seed(n)
    maps = [torch.randn(2, channels, *(-(-side // s) for side in SIZE), generator=g) for s in (4, 8, 16, 32)]
    corner = torch.rand(n, 2, generator=g) * 120 - 20
    size = 2 ** (torch.rand(n, 2, generator=g) * 7)
    image = torch.randint(2, (n, 1), generator=g)
    rois = torch.cat([image, corner, corner + size], 1)
    return [m.to(device, dtype).requires_grad_() for m in maps], rois.to(device)


def with_gradients(align, maps, rois, bins=7):
    out = align(maps, rois, bins, SIZE, canonical_scale=60.)
    # rounded to 16 bits, so that it is the same in both precisions
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out)
    return out.detach(), *torch.autograd.grad(out, maps, upstream)


def interpreted(program):
    "Run a program in a process of its own, where Triton interprets: it asks when a kernel is made."
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", program], check=True, env=env)


@pytest.mark.parametrize("program", [NMS, ROI_ALIGN], ids=["nms", "roi_align"])
def test_the_interpreter_gives_the_same(program): interpreted(program)


def compiled(kernel, signature, constants):
    "The kernel's PTX code for a GPU that need not be there."
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    signature = signature | dict.fromkeys(constants, "constexpr")
    try: program = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    except RuntimeError as e:
        if "ptxas" not in str(e): raise
        pytest.skip(f"no compiler for it here: {e}")
    return program.asm["ptx"]


@pytest.fixture
def no_old_kernels(tmp_path, monkeypatch): monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("size, kind", [(32, "fp32"), (2048, "fp32"), (1024, "fp64")])
def test_the_kernel_of_nms_compiles_for_a_gpu(size, kind, no_old_kernels):
    from maskrcnn_course.kernels import _nms_kernel
    signature = dict(boxes=f"*{kind}", counts="*i64", keep="*i32", n="i32", iou_threshold="fp32")
    ptx = compiled(_nms_kernel(), signature, dict(SIZE=size))
    assert len(ptx) > 1000
    assert "div.full" not in ptx  # exact division, as torchvision's


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("backward", [False, True])
def test_the_kernel_of_roi_align_compiles_for_a_gpu(kind, backward, no_old_kernels):
    from maskrcnn_course.kernels import _align_kernel
    if backward and kind == "bf16": pytest.skip("gradients are summed in 32 bits")
    maps = dict.fromkeys(("p0", "p1", "p2", "p3"), f"*{kind}")
    signature = maps | dict(about="*i32", rois="*fp32", out="*fp32")
    ptx = compiled(_align_kernel(), signature, dict(C=256, BINS=7, RATIO=2, BACKWARD=backward))
    assert ("atom" in ptx or "red." in ptx) == backward


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (8,), (2, 0)])
def test_on_the_cpu_the_definition_serves(shape):
    boxes = torch.rand(*shape, 4).cumsum(-1)
    scores, valid = torch.rand(shape), torch.rand(shape) > .3
    assert torch.equal(nms_mask_by_kernel(boxes, scores, valid, .5), nms_mask(boxes, scores, valid, .5))


@pytest.mark.gpu
def test_nms_does_not_wait_for_the_gpu(gpu):
    corners = torch.randint(0, 200, (4, 4, 300, 2))
    boxes = torch.cat([corners, corners + torch.randint(1, 80, (4, 4, 300, 2))], -1).float()
    scores, valid = torch.rand(4, 4, 300), torch.rand(4, 4, 300) > .2
    there = [t.to(gpu) for t in (boxes, scores, valid)]
    nms_mask_by_kernel(*there, .5)  # compiled
    with never_waits(gpu): keep = nms_mask_by_kernel(*there, .5)
    assert torch.equal(keep.cpu(), nms_mask(boxes, scores, valid, .5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 31, 1000, 2000, 4000])
def test_nms_on_the_gpu_keeps_what_torchvision_keeps(gpu, n, dtype):
    "Rows of all sizes that occur in the model, with corners on whole pixels, padding and an empty row."
    if gpu == "cpu": n = min(n, 31)
    corners = torch.randint(0, 900, (3, n, 2))
    boxes = torch.cat([corners, corners + torch.randint(1, 300, (3, n, 2))], -1).to(dtype)
    scores, valid = torch.rand(3, n, dtype=dtype), torch.rand(3, n) > .2
    valid[2] = False
    for threshold in (.3, .5, .7):
        keep = nms_mask_by_kernel(*(t.to(gpu) for t in (boxes, scores, valid)), threshold).cpu()
        for row in range(3):
            index = valid[row].nonzero()[:, 0]
            kept = index[torchvision.ops.nms(boxes[row, index], scores[row, index], threshold)]
            assert torch.equal(keep[row].nonzero()[:, 0], kept.sort()[0]), (n, threshold, row)


def kernel_on(device):
    "The kernel; in a rehearsal on the CPU the plain version in its place."
    if device == "cpu": return multiscale_roi_align
    from maskrcnn_course.kernels import roi_align_by_kernel
    return roi_align_by_kernel


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [16, 256])
def test_roi_align_on_the_gpu_gives_the_same(gpu, channels):
    align = kernel_on(gpu)
    case = problem(500, gpu, channels)
    for a, b in zip(with_gradients(align, *case), with_gradients(multiscale_roi_align, *case)):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    with never_waits(gpu): align(*case, 7, SIZE, canonical_scale=60.)


@pytest.mark.gpu
def test_roi_align_on_the_gpu_reads_16_bits(gpu):
    align = kernel_on(gpu)
    maps, rois = problem(500, gpu, 64, torch.bfloat16)
    found = with_gradients(align, maps, rois)
    expected = with_gradients(multiscale_roi_align, [m.detach().float().requires_grad_() for m in maps], rois)
    for a, b in zip(found, expected):
        assert a.dtype == torch.bfloat16
        off = 3e-2 if gpu == "cuda" else 0.5  # the plain version also sums in 16 bits
        torch.testing.assert_close(a.float(), b, atol=off, rtol=3e-2)
