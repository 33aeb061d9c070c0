"The box head against torchvision: same samples, same losses, same detections; and what padding must never change."
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss

from helpers import never_waits
from maskrcnn_course.box_head import BoxHead, Linear, box_loss, filter_detections, select_training_samples

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def peer(**kwargs):
    defaults = dict(fg_iou_thresh=0.5, bg_iou_thresh=0.5, batch_size_per_image=512, positive_fraction=0.5, bbox_reg_weights=WEIGHTS,
                    score_thresh=0.05, nms_thresh=0.5, detections_per_img=100)
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
    return proposals * valid[..., None], valid, truth * boxes_valid[..., None], labels * boxes_valid, boxes_valid


def rows(*columns):
    return sorted(torch.cat([c if c.dim() == 2 else c[:, None] for c in columns], 1).tolist())


def test_head_has_torchvisions_layers_and_numbers():
    torch.manual_seed(0)
    head, x = BoxHead(8, 5, 7, (16, 16)), torch.randn(6, 8, 7, 7)
    theirs, predictor = TwoMLPHead(8 * 49, 16), FastRCNNPredictor(16, 5)
    weights = head.state_dict()
    theirs.load_state_dict({k.replace("fcs.0", "fc6").replace("fcs.1", "fc7"): v for k, v in weights.items() if k.startswith("fcs")})
    predictor.load_state_dict({k: v for k, v in weights.items() if not k.startswith("fcs")})
    logits, deltas = head(x)
    for ours, peers in zip((logits, deltas.flatten(1)), predictor(theirs(x))): torch.testing.assert_close(ours, peers)
    assert head(x[:0])[1].shape == (0, 5, 4)


def test_loss_of_an_ignorant_head_is_log_of_the_classes():
    torch.manual_seed(0)
    logits, _ = BoxHead(64, 91)(torch.randn(100, 64, 7, 7))
    assert abs(F.cross_entropy(logits, torch.randint(91, (100,))).item() - math.log(91)) < 0.02


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("thresholds", [(0.5, 0.5), (0.6, 0.3)])
def test_candidates_are_torchvisions(seed, thresholds):
    "With room for all, chance plays no part."
    high, low = thresholds
    proposals, valid, boxes, labels, boxes_valid = sampling_case(seed)
    out = select_training_samples(proposals, valid, boxes, labels, boxes_valid, high, low, 1000, 0.5)
    targets = [dict(boxes=b[v], labels=l[v]) for b, l, v in zip(boxes, labels, boxes_valid)]
    theirs = peer(fg_iou_thresh=high, bg_iou_thresh=low, batch_size_per_image=1000).select_training_samples(
        [p[v] for p, v in zip(proposals, valid)], targets)
    for k in range(3):
        b, l, m, v = (o[k] for o in out)
        assert rows(b[v], l[v]) == rows(theirs[0][k], theirs[2][k])
        objects, peers = v & (l > 0), theirs[2][k] > 0
        assert rows(b[objects], m[objects]) == rows(theirs[0][k][peers], theirs[1][k][peers])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 120), fraction=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_sample_has_its_counts_and_its_order(seed, size, fraction):
    case = sampling_case(seed, n=30)
    b, l, m, v = select_training_samples(*case, batch_size_per_image=size, positive_fraction=fraction)
    _, everything, _, everyone = select_training_samples(*case, batch_size_per_image=1000, positive_fraction=1.0)
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
    a, b, c = (select_training_samples(*case, batch_size_per_image=16, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(a[0], c[0])


def loss_case(seed=0, n=40, classes=5):
    g = torch.Generator().manual_seed(seed)
    proposals = random_boxes(g, n)
    matched = proposals + 3 * torch.randn(n, 4, generator=g)
    return (torch.randn(n, classes, generator=g).double(), torch.randn(n, classes, 4, generator=g).double(), proposals,
            torch.randint(classes, (n,), generator=g), matched, torch.ones(n, dtype=torch.bool))


@pytest.mark.parametrize("seed", range(5))
def test_losses_and_gradients_are_torchvisions(seed):
    case = [t.requires_grad_() if i < 2 else t for i, t in enumerate(loss_case(seed))]
    logits, deltas, proposals, labels, matched, _ = case
    targets = BoxCoder(WEIGHTS).encode([matched], [proposals])
    ours, theirs = box_loss(*case), fastrcnn_loss(logits, deltas.flatten(1), [labels], targets)
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(sum(ours), case[:2]), torch.autograd.grad(sum(theirs), case[:2])):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_losses_of_a_batch_are_those_of_its_samples():
    flat = loss_case()
    batch = [t.unflatten(0, (2, 20)) for t in flat]
    for a, b in zip(box_loss(*batch), box_loss(*flat)): torch.testing.assert_close(a, b)


def test_padding_changes_no_loss_whatever_stands_in_it():
    case = loss_case()
    junk = [torch.cat([t, torch.zeros_like(t) if i > 1 else t * 100]) for i, t in enumerate(case)]  # boxes without area
    for a, b in zip(box_loss(*junk), box_loss(*case)): torch.testing.assert_close(a, b)
    nothing = [t[:0] for t in case]
    assert [l.item() for l in box_loss(*nothing)] == [0, 0]
    deltas = junk[1].requires_grad_()
    box_loss(junk[0], deltas, *junk[2:])[1].backward()
    assert deltas.grad.isfinite().all() and deltas.grad[40:].abs().sum() == 0


def test_only_the_true_classs_deltas_learn():
    case = loss_case()
    deltas, labels = case[1].requires_grad_(), case[3]
    box_loss(*case)[1].backward()
    taught = deltas.grad.abs().sum(-1) > 0
    assert torch.equal(taught, F.one_hot(labels, 5).bool() & (labels > 0)[:, None])


def detections_case(seed=0, n=60, classes=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    valid = torch.arange(n) < tensor([[n], [n * 3 // 4], [0]])
    return ((2 * torch.randn(3, n, classes, generator=g)).to(dtype), torch.randn(3, n, classes, 4, generator=g).to(dtype),
            (random_boxes(g, 3, n) * valid[..., None]).to(dtype), valid, tensor([[192, 256], [160, 200], [64, 64]]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kwargs", [{}, dict(score_thresh=0.3), dict(nms_thresh=0.2), dict(detections_per_img=7), dict(nms_thresh=1.0)])
def test_detections_are_torchvisions(seed, kwargs):
    logits, deltas, proposals, valid, sizes = detections_case(seed)
    theirs = peer(**kwargs).postprocess_detections(
        logits[valid], deltas[valid].flatten(1), [p[v] for p, v in zip(proposals, valid)], sizes.tolist())
    b, l, s, v = filter_detections(logits, deltas, proposals, valid, sizes, **kwargs)
    for k in range(3):
        assert torch.equal(l[k, v[k]], theirs[2][k])
        torch.testing.assert_close(b[k, v[k]], theirs[0][k], rtol=0, atol=1e-10)
        torch.testing.assert_close(s[k, v[k]], theirs[1][k], rtol=0, atol=1e-12)


def test_detections_are_sorted_padded_with_zeros_and_inside():
    logits, deltas, proposals, valid, sizes = detections_case(dtype=torch.float32)
    b, l, s, v = filter_detections(logits, deltas * 5, proposals, valid, sizes)
    assert b.shape == (3, 100, 4) and v.sum(1).tolist()[2] == 0
    assert (s.diff(dim=1) <= 0).all() and (v.int().diff(dim=1) <= 0).all()
    for t in (b, l, s): assert t[~v].abs().sum() == 0
    assert (b >= 0).all() and (b[..., 2:] <= sizes.flip(1)[:, None]).all()


def test_a_score_must_exceed_the_threshold_and_an_empty_box_goes():
    half = tensor([[[0.5, 0.5]]]).log()
    case = half, torch.zeros(1, 1, 2, 4), tensor([[[1.0, 1, 5, 5]]]), tensor([[True]]), tensor([[9, 9]])
    score = half.softmax(-1)[0, 0, 1].item()
    assert filter_detections(*case, score_thresh=score)[3].sum() == 0
    assert filter_detections(*case, score_thresh=score - 1e-6)[3].sum() == 1
    beyond = (*case[:2], case[2] + 20, *case[3:])  # clipped to nothing
    assert filter_detections(*beyond)[3].sum() == 0


def test_padding_changes_no_detection():
    logits, deltas, proposals, valid, sizes = detections_case()
    more = [F.pad(t, (0, 0) * (t.dim() - 2) + (0, 30), value=value) for t, value in zip((logits, deltas, proposals), (9.0, 1.0, 50.0))]
    more[0][:, 60:, 1] = 99.0  # as sure as can be
    a = filter_detections(logits, deltas, proposals, valid, sizes)
    b = filter_detections(*more, F.pad(valid, (0, 30)), sizes)
    for x, y in zip(a, b): torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.gpu
def test_gpu_agrees_and_never_waits(gpu):
    case, samples = detections_case(), sampling_case(0)
    here, there = filter_detections(*case), filter_detections(*(t.to(gpu) for t in case))
    for a, b in zip(here, there): torch.testing.assert_close(a, b.cpu(), rtol=0, atol=1e-9)
    samples = [t.to(gpu) for t in samples]
    losses = [t.to(gpu) for t in loss_case()]
    select_training_samples(*samples)
    with never_waits(gpu): out = select_training_samples(*samples)
    assert out[0].device.type == gpu
    for a, b in zip(box_loss(*losses), box_loss(*loss_case())): torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows_", [0, 1, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_linear_is_torchs(rows_, dtype, autocast):
    torch.manual_seed(0)
    ours, theirs, x = Linear(96, 40).to(dtype), torch.nn.Linear(96, 40).to(dtype), torch.randn(rows_, 96).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    results = []
    for layer in (ours, theirs):
        mine = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast): out = layer(mine)
        out.float().square().sum().backward()
        results.append([out.detach(), mine.grad, layer.weight.grad, layer.bias.grad])
    for a, b in zip(*results):
        assert torch.equal(a, b) and a.dtype == b.dtype                   # with gradients, to the bit
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast): a, b = ours(x), theirs(x)
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_linear_without_gradients_compiled_and_strided():
    torch.manual_seed(0)
    layer, x = Linear(96, 40), torch.randn(96, 30).T                     # not contiguous
    with torch.no_grad(): expected = torch.nn.Linear.forward(layer, x)
    with torch.inference_mode(): torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients): found = torch.compile(layer, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)
