"The region proposal network against torchvision's: head, loss and filter, with the corners a lesson has no room for."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn, tensor
from torch.testing import assert_close
from torchvision.models.detection.anchor_utils import AnchorGenerator as PeerAnchors
from torchvision.models.detection.rpn import RPNHead as PeerHead, RegionProposalNetwork

from maskrcnn_course.anchors import AnchorGenerator
from maskrcnn_course.boxes import batched_nms, decode_boxes, gather_boxes
from maskrcnn_course.rpn import RPNHead, answer_at, filter_proposals, masked_mean, rpn_loss, select_training_anchors

SIZES, RATIOS = ((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3


def levels(height=96, width=128, dtype=torch.float64):
    "Anchors of three levels."
    return AnchorGenerator(SIZES, RATIOS)((height, width), [torch.zeros(1, 1, height // s, width // s, dtype=dtype) for s in (8, 16, 32)])


def answers(anchors, batch, seed=0, spread=0.4):
    "Random logits and deltas per level."
    g = torch.Generator().manual_seed(seed)
    return ([torch.randn(batch, len(a), generator=g, dtype=torch.float64).to(a) for a in anchors],
            [torch.randn(batch, len(a), 4, generator=g, dtype=torch.float64).to(a) * spread for a in anchors])


def peer(top=50, post=30, nms=0.7, score=0.0, min_size=1e-3, sample=10**6):
    "Torchvision's network, for its loss and its filter."
    p = RegionProposalNetwork(PeerAnchors(SIZES, RATIOS), PeerHead(8, 3), 0.7, 0.3, sample, 0.5, dict(training=top, testing=top),
                              dict(training=post, testing=post), nms, score).eval()
    p.min_size = min_size
    return p


def objects(seed, count, height=96, width=128):
    "Random boxes of one image."
    g = torch.Generator().manual_seed(seed)
    corner, side = torch.rand(count, 2, generator=g) * tensor([width - 40.0, height - 40.0]), 8 + 60 * torch.rand(count, 2, generator=g)
    return torch.cat([corner, torch.minimum(corner + side, tensor([float(width), height]))], 1).double()


def pad(boxes):
    "Boxes of all images as one tensor, and which are real."
    n = max(1, *map(len, boxes))
    padded = torch.stack([torch.cat([b, b.new_zeros(n - len(b), 4)]) for b in boxes])
    return padded, torch.arange(n) < tensor([[len(b)] for b in boxes])


def loss_of_sample(objectness, deltas, *about, **settings):
    "The loss, given everyone's answers."
    chosen, *asked = select_training_anchors(*about, **settings)
    return rpn_loss(gather_boxes(objectness, chosen), gather_boxes(deltas, chosen), *asked)


@pytest.mark.parametrize("depth", [1, 2])
def test_head_is_torchvisions(depth):
    ours, theirs = RPNHead(8, 3, depth).double(), PeerHead(8, 3, depth).double()
    theirs.load_state_dict(ours.state_dict())
    maps = [torch.randn(2, 8, h, w, dtype=torch.float64) for h, w in ((12, 16), (6, 8), (3, 5))]
    logits, deltas = theirs(maps)
    for o, d, peer_o, peer_d in zip(*ours(maps), logits, deltas):
        torch.testing.assert_close(o, peer_o.permute(0, 2, 3, 1).flatten(1), atol=1e-14, rtol=1e-12)
        n, _, h, w = peer_d.shape
        torch.testing.assert_close(d, peer_d.view(n, 3, 4, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, 4), atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("shapes", [((12, 16), (6, 8), (3, 5)), ((1, 1),), ((1, 9), (7, 1)), ((2, 2), (1, 1))])
def test_some_answers_are_those_of_the_whole_map_with_the_same_gradients(depth, shapes):
    torch.manual_seed(depth)
    head, maps = RPNHead(8, 3, depth).double(), [torch.randn(2, 8, *s, dtype=torch.float64, requires_grad=True) for s in shapes]
    for p in head.parameters(): nn.init.normal_(p)
    index = torch.stack([torch.randperm(3 * sum(h * w for h, w in shapes)) for _ in range(2)])      # every anchor once, in another order in each image
    some, everyone = answer_at(head, maps, index), [gather_boxes(torch.cat(a, 1), index) for a in head(maps)]
    upstream = [torch.randn_like(a) for a in some]
    for a, b in zip(some, everyone): assert_close(a, b, rtol=1e-10, atol=1e-10)
    wanted = [*maps, *head.parameters()]
    for a, b in zip(*(torch.autograd.grad(answers, wanted, upstream) for answers in (some, everyone))): assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_only_the_windows_of_the_anchors_asked_get_a_gradient():
    head, maps = RPNHead(4, 3), [torch.randn(1, 4, h, w, requires_grad=True) for h, w in ((6, 8), (3, 4))]
    sum(a.sum() for a in answer_at(head, maps, tensor([[3 * 48 + 3 * 5 + 1]]))).backward()      # second level, row 1, column 1
    assert (maps[0].grad == 0).all() and (maps[1].grad[..., :3] != 0).all() and (maps[1].grad[..., 3] == 0).all()


def test_half_precision_stays_half():
    head, maps = RPNHead(8, 3).bfloat16(), [torch.randn(1, 8, 4, 6, dtype=torch.bfloat16)]
    for a, b in zip(answer_at(head, maps, torch.arange(72)[None]), head(maps)):
        assert a.dtype == torch.bfloat16
        assert_close(a, b[0], rtol=2e-2, atol=1e-3)


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
    maps = [torch.stack(torch.meshgrid(torch.arange(0.0, 96, s), torch.arange(0.0, 128, s), indexing="ij")).flip(0)[None] for s in strides]
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
    theirs = p.compute_loss(o.reshape(-1, 1), d.reshape(-1, 4), [l.double() for l in labels], p.box_coder.encode(matched, repeated))
    ours = loss_of_sample(o, d, flat, *pad(boxes), batch_size_per_image=2 * n)
    for a, b in zip(ours, theirs): assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_are_torchvisions():
    anchors = levels()
    flat = torch.cat(anchors)
    inputs = [[torch.cat(x, 1).requires_grad_() for x in answers(anchors, 2)] for _ in range(2)]
    boxes = [objects(0, 3), objects(1, 5)]
    p = peer()
    labels, matched = p.assign_targets_to_anchors([flat] * 2, [dict(boxes=b) for b in boxes])
    targets = p.box_coder.encode(matched, [flat] * 2)
    sum(p.compute_loss(inputs[0][0].reshape(-1, 1), inputs[0][1].reshape(-1, 4), [l.double() for l in labels], targets)).backward()
    sum(loss_of_sample(*inputs[1], flat, *pad(boxes), batch_size_per_image=10**5)).backward()
    for a, b in zip(*inputs): assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-14)


def test_padding_changes_nothing():
    anchors = levels()
    o, d = (torch.cat(x, 1) for x in answers(anchors, 1))
    boxes = objects(0, 3)
    more = torch.cat([boxes, torch.rand(6, 4, dtype=torch.float64)])[None]
    valid = (torch.arange(9) < 3)[None]
    plain = loss_of_sample(o, d, torch.cat(anchors), *pad([boxes]), batch_size_per_image=10**5)
    for a, b in zip(plain, loss_of_sample(o, d, torch.cat(anchors), more, valid, batch_size_per_image=10**5)): assert_close(a, b)


def test_sample_is_balanced_and_repeatable():
    anchors = torch.cat(levels(dtype=torch.float32))
    boxes, valid = pad([objects(0, 3).float()])
    o, d = torch.full((1, len(anchors)), -5.0), torch.zeros(1, len(anchors), 4)
    def run(seed, size): return loss_of_sample(o, d, anchors, boxes, valid, batch_size_per_image=size, generator=torch.Generator().manual_seed(seed))
    assert run(0, 16) == run(0, 16)
    losses = {run(seed, 4)[0].item() for seed in range(20)}
    assert all(abs(l - (5.0067 + 0.0067) / 2) < 1e-3 for l in losses)      # always half of each


def test_loss_without_objects_is_finite_with_finite_gradients():
    anchors = torch.cat(levels(dtype=torch.float32))
    o, d = torch.zeros(1, len(anchors), requires_grad=True), torch.zeros(1, len(anchors), 4, requires_grad=True)
    losses = loss_of_sample(o, d, anchors, torch.zeros(1, 1, 4), tensor([[False]]))
    sum(losses).backward()
    assert losses[1] == 0 and (d.grad == 0).all() and o.grad.isfinite().all()


def test_masked_mean():
    assert masked_mean(tensor([[1.0, 2], [3, 100]]), tensor([[True, True], [True, False]])) == 2
    assert masked_mean(torch.ones(3), torch.zeros(3, dtype=torch.bool)) == 0


@pytest.mark.parametrize("options", [
    dict(), dict(top=5), dict(post=7), dict(nms=0.3), dict(score=0.6), dict(min_size=20.0), dict(top=10**5, post=10**5),
    dict(score=0.999999), dict(top=40, post=20, nms=0.5, score=0.55, min_size=6.0)])
@pytest.mark.parametrize("spread", [0.4, 3.0])
def test_filter_is_torchvisions(options, spread):
    anchors = levels()
    o, d = answers(anchors, 3, seed=1, spread=spread)
    sizes, p = tensor([[96, 128], [80, 100], [96, 60]]), peer(**options)
    decoded = torch.stack([decode_boxes(torch.cat(d, 1)[i], torch.cat(anchors)) for i in range(3)])
    boxes, scores = p.filter_proposals(decoded, torch.cat(o, 1).reshape(-1, 1), [tuple(s) for s in sizes.tolist()], [len(a) for a in anchors])
    given_options = dict(top=50, post=30, nms=0.7, score=0.0, min_size=1e-3) | options
    ours, ours_scores, valid = filter_proposals(o, d, anchors, sizes, *given_options.values())
    for i in range(3):
        assert_close(ours[i, valid[i]], boxes[i], rtol=1e-10, atol=1e-10)
        assert_close(ours_scores[i, valid[i]], scores[i], rtol=1e-12, atol=1e-12)
        assert (ours[i, ~valid[i]] == 0).all() and (ours_scores[i, ~valid[i]] == 0).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), top=st.integers(1, 80), post=st.integers(1, 60), nms=st.floats(0.1, 0.95), spread=st.floats(0.01, 20))
def test_proposals_keep_their_promises(seed, top, post, nms, spread):
    anchors = levels(dtype=torch.float32)
    sizes = tensor([[96, 128], [40, 50]])
    boxes, scores, valid = filter_proposals(*answers(anchors, 2, seed, spread), anchors, sizes, top, post, nms)
    assert boxes.shape[1] <= min(post, sum(min(top, len(a)) for a in anchors))
    assert (valid.int().diff(dim=1) <= 0).all()                                         # the real ones come first
    assert (scores.diff(dim=1) <= 0).all() and boxes.isfinite().all()
    for b, v, (h, w) in zip(boxes, valid, sizes.tolist()):
        assert (b >= 0).all() and (b <= tensor([w, h, w, h])).all() and ((b[:, 2:] - b[:, :2] >= 1e-3).all(1) == v).all()


def test_levels_leave_each_other_alone():
    here = tensor([[10.0, 10, 30, 30]]).expand(2, 4)
    still = [torch.zeros(1, 2, 4)] * 2
    logits = [tensor([[2.0, 1]]), tensor([[3.0, 0]])]
    _, scores, valid = filter_proposals(logits, still, [here, here], tensor([[64, 64]]))
    assert valid.sum() == 2
    assert_close(scores[0, :2], tensor([3.0, 2]).sigmoid())
    alone = batched_nms(here.repeat(2, 1), torch.cat(logits, 1)[0], torch.zeros(4, dtype=torch.int64), 0.7)
    assert len(alone) == 1                                                              # in one group only the best would stay


def test_nothing_left_is_no_error():
    anchors = levels(dtype=torch.float32)
    boxes, scores, valid = filter_proposals(*answers(anchors, 2), anchors, tensor([[96, 128]] * 2), min_size=500.0)
    assert not valid.any() and (boxes == 0).all() and (scores == 0).all()


def test_what_is_no_number_is_dropped_and_an_infinite_logit_is_sure():
    anchors = levels(dtype=torch.float32)
    o, d = answers(anchors, 1)
    o[0][0, 3], o[0][0, 4], d[0][0, 5] = float("nan"), float("inf"), float("nan")
    o[0][0, 5] = 99.0
    boxes, scores, valid = filter_proposals(o, d, anchors, tensor([[96, 128]]), 100, 50)
    assert boxes.isfinite().all() and scores.isfinite().all() and valid.sum() > 10
    assert scores[0, 0] == 1 and (scores[0] == 1).sum() == 1  # the infinite logit alone; 99 went with its box


@pytest.mark.gpu
def test_gpu_agrees_with_cpu(gpu):
    anchors = levels(dtype=torch.float32)
    o, d = answers(anchors, 3)
    sizes = tensor([[96, 128], [80, 100], [96, 60]])
    boxes, valid = pad([objects(i, 3).float() for i in range(3)])
    here = filter_proposals(o, d, anchors, sizes, 100, 50)
    there = filter_proposals(*([x.to(gpu) for x in xs] for xs in (o, d, anchors)), sizes.to(gpu), 100, 50)
    for a, b in zip(here, there): assert_close(a, b.cpu(), atol=1e-3, rtol=1e-4)
    flat = [torch.cat(o, 1), torch.cat(d, 1), torch.cat(anchors), boxes, valid]
    here = loss_of_sample(*flat, batch_size_per_image=10**5)
    there = loss_of_sample(*(x.to(gpu) for x in flat), batch_size_per_image=10**5)
    for a, b in zip(here, there): assert_close(a, b.cpu(), atol=1e-5, rtol=1e-5)
    head, maps, index = RPNHead(8, 3), [torch.randn(2, 8, h, w) for h, w in ((12, 16), (6, 8))], torch.randint(3 * 240, (2, 64))
    here = answer_at(head, maps, index)
    there = answer_at(head.to(gpu), [m.to(gpu) for m in maps], index.to(gpu))
    for a, b in zip(here, there): assert_close(a, b.cpu(), atol=1e-5, rtol=1e-4)
