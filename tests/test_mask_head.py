"The mask head against torchvision: same layers, same targets, same loss, same pixels."
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings, strategies as st
from torch import nn, tensor
from torchvision.models.detection.mask_rcnn import (
    MaskRCNNHeads as PeerHead, MaskRCNNPredictor as PeerPredictor)
from torchvision.models.detection.roi_heads import (
    maskrcnn_loss as peer_maskrcnn_loss, paste_masks_in_image as peer_paste,
    project_masks_on_boxes as peer_project)

from helpers import never_waits
from maskrcnn_course.box_head import conv_layers
from maskrcnn_course.mask_head import (
    MaskRCNNPredictor, maskrcnn_loss, masks_of_class, paste_masks_in_image, pasting_weights,
    project_masks_on_boxes)


def mask_branch(in_channels, num_classes, layers, norm_layer=None):
    predictor = MaskRCNNPredictor(layers[-1], layers[-1], num_classes)
    return nn.Sequential(conv_layers(in_channels, layers, norm_layer), predictor)


def loss_case(seed=0, n=12, classes=5, m=28):
    "Two images of three instances; the first half of the samples belongs to the first."
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g).double() * 150 - 10
    boxes = torch.cat([corner, corner + 2 + 80 * torch.rand(n, 2, generator=g)], 1)
    masks = F.interpolate(torch.rand(1, 6, 12, 16, generator=g), size=(192, 256))[0] > 0.5
    labels, index = torch.randint(1, classes, (6,), generator=g), torch.randint(3, (n,), generator=g)
    logits = torch.randn(n, classes, m, m, generator=g).double()
    return logits, boxes, masks, labels, index, index + 3 * (torch.arange(n) >= n // 2)


def paste_case(n=40, size=(120, 160), m=28, seed=0, dtype=torch.float64):
    "Boxes from half a pixel to larger than the image, many of them over its edges."
    g = torch.Generator().manual_seed(seed)
    center = torch.rand(n, 2, generator=g) * tensor([size[1] * 1.0, size[0]])
    half = 2 ** (torch.rand(n, 2, generator=g) * 9 - 2)
    boxes = torch.cat([center - half, center + half], 1)
    return torch.rand(n, m, m, generator=g).to(dtype), boxes.to(dtype), size


@pytest.mark.parametrize("layers", [(16,), (16, 16, 16, 16)])
def test_weights_travel_both_ways_and_answers_are_torchvisions(layers):
    torch.manual_seed(0)
    ours, x = mask_branch(8, 5, layers), torch.randn(3, 8, 14, 14)
    theirs = nn.Sequential(PeerHead(8, layers, 1), PeerPredictor(layers[-1], layers[-1], 5))
    for source, target in ((theirs, ours), (mask_branch(8, 5, layers), theirs)):
        target.load_state_dict(source.state_dict(), strict=True)
        assert list(target.state_dict()) == list(source.state_dict())
        torch.testing.assert_close(target(x), source(x), rtol=0, atol=0)
    assert ours(x).shape == (3, 5, 28, 28) and ours(x[:0]).shape == (0, 5, 28, 28)


def test_normalisation_takes_the_place_of_the_bias():
    branch = mask_branch(8, 5, (16, 16), nn.BatchNorm2d)
    first = branch[0][0]
    assert [type(l) for l in first] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] and first[0].bias is None
    assert branch(torch.randn(2, 8, 14, 14)).shape == (2, 5, 28, 28)


def test_one_class_is_picked_for_each_roi_and_only_it_gets_a_gradient():
    z, labels = torch.randn(6, 4, 7, 7, requires_grad=True), tensor([3, 0, 1, 1, 2, 3])
    masks = masks_of_class(z, labels)
    assert torch.equal(masks, torch.stack([z[i, k] for i, k in enumerate(labels)]))
    (gradient,) = torch.autograd.grad(masks.sum(), z)
    assert torch.equal(gradient, F.one_hot(labels, 4)[..., None, None].expand_as(z).to(gradient))
    assert masks_of_class(z[:0], labels[:0]).shape == (0, 7, 7)


def test_first_loss_is_about_log_two_whatever_the_features():
    torch.manual_seed(0)
    branch, labels = mask_branch(32, 5, (32,) * 4), torch.randint(1, 5, (10,))
    targets, valid = (torch.rand(10, 28, 28) > 0.5).float(), torch.ones(10, dtype=torch.bool)
    for size in (0.01, 1):
        logits = branch(torch.randn(10, 32, 14, 14) * size)
        assert abs(maskrcnn_loss(masks_of_class(logits, labels), targets, valid).item() - math.log(2)) < 0.02


@pytest.mark.parametrize("size", [7, 28])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_targets_are_torchvisions(size, dtype):
    _, boxes, masks, _, index, instance = loss_case()
    ours = project_masks_on_boxes(masks.to(dtype), boxes, instance, size)
    images = zip(masks.split(3), boxes.split(6), index.split(6))
    theirs = torch.cat([peer_project(m, b, i, size) for m, b, i in images])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert ours.dtype == boxes.dtype and 0 <= ours.min() and ours.max() <= 1


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_are_torchvisions(seed):
    z, boxes, masks, labels, index, instance = loss_case(seed)
    z.requires_grad_()
    targets, valid = project_masks_on_boxes(masks, boxes, instance, 28), torch.ones(12, dtype=torch.bool)
    ours = maskrcnn_loss(masks_of_class(z, labels[instance]), targets, valid)
    theirs = peer_maskrcnn_loss(z, boxes.split(6), masks.split(3), labels.split(3), index.split(6))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (a,), (b,) = (torch.autograd.grad(loss, z) for loss in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    assert torch.equal(a.abs().sum((2, 3)) > 0, F.one_hot(labels[instance], 5).bool())  # the true class alone


def test_padding_and_nothing_cost_nothing():
    z, boxes, masks, labels, _, instance = loss_case()
    t = project_masks_on_boxes(masks, boxes, instance, 28)
    z, half = masks_of_class(z, labels[instance]), torch.arange(12) < 6
    torch.testing.assert_close(maskrcnn_loss(z, t, half), maskrcnn_loss(z[:6], t[:6], half[:6]))
    z.requires_grad_()
    loss = maskrcnn_loss(z, t, half & False)
    loss.backward()
    assert loss == 0 and z.grad.abs().sum() == 0
    assert maskrcnn_loss(z[:0], t[:0], half[:0]) == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("m", [7, 28])
def test_pasted_masks_are_torchvisions(seed, m):
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        masks, boxes, size = paste_case(seed=seed, m=m, dtype=dtype)
        ours, theirs = paste_masks_in_image(masks, boxes, size), peer_paste(masks[:, None], boxes, size)[:, 0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


quarter = st.integers(-320, 800).map(lambda n: n / 4)  # pixels, also beyond the image


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(quarter, quarter, st.integers(0, 900), st.integers(0, 900)), max_size=6),
       st.sampled_from([1, 7, 14, 28]), st.integers(1, 130), st.integers(1, 170), st.integers(0, 2**31))
def test_any_boxes_masks_and_images_are_torchvisions(rows, m, height, width, seed):
    boxes = [(x, y, x + w / 4, y + h / 4) for x, y, w, h in rows]
    boxes = tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    # torchvision fails where a box is wholly outside
    boxes = boxes[(boxes[:, :2] < tensor([width, height])).all(1) & (boxes[:, 2:] >= 0).all(1)]
    masks = torch.rand(len(boxes), m, m, generator=torch.Generator().manual_seed(seed)).double()
    ours, theirs = paste_masks_in_image(masks, boxes, (height, width)), masks.new_zeros(0, height, width)
    if len(boxes): theirs = peer_paste(masks[:, None], boxes, (height, width))[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_pixels_that_a_mask_reaches():
    masks, boxes, size = paste_case()
    rows, rimmed, columns, reached = pasting_weights(masks, boxes, size)
    assert rimmed.shape == (40, 30, 30) and torch.equal(rimmed[:, 1:-1, 1:-1], masks)
    for i, (x1, y1, x2, y2) in enumerate(reached.clamp(min=0).long().tolist()):
        inside = torch.zeros(size, dtype=torch.bool)
        inside[y1:y2, x1:x2] = True
        assert torch.equal((rows[i].sum(1)[:, None] * columns[i].sum(1)) > 0, inside)


@pytest.mark.parametrize("box, share", [
    ([200.0, 10, 240, 50], 0), ([-90.0, -90, -50, -50], 0),  # beyond the image
    ([-10.0, -10, 60, 50], 1), ([0.0, 0, 50, 40], 1),        # all of it
    ([20.0, 20, 20, 20], None),                              # no area: one pixel, as torchvision does
])
def test_boxes_at_the_limits(box, share):
    out = paste_masks_in_image(torch.ones(1, 28, 28), tensor([box]), (40, 50))[0]
    assert out.shape == (40, 50) and out.isfinite().all() and out.min() >= 0 and out.max() <= 1 + 1e-6
    if share == 0: assert out.sum() == 0
    if share == 1: assert out[2:-2, 2:-2].min() > 0.99
    if share is None: assert (out > 0).sum() == 1


def test_no_mask_and_half_precision():
    assert paste_masks_in_image(torch.zeros(0, 28, 28), torch.zeros(0, 4), (9, 11)).shape == (0, 9, 11)
    masks, boxes, size = paste_case(dtype=torch.float32)
    whole, halved = (paste_masks_in_image(m, boxes, size) for m in (masks, masks.bfloat16()))
    assert halved.dtype == torch.bfloat16 and (halved.float() - whole).abs().max() < 0.02


def test_gradients_go_through_pasting():
    masks, boxes, size = paste_case(4, (40, 50), 6)
    assert torch.autograd.gradcheck(lambda m: paste_masks_in_image(m, boxes, size), masks.requires_grad_(),
                                    fast_mode=True)


def test_cut_and_pasted_it_is_nearly_the_same_mask():
    y, x = torch.meshgrid(torch.arange(120.0), torch.arange(160.0), indexing="ij")
    ellipses = (50, 60, 30, 40), (110, 50, 40, 25)
    discs = torch.stack([((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 < 1 for cx, cy, a, b in ellipses])
    boxes = torchvision.ops.masks_to_boxes(discs) + tensor([0.0, 0, 1, 1])
    cut = project_masks_on_boxes(discs, boxes, torch.arange(2), 28)
    pasted = paste_masks_in_image(cut, boxes, (120, 160)) >= 0.5
    assert ((pasted & discs).sum((1, 2)) / (pasted | discs).sum((1, 2))).min() > 0.95


@pytest.mark.gpu
def test_gpu_agrees_and_never_waits(gpu):
    masks, boxes, size = paste_case()
    z, b, gt, labels, _, instance = loss_case()
    there = [t.to(gpu) for t in (masks, boxes, z, b, gt, labels, instance)]
    def step(masks, boxes, z, b, gt, labels, instance):
        valid = torch.ones_like(instance, dtype=torch.bool)
        loss = maskrcnn_loss(
            masks_of_class(z, labels[instance]), project_masks_on_boxes(gt, b, instance, 28), valid)
        return paste_masks_in_image(masks, boxes, size), loss
    step(*there)
    with never_waits(gpu): ours = step(*there)
    for a, c in zip(ours, step(masks, boxes, z, b, gt, labels, instance)):
        torch.testing.assert_close(a.cpu(), c, rtol=0, atol=1e-10)
