"The box head against torchvision: the same parts, samples, losses, detections; and padding changes nothing."
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn, tensor
from torchvision.models.detection import faster_rcnn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss as peer_fastrcnn_loss

from helpers import never_waits
from maskrcnn_course.anchors import Matcher
from maskrcnn_course.box_head import (
    FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead, fastrcnn_loss, postprocess_detections,
    select_training_samples)

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
SAMPLING = dict(matcher=Matcher(0.5, 0.5), batch_size_per_image=512, positive_fraction=0.25)
PAPER = dict(score_thresh=0.05, nms_thresh=0.5, detections_per_img=100)


def peer(**kwargs):
    defaults = PAPER | dict(
        fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=512, positive_fraction=0.5,
        bbox_reg_weights=WEIGHTS)
    return RoIHeads(None, None, None, **defaults | kwargs)


def random_boxes(g, *shape, spread=150.0):
    corner = torch.rand(*shape, 2, generator=g, dtype=torch.float64) * spread
    return torch.cat([corner, corner + 5 + 60 * torch.rand(*shape, 2, generator=g, dtype=torch.float64)], -1)


def sampling_case(seed, n=80, boxes=6, spread=60.0):
    g = torch.Generator().manual_seed(seed)
    truth = random_boxes(g, 3, boxes, spread=spread)
    near = truth[:, torch.randint(boxes, (n // 2,), generator=g)] + 6 * torch.randn(3, n // 2, 4, generator=g)
    proposals = torch.cat([near, random_boxes(g, 3, n - n // 2, spread=spread)], 1)
    valid = torch.arange(n) < tensor([[n], [n // 2], [n]])
    boxes_valid = torch.arange(boxes) < tensor([[boxes], [boxes // 2], [0]])  # the last image is empty
    labels = torch.randint(1, 5, (3, boxes), generator=g)
    proposals, truth = proposals * valid[..., None], truth * boxes_valid[..., None]
    return proposals, valid, truth, labels * boxes_valid, boxes_valid


def rows(*columns):
    return sorted(torch.cat([c if c.dim() == 2 else c[:, None] for c in columns], 1).tolist())


def assert_interchangeable(ours, theirs):
    "Each loads the other's weights, whose names and shapes are the same and in the same order."
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict({k: v + 0.01 for k, v in theirs.state_dict().items()})
    theirs.load_state_dict(ours.state_dict())


def assert_same_answers_and_gradients(ours, theirs, x):
    a, b = ours(x), theirs(x)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    a.square().sum().backward()
    b.square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rois", [0, 1, 6])
def test_two_mlp_head_is_torchvisions(rois):
    torch.manual_seed(0)
    ours, theirs = (head(8 * 49, 16).double() for head in (TwoMLPHead, faster_rcnn.TwoMLPHead))
    assert_interchangeable(ours, theirs)
    assert_same_answers_and_gradients(ours, theirs, torch.randn(rois, 8, 7, 7).double())


@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d])
@pytest.mark.parametrize("layers", [(), (6,), (6, 4, 4)])
@pytest.mark.parametrize("hidden", [(16,), (16, 12)])
def test_head_with_convolutions_is_torchvisions(norm_layer, layers, hidden):
    torch.manual_seed(0)
    ours = FastRCNNConvFCHead(8, 5, layers, hidden, norm_layer).double()
    theirs = faster_rcnn.FastRCNNConvFCHead((8, 5, 5), layers, hidden, norm_layer).double()
    assert_interchangeable(ours, theirs)
    x = torch.randn(6, 8, 5, 5).double()
    assert_same_answers_and_gradients(ours, theirs, x)  # norms with the statistics of the batch ...
    a, b = ours.eval()(x), theirs.eval()(x)             # ... and with the kept ones
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert ours(x[:0]).shape == (0, hidden[-1])


@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d])
def test_convolutions_start_as_in_torchvision(norm_layer):
    "He et al.'s deviation, counted over what goes out; biases 0, and none before a norm."
    torch.manual_seed(0)
    ours = FastRCNNConvFCHead(8, 5, (64, 32), (16,), norm_layer)
    for m in ours.modules():
        if isinstance(m, nn.Conv2d):
            deviation = (2 / (m.out_channels * 9)) ** 0.5
            assert abs(m.weight.std() / deviation - 1) < 0.15
            assert m.bias is None if norm_layer else not m.bias.any()


@pytest.mark.parametrize("rois", [0, 1, 6])
def test_predictor_is_torchvisions_with_a_box_per_class(rois):
    torch.manual_seed(0)
    ours, theirs = (kind(16, 5).double() for kind in (FastRCNNPredictor, faster_rcnn.FastRCNNPredictor))
    assert_interchangeable(ours, theirs)
    x = torch.randn(rois, 16).double()
    (logits, deltas), (their_logits, their_deltas) = ours(x), theirs(x)
    assert deltas.shape == (rois, 5, 4)
    torch.testing.assert_close(logits, their_logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(deltas.flatten(1), their_deltas, rtol=1e-12, atol=1e-12)


def test_loss_of_an_untrained_head_is_log_of_the_classes():
    torch.manual_seed(0)
    head = nn.Sequential(TwoMLPHead(64 * 49, 1024), FastRCNNPredictor(1024, 91))
    logits, _ = head(torch.randn(100, 64, 7, 7))
    assert abs(F.cross_entropy(logits, torch.randint(91, (100,))).item() - math.log(91)) < 0.02


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("thresholds", [(0.5, 0.5), (0.6, 0.3)])
def test_candidates_are_torchvisions(seed, thresholds):
    "With room for all, chance plays no part."
    high, low = thresholds
    proposals, valid, boxes, labels, boxes_valid = sampling_case(seed)
    out = select_training_samples(proposals, valid, boxes, labels, boxes_valid, Matcher(high, low), 1000, 0.5)
    targets = [dict(boxes=b[v], labels=l[v]) for b, l, v in zip(boxes, labels, boxes_valid)]
    heads = peer(fg_iou_thresh=high, bg_iou_thresh=low, batch_size_per_image=1000)
    theirs = heads.select_training_samples([p[v] for p, v in zip(proposals, valid)], targets)
    for k in range(3):
        b, l, m, v = (o[k] for o in out)
        assert rows(b[v], l[v]) == rows(theirs[0][k], theirs[2][k])
        objects, peers = v & (l > 0), theirs[2][k] > 0
        assert rows(b[objects], m[objects]) == rows(theirs[0][k][peers], theirs[1][k][peers])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 120), fraction=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_sample_has_its_counts_and_its_order(seed, size, fraction):
    case = sampling_case(seed, n=30)
    matcher = SAMPLING["matcher"]
    b, l, m, v = select_training_samples(*case, matcher, size, fraction)
    _, everything, _, everyone = select_training_samples(*case, matcher, 1000, 1.0)
    assert b.shape == (3, min(size, 36), 4)
    for k in range(3):
        positive, negative = (everything[k] > 0).sum(), ((everything[k] == 0) & everyone[k]).sum()
        objects, most = (l[k] > 0).sum(), int(size * fraction)
        assert objects == min(positive, most)
        assert v[k].sum() - objects == min(negative, size - objects)
        assert (l[k] > 0)[:objects].all() and v[k][:v[k].sum()].all()  # objects, background, padding
        assert ((b[k][v[k]][:, 2:] - b[k][v[k]][:, :2]) != 0).all()    # no padding among the samples


def test_same_generator_same_samples():
    case = sampling_case(0)
    few = SAMPLING | dict(batch_size_per_image=16)
    generators = (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    a, b, c = (select_training_samples(*case, **few, generator=g) for g in generators)
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(a.boxes, c.boxes)


def loss_case(seed=0, n=40, classes=5):
    g = torch.Generator().manual_seed(seed)
    proposals = random_boxes(g, n)
    matched = proposals + 3 * torch.randn(n, 4, generator=g)
    class_logits = torch.randn(n, classes, generator=g).double()
    box_deltas = torch.randn(n, classes, 4, generator=g).double()
    labels = torch.randint(classes, (n,), generator=g)
    return class_logits, box_deltas, proposals, labels, matched, torch.ones(n, dtype=torch.bool)


@pytest.mark.parametrize("seed", range(5))
def test_losses_and_gradients_are_torchvisions(seed):
    case = [t.requires_grad_() if i < 2 else t for i, t in enumerate(loss_case(seed))]
    logits, deltas, proposals, labels, matched, _ = case
    targets = BoxCoder(WEIGHTS).encode([matched], [proposals])
    ours, theirs = fastrcnn_loss(*case), peer_fastrcnn_loss(logits, deltas.flatten(1), [labels], targets)
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(sum(ours), case[:2]), torch.autograd.grad(sum(theirs), case[:2])):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_losses_of_a_batch_are_those_of_its_samples():
    flat = loss_case()
    batch = [t.unflatten(0, (2, 20)) for t in flat]
    for a, b in zip(fastrcnn_loss(*batch), fastrcnn_loss(*flat)): torch.testing.assert_close(a, b)


def test_padding_changes_no_loss_whatever_stands_in_it():
    case = loss_case()
    junk = [torch.cat([t, torch.zeros_like(t) if i > 1 else t * 100])  # boxes without area
            for i, t in enumerate(case)]
    for a, b in zip(fastrcnn_loss(*junk), fastrcnn_loss(*case)): torch.testing.assert_close(a, b)
    nothing = [t[:0] for t in case]
    assert [l.item() for l in fastrcnn_loss(*nothing)] == [0, 0]
    deltas = junk[1].requires_grad_()
    fastrcnn_loss(junk[0], deltas, *junk[2:])[1].backward()
    assert deltas.grad.isfinite().all() and deltas.grad[40:].abs().sum() == 0


def test_only_the_true_classs_deltas_learn():
    case = loss_case()
    deltas, labels = case[1].requires_grad_(), case[3]
    fastrcnn_loss(*case)[1].backward()
    taught = deltas.grad.abs().sum(-1) > 0
    assert torch.equal(taught, F.one_hot(labels, 5).bool() & (labels > 0)[:, None])


def detections_case(seed=0, n=60, classes=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    valid = torch.arange(n) < tensor([[n], [n * 3 // 4], [0]])
    class_logits = (2 * torch.randn(3, n, classes, generator=g)).to(dtype)
    box_deltas = torch.randn(3, n, classes, 4, generator=g).to(dtype)
    proposals = (random_boxes(g, 3, n) * valid[..., None]).to(dtype)
    return class_logits, box_deltas, proposals, valid, tensor([[192, 256], [160, 200], [64, 64]])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kwargs", [
    {}, dict(score_thresh=0.3), dict(nms_thresh=0.2), dict(detections_per_img=7), dict(nms_thresh=1.0)])
def test_detections_are_torchvisions(seed, kwargs):
    logits, deltas, proposals, valid, sizes = detections_case(seed)
    theirs = peer(**kwargs).postprocess_detections(
        logits[valid], deltas[valid].flatten(1), [p[v] for p, v in zip(proposals, valid)], sizes.tolist())
    b, l, s, v = postprocess_detections(logits, deltas, proposals, valid, sizes, **PAPER | kwargs)
    for k in range(3):
        assert torch.equal(l[k, v[k]], theirs[2][k])
        torch.testing.assert_close(b[k, v[k]], theirs[0][k], rtol=0, atol=1e-10)
        torch.testing.assert_close(s[k, v[k]], theirs[1][k], rtol=0, atol=1e-12)


def test_detections_are_sorted_padded_with_zeros_and_inside():
    logits, deltas, proposals, valid, sizes = detections_case(dtype=torch.float32)
    b, l, s, v = postprocess_detections(logits, deltas * 5, proposals, valid, sizes, **PAPER)
    assert b.shape == (3, 100, 4) and v.sum(1).tolist()[2] == 0
    assert (s.diff(dim=1) <= 0).all() and (v.int().diff(dim=1) <= 0).all()
    for t in (b, l, s): assert t[~v].abs().sum() == 0
    assert (b >= 0).all() and (b[..., 2:] <= sizes.flip(1)[:, None]).all()


def test_a_score_must_exceed_the_threshold_and_an_empty_box_goes():
    half = tensor([[[0.5, 0.5]]]).log()
    case = half, torch.zeros(1, 1, 2, 4), tensor([[[1.0, 1, 5, 5]]]), tensor([[True]]), tensor([[9, 9]])
    score = half.softmax(-1)[0, 0, 1].item()
    def found(case, **kwargs): return postprocess_detections(*case, **PAPER | kwargs).valid.sum()
    assert found(case, score_thresh=score) == 0
    assert found(case, score_thresh=score - 1e-6) == 1
    beyond = (*case[:2], case[2] + 20, *case[3:])  # clipped to nothing
    assert found(beyond) == 0


def test_padding_changes_no_detection():
    *answers, valid, sizes = detections_case()
    more = [F.pad(t, (0, 0) * (t.dim() - 2) + (0, 30), value=value)
            for t, value in zip(answers, (9.0, 1.0, 50.0))]
    more[0][:, 60:, 1] = 99.0  # as high a score as there is
    a = postprocess_detections(*answers, valid, sizes, **PAPER)
    b = postprocess_detections(*more, F.pad(valid, (0, 30)), sizes, **PAPER)
    for x, y in zip(a, b): torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.gpu
def test_gpu_agrees_and_never_waits(gpu):
    case, samples = detections_case(), sampling_case(0)
    here = postprocess_detections(*case, **PAPER)
    there = postprocess_detections(*(t.to(gpu) for t in case), **PAPER)
    for a, b in zip(here, there): torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-9)
    samples = [t.to(gpu) for t in samples]
    losses = [t.to(gpu) for t in loss_case()]
    select_training_samples(*samples, **SAMPLING)
    with never_waits(gpu): out = select_training_samples(*samples, **SAMPLING)
    assert out.boxes.device.type == gpu
    for a, b in zip(fastrcnn_loss(*losses), fastrcnn_loss(*loss_case())):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-12)
