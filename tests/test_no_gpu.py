"""The branch for GPUs, on a machine without one: tensors that claim to lie on a GPU, computed on the CPU.

A CPU tensor that meets one of them is an error, as it would be on a GPU, so whatever is not moved is found.
Each time that Python would have to wait for the GPU's answer is written down. The kernel of NMS runs in
Triton's interpreter; without Triton `nms_mask` takes its place, and the two then agree by construction.
"""
import copy
import inspect
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from maskrcnn_course import kernels
from maskrcnn_course.boxes import nms_mask
from maskrcnn_course.presets import build_model

aten, GPU = torch.ops.aten, torch.device("cuda", 0)
VALUES = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
SIZES = {
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
    torch.ops.torchvision.nms.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class There(torch.Tensor):
    "A tensor on the pretended GPU; `here` is what it holds."
    device, is_cuda = property(lambda self: GPU), property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here):
        like = torch.empty_strided(here.shape, here.stride(), dtype=here.dtype, device="meta")
        tensor = torch.Tensor._make_subclass(
            cls, like, False, dispatch_device=True, device_for_backend_keys=GPU)
        tensor.here = here
        return tensor

    def __repr__(self): return f"There({self.here})"

    def tolist(self): return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return Pretended.now.run(function, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """While it is on, what is asked for on a GPU comes from here.

    `waits` names each operation that Python would have to wait for.
    """
    now = None

    def __init__(self):
        super().__init__()
        self.waits, Pretended.now = [], self

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.run(function, args, kwargs or {})

    def wait(self, function):
        ours = [f for f in traceback.extract_stack() if "maskrcnn_course" in f.filename]
        place = f" in {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
        self.waits.append(f"{function}{place}")

    def run(self, function, args, kwargs):
        if function is torch.ops.prim.device.default:
            return torch.device("meta")  # for the code below Python, which must not look for a driver
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = [isinstance(t, There) for t in tensors]
        target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        args_here, kwargs_here = tree_map(here, args), tree_map(here, kwargs)
        if function is aten._to_copy.default:
            if target == "cpu" and any(there): self.wait(function)
            out = function(*args_here, **kwargs_here | dict(device=None, non_blocking=False))
            return There(out) if target in ("cuda", "meta") or target is None and any(there) else out
        if function is aten.copy_.default:
            if there[1:] == [True] and not there[0]: self.wait(function)
            function(*args_here, **kwargs_here)
            return args[0]
        if any(there) and any(not t and tensor.dim() for t, tensor in zip(there, tensors)):
            places = [(tuple(t.shape), str(t.device)) for t in tensors]
            raise RuntimeError(f"{function}: tensors on two devices, {places}")
        if any(there):
            masks = function in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
            writes = function in INDEXING and function is not aten.index.Tensor
            filling = writes and args[2].numel() == 1  # no need to know how many
            if function in VALUES | SIZES or masks and not filling: self.wait(function)
        made_there = target in ("cuda", "meta")
        out = function(*args_here, **kwargs_here | (dict(device=torch.device("cpu")) if made_there else {}))
        if function in VALUES or not (any(there) or made_there): return out
        given = {id(t.here): t for t in tensors if isinstance(t, There)}

        def back(value):
            if id(value) in given: return given[id(value)]  # what was changed in place is handed back itself
            return There(value) if isinstance(value, torch.Tensor) else value

        return tree_map(back, out)


class Tables(TorchFunctionMode):
    "`torch.tensor(numbers, device=gpu)` copies, and waits for the copy."
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        copies = function in (torch.tensor, torch.as_tensor)
        if not copies or torch.device(kwargs.get("device") or "cpu").type == "cpu":
            return function(*args, **kwargs)
        Pretended.now.wait(function.__name__)
        return function(*args, **kwargs | dict(device=None)).to(GPU)


def here(value): return value.here if isinstance(value, There) else value


class Definition:
    "In place of the kernel of NMS: `nms_mask` of boxes that come best first, with padding at the end."
    def __getitem__(self, grid): return self.launch

    def launch(self, in_order, counts, keep, n, iou_threshold, size, num_warps):
        place = torch.arange(n).expand(keep.shape)
        keep.copy_(nms_mask(in_order, -place.float(), place < counts[:, None], iou_threshold))


class Kernel:
    "The kernel of NMS for tensors on the pretended GPU; `launches` counts its calls."
    launches = 0

    def __init__(self, kernel): self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            Kernel.launches += 1
            self.kernel[grid](*map(here, args), **options)
        return launch


@contextmanager
def pretended_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton asks when a kernel is made
    kernel = Kernel(inspect.unwrap(kernels._nms_kernel)() or Definition())
    monkeypatch.setattr(kernels, "_nms_kernel", lambda: kernel)
    torch._C._ensureCUDADeviceGuardSet()
    with Pretended() as gpu, Tables(): yield gpu


def moved(model):
    "A copy of a model on the pretended GPU."
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is None: continue
            module._parameters[name] = nn.Parameter(There(value.detach()), value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None: module._buffers[name] = There(value)
    return model


@pytest.fixture(scope="module", params=["tiny", "laptop"])
def model(request):
    torch.manual_seed(0)
    size = dict(
        min_size=64, max_size=96, rpn_pre_nms_top_n_train=60, rpn_pre_nms_top_n_test=60,
        rpn_post_nms_top_n_train=40, rpn_post_nms_top_n_test=30, box_batch_size_per_image=16)
    return build_model(request.param, 4, pretrained=False, **size)


@pytest.fixture
def images(): return [torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(i)) for i in range(2)]


@pytest.fixture
def targets(images):
    masks = [torch.zeros(2, *image.shape[1:], dtype=torch.uint8) for image in images]
    for m in masks: m[0, 4:30, 3:20], m[1, 5:40, 5:30] = 1, 1
    boxes, labels = torch.tensor([[3., 4, 20, 30], [5, 5, 30, 40]]), torch.tensor([1, 2])
    return [dict(boxes=boxes, labels=labels, masks=m) for m in masks]


pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not hasattr(torch._C, "_ensureCUDADeviceGuardSet"),
    reason="there is a GPU, or PyTorch cannot pretend one")


def test_what_the_pretended_gpu_notices(monkeypatch):
    with pretended_gpu(monkeypatch) as gpu:
        x = torch.tensor([1., -2, 3]).to("cuda")
        assert x.is_cuda and x.device == GPU and gpu.waits == []
        with pytest.raises(RuntimeError, match="two devices"): x + torch.ones(3)
        assert (2 * x + torch.tensor(1.)).is_cuda and torch.zeros(2, device=x.device).is_cuda
        assert gpu.waits == []
        waiting = (
            lambda: x.sum().item(), lambda: x[x > 0], lambda: x.nonzero(), lambda: x.cpu(),
            lambda: torch.tensor([1.], device=x.device), lambda: torchvision.ops.nms(x.expand(4, 3).T, x, .5))
        for i, ask in enumerate(waiting, 1):
            ask()
            assert len(gpu.waits) == i


def test_nms_of_many_boxes_never_waits_and_agrees(monkeypatch):
    corners = torch.randint(0, 60, (2, 3, 40, 2))
    boxes = torch.cat([corners, corners + torch.randint(10, 60, (2, 3, 40, 2))], -1).float()
    scores, valid = torch.rand(2, 3, 40), torch.rand(2, 3, 40) > .2
    expected = nms_mask(boxes, scores, valid, .5)
    with pretended_gpu(monkeypatch) as gpu:
        there = [t.to("cuda") for t in (boxes, scores, valid)]
        keep = kernels.nms_mask_by_kernel(*there, .5)
        assert gpu.waits == []
        nms_mask(*there, .5)
        assert len(gpu.waits) > 1  # the definition waits for each row
    assert torch.equal(here(keep), expected)


def test_a_training_step_never_waits_and_agrees(model, images, targets, monkeypatch):
    model.train()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.eval()
    def generator(): return torch.Generator().manual_seed(0)
    expected = model(images, targets, generator())
    with pretended_gpu(monkeypatch) as gpu:
        card = moved(model)
        launches = Kernel.launches
        losses = card(images, targets, generator())
        assert Kernel.launches == launches + 1  # the proposals of all images and levels
        assert all(loss.is_cuda for loss in losses.values())
        sum(losses.values()).backward()
        assert gpu.waits == []
        losses = {k: here(v.detach()) for k, v in losses.items()}
        gradients = {k: here(p.grad) for k, p in card.named_parameters() if p.requires_grad}
    model.zero_grad()
    sum(expected.values()).backward()
    expected_gradients = {k: p.grad for k, p in model.named_parameters()}
    for k in expected: torch.testing.assert_close(expected[k].detach(), losses[k], rtol=1e-4, atol=1e-5)
    for k, gradient in gradients.items():
        torch.testing.assert_close(expected_gradients[k], gradient, rtol=1e-3, atol=1e-4)


def test_detecting_asks_once_and_finds_the_same(model, images, monkeypatch):
    model.eval()
    with torch.no_grad(): expected = model(images)
    with pretended_gpu(monkeypatch) as gpu, torch.no_grad():
        launches = Kernel.launches
        found = moved(model)(images)
        assert Kernel.launches == launches + 2  # proposals, detections
        assert len(gpu.waits) == 1, gpu.waits  # how many there are in each image
    for a, b in zip(expected, found):
        assert all(t.is_cuda for t in b.values())
        for k in a: torch.testing.assert_close(a[k], here(b[k]), rtol=1e-4, atol=1e-4)
