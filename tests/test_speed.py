"The engine against the lessons: the same values and gradients, faster, and all of it can be undone."
import copy
import io
import pickle

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from torch import nn, tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torchvision.ops.misc import FrozenBatchNorm2d

from helpers import never_waits
from maskrcnn_course import speed
from maskrcnn_course.boxes import batched_gather
from maskrcnn_course.fpn import Backbone, Body, lite0_backbone, tiny_backbone
from maskrcnn_course.mask_head import paste_masks_in_image, project_masks_on_boxes
from maskrcnn_course.mask_rcnn import MaskRCNN, RoIHeads, Transform
from maskrcnn_course.presets import PRESETS, build_model
from maskrcnn_course.rpn import RegionProposalNetwork, RPNHead
from maskrcnn_course.speed import (
    DepthwiseConv2d, FastRegionProposalNetwork, FastRoIHeads, FastTransform, FoldedBatchNorm2d,
    FoldedConv2d, FoldedFrozenBatchNorm2d, _as, answers_in_windows, conv_norm_pairs, fold_norms,
    paste_in_boxes, project_in_parts, slow_down, speed_up, speed_up_depthwise, speed_up_wide_convs)
from maskrcnn_course.winograd import WinogradConv2d


def classes(model): return [(name, type(m)) for name, m in model.named_modules()]


def relative(a, b): return ((a - b).norm() / b.norm()).item()


# Folded norms

class Oddities(nn.Module):
    "Convolutions and norms that must not be folded, and one pair that must."
    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(3, 4, 3, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(6))
        self.biased, self.plain = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, bias=False)
        self.norms[4] = nn.BatchNorm2d(4, affine=False)

    def forward(self, x):
        x = self.norms[1](self.norms[0](self.shared(x)))  # the second follows a norm, no convolution
        x = self.norms[2](self.biased(x))
        x = self.norms[3](self.plain(x).relu_())
        x = self.norms[4](self.plain(x))
        return [self.norms[5](x.mean((2, 3), keepdim=True))]


def random_statistics(body):
    for m in body.modules():
        if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            for t in (m.running_mean, m.running_var, m.weight, m.bias):
                if t is not None: nn.init.uniform_(t, 0.5, 2)
    return body


def test_only_a_norm_right_after_a_convolution_is_folded():
    torch.manual_seed(0)
    plain = random_statistics(Oddities().double().eval())
    folded, x = fold_norms(copy.deepcopy(plain)), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert conv_norm_pairs(plain) == [("shared", "norms.0")]
    assert [type(m) for m in folded.norms] == [FoldedBatchNorm2d] + [nn.BatchNorm2d] * 5
    assert_close(folded(x), plain(x))
    assert list(folded.state_dict()) == list(plain.state_dict())


class OnePair(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.norm, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x): return self.run(self, x)


def asking(b, x): return b.norm(b.conv(x)) if x.mean() < 1e9 else x
def looking_up(b, x): return {3: b.norm}[x.shape[1]](b.conv(x))
def counting(b, x): return sum(b.norm(b.conv(x[i:i + 1])) for i in range(len(x)))
def asserting(b, x):
    assert x.shape[1] == 3
    return b.norm(b.conv(x))


@pytest.mark.parametrize("pairs, run", [
    (1, lambda b, x: b.norm(b.conv(x))),
    (0, lambda b, x: b.norm(input=b.conv(input=x))),                # a folded layer has no keywords
    (1, lambda b, x: b.other(b.norm(b.conv(x)))),
    (0, lambda b, x: b.other(b.conv(b.norm(b.conv(x))))),           # the convolution runs twice
    (0, lambda b, x: b.norm(b.conv(b.norm(x)))),                    # the norm runs twice
    (0, lambda b, x: b.norm(b.conv(x).relu())),
    (0, lambda b, x: b.norm(y := b.conv(x)) + y),                   # the result is used twice
    (0, lambda b, x: [y := b.conv(x), b.norm(y)]),
    (0, lambda b, x: b.norm(b.conv(x) * 2)),
    (0, lambda b, x: b.norm(torch.conv2d(x, b.conv.weight))),
    (0, asking), (0, looking_up), (0, counting), (0, asserting),    # no trace
])
def test_pairs_only_where_they_are_right(pairs, run):
    torch.manual_seed(0)
    plain, x = random_statistics(OnePair(run).double().eval()), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert conv_norm_pairs(plain) == [("conv", "norm")] * pairs
    folded = fold_norms(copy.deepcopy(plain))
    assert (type(folded.norm) is FoldedBatchNorm2d) == (type(folded.conv) is FoldedConv2d) == bool(pairs)
    assert_close(folded(x), plain(x))


def test_a_convolution_under_two_names_is_not_folded():
    conv = nn.Conv2d(3, 3, 1, bias=False)
    body = nn.Sequential(conv, nn.BatchNorm2d(3), conv, nn.BatchNorm2d(3)).eval()
    assert conv_norm_pairs(body) == []


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_pairs_are_found_with_and_without_gradients(grad):
    with grad():
        body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        assert conv_norm_pairs(body) == [("0", "1")]


def resnet(weights=None, norm=nn.BatchNorm2d, block=torchvision.models.resnet.Bottleneck):
    "As ResNet-50, with one block a layer."
    return Body(torchvision.models.ResNet(block, [1, 1, 1, 1], norm_layer=norm), ["layer1", "layer4"])


@pytest.mark.parametrize("make", [
    resnet, lambda: resnet(norm=FrozenBatchNorm2d), torchvision.models.mobilenet_v3_small,
    lambda: timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(1, 4))])
@pytest.mark.parametrize("change", [fold_norms, lambda body: speed_up_depthwise(fold_norms(body))])
def test_folded_bodies_answer_and_learn_as_before(make, change):
    torch.manual_seed(0)
    plain = random_statistics(make().double().eval())
    for m in plain.modules():
        if isinstance(m, nn.Dropout): m.p = 0.0
    fast, x = change(copy.deepcopy(plain)), torch.randn(2, 3, 48, 64, dtype=torch.float64)
    assert not any(type(m) in (nn.BatchNorm2d, FrozenBatchNorm2d) for m in fast.modules())
    assert list(fast.state_dict()) == list(plain.state_dict())
    for mode in (False, True, False):  # a norm that moves is not folded while it does
        results = []
        for body in (fast, plain):
            maps = body.train(mode)(x)
            loss = sum(m.square().mean() for m in (maps if isinstance(maps, list) else [maps]))
            results.append([loss, *torch.autograd.grad(loss, list(body.parameters()), allow_unused=True)])
        for a, b in zip(*results):
            assert (a is None) == (b is None)
            if b is not None: assert_close(a, b, rtol=1e-6, atol=1e-7 * b.abs().max().item() + 1e-12)
    assert_close(list(fast.buffers()), list(plain.buffers()))
    assert classes(slow_down(fast)) == classes(plain)


def test_norms_that_move_are_folded_in_eval_mode_alone():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).double()
    folded, x = fold_norms(copy.deepcopy(plain)), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(folded(x), plain(x))                    # training: the statistics of the batch ...
    assert torch.equal(folded[1].running_mean, plain[1].running_mean) and folded[1].running_mean.any()
    assert torch.equal(folded[0](x), plain[0](x))              # ... of the convolution's own map
    folded.eval(), plain.eval()
    assert_close(folded[0](x), plain(x))                       # now it does the norm's work


@pytest.mark.parametrize("places", [(1, 1), (3, 4), (9, 16)])  # around the layer's weights per channel
@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.BatchNorm2d])
@pytest.mark.parametrize("conv", [
    nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.Conv2d(16, 8, 3, 2, 1, bias=False),
    nn.Conv2d(16, 8, 1, bias=False), nn.Conv2d(16, 16, 3, groups=4, padding=1, bias=False)])
def test_a_factor_goes_to_the_map_or_to_the_weights_with_the_same_result(places, norm, conv):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 1), copy.deepcopy(conv), norm(conv.out_channels), nn.ReLU(inplace=True)]
    plain = random_statistics(nn.Sequential(*layers)).double().eval()
    folded = fold_norms(copy.deepcopy(plain))
    assert type(folded[1]) is FoldedConv2d
    results = []
    for layers in (plain, folded):
        x = torch.linspace(-9, 9, 6 * places[0] * places[1], dtype=torch.float64).view(2, 3, *places).sin()
        out = layers(x.requires_grad_())
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in layers.parameters())])
    for a, b in zip(*results): assert_close(a, b, rtol=1e-10, atol=1e-10)
    with torch.autocast("cpu", torch.bfloat16): assert folded.float()(x.float()).dtype == torch.bfloat16


def test_paddings_of_other_kinds_are_left_alone():
    for padding in (dict(padding="same"), dict(padding=1, padding_mode="reflect")):
        body = nn.Sequential(nn.Conv2d(6, 6, 3, bias=False, groups=6, **padding), nn.BatchNorm2d(6))
        assert classes(speed_up_depthwise(fold_norms(copy.deepcopy(body)))) == classes(body)


# Depthwise layers

def learnt(backbone, x):
    backbone.zero_grad()
    maps = backbone(x)
    sum(m.double().square().mean() for m in maps).backward()
    return [*maps, *(p.grad for p in backbone.parameters() if p.grad is not None)]


def ours_and_torchs():
    torch.manual_seed(0)
    torchs = lite0_backbone(16).train()
    ours = copy.deepcopy(torchs)
    speed_up_depthwise(fold_norms(ours.body))
    fold_norms(torchs.body)
    return ours, torchs


def test_depthwise_layers_learn_as_torchs_do():
    ours, torchs = (b.double() for b in ours_and_torchs())
    assert sum(type(m) is DepthwiseConv2d for m in ours.modules()) == 16
    x = torch.rand(2, 3, 75, 101, dtype=torch.float64)
    found, expected = learnt(ours, x), learnt(torchs, x)
    assert len(found) == len(expected) > 100 and max(map(relative, found, expected)) < 1e-9


def test_depthwise_layers_learn_in_bfloat16():
    ours, torchs = ours_and_torchs()
    x = torch.rand(2, 3, 96, 128)
    with torch.autocast("cpu", torch.bfloat16): found, half = learnt(ours, x), learnt(torchs, x)
    full = learnt(torchs, x)
    assert all(g.dtype == torch.float32 for g in found[5:])
    far, as_far = ([relative(a, b) for a, b in zip(some, full)] for some in (found, half))
    # as near to full precision as torch's own
    assert sum(far) < 1.1 * sum(as_far) and max(far) < 1.5 * max(as_far)


class Layers(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x): return [layer(x) for layer in self.layers]


@pytest.mark.parametrize("fast, layer", [
    (True, nn.Conv2d(6, 6, 5, 2, 2, groups=6)),
    (True, nn.Conv2d(6, 6, (3, 7), padding=(1, 3), groups=6, bias=False)),
    (False, nn.Conv2d(6, 12, 3, 1, 1, groups=6)),
    (False, nn.Conv2d(6, 6, 5, padding="same", groups=6)),
    (False, nn.Conv2d(6, 6, 5, padding=4, dilation=2, groups=6)),
    (False, nn.Conv2d(6, 6, 3, groups=3)),
    (False, nn.Conv2d(6, 6, 5, padding=2, padding_mode="reflect", groups=6)),
    (False, nn.Conv2d(1, 1, 3)),
])
def test_any_layer_with_groups(fast, layer):
    torchs = Backbone(Layers(layer), [layer.out_channels], 4).double()
    ours = copy.deepcopy(torchs)
    speed_up_depthwise(ours.body)
    assert any(type(m) is DepthwiseConv2d for m in ours.modules()) == fast
    x = torch.rand(2, layer.in_channels, 17, 23, dtype=torch.float64)
    its_x, our_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = learnt(torchs, its_x), learnt(ours, our_x)
    assert max(map(relative, [*found, our_x.grad], [*expected, its_x.grad])) < 1e-12 and our_x.grad.any()


def test_checkpointing_computes_depthwise_gradients_again():
    "Non-reentrant checkpointing lets a backward pass ask for what was saved only once."
    torch.manual_seed(0)
    backbone, x = lite0_backbone(16, pretrained=False).train(), torch.randn(1, 3, 64, 64)
    speed_up_depthwise(fold_norms(backbone.body))
    weight = next(p for n, p in backbone.named_parameters() if "conv_dw" in n)
    gradients = []
    for run in (backbone, lambda x: checkpoint(backbone, x, use_reentrant=False)):
        backbone.zero_grad()
        sum(m.square().mean() for m in run(x)).backward()
        gradients.append(weight.grad.clone())
    assert_close(*gradients)


def test_second_derivatives_of_depthwise_layers_are_refused():
    layer = speed_up_depthwise(nn.Sequential(nn.Conv2d(6, 6, 5, groups=6)))
    out = layer(torch.rand(1, 6, 9, 9, requires_grad=True)).square().sum()
    gradient, = torch.autograd.grad(out, [layer[0].weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"): gradient.sum().backward()


# The RPN

@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("shapes", [
    ((12, 16), (6, 8), (3, 5)), ((1, 1),), ((1, 9), (7, 1)), ((2, 2), (1, 1))])
def test_some_answers_are_those_of_the_whole_map_with_the_same_gradients(depth, shapes):
    torch.manual_seed(depth)
    head = RPNHead(8, 3, depth).double()
    maps = [torch.randn(2, 8, *s, dtype=torch.float64, requires_grad=True) for s in shapes]
    for p in head.parameters(): nn.init.normal_(p)
    # every anchor once, in another order in each image
    index = torch.stack([torch.randperm(3 * sum(h * w for h, w in shapes)) for _ in range(2)])
    some = answers_in_windows(head, maps, index)
    everyone = [batched_gather(torch.cat(a, 1), index) for a in head(maps)]
    upstream = [torch.randn_like(a) for a in some]
    for a, b in zip(some, everyone): assert_close(a, b, rtol=1e-10, atol=1e-10)
    wanted = [*maps, *head.parameters()]
    for a, b in zip(*(torch.autograd.grad(answers, wanted, upstream) for answers in (some, everyone))):
        assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_only_the_windows_of_the_anchors_asked_get_a_gradient():
    head, maps = RPNHead(4, 3), [torch.randn(1, 4, h, w, requires_grad=True) for h, w in ((6, 8), (3, 4))]
    index = tensor([[3 * 48 + 3 * 5 + 1]])  # second level, row 1, column 1
    sum(a.sum() for a in answers_in_windows(head, maps, index)).backward()
    assert (maps[0].grad == 0).all()
    assert (maps[1].grad[..., :3] != 0).all() and (maps[1].grad[..., 3] == 0).all()


def test_half_precision_stays_half():
    head, maps = RPNHead(8, 3).bfloat16(), [torch.randn(1, 8, 4, 6, dtype=torch.bfloat16)]
    for a, b in zip(answers_in_windows(head, maps, torch.arange(72)[None]), head(maps)):
        assert a.dtype == torch.bfloat16
        assert_close(a, b[0], rtol=2e-2, atol=1e-3)


def test_the_head_runs_when_its_answers_are_asked_for_and_once():
    torch.manual_seed(0)
    plain = RegionProposalNetwork(8, ((8,), (16,)), ((0.5, 1.0, 2.0),) * 2).double()
    fast = _as(FastRegionProposalNetwork, plain)
    maps = [torch.randn(2, 8, *s, dtype=torch.float64, requires_grad=True) for s in ((12, 16), (6, 8))]
    boxes = tensor([[[10.0, 10, 40, 40]], [[0, 0, 0, 0]]]).double()
    valid, sizes = tensor([[True], [False]]), tensor([[48, 64], [40, 64]])
    calls, forward = [], plain.head.forward
    plain.head.forward = lambda f: calls.append(1) or forward(f)
    results = []
    for rpn, expected in ((plain, 1), (fast, 0)):
        calls.clear()
        output = rpn(maps, (48, 64))
        losses = rpn.losses(maps, output, boxes, valid, torch.Generator().manual_seed(0))
        assert len(calls) == expected
        proposals = rpn.filter_proposals(output, sizes, train=True)
        gradients = torch.autograd.grad(sum(losses.values()), [*maps, *rpn.parameters()])
        assert len(calls) == 1 and not (rpn is fast and output.objectness[0].requires_grad)
        results.append([*losses.values(), *proposals, *gradients])
    for a, b in zip(*results, strict=True): assert_close(a, b, rtol=1e-9, atol=1e-12)


# The mask head

@pytest.mark.parametrize("bins", [14, 3])
@pytest.mark.parametrize("norm", [False, True])
def test_the_mask_of_one_class_is_the_one_picked_from_all(bins, norm):
    torch.manual_seed(0)
    plain = RoIHeads(8, 7, mask_layers=(16, 12), box_hidden=(4, 4), head_norm=norm).double()
    for p in plain.mask_predictor.parameters(): nn.init.normal_(p)
    fast = _as(FastRoIHeads, plain)
    x = torch.randn(9, 8, bins, bins, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(9) % 7
    learning = [x, *plain.mask_head.parameters(), *plain.mask_predictor.parameters()]
    results = []
    for heads in (plain, fast):
        logits = heads.masks_of(x, labels)
        results.append([logits, *torch.autograd.grad(logits.sin().sum(), learning)])
    assert results[1][0].shape == (9, 2 * bins, 2 * bins)
    for a, b in zip(*results, strict=True): assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert fast.eval().masks_of(x[:0], labels[:0]).shape == (0, 2 * bins, 2 * bins)


@pytest.mark.parametrize("instances, samples, at_once", [
    (3, 9, 64), (100, 70, 64), (70, 1, 64), (5, 7, 2), (5, 0, 2)])
def test_targets_in_parts_are_those_of_all_at_once(monkeypatch, instances, samples, at_once):
    g = torch.Generator().manual_seed(0)
    masks = torch.randint(2, (instances, 30, 40), generator=g).to(torch.uint8)
    corner = torch.rand(samples, 2, generator=g).double() * 20
    boxes, instance = torch.cat([corner, corner + 15], 1), torch.randint(instances, (samples,), generator=g)
    expected, seen = project_masks_on_boxes(masks, boxes, instance, 7), []
    def watched(masks, *rest): return seen.append(len(masks)) or project_masks_on_boxes(masks, *rest)
    monkeypatch.setattr(speed, "project_masks_on_boxes", watched)
    assert torch.equal(project_in_parts(masks, boxes, instance, 7, at_once), expected)
    assert max(seen) <= at_once


# Pasting

def paste_case(n=40, size=(120, 160), m=28, seed=0, dtype=torch.float64):
    "Boxes from half a pixel to larger than the image, many of them over its edges."
    g = torch.Generator().manual_seed(seed)
    center = torch.rand(n, 2, generator=g) * tensor([size[1] * 1.0, size[0]])
    half = 2 ** (torch.rand(n, 2, generator=g) * 9 - 2)
    boxes = torch.cat([center - half, center + half], 1).to(dtype)
    return torch.rand(n, m, m, generator=g).to(dtype), boxes, size


@pytest.mark.parametrize("m", [7, 28])
@pytest.mark.parametrize("dtype, atol", [
    (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 2e-2)])
def test_pasting_inside_the_boxes_is_pasting(m, dtype, atol):
    masks, boxes, size = paste_case(m=m)
    masks = masks.to(dtype)
    found, expected = paste_in_boxes(masks, boxes, size), paste_masks_in_image(masks, boxes, size)
    assert found.dtype == expected.dtype == dtype
    assert_close(found, expected, rtol=0, atol=atol)


quarter = st.integers(-320, 800).map(lambda n: n / 4)  # pixels, also beyond the image
edges = st.tuples(quarter, quarter, st.integers(0, 900), st.integers(0, 900))


@settings(deadline=None, max_examples=80)
@given(st.lists(edges, max_size=6), st.sampled_from([1, 7, 14, 28]), st.integers(1, 130),
       st.integers(1, 170), st.integers(0, 2**31))
def test_any_boxes_masks_and_images(rows, m, height, width, seed):
    boxes = tensor([(x, y, x + w / 4, y + h / 4) for x, y, w, h in rows], dtype=torch.float64).reshape(-1, 4)
    masks = torch.rand(len(boxes), m, m, generator=torch.Generator().manual_seed(seed)).double()
    case = masks, boxes, (height, width)
    assert_close(paste_in_boxes(*case), paste_masks_in_image(*case), rtol=0, atol=1e-12)


def test_gradients_go_through_pasting():
    masks, boxes, size = paste_case(4, (40, 50), 6)
    assert torch.autograd.gradcheck(lambda m: paste_in_boxes(m, boxes, size), masks.requires_grad_(),
                                    fast_mode=True)


# The whole model

def resnet_v2():
    "As `standard_v2`, on a small ResNet."
    body = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1])
    body = Body(body, ["layer1", "layer2", "layer3", "layer4"])
    return Backbone(body, [256, 512, 1024, 2048], 32, norm_layer=nn.BatchNorm2d, frozen_norm=False)


def small_v2():
    options = PRESETS["standard_v2"].settings | dict(
        box_layers=(16, 16), box_hidden=(32,), mask_layers=(16, 16), min_size=64, max_size=96,
        anchor_sizes=((8,), (16,), (32,), (48,), (64,)), box_detections_per_img=20)
    return MaskRCNN(resnet_v2(), 5, **options)


def small_laptop():
    return build_model("laptop", fast=False, min_size=96, max_size=128, box_detections_per_img=20)


MODELS = dict(tiny=lambda: build_model("tiny", fast=False), laptop=small_laptop, small_v2=small_v2,
              laptop_avx2=small_laptop)


def scenes(dtype=torch.float64):
    "Two images of different sizes with discs on them."
    g, images, targets = torch.Generator().manual_seed(0), [], []
    for h, w in ((64, 80), (72, 64)):
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        discs = ((20, 22, 11), (44, 40, 16))
        masks = torch.stack([(y - cy) ** 2 + (x - cx) ** 2 < r * r for cy, cx, r in discs])
        boxes = torchvision.ops.masks_to_boxes(masks).to(dtype) + tensor([0.0, 0, 1, 1]).to(dtype)
        images.append((torch.rand(3, h, w, generator=g).to(dtype) + masks.any(0)) / 2)
        targets.append(dict(boxes=boxes, labels=tensor([1, 2]), masks=masks.to(torch.uint8)))
    return images, targets


def trained_losses(model, train=True):
    "Losses and the gradients of all that is trained, by name."
    images, targets = scenes()
    losses = model.train(train)(images, targets, torch.Generator().manual_seed(1))
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return losses | dict(zip(weights, torch.autograd.grad(sum(losses.values()), list(weights.values()))))


def pretend(monkeypatch, capability):
    "That the processor has these instructions, whatever it has."
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)


@pytest.fixture(params=list(MODELS))
def pair(request, monkeypatch):
    "A model in float64 with weights of all sizes, plain and fast."
    pretend(monkeypatch, "AVX2" if request.param.endswith("avx2") else "AVX512")
    torch.manual_seed(0)
    plain = MODELS[request.param]().double()
    head, heads = plain.rpn.head, plain.roi_heads
    for part in (head.cls_logits, head.bbox_pred, *heads.box_predictor.children(),
                 heads.mask_predictor.mask_fcn_logits):
        nn.init.normal_(part.weight, std=0.05)
        nn.init.normal_(part.bias, std=0.05)
    return plain, speed_up(copy.deepcopy(plain))


@pytest.mark.parametrize("train", [True, False])
def test_losses_and_gradients_are_the_plain_models(pair, train):
    expected, found = (trained_losses(model, train) for model in pair)
    assert list(found) == list(expected)
    for name, b in expected.items():
        assert b.isfinite().all()
        atol = 1e-8 * b.abs().max().item() + 1e-12
        assert_close(found[name], b, rtol=1e-7, atol=atol, msg=lambda m: f"{name}: {m}")
    for (name, b), a in zip(pair[0].named_buffers(), pair[1].buffers()):
        assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m: f"{name}: {m}")


@torch.no_grad()
def test_detections_are_the_plain_models(pair):
    plain, fast = (model.eval() for model in pair)
    images, _ = scenes()
    expected, found = plain(images), fast(images)
    assert sum(len(e["boxes"]) for e in expected) > 0
    for e, f in zip(expected, found, strict=True):
        assert list(e) == list(f)
        for key in e: assert_close(f[key], e[key], rtol=1e-7, atol=1e-7)
    stages, others = plain.stages(images), fast.stages(images)
    assert list(stages) == list(others)
    for key in ("features", "objectness", "deltas", "anchors"):
        for a, b in zip(others[key], stages[key], strict=True): assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_names_stay_and_what_is_undone_is_as_before(pair):
    plain, fast = pair
    before = copy.deepcopy(fast)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert type(fast.transform) is FastTransform and type(fast.rpn) is FastRegionProposalNetwork
    assert type(fast.rpn) is FastRegionProposalNetwork and type(fast.roi_heads) is FastRoIHeads
    wide = {n.split(".")[0] for n, m in fast.named_modules() if type(m) is WinogradConv2d}
    has_avx2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
    assert wide == ({"backbone", "rpn", "roi_heads"} if has_avx2 else set())
    assert "FastRegionProposalNetwork" in repr(fast) and fast.settings == plain.settings
    assert speed_up(fast) is fast and classes(fast) == classes(before)            # twice is once
    kept = [id(t) for t in [*fast.parameters(), *fast.buffers()]]
    assert slow_down(fast) is fast and classes(fast) == classes(plain)
    assert [id(t) for t in [*fast.parameters(), *fast.buffers()]] == kept
    for (name, module), other in zip(fast.named_modules(), plain.modules()):
        assert set(vars(module)) == set(vars(other)), name  # no attribute is left behind
    assert classes(slow_down(fast)) == classes(plain)                             # and twice is once
    assert classes(speed_up(fast)) == classes(before)


def test_only_wide_convolutions_and_only_with_avx2_multiply_less(monkeypatch):
    fits = nn.Conv2d(128, 160, 3, padding=1, bias=False)
    others = [nn.Conv2d(128, 160, 3, **options) for options in (
        dict(), dict(padding=1, stride=2), dict(padding=1, groups=2), dict(padding=2, dilation=2),
        dict(padding=1, padding_mode="reflect"), dict(padding="same"))]
    layers = nn.Sequential(fits, *others, nn.Conv2d(64, 160, 3, padding=1), nn.Conv2d(128, 160, 1))
    plain = classes(layers)
    pretend(monkeypatch, "AVX512")
    assert classes(speed_up_wide_convs(layers)) == plain
    pretend(monkeypatch, "AVX2")
    names, x = list(layers.state_dict()), torch.randn(2, 128, 5, 6)
    assert classes(speed_up_wide_convs(layers)) == plain[:1] + [("0", WinogradConv2d)] + plain[2:]
    assert_close(layers[0](x), fits(x), rtol=1e-4, atol=1e-4)
    assert layers[0].weight is fits.weight and list(layers.state_dict()) == names
    assert classes(slow_down(layers)) == plain and set(vars(layers[0])) == set(vars(fits))


def test_no_object_changes_its_class():
    model = build_model("tiny", fast=False)
    parts = dict(model.named_modules())
    kinds = {name: type(m) for name, m in parts.items()}
    speed_up(model)
    assert {name: type(m) for name, m in parts.items()} == kinds
    assert RoIHeads.masks_of is not FastRoIHeads.masks_of and Transform.paste is paste_masks_in_image


@pytest.mark.parametrize("travel", [
    copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)),
    lambda m: torch.load(saved(m), weights_only=False)])
def test_a_fast_model_can_be_copied_and_pickled(pair, travel):
    _, fast = pair
    other, images = travel(fast), scenes()[0]
    assert classes(other) == classes(fast)
    for name, m in other.backbone.body.named_modules():
        if getattr(m, "norm", None):  # its own
            assert m.norm[0] in set(other.backbone.body.modules()), name
    with torch.no_grad():
        for m in other.backbone.body.modules():
            if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d)): m.weight.mul_(1.5)
        changed, before = (m.eval().backbone(m.prepare(images).images)[0] for m in (other, fast))
    has_norms = any(isinstance(m, nn.BatchNorm2d) for m in other.backbone.body.modules())
    assert torch.equal(changed, before) != has_norms  # the copy's norms are its own


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_a_fast_model_changes_its_type(pair):
    plain, fast = (model.eval() for model in pair)
    images = scenes(torch.float32)[0]
    with torch.no_grad():
        expected, found = (m.float().backbone(m.prepare(images).images) for m in (plain, fast))
    for a, b in zip(found, expected): assert a.dtype == torch.float32 and relative(a, b) < 1e-4
    again = fast.double()
    assert all(p.dtype == torch.float64 for p in again.parameters())
    assert all(c.norm[0].weight.dtype == torch.float64 for c in again.modules() if getattr(c, "norm", None))


def test_an_optimizer_made_before_trains_the_same_weights():
    torch.manual_seed(0)
    plain = build_model("tiny", fast=False).double()
    fast = copy.deepcopy(plain)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, fast)]
    speed_up(fast)
    images, targets = scenes()
    start = copy.deepcopy(plain.state_dict())
    for model, optimizer in zip((plain, fast), optimizers):
        for i in range(2):
            optimizer.zero_grad()
            sum(model.train()(images, targets, torch.Generator().manual_seed(i)).values()).backward()
            optimizer.step()
    for (name, b), a in zip(plain.state_dict().items(), fast.state_dict().values()):
        assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert any(not torch.equal(a, start[name]) for name, a in fast.state_dict().items())


def test_weights_loaded_after_speed_up_are_used(pair):
    plain, fast = pair
    with torch.no_grad():
        for p in plain.parameters(): p.mul_(0.9)
    fast.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for a, b in zip(fast.eval().backbone(x), plain.eval().backbone(x)):
            assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_build_model_is_fast_unless_told_not_to():
    assert type(build_model("tiny").rpn) is FastRegionProposalNetwork
    assert type(build_model("tiny", fast=False).rpn.head) is RPNHead


def test_the_laptops_body_has_its_fast_layers():
    kinds = [type(m) for m in build_model("laptop", pretrained=False).modules()]
    assert kinds.count(FoldedConv2d) == 32 and kinds.count(DepthwiseConv2d) == 16
    assert kinds.count(FoldedBatchNorm2d) == 48 and nn.BatchNorm2d not in kinds


def test_a_frozen_resnet_is_folded_with_frozen_norms():
    body = fold_norms(resnet(norm=FrozenBatchNorm2d))
    assert sum(type(m) is FoldedFrozenBatchNorm2d for m in body.modules()) == 17
    assert not any(type(m) is FrozenBatchNorm2d for m in body.modules())


@pytest.mark.gpu
def test_gpu_agrees_and_never_waits(gpu):
    torch.manual_seed(0)
    backbone, x = tiny_backbone().double().eval(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    head = RPNHead(8, 3)
    maps, index = [torch.randn(2, 8, h, w) for h, w in ((12, 16), (6, 8))], torch.randint(3 * 240, (2, 64))
    here = answers_in_windows(head, maps, index)
    there = copy.deepcopy(head).to(gpu), [m.to(gpu) for m in maps], index.to(gpu)
    answers_in_windows(*there)
    with never_waits(gpu): found = answers_in_windows(*there)
    for a, b in zip(here, found): assert_close(a, b.cpu(), atol=1e-5, rtol=1e-4)
    case = paste_case()
    masks, boxes, size = case
    there = paste_in_boxes(masks.to(gpu), boxes.to(gpu), size)
    assert_close(there.cpu(), paste_in_boxes(*case), rtol=0, atol=1e-10)
    body = speed_up_depthwise(fold_norms(copy.deepcopy(backbone.body)))
    for a, b in zip(body(x), body.to(gpu)(x.to(gpu))): assert_close(a, b.cpu())
