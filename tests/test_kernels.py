"The Triton kernel of RoIAlign against the plain version: by the interpreter, on a GPU, and compiled for one."
import os
import subprocess
import sys

import pytest
import torch

from helpers import never_waits
from maskrcnn_course.roi_align import multiscale_roi_align

pytest.importorskip("triton")

PROGRAM = """
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
    "Run a program in a process of its own, where Triton interprets: it asks once, when it is imported."
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", program], check=True, env=env)


def test_the_interpreter_gives_the_same(): interpreted(PROGRAM)


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("backward", [False, True])
def test_the_kernel_compiles_for_a_gpu(kind, backward, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # no kernel of an earlier run
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from maskrcnn_course.kernels import _align_kernel
    if backward and kind == "bf16": pytest.skip("gradients are summed in 32 bits")
    maps = dict.fromkeys(("p0", "p1", "p2", "p3"), f"*{kind}")
    constants = dict(C=256, BINS=7, RATIO=2, BACKWARD=backward)
    signature = maps | dict(about="*i32", rois="*fp32", out="*fp32") | dict.fromkeys(constants, "constexpr")
    try: program = compile(ASTSource(_align_kernel(), signature, constants), target=GPUTarget("cuda", 90, 32))
    except RuntimeError as e:
        if "ptxas" not in str(e): raise
        pytest.skip(f"no compiler for it here: {e}")
    assert ("atom" in program.asm["ptx"] or "red." in program.asm["ptx"]) == backward


def kernel_on(device):
    "The kernel; in a rehearsal on the CPU the plain version in its place."
    if device == "cpu": return multiscale_roi_align
    from maskrcnn_course.kernels import roi_align_by_kernel
    return roi_align_by_kernel


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [16, 256])
def test_the_gpu_gives_the_same(gpu, channels):
    align = kernel_on(gpu)
    case = problem(500, gpu, channels)
    for a, b in zip(with_gradients(align, *case), with_gradients(multiscale_roi_align, *case)):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    with never_waits(gpu): align(*case, 7, SIZE, canonical_scale=60.)


@pytest.mark.gpu
def test_the_gpu_reads_16_bits(gpu):
    align = kernel_on(gpu)
    maps, rois = problem(500, gpu, 64, torch.bfloat16)
    found = with_gradients(align, maps, rois)
    expected = with_gradients(multiscale_roi_align, [m.detach().float().requires_grad_() for m in maps], rois)
    for a, b in zip(found, expected):
        assert a.dtype == torch.bfloat16
        off = 3e-2 if gpu == "cuda" else 0.5  # the plain version also sums in 16 bits
        torch.testing.assert_close(a.float(), b, atol=off, rtol=3e-2)
