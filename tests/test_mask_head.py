"The mask head against torchvision: same layers, same targets, same loss, same pixels."
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings, strategies as st
from torch import nn, tensor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import maskrcnn_loss, paste_masks_in_image, project_masks_on_boxes

from helpers import never_waits
from maskrcnn_course.mask_head import MaskHead, boxes_from_masks, mask_loss, mask_targets, paste_masks


def loss_case(seed=0, n=12, classes=5, m=28):
    "Two images of three instances; the first half of the samples belongs to the first."
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g).double() * 150 - 10
    boxes = torch.cat([corner, corner + 2 + 80 * torch.rand(n, 2, generator=g)], 1)
    masks = F.interpolate(torch.rand(1, 6, 12, 16, generator=g), size=(192, 256))[0] > 0.5
    labels, index = torch.randint(1, classes, (6,), generator=g), torch.randint(3, (n,), generator=g)
    return torch.randn(n, classes, m, m, generator=g).double(), boxes, masks, labels, index, index + 3 * (torch.arange(n) >= n // 2)


def paste_case(n=40, size=(120, 160), m=28, seed=0, dtype=torch.float64):
    "Boxes from half a pixel to larger than the image, many of them over its edges."
    g = torch.Generator().manual_seed(seed)
    center = torch.rand(n, 2, generator=g) * tensor([size[1] * 1.0, size[0]])
    half = 2 ** (torch.rand(n, 2, generator=g) * 9 - 2)
    return torch.rand(n, m, m, generator=g).to(dtype), torch.cat([center - half, center + half], 1).to(dtype), size


@pytest.mark.parametrize("layers", [(16,), (16, 16, 16, 16)])
def test_head_has_torchvisions_layers_and_numbers(layers):
    torch.manual_seed(0)
    head, x = MaskHead(8, 5, layers), torch.randn(3, 8, 14, 14)
    theirs, predictor = MaskRCNNHeads(8, layers, 1), MaskRCNNPredictor(layers[-1], layers[-1], 5)
    weights = head.state_dict()
    theirs.load_state_dict({k.removeprefix("convs."): v for k, v in weights.items() if k.startswith("convs.")})
    predictor.load_state_dict({k: v for k, v in weights.items() if not k.startswith("convs.")})
    torch.testing.assert_close(head(x), predictor(theirs(x)))
    assert head(x).shape == (3, 5, 28, 28) and head(x[:0]).shape == (0, 5, 28, 28)


def test_normalisation_takes_the_place_of_the_bias():
    head = MaskHead(8, 5, (16, 16), nn.BatchNorm2d)
    assert [type(l) for l in head.convs[0]] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] and head.convs[0][0].bias is None
    assert head(torch.randn(2, 8, 14, 14)).shape == (2, 5, 28, 28)


def test_first_loss_is_about_log_two_where_features_are_quiet():
    torch.manual_seed(0)
    logits = MaskHead(32, 5, (32,) * 4)(torch.randn(10, 32, 14, 14) / 100)
    loss = mask_loss(logits[torch.arange(10), torch.randint(1, 5, (10,))], (torch.rand(10, 28, 28) > 0.5).float(), torch.ones(10, dtype=torch.bool))
    assert abs(loss.item() - math.log(2)) < 0.02


@pytest.mark.parametrize("size", [7, 28])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_targets_are_torchvisions(size, dtype):
    _, boxes, masks, _, index, instance = loss_case()
    ours = mask_targets(masks.to(dtype), boxes, instance, size)
    theirs = torch.cat([project_masks_on_boxes(m, b, i, size) for m, b, i in zip(masks.split(3), boxes.split(6), index.split(6))])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert ours.dtype == boxes.dtype and 0 <= ours.min() and ours.max() <= 1


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_are_torchvisions(seed):
    z, boxes, masks, labels, index, instance = loss_case(seed)
    z.requires_grad_()
    ours = mask_loss(z[torch.arange(12), labels[instance]], mask_targets(masks, boxes, instance, 28), torch.ones(12, dtype=torch.bool))
    theirs = maskrcnn_loss(z, boxes.split(6), masks.split(3), labels.split(3), index.split(6))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (a,), (b,) = (torch.autograd.grad(loss, z) for loss in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    assert torch.equal(a.abs().sum((2, 3)) > 0, F.one_hot(labels[instance], 5).bool())  # the true class alone


def test_padding_and_nothing_cost_nothing():
    z, boxes, masks, labels, _, instance = loss_case()
    t, z, half = mask_targets(masks, boxes, instance, 28), z[torch.arange(12), labels[instance]], torch.arange(12) < 6
    torch.testing.assert_close(mask_loss(z, t, half), mask_loss(z[:6], t[:6], half[:6]))
    z.requires_grad_()
    loss = mask_loss(z, t, half & False)
    loss.backward()
    assert loss == 0 and z.grad.abs().sum() == 0
    assert mask_loss(z[:0], t[:0], half[:0]) == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("m", [7, 28])
def test_pasted_masks_are_torchvisions(seed, m):
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        masks, boxes, size = paste_case(seed=seed, m=m, dtype=dtype)
        torch.testing.assert_close(paste_masks(masks, boxes, size), paste_masks_in_image(masks[:, None], boxes, size)[:, 0], rtol=0, atol=atol)


quarter = st.integers(-320, 800).map(lambda n: n / 4)  # pixels, also beyond the image


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(quarter, quarter, st.integers(0, 900), st.integers(0, 900)), max_size=6), st.sampled_from([1, 7, 14, 28]),
       st.integers(1, 130), st.integers(1, 170), st.integers(0, 2**31))
def test_any_boxes_masks_and_images_are_torchvisions(rows, m, height, width, seed):
    boxes = tensor([(x, y, x + w / 4, y + h / 4) for x, y, w, h in rows], dtype=torch.float64).reshape(-1, 4)
    boxes = boxes[(boxes[:, :2] < tensor([width, height])).all(1) & (boxes[:, 2:] >= 0).all(1)]  # torchvision fails where a box is wholly outside
    masks = torch.rand(len(boxes), m, m, generator=torch.Generator().manual_seed(seed)).double()
    theirs = paste_masks_in_image(masks[:, None], boxes, (height, width))[:, 0] if len(boxes) else masks.new_zeros(0, height, width)
    torch.testing.assert_close(paste_masks(masks, boxes, (height, width)), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("box, share", [
    ([200.0, 10, 240, 50], 0), ([-90.0, -90, -50, -50], 0),  # beyond the image
    ([-10.0, -10, 60, 50], 1), ([0.0, 0, 50, 40], 1),        # all of it
    ([20.0, 20, 20, 20], None),                              # no area: one pixel, as torchvision does
])
def test_boxes_at_the_limits(box, share):
    out = paste_masks(torch.ones(1, 28, 28), tensor([box]), (40, 50))[0]
    assert out.shape == (40, 50) and out.isfinite().all() and out.min() >= 0 and out.max() <= 1 + 1e-6
    if share == 0: assert out.sum() == 0
    if share == 1: assert out[2:-2, 2:-2].min() > 0.99
    if share is None: assert (out > 0).sum() == 1


def test_no_mask_and_half_precision():
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (9, 11)).shape == (0, 9, 11)
    masks, boxes, size = paste_case(dtype=torch.float32)
    halved = paste_masks(masks.bfloat16(), boxes, size)
    assert halved.dtype == torch.bfloat16 and (halved.float() - paste_masks(masks, boxes, size)).abs().max() < 0.02


def test_gradients_go_through_pasting():
    masks, boxes, size = paste_case(4, (40, 50), 6)
    assert torch.autograd.gradcheck(lambda m: paste_masks(m, boxes, size), masks.requires_grad_())


def test_cut_and_pasted_it_is_nearly_the_same_mask():
    y, x = torch.meshgrid(torch.arange(120.0), torch.arange(160.0), indexing="ij")
    discs = torch.stack([((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 < 1 for cx, cy, a, b in ((50, 60, 30, 40), (110, 50, 40, 25))])
    boxes = torchvision.ops.masks_to_boxes(discs) + tensor([0.0, 0, 1, 1])
    pasted = paste_masks(mask_targets(discs, boxes, torch.arange(2), 28), boxes, (120, 160)) >= 0.5
    assert ((pasted & discs).sum((1, 2)) / (pasted | discs).sum((1, 2))).min() > 0.95


@pytest.mark.gpu
def test_gpu_agrees_and_never_waits(gpu):
    masks, boxes, size = paste_case()
    z, b, gt, labels, _, instance = loss_case()
    there = [t.to(gpu) for t in (masks, boxes, z, b, gt, labels, instance)]
    def step(masks, boxes, z, b, gt, labels, instance):
        valid = torch.ones_like(instance, dtype=torch.bool)
        return paste_masks(masks, boxes, size), mask_loss(z[torch.arange(len(z)), labels[instance]], mask_targets(gt, b, instance, 28), valid)
    step(*there)
    with never_waits(gpu): ours = step(*there)
    for a, c in zip(ours, step(masks, boxes, z, b, gt, labels, instance)): torch.testing.assert_close(a.cpu(), c, rtol=0, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(30, 160), min_size=4, max_size=4), st.floats(1.2, 1.6))
def test_boxes_come_back_from_the_targets_of_rectangles(edges, times):
    "Every edge to within a tenth of a pixel and of a cell, if the window has the room that `refine` gives, or more."
    (x1, x2), (y1, y2) = sorted(edges[:2]), sorted(edges[2:])
    box = tensor([[x1, y1, x2 + 8, y2 + 8]]).double()
    mask = torch.zeros(1, 200, 200, dtype=torch.uint8)
    mask[0, y1:y2 + 8, x1:x2 + 8] = 1
    half = (box[:, 2:] - box[:, :2]) / 2 * times
    window = torch.cat([(box[:, :2] + box[:, 2:]) / 2 - half, (box[:, :2] + box[:, 2:]) / 2 + half], 1)
    found, sure = boxes_from_masks(mask_targets(mask, window, tensor([0]), 28), window)
    cells = (window[:, 2:] - window[:, :2]).tile(2) / 28
    assert sure.all() and ((found - box).abs() <= 0.1 + 0.1 * cells).all()


def test_a_mask_that_is_cut_off_ends_with_its_window_and_one_without_opinion_says_so():
    window = tensor([[10.0, 20, 38, 48]]).repeat(4, 1)
    masks = torch.zeros(4, 28, 28)
    masks[0] = 1
    masks[1, :, 14:] = 1
    masks[2] = 0.55
    masks[3, 5, 7] = 0.9  # a single cell: between the centres around it
    found, sure = boxes_from_masks(masks, window)
    assert sure.tolist() == [True, True, False, True]
    torch.testing.assert_close(found[:2] - 0.5, tensor([[10.0, 20, 38, 48], [24.0, 20, 38, 48]]))
    inside = 0.4 / 0.9  # from the cell's centre to one half
    torch.testing.assert_close(found[3] - 0.5, tensor([17.5 - inside, 25.5 - inside, 17.5 + inside, 25.5 + inside]))
    assert [len(x) for x in boxes_from_masks(masks[:0], window[:0])] == [0, 0]
