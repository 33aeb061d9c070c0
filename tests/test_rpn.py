"The region proposal network against torchvision's: head, loss, filter, module, and the corners of each."
import inspect
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn, tensor
from torch.testing import assert_close
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator as PeerAnchors
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork as PeerRPN, RPNHead as PeerHead
from torchvision.models.detection.rpn import permute_and_flatten as peer_permute

from maskrcnn_course.anchors import AnchorGenerator, Matcher
from maskrcnn_course.boxes import batched_gather, batched_nms, decode_boxes, nms_mask
from maskrcnn_course.rpn import (RegionProposalNetwork, RPNHead, filter_proposals, masked_mean,
                                 permute_and_flatten, rpn_loss, select_training_anchors)

PAPER = Matcher(0.7, 0.3, allow_low_quality_matches=True)
SIZES, RATIOS = ((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3


def levels(height=96, width=128, dtype=torch.float64):
    "Anchors of three levels."
    maps = [torch.zeros(1, 1, height // s, width // s, dtype=dtype) for s in (8, 16, 32)]
    return AnchorGenerator(SIZES, RATIOS)((height, width), maps)


def answers(anchors, batch, seed=0, spread=0.4):
    "Random logits and deltas per level."
    g = torch.Generator().manual_seed(seed)
    return ([torch.randn(batch, len(a), generator=g, dtype=torch.float64).to(a) for a in anchors],
            [torch.randn(batch, len(a), 4, generator=g, dtype=torch.float64).to(a) * spread for a in anchors])


def peer(top=50, post=30, nms=0.7, score=0.0, min_size=1e-3, sample=10**6):
    "Torchvision's network, for its loss and its filter."
    p = PeerRPN(PeerAnchors(SIZES, RATIOS), PeerHead(8, 3), 0.7, 0.3, sample, 0.5,
                dict(training=top, testing=top), dict(training=post, testing=post), nms, score).eval()
    p.min_size = min_size
    return p


def objects(seed, count, height=96, width=128):
    "Random boxes of one image."
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=g) * tensor([width - 40.0, height - 40.0])
    side = 8 + 60 * torch.rand(count, 2, generator=g)
    return torch.cat([corner, torch.minimum(corner + side, tensor([float(width), height]))], 1).double()


def pad(boxes):
    "Boxes of all images as one tensor, and which are real."
    n = max(1, *map(len, boxes))
    padded = torch.stack([torch.cat([b, b.new_zeros(n - len(b), 4)]) for b in boxes])
    return padded, torch.arange(n) < tensor([[len(b)] for b in boxes])


def loss_of_sample(objectness, deltas, anchors, boxes, valid, size=256, generator=None):
    "The loss, given the answers of all anchors."
    chosen, *truth = select_training_anchors(anchors, boxes, valid, PAPER, size, 0.5, generator)
    return rpn_loss(batched_gather(objectness, chosen), batched_gather(deltas, chosen), *truth)


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 3), k=st.integers(1, 4), values=st.integers(1, 5), rows=st.integers(1, 6),
       columns=st.integers(1, 6))
def test_the_order_of_the_answers_is_torchvisions(batch, k, values, rows, columns):
    maps = torch.randn(batch, k * values, rows, columns)
    theirs = peer_permute(maps, batch, k, values, rows, columns)
    assert torch.equal(permute_and_flatten(maps, values), theirs)


@pytest.mark.parametrize("depth", [1, 2])
def test_head_is_torchvisions(depth):
    ours, theirs = RPNHead(8, 3, depth).double(), PeerHead(8, 3, depth).double()
    theirs.load_state_dict(ours.state_dict())
    maps = [torch.randn(2, 8, h, w, dtype=torch.float64) for h, w in ((12, 16), (6, 8), (3, 5))]
    logits, deltas = theirs(maps)
    for o, d, peer_o, peer_d in zip(*ours(maps), logits, deltas):
        assert_close(o, peer_o.permute(0, 2, 3, 1).flatten(1), atol=1e-14, rtol=1e-12)
        n, _, h, w = peer_d.shape
        peer_d = peer_d.view(n, 3, 4, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, 4)
        assert_close(d, peer_d, atol=1e-14, rtol=1e-12)


def test_half_precision_stays_half():
    head, maps = RPNHead(8, 3).bfloat16(), [torch.randn(1, 8, 4, 6, dtype=torch.bfloat16)]
    for [a] in head(maps): assert a.dtype == torch.bfloat16 and a.shape[:2] == (1, 72)


def test_head_starts_undecided():
    torch.manual_seed(0)
    head = RPNHead(64, 3)
    assert all(p.std() < 0.012 for p in head.parameters() if p.dim() > 1)
    assert all((p == 0).all() for p in head.parameters() if p.dim() == 1)
    o, d = head([torch.randn(2, 64, 12, 16)])
    anchors = torch.cat(levels(dtype=torch.float32))[: o[0].shape[1]]
    boxes, valid = pad([objects(0, 3).float(), objects(1, 1).float()])
    assert abs(loss_of_sample(o[0], d[0], anchors, boxes, valid)[0].item() - math.log(2)) < 0.02


def test_answers_stand_in_the_order_of_the_anchors():
    generator, strides = AnchorGenerator(SIZES, RATIOS), (8, 16, 32)
    head = RPNHead(2, 3)
    for p in head.parameters(): nn.init.zeros_(p)
    with torch.no_grad():
        head.conv[0][0].weight[:, :, 1, 1] = torch.eye(2)
        head.bbox_pred.weight[:, :, 0, 0] = torch.eye(2).repeat(6, 1)
    grids = [(torch.arange(0.0, 96, s), torch.arange(0.0, 128, s)) for s in strides]
    maps = [torch.stack(torch.meshgrid(*grid, indexing="ij")).flip(0)[None] for grid in grids]
    for d, a, cell in zip(head(maps)[1], generator((96, 128), maps), generator.cells):
        assert torch.equal(d[0].view(-1, 3, 4) + cell, a.view(-1, 3, 4))


@pytest.mark.parametrize("counts", [(3,), (2, 7), (0, 4), (0,), (5, 1, 12)])
def test_loss_is_torchvisions_when_everyone_takes_part(counts):
    anchors = levels()
    flat, n = torch.cat(anchors), sum(map(len, anchors))
    o, d = (torch.cat(x, 1) for x in answers(anchors, len(counts)))
    boxes = [objects(i, c) for i, c in enumerate(counts)]
    p, repeated = peer(), [flat] * len(counts)
    labels, matched = p.assign_targets_to_anchors(repeated, [dict(boxes=b) for b in boxes])
    labels, targets = [l.double() for l in labels], p.box_coder.encode(matched, repeated)
    theirs = p.compute_loss(o.reshape(-1, 1), d.reshape(-1, 4), labels, targets)
    ours = loss_of_sample(o, d, flat, *pad(boxes), size=2 * n)
    for a, b in zip(ours, theirs): assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_are_torchvisions():
    anchors = levels()
    flat = torch.cat(anchors)
    inputs = [[torch.cat(x, 1).requires_grad_() for x in answers(anchors, 2)] for _ in range(2)]
    boxes = [objects(0, 3), objects(1, 5)]
    p = peer()
    labels, matched = p.assign_targets_to_anchors([flat] * 2, [dict(boxes=b) for b in boxes])
    labels, targets = [l.double() for l in labels], p.box_coder.encode(matched, [flat] * 2)
    sum(p.compute_loss(inputs[0][0].reshape(-1, 1), inputs[0][1].reshape(-1, 4), labels, targets)).backward()
    sum(loss_of_sample(*inputs[1], flat, *pad(boxes), size=10**5)).backward()
    for a, b in zip(*inputs): assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-14)


def test_padding_changes_nothing():
    anchors = levels()
    o, d = (torch.cat(x, 1) for x in answers(anchors, 1))
    boxes = objects(0, 3)
    more = torch.cat([boxes, torch.rand(6, 4, dtype=torch.float64)])[None]
    valid = (torch.arange(9) < 3)[None]
    plain = loss_of_sample(o, d, torch.cat(anchors), *pad([boxes]), size=10**5)
    padded = loss_of_sample(o, d, torch.cat(anchors), more, valid, size=10**5)
    for a, b in zip(plain, padded): assert_close(a, b)


def test_sample_is_balanced_and_repeatable():
    anchors = torch.cat(levels(dtype=torch.float32))
    boxes, valid = pad([objects(0, 3).float()])
    o, d = torch.full((1, len(anchors)), -5.0), torch.zeros(1, len(anchors), 4)
    def run(seed, size):
        return loss_of_sample(o, d, anchors, boxes, valid, size, torch.Generator().manual_seed(seed))
    assert run(0, 16) == run(0, 16)
    losses = {run(seed, 4)[0].item() for seed in range(20)}
    assert all(abs(l - (5.0067 + 0.0067) / 2) < 1e-3 for l in losses)      # always half of each


def test_loss_without_objects_is_finite_with_finite_gradients():
    anchors = torch.cat(levels(dtype=torch.float32))
    o = torch.zeros(1, len(anchors), requires_grad=True)
    d = torch.zeros(1, len(anchors), 4, requires_grad=True)
    losses = loss_of_sample(o, d, anchors, torch.zeros(1, 1, 4), tensor([[False]]))
    sum(losses).backward()
    assert losses[1] == 0 and (d.grad == 0).all() and o.grad.isfinite().all()


def test_masked_mean():
    assert masked_mean(tensor([[1.0, 2], [3, 100]]), tensor([[True, True], [True, False]])) == 2
    assert masked_mean(torch.ones(3), torch.zeros(3, dtype=torch.bool)) == 0


@pytest.mark.parametrize("options", [
    dict(), dict(top=5), dict(post=7), dict(nms=0.3), dict(score=0.6), dict(min_size=20.0),
    dict(top=10**5, post=10**5), dict(score=0.999999),
    dict(top=40, post=20, nms=0.5, score=0.55, min_size=6.0)])
@pytest.mark.parametrize("spread", [0.4, 3.0])
def test_filter_is_torchvisions(options, spread):
    anchors = levels()
    o, d = answers(anchors, 3, seed=1, spread=spread)
    sizes, p = tensor([[96, 128], [80, 100], [96, 60]]), peer(**options)
    decoded = torch.stack([decode_boxes(torch.cat(d, 1)[i], torch.cat(anchors)) for i in range(3)])
    image_sizes, lengths = [tuple(s) for s in sizes.tolist()], [len(a) for a in anchors]
    boxes, scores = p.filter_proposals(decoded, torch.cat(o, 1).reshape(-1, 1), image_sizes, lengths)
    given_options = dict(top=50, post=30, nms=0.7, score=0.0, min_size=1e-3) | options
    ours, ours_scores, valid = filter_proposals(o, d, anchors, sizes, *given_options.values())
    for i in range(3):
        assert_close(ours[i, valid[i]], boxes[i], rtol=1e-10, atol=1e-10)
        assert_close(ours_scores[i, valid[i]], scores[i], rtol=1e-12, atol=1e-12)
        assert (ours[i, ~valid[i]] == 0).all() and (ours_scores[i, ~valid[i]] == 0).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), top=st.integers(1, 80), post=st.integers(1, 60), nms=st.floats(0.1, 0.95),
       spread=st.floats(0.01, 20))
def test_proposals_keep_their_promises(seed, top, post, nms, spread):
    anchors = levels(dtype=torch.float32)
    sizes = tensor([[96, 128], [40, 50]])
    o, d = answers(anchors, 2, seed, spread)
    boxes, scores, valid = filter_proposals(o, d, anchors, sizes, top, post, nms)
    assert boxes.shape[1] <= min(post, sum(min(top, len(a)) for a in anchors))
    assert (valid.int().diff(dim=1) <= 0).all()                                     # the real ones come first
    assert (scores.diff(dim=1) <= 0).all() and boxes.isfinite().all()
    for b, v, (h, w) in zip(boxes, valid, sizes.tolist()):
        assert (b >= 0).all() and (b <= tensor([w, h, w, h])).all()
        assert ((b[:, 2:] - b[:, :2] >= 1e-3).all(1) == v).all()


def test_levels_leave_each_other_alone():
    here = tensor([[10.0, 10, 30, 30]]).expand(2, 4)
    still = [torch.zeros(1, 2, 4)] * 2
    logits = [tensor([[2.0, 1]]), tensor([[3.0, 0]])]
    _, scores, valid = filter_proposals(logits, still, [here, here], tensor([[64, 64]]), 1000, 1000, 0.7)
    assert valid.sum() == 2
    assert_close(scores[0, :2], tensor([3.0, 2]).sigmoid())
    alone = batched_nms(here.repeat(2, 1), torch.cat(logits, 1)[0], torch.zeros(4, dtype=torch.int64), 0.7)
    assert len(alone) == 1  # in one group only the best would stay


def test_nothing_left_is_no_error():
    anchors = levels(dtype=torch.float32)
    (o, d), sizes = answers(anchors, 2), tensor([[96, 128]] * 2)
    boxes, scores, valid = filter_proposals(o, d, anchors, sizes, 100, 50, 0.7, min_size=500.0)
    assert not valid.any() and (boxes == 0).all() and (scores == 0).all()


def test_what_is_no_number_is_dropped_and_an_infinite_logit_is_sure():
    anchors = levels(dtype=torch.float32)
    o, d = answers(anchors, 1)
    o[0][0, 3], o[0][0, 4], d[0][0, 5] = float("nan"), float("inf"), float("nan")
    o[0][0, 5] = 99.0
    boxes, scores, valid = filter_proposals(o, d, anchors, tensor([[96, 128]]), 100, 50, 0.7)
    assert boxes.isfinite().all() and scores.isfinite().all() and valid.sum() > 10
    assert scores[0, 0] == 1 and (scores[0] == 1).sum() == 1  # the infinite logit alone; 99 went with its box


def network(**numbers):
    "The module, for the three levels, with answers that are not nearly zero."
    rpn = RegionProposalNetwork(8, SIZES, RATIOS, **numbers)
    torch.manual_seed(0)
    for p in rpn.parameters(): nn.init.normal_(p, std=0.2)
    return rpn


def random_maps(batch):
    "Features of images of 96 x 128 pixels, one map per level."
    return [torch.randn(batch, 8, 96 // s, 128 // s) for s in (8, 16, 32)]


def no_backbone():
    "As little of a backbone as torchvision takes."
    backbone = nn.Identity()
    backbone.out_channels = 8
    return backbone


def test_the_modules_numbers_are_torchvisions():
    ours, theirs = (inspect.signature(c).parameters for c in (RegionProposalNetwork, FasterRCNN))
    names = [name for name in ours if name.startswith("rpn_") and name != "rpn_conv_depth"]
    assert len(names) == 10 and all(ours[name].default == theirs[name].default for name in names)
    rpn = RegionProposalNetwork(8)
    assert all(getattr(rpn, name) == theirs[name].default for name in names)
    generator = FasterRCNN(no_backbone(), 2).rpn.anchor_generator
    assert (rpn.anchor_sizes, rpn.aspect_ratios) == (generator.sizes, generator.aspect_ratios)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("limits", [(0.7, 0.7, 0.3, 0.0), (0.4, 0.6, 0.4, 0.55)])
@pytest.mark.parametrize("counts", [(2, 5), (0, 3)])
def test_the_module_is_torchvisions(train, depth, limits, counts):
    nms, high, low, score = limits
    rpn = network(
        rpn_conv_depth=depth, rpn_pre_nms_top_n_train=60, rpn_post_nms_top_n_train=40,
        rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_test=30, rpn_nms_thresh=nms, rpn_score_thresh=score,
        rpn_fg_iou_thresh=high, rpn_bg_iou_thresh=low, rpn_batch_size_per_image=10**5).double()
    peer = PeerRPN(PeerAnchors(SIZES, RATIOS), PeerHead(8, 3, depth), high, low, 10**5, 0.5,
                   dict(training=60, testing=50), dict(training=40, testing=30), nms, score)
    peer.double().train(train).load_state_dict(rpn.state_dict())
    sizes, maps = tensor([[96, 128], [80, 100]]), [m.double() for m in random_maps(2)]
    images = ImageList(torch.zeros(2, 3, 96, 128), [tuple(s) for s in sizes.tolist()])
    boxes = [objects(i, count) for i, count in enumerate(counts)]
    peer_boxes, peer_losses = peer(images, dict(enumerate(maps)), [dict(boxes=b) for b in boxes])
    output = rpn(maps, (96, 128))
    proposals = rpn.filter_proposals(output, sizes, train=train)
    for i in range(2):
        assert_close(proposals.boxes[i, proposals.valid[i]], peer_boxes[i], rtol=1e-10, atol=1e-10)
    if train:
        losses = rpn.losses(maps, output, *pad(boxes))
        assert losses.keys() == peer_losses.keys()
        for name in losses:  # torchvision's labels are float32, and so is its cross-entropy
            assert_close(losses[name], peer_losses[name].double(), rtol=1e-6, atol=1e-6)


def test_the_modules_losses_are_those_of_its_functions_and_repeatable():
    rpn, maps = network(rpn_batch_size_per_image=16, rpn_positive_fraction=0.25), random_maps(2)
    boxes, valid = pad([objects(0, 3).float(), objects(1, 5).float()])
    output = rpn(maps, (96, 128))
    def run(seed):
        losses = rpn.losses(maps, output, boxes, valid, torch.Generator().manual_seed(seed))
        return [loss.item() for loss in losses.values()]
    chosen, *truth = select_training_anchors(
        torch.cat(output.anchors), boxes, valid, PAPER, 16, 0.25, torch.Generator().manual_seed(1))
    o, d = (batched_gather(torch.cat(x, 1), chosen) for x in (output.objectness, output.deltas))
    assert run(1) == run(1) == [l.item() for l in rpn_loss(o, d, *truth)] != run(2)


def test_changed_numbers_and_another_suppression_take_effect():
    rpn, sizes = network(), tensor([[96, 128]])
    output = rpn(random_maps(1), (96, 128))
    rpn.rpn_post_nms_top_n_test = 7
    assert rpn.filter_proposals(output, sizes).boxes.shape == (1, 7, 4)
    rpn.rpn_fg_iou_thresh, rpn.rpn_bg_iou_thresh = 0.6, 0.2
    assert vars(rpn.matcher()) == vars(Matcher(0.6, 0.2, allow_low_quality_matches=True))
    calls = []
    def counted(*about):
        calls.append(about)
        return nms_mask(*about)
    expected = rpn.filter_proposals(output, sizes)
    rpn.suppress = counted
    for a, b in zip(rpn.filter_proposals(output, sizes), expected): assert torch.equal(a, b)
    assert len(calls) == 1


def test_no_gradient_goes_through_the_proposals():
    rpn = network()
    output = rpn(random_maps(1), (96, 128))
    assert all(o.requires_grad for o in output.objectness)
    assert not any(x.requires_grad for x in rpn.filter_proposals(output, tensor([[96, 128]])))


@pytest.mark.gpu
def test_gpu_agrees_with_cpu(gpu):
    anchors = levels(dtype=torch.float32)
    o, d = answers(anchors, 3)
    sizes = tensor([[96, 128], [80, 100], [96, 60]])
    boxes, valid = pad([objects(i, 3).float() for i in range(3)])
    here = filter_proposals(o, d, anchors, sizes, 100, 50, 0.7)
    moved = ([x.to(gpu) for x in xs] for xs in (o, d, anchors))
    there = filter_proposals(*moved, sizes.to(gpu), 100, 50, 0.7)
    for a, b in zip(here, there): assert_close(a, b.cpu(), atol=1e-3, rtol=1e-4)
    flat = [torch.cat(o, 1), torch.cat(d, 1), torch.cat(anchors), boxes, valid]
    here = loss_of_sample(*flat, size=10**5)
    there = loss_of_sample(*(x.to(gpu) for x in flat), size=10**5)
    for a, b in zip(here, there): assert_close(a, b.cpu(), atol=1e-5, rtol=1e-5)
    rpn, maps = network(), random_maps(2)
    here = rpn(maps, (96, 128))
    there = rpn.to(gpu)([m.to(gpu) for m in maps], (96, 128))
    for name in ("objectness", "deltas", "anchors"):
        for a, b in zip(getattr(here, name), getattr(there, name)):
            assert_close(a, b.cpu(), atol=1e-5, rtol=1e-4)
