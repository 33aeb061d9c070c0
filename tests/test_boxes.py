"Boxes against torchvision: thousands of random cases, and the corners where bugs live."
import math

import pytest
import torch
import torchvision.ops as ops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from torchvision.models.detection._utils import BoxCoder

from helpers import never_waits
from maskrcnn_course.boxes import (
    MAX_LOG_SCALE, apply_to_valid, batched_gather, batched_nms, box_area, box_iou, clip_boxes, decode_boxes,
    encode_boxes, nms, nms_mask, remove_small_boxes)

settings.register_profile("quick", max_examples=150, deadline=None)
settings.load_profile("quick")

# whole numbers: IoU is then exact wherever a box lies
coordinate, side = st.integers(-50, 300), st.integers(0, 120)
box = st.tuples(coordinate, coordinate, side, side).map(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
real_box = st.tuples(*[st.floats(-50, 300, width=32)] * 2, *[st.floats(1, 300, width=32)] * 2).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
threshold = st.sampled_from([0., .3, .5, .7, 1.])


def as_boxes(rows): return tensor(rows, dtype=torch.float32).view(-1, 4)


def boxes_of(kind=box, least=0, most=25): return st.lists(kind, min_size=least, max_size=most).map(as_boxes)


def inside(boxes):
    "Without negative coordinates, for torchvision's batched_nms."
    return boxes - boxes.amin() if boxes.numel() else boxes


@st.composite
def detections(draw, least=0, most=40):
    boxes = draw(boxes_of(least=least, most=most))
    scores = draw(st.lists(st.integers(0, 8), min_size=len(boxes), max_size=len(boxes)))  # ties are common
    groups = draw(st.lists(st.integers(0, 3), min_size=len(boxes), max_size=len(boxes)))
    return boxes, tensor(scores, dtype=torch.float32) / 8, tensor(groups, dtype=torch.int64)


def plain_nms(boxes, scores, iou_threshold):
    ious, kept = box_iou(boxes, boxes), []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if all(ious[i, k] <= iou_threshold for k in kept): kept.append(i)
    return kept


@given(boxes_of(), boxes_of())
def test_box_iou_is_torchvisions(a, b):
    ours = box_iou(a, b)
    torch.testing.assert_close(ours, torch.nan_to_num(ops.box_iou(a, b)))  # theirs is 0 / 0 for two points
    torch.testing.assert_close(box_area(a), ops.box_area(a))
    assert ours.shape == (len(a), len(b)) and not ours.isnan().any()
    assert (ours >= 0).all() and (ours <= 1).all()
    torch.testing.assert_close(ours.T, box_iou(b, a))


@given(boxes_of(least=1), boxes_of(least=1))
def test_box_iou_of_a_batch_is_that_of_its_images(a, b):
    batch = box_iou(torch.stack([a, a + 3]), torch.stack([b, b - 5]))
    torch.testing.assert_close(batch, torch.stack([box_iou(a, b), box_iou(a + 3, b - 5)]))


def test_boxes_that_miss_each_other_or_are_inside_out_have_no_overlap():
    a = tensor([[0., 0, 4, 4]])
    others = tensor([[10., 10, 12, 12], [4, 0, 8, 4], [-4, -4, 0, 0], [3, 3, 1, 1], [0, 0, 0, 0]])
    assert box_iou(a, others).tolist() == [[0] * 5]
    assert box_iou(a, a).item() == 1


@given(boxes_of(), st.integers(1, 250), st.integers(1, 250))
def test_clipping_is_torchvisions(boxes, height, width):
    clipped = clip_boxes(boxes, tensor([height, width]))
    assert torch.equal(clipped, ops.clip_boxes_to_image(boxes, (height, width)))
    assert torch.equal(remove_small_boxes(clipped, 5.).nonzero()[:, 0], ops.remove_small_boxes(clipped, 5.))


def test_every_image_of_a_batch_is_clipped_at_its_own_size():
    boxes, sizes = tensor([[-10., -10, 500, 500]]).expand(3, 2, 4), tensor([[100, 200], [50, 60], [300, 10]])
    assert clip_boxes(boxes, sizes)[:, 1].tolist() == [[0, 0, w, h] for h, w in sizes.tolist()]


weights = st.sampled_from([(1., 1., 1., 1.), (10., 10., 5., 5.)])


@given(st.lists(st.tuples(real_box, real_box), min_size=1, max_size=20), weights)
def test_encode_and_decode_are_torchvisions_and_each_others_inverse(pairs, weights):
    boxes, anchors = (as_boxes(b).double() for b in zip(*pairs))
    deltas, peer = encode_boxes(boxes, anchors, weights), BoxCoder(weights)
    torch.testing.assert_close(deltas, peer.encode_single(boxes, anchors))
    decoded = decode_boxes(deltas, anchors, weights)
    torch.testing.assert_close(decoded, peer.decode_single(deltas, anchors))
    reachable = (deltas[:, 2:] / tensor(weights[2:]) <= MAX_LOG_SCALE).all(1)
    torch.testing.assert_close(decoded[reachable], boxes[reachable])


wild_deltas = st.tuples(*[st.floats(-1000, 1000, width=32)] * 4)


@given(st.lists(st.tuples(real_box, wild_deltas), min_size=1, max_size=20), weights)
def test_wild_deltas_stay_finite_and_equal_torchvisions(rows, weights):
    anchors, deltas = as_boxes([a for a, _ in rows]), as_boxes([list(d) for _, d in rows])
    decoded = decode_boxes(deltas, anchors, weights)
    assert decoded.isfinite().all()
    expected = BoxCoder(weights).decode_single(deltas, anchors)
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-2)


def test_a_box_without_height_has_no_finite_deltas():
    "Data without such boxes is what chapter 0 sees to."
    deltas = encode_boxes(tensor([[2., 2, 5, 2]]), tensor([[0., 0, 4, 4]]))
    assert deltas[0, 3] == -math.inf and deltas[0, :3].isfinite().all()


def test_decoding_keeps_the_number_format_of_the_anchors():
    anchors = tensor([[100., 200, 613, 701]])
    decoded = decode_boxes(torch.full((1, 4), .1).bfloat16(), anchors)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, decode_boxes(torch.full((1, 4), .1), anchors), atol=.3, rtol=0)
    assert decode_boxes(torch.zeros(2, 3, 5, 4), torch.ones(2, 3, 5, 4)).shape == (2, 3, 5, 4)


def test_gradients_pass_through_encoding_and_decoding():
    anchors = tensor([[0., 0, 10, 20], [5, 5, 9, 8]], dtype=torch.float64)
    deltas = (torch.rand(2, 4, dtype=torch.float64) * .2).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: decode_boxes(d, anchors, (10., 10., 5., 5.)), deltas)
    boxes = (anchors + .3).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: encode_boxes(b, anchors), boxes)


@given(detections(), threshold)
def test_nms_is_torchvisions_and_the_textbooks(found, iou_threshold):
    boxes, scores, _ = found
    kept = nms(boxes, scores, iou_threshold)
    assert torch.equal(kept, ops.nms(boxes, scores, iou_threshold))
    assert kept.tolist() == plain_nms(boxes, scores, iou_threshold)


@given(detections(), threshold)
def test_batched_nms_is_torchvisions(found, iou_threshold):
    boxes, scores, groups = found
    ours = batched_nms(boxes, scores, groups, iou_threshold)
    assert torch.equal(ours, ops.batched_nms(inside(boxes), scores, groups, iou_threshold))
    members = [(groups == g).nonzero()[:, 0] for g in range(4)]
    each = [i[plain_nms(boxes[i], scores[i], iou_threshold)] for i in members]
    assert sorted(ours.tolist()) == sorted(torch.cat(each).tolist())


def test_groups_stay_apart_though_boxes_reach_below_zero():
    boxes, scores, groups = tensor([[0., 0, 10, 10], [-11, -11, -1, -1]]), tensor([.9, .8]), tensor([0, 1])
    assert len(batched_nms(boxes, scores, groups, .5)) == 2
    assert len(ops.batched_nms(boxes, scores, groups, .5)) == 1  # torchvision moves the second onto the first


def in_rows(found, rows, random):
    "The detections in several orders, some of them padding."
    n = len(found[0])
    order = tensor([random.sample(range(n), n) for _ in range(rows)])
    valid = tensor([[random.random() < .7 for _ in range(n)] for _ in range(rows)])
    return *(t[order] for t in found[:2]), valid


@given(detections(least=1, most=30), threshold, st.integers(1, 4), st.randoms(use_true_random=False))
def test_nms_of_a_padded_batch(found, iou_threshold, rows, random):
    boxes, scores, valid = in_rows(found, rows, random)
    keep = nms_mask(boxes, scores, valid, iou_threshold)
    for k, b, s, v in zip(keep, boxes, scores, valid):
        assert torch.equal(k[v].nonzero()[:, 0], nms(b[v], s[v], iou_threshold).sort()[0])
    assert not (keep & ~valid).any()
    two = [torch.stack([t, t]) for t in (boxes, scores, valid)]
    assert torch.equal(nms_mask(*two, iou_threshold), torch.stack([keep, keep]))  # any leading dimensions


def test_padding_never_matters():
    boxes = torch.rand(4, 30, 4).mul(50).cumsum(-1)
    scores, valid = torch.rand(4, 30), torch.rand(4, 30) > .4
    keep = nms_mask(boxes, scores, valid, .3)
    boxes[~valid], scores[~valid] = tensor([0., 0, 90, 90]), 2.
    assert torch.equal(nms_mask(boxes, scores, valid, .3), keep)


def test_nothing_in_nothing_out():
    none = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert len(nms(*none[:2], .5)) == len(batched_nms(*none, .5)) == 0
    empty = nms_mask(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), .5)
    assert empty.shape == (2, 0)
    all_padding = nms_mask(torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), .5)
    assert not all_padding.any()


@given(st.integers(1, 3), st.integers(1, 6), st.integers(0, 2**18 - 1))
def test_apply_to_valid_runs_on_the_real_entries_and_puts_them_back(batch, n, bits):
    valid = tensor([bits >> i & 1 for i in range(batch * n)], dtype=torch.bool).view(batch, n)
    x = torch.rand(batch, n, 3, requires_grad=True)
    seen = []

    def function(t, i):
        seen.append(len(t))
        return 2 * t, t.sum(1) + i

    twice, total = apply_to_valid(function, valid, x, valid * 5.)
    assert seen == [valid.sum()]
    assert twice.shape == x.shape and total.shape == (batch, n)
    assert torch.equal(twice, 2 * x * valid[..., None])
    torch.testing.assert_close(total, (x.sum(-1) + 5) * valid)
    twice.sum().backward()
    assert torch.equal(x.grad, 2. * valid[..., None].expand_as(x))


def test_batched_gather_keeps_images_apart():
    values, index = torch.rand(3, 7, 4), torch.randint(7, (3, 5))
    assert torch.equal(batched_gather(values, index), torch.stack([v[i] for v, i in zip(values, index)]))
    assert torch.equal(batched_gather(values[..., 0], index), values[..., 0].gather(1, index))


def test_no_function_of_fixed_shape_looks_at_a_number():
    boxes, sizes = torch.rand(2, 6, 4, device="meta"), torch.full((2, 2), 9, device="meta")
    assert clip_boxes(decode_boxes(encode_boxes(boxes, boxes), boxes), sizes).shape == (2, 6, 4)
    assert box_iou(boxes, boxes).shape == (2, 6, 6) and remove_small_boxes(boxes, 1.).shape == (2, 6)


def test_shapes_and_kinds_that_do_not_fit_are_refused():
    with pytest.raises(Exception, match="box_iou"): box_iou(torch.rand(2, 5), torch.rand(2, 4))
    with pytest.raises(Exception, match="clip_boxes"): clip_boxes(torch.rand(2, 4), tensor([1., 2.]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8])
def test_iou_of_boxes_in_few_bits_or_whole_numbers(dtype):
    "Areas of large boxes overflow 16 bits, and whole numbers have no fractions."
    boxes = tensor([[0, 0, 250, 200], [10, 20, 240, 250], [0, 0, 250, 200]])
    rounded = boxes.to(dtype)
    found, expected = box_iou(rounded, rounded), ops.box_iou(rounded.float(), rounded.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
def test_the_gpu_keeps_what_the_cpu_keeps(gpu):
    corners = torch.randint(0, 200, (16, 300, 2))
    boxes = torch.cat([corners, corners + torch.randint(1, 80, (16, 300, 2))], -1).float()
    scores, valid = torch.rand(16, 300), torch.rand(16, 300) > .2
    keep = nms_mask(boxes, scores, valid, .5)
    there = [t.to(gpu) for t in (boxes, scores, valid)]
    assert torch.equal(nms_mask(*there, .5).cpu(), keep)
    double = apply_to_valid(lambda t: 2 * t, valid.to(gpu), boxes.to(gpu)).cpu()
    assert torch.equal(double[valid], 2 * boxes[valid])


@pytest.mark.gpu
def test_encoding_decoding_and_clipping_do_not_wait_for_the_gpu(gpu):
    boxes, sizes = torch.rand(2, 50, 4, device=gpu).cumsum(-1), torch.full((2, 2), 3, device=gpu)
    with never_waits(gpu):
        clip_boxes(decode_boxes(encode_boxes(boxes, boxes + 1), boxes, (10., 10., 5., 5.)), sizes)


def test_the_largest_step_takes_a_side_of_16_to_1000():
    assert math.isclose(16 * math.exp(MAX_LOG_SCALE), 1000)
    largest = decode_boxes(tensor([[0., 0, 99, 99]]), tensor([[0., 0, 16, 16]]))
    assert math.isclose(box_area(largest).item(), 1e6, rel_tol=1e-4)
