"RoIAlign against torchvision's operators, over boxes that hypothesis generates."
import pytest
import torch
import torchvision
from hypothesis import example, given, settings, strategies as st
from torch import tensor
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper
from maskrcnn_course.roi_align import multiscale_roi_align, roi_align, roi_levels

STRIDES = (4, 8, 16, 32)
many = settings(deadline=None, max_examples=80)


def maps(size, batch=2, channels=3, strides=STRIDES, seed=0, dtype=torch.float64):
    "Random levels of a padded batch, with an odd row or column where a stride does not divide the size."
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, channels, -(-size[0] // s), -(-size[1] // s)) for s in strides]
    return [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in shapes]


def peer(features, rois, bins, size, ratio=2, scale=224, level=4):
    names = [str(i) for i in range(len(features))]
    pool = MultiScaleRoIAlign(names, bins, ratio, canonical_scale=scale, canonical_level=level)
    boxes = [rois[rois[:, 0] == i, 1:] for i in range(len(features[0]))]
    return pool(dict(zip(names, features)), boxes, [size] * len(boxes))


def rois_of(*boxes, image=0):
    index = torch.full((len(boxes), 1), float(image))
    return torch.cat([index, tensor(boxes, dtype=torch.float32)], 1).double()


@st.composite
def rois(draw, step, most=12, images=2):
    "Boxes on a grid of `step` pixels, also beyond the image, thin, empty; those of image 0 first."
    number = lambda low, high: draw(st.integers(int(low / step), int(high / step))) * step
    rows = []
    for _ in range(draw(st.integers(0, most))):
        x, y = number(-100, 300), number(-100, 300)
        rows.append([draw(st.integers(0, images - 1)), x, y, x + number(0, 400), y + number(0, 400)])
    return tensor(sorted(rows, key=lambda r: r[0]), dtype=torch.float64).view(-1, 5)


# ------------------------------------------------------------------------------------------------ one level

def roofs(at, cells):
    inside = (at >= -1) & (at <= cells)
    return (1 - (at.clamp(0, cells - 1)[:, None] - torch.arange(cells)).abs()).clamp(min=0) * inside[:, None]


def by_definition(fmap, box, bins, scale, ratio, aligned):
    "RoIAlign of one box as two dense products, with the number of samples that the box asks for."
    start = box[:2] * scale - (0.5 if aligned else 0)
    size = (box[2:] - box[:2]) * scale
    if not aligned: size = size.clamp(min=1)
    weights = []
    for s, length, cells in zip(start, size, reversed(fmap.shape[-2:])):
        n = ratio if ratio > 0 else int((length / bins).ceil())
        at = s + (torch.arange(bins * n, dtype=box.dtype) + 0.5) / max(bins * n, 1) * length
        weights.append(roofs(at, cells).view(bins, n, cells).sum(1) / max(n, 1))
    return weights[1] @ fmap @ weights[0].T


@many
@given(rois(step=0.25, most=4), st.sampled_from([1, 2, 4, -1]), st.booleans(), st.sampled_from([1, 2, 4]))
def test_roi_align_is_its_definition(boxes, ratio, aligned, bins):
    features = maps((100, 140), strides=(4,))[0].detach()
    expected = [by_definition(features[int(b[0])], b[1:], bins, 0.25, ratio, aligned) for b in boxes]
    out = roi_align(features, boxes, bins, 0.25, ratio, aligned)
    assert out.shape == (len(boxes), 3, bins, bins)
    if expected: torch.testing.assert_close(out, torch.stack(expected), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=30)
@example(rois_of((19.5, .5, 41.5, .5)), 1, False, (torch.float16, 1e-2))  # here half precision is too coarse
@given(rois(step=0.5, most=5), st.sampled_from([1, 2, -1]), st.booleans(),
       st.sampled_from([(torch.float16, 1e-2), (torch.float32, 1e-4), (torch.float64, 1e-12)]))
def test_every_precision_and_any_memory_layout(boxes, ratio, aligned, precision):
    "Maps that lie in memory channel by channel, channels last, or as a cut-out of something larger."
    dtype, atol = precision
    whole = maps((64, 96), strides=(4,))[0].detach()
    expected = [by_definition(whole[int(b[0])], b[1:], 3, 0.25, ratio, aligned) for b in boxes]
    larger = torch.zeros(2, 6, 20, 30, dtype=dtype)
    larger[:, ::2, 2:18, 3:27] = whole.to(dtype)
    channels_last = whole.to(dtype).to(memory_format=torch.channels_last)
    for features in (whole.to(dtype), channels_last, larger[:, ::2, 2:18, 3:27]):
        out = roi_align(features, boxes.to(dtype), 3, 0.25, ratio, aligned)
        assert out.dtype == dtype and out.shape == (len(boxes), 3, 3, 3)
        if expected: torch.testing.assert_close(out.double(), torch.stack(expected), rtol=atol, atol=atol)


@many
@given(rois(step=1, images=2))
def test_lists_and_tensors_of_boxes(boxes):
    features = maps((64, 64), strides=(8,))[0]
    as_list = [boxes[boxes[:, 0] == i, 1:] for i in range(2)]
    assert torch.equal(roi_align(features, as_list, (3, 5), 1 / 8), roi_align(features, boxes, (3, 5), 1 / 8))


@many
@given(rois(step=0.25), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4, 8]))
@example(  # one sample, on each border
    rois_of((-16, 8, 0, 16), (8, -16, 16, 0), (136, 8, 152, 16), (8, 96, 16, 112)), 1, 1)
def test_one_level_is_torchvisions_roi_align(boxes, ratio, bins):
    "Steps of powers of 2: samples that fall on the very border of the map do so in both."
    features = maps((100, 140), strides=(8,))
    out = multiscale_roi_align(features, boxes, bins, (100, 140), ratio)
    expected = torchvision.ops.roi_align(features[0], boxes, bins, 1 / 8, ratio)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------- all levels

@many
@given(rois(step=0.37), st.sampled_from([1, 2, 3, -1]), st.sampled_from([3, 7]),
       st.sampled_from([32, 96, 224]), st.sampled_from([3, 4]),
       st.sampled_from([(192, 256), (100, 140), (256, 96)]))
def test_all_levels_are_torchvisions(boxes, ratio, bins, scale, level, size):
    features = maps(size)
    ours = multiscale_roi_align(features, boxes, bins, size, ratio, float(scale), level)
    theirs = peer(features, boxes, bins, size, ratio, scale, level)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    g = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(ours, features, g), torch.autograd.grad(theirs, features, g)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("strides", [(8,), (4, 8), (8, 16, 32), (4, 8, 16, 32, 64)])
def test_any_run_of_levels(strides):
    features = maps((192, 256), strides=strides)
    boxes = rois_of((3, 4, 30, 31), (9, 9, 100, 120), (0, 0, 256, 192), (0, 0, 900, 900))
    ours = multiscale_roi_align(features, boxes, 7, (192, 256), canonical_scale=96.)
    torch.testing.assert_close(ours, peer(features, boxes, 7, (192, 256), scale=96))


@many
@given(st.lists(st.tuples(st.floats(0, 2000), st.floats(0, 2000)), min_size=1, max_size=30),
       st.sampled_from([32, 96, 224]))
def test_levels_are_torchvisions(sides, scale):
    powers = [(scale * 2. ** k, scale * 2. ** k) for k in range(-4, 5)]  # on the border of two levels
    sides = tensor(sides + powers)
    places = (0, 33.7, 160.3, 288.1)  # at some of them, 224 px are off in the last bit
    boxes = torch.cat([torch.cat([sides * 0 + at, sides + at], 1) for at in places])
    assert roi_levels(boxes, 2, 5, float(scale)).tolist() == LevelMapper(2, 5, scale)([boxes]).tolist()


def test_gradcheck():
    features = maps((32, 48), batch=1, channels=2, strides=(8, 16))
    boxes = rois_of((3, 4, 20, 15), (-9, 2, 30, 40), (15, 3, 60, 31), (200, 200, 210, 220))
    def align(*maps): return multiscale_roi_align(list(maps), boxes, 2, (32, 48), canonical_scale=40.)
    assert torch.autograd.gradcheck(align, features)


def test_no_boxes():
    features = maps((64, 64))
    out = multiscale_roi_align(features, torch.zeros(0, 5, dtype=torch.float64), 7, (64, 64))
    assert out.shape == (0, 3, 7, 7)
    gradients = torch.autograd.grad(out.sum(), features)
    assert all(g.shape == f.shape and not g.any() for g, f in zip(gradients, features))
    assert roi_levels(torch.zeros(0, 4), 2, 5).shape == (0,)
    assert roi_align(features[0], [torch.zeros(0, 4).double()] * 2, 7, 0.25).shape == (0, 3, 7, 7)


def test_outside_is_zero_and_teaches_nothing():
    features, boxes = maps((64, 64)), rois_of((400, 400, 440, 450), (-90, 5, -50, 40))
    out = multiscale_roi_align(features, boxes, 7, (64, 64))
    assert not out.any() and not any(g.any() for g in torch.autograd.grad(out.sum(), features))


@many
@given(rois(step=1), st.randoms())
def test_order_of_boxes_and_memory_do_not_matter(boxes, random):
    features = maps((96, 128))
    out = multiscale_roi_align(features, boxes, 4, (96, 128))
    order = random.sample(range(len(boxes)), len(boxes))
    assert torch.equal(multiscale_roi_align(features, boxes[order], 4, (96, 128)), out[order])
    strided = [f.contiguous(memory_format=torch.channels_last) for f in features]
    assert torch.equal(multiscale_roi_align(strided, boxes.T.contiguous().T, 4, (96, 128)), out)


def test_shifting_box_and_map_together():
    feature, boxes = torch.zeros(1, 2, 32, 32, dtype=torch.float64), rois_of((40, 36, 88, 70))
    g = torch.Generator().manual_seed(0)
    feature[..., 6:20, 6:20] = torch.randn(2, 14, 14, dtype=torch.float64, generator=g)
    still = multiscale_roi_align([feature], boxes, 7, (128, 128))
    moved_boxes = boxes + tensor([0, 20, 8, 20, 8])
    moved = multiscale_roi_align([feature.roll((2, 5), (2, 3))], moved_boxes, 7, (128, 128))
    torch.testing.assert_close(moved, still, rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------- precision, devices

@pytest.mark.parametrize("dtype, atol", [
    (torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_lower_precision_of_the_maps_alone(dtype, atol):
    features = [f.detach().to(dtype).double().requires_grad_() for f in maps((192, 256))]
    boxes = rois_of((3, 4, 30, 31), (9.3, 9.1, 100.7, 120), (0, 0, 256, 192))
    low = [f.detach().to(dtype).requires_grad_() for f in features]
    out = multiscale_roi_align(low, boxes.float(), 7, (192, 256))
    exact = multiscale_roi_align(features, boxes, 7, (192, 256))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=atol)
    for a, b in zip(torch.autograd.grad(out.sum(), low), torch.autograd.grad(exact.sum(), features)):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=20 * atol)  # sums over many bins


def test_autocast():
    features, boxes = maps((64, 64), dtype=torch.float32), rois_of((3, 4, 30, 31), (9, 9, 60, 50)).float()
    same = torch.eye(3)[..., None, None]
    with torch.autocast("cpu", torch.bfloat16):
        halved = [torch.nn.functional.conv2d(f, same) for f in features]
        out = multiscale_roi_align(halved, boxes, 7, (64, 64))
    assert out.dtype == torch.bfloat16
    exact = multiscale_roi_align(features, boxes, 7, (64, 64))
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=3e-2)


@pytest.mark.parametrize("ratio", [2, -1])
def test_a_box_that_is_none_disturbs_no_other(ratio):
    nan = float("nan")
    # torchvision's operator, which a ratio of -1 calls, cannot count the samples of a NaN
    third = (nan, 4, 30, 31) if ratio == 2 else (40, 4, 30, 31)
    features, boxes = maps((64, 64)), rois_of((3, 4, 30, 31), (30, 31, 3, 4), third, (9, 9, 60, 50))
    found = multiscale_roi_align(features, boxes, 7, (64, 64), ratio)
    assert len(found) == 4
    torch.testing.assert_close(found[[0, 3]],
                               multiscale_roi_align(features, boxes[[0, 3]], 7, (64, 64), ratio))
    if ratio == 2: assert found.isfinite().all() and (found[2] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("n", [0, 300])
def test_cuda_gives_the_same(gpu, n):
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(n, 2, generator=g) * 300 - 30
    image = torch.randint(2, (n, 1), generator=g)
    sides = 2 ** (torch.rand(n, 2, generator=g) * 7.5 + 1)
    boxes = torch.cat([image, corner, corner + sides], 1).double()
    features = maps((192, 256))
    cuda = [f.detach().to(gpu).requires_grad_() for f in features]
    ours = multiscale_roi_align(features, boxes, 7, (192, 256))
    theirs = multiscale_roi_align(cuda, boxes.to(gpu), 7, (192, 256))
    torch.testing.assert_close(theirs.cpu(), ours, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours.sum(), features), torch.autograd.grad(theirs.sum(), cuda)):
        torch.testing.assert_close(b.cpu(), a, rtol=0, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuda_lower_precision(gpu, dtype):
    features = maps((192, 256), dtype=torch.float32)
    boxes = rois_of((3, 4, 30, 31), (9.3, 9.1, 100.7, 120), (0, 0, 256, 192)).float()
    cuda = [f.detach().to(gpu, dtype).requires_grad_() for f in features]
    out = multiscale_roi_align(cuda, boxes.to(gpu), 7, (192, 256))
    assert out.dtype == dtype
    exact = multiscale_roi_align(features, boxes, 7, (192, 256))
    torch.testing.assert_close(out.float().cpu(), exact, rtol=0, atol=5e-2)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), cuda))
