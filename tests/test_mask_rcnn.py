"The model, plain and fast, against torchvision's with the same weights; weights both ways; any targets."
import copy
import functools
import hashlib
import http.server
import threading

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import MaskRCNN as Peer, faster_rcnn as tv_boxes, mask_rcnn as tv_masks
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from helpers import loud
from maskrcnn_course.mask_rcnn import MaskRCNN, Transform
from maskrcnn_course.presets import build_model, load_model, save_model
from maskrcnn_course.speed import speed_up

EVERYTHING = dict(
    rpn_batch_size_per_image=10**6, box_batch_size_per_image=10**4, box_positive_fraction=0.5,
    rpn_pre_nms_top_n_train=100, rpn_post_nms_top_n_train=40,
    rpn_pre_nms_top_n_test=100, rpn_post_nms_top_n_test=40,
    box_score_thresh=0.01, box_detections_per_img=20)
SMALL = dict(num_classes=4, min_size=64, max_size=100, **EVERYTHING)
BOTH = pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])


def anchors(levels): return AnchorGenerator(((16, 40, 90),) * levels, ((0.5, 1.0, 2.0),) * levels)
def resnet(name, **kwargs): return resnet_fpn_backbone(backbone_name=name, weights=None, **kwargs)
def mobilenet(name, **kwargs): return mobilenet_backbone(backbone_name=name, weights=None, fpn=True, **kwargs)


def whole(name): return torchvision.models.get_model(name, weights=None, weights_backbone=None, **SMALL)


PEERS = {
    "resnet50_fpn": lambda: whole("maskrcnn_resnet50_fpn"),
    "resnet50_fpn_v2": lambda: whole("maskrcnn_resnet50_fpn_v2"),
    "resnet18, frozen norm, three layers trained": lambda: Peer(
        resnet("resnet18", trainable_layers=3), **SMALL),
    "resnet18, norm that learns, all trained": lambda: Peer(
        resnet("resnet18", norm_layer=nn.BatchNorm2d, trainable_layers=5), **SMALL),
    "resnet34, three levels, none trained": lambda: Peer(
        resnet("resnet34", returned_layers=[2, 3, 4], trainable_layers=0),
        rpn_anchor_generator=anchors(4), **SMALL),
    "mobilenet_v3_large": lambda: Peer(
        mobilenet("mobilenet_v3_large", trainable_layers=4), rpn_anchor_generator=anchors(3), **SMALL),
    "mobilenet_v2, norm that learns": lambda: Peer(
        mobilenet("mobilenet_v2", norm_layer=nn.BatchNorm2d), rpn_anchor_generator=anchors(3),
        **SMALL | dict(min_size=96, max_size=150)),  # fewer pixels give it too few detections to compare
    "ours: tiny": lambda: build_model("tiny", **EVERYTHING).to_torchvision(),
    "ours: laptop": lambda: build_model("laptop", min_size=96, max_size=128, **EVERYTHING).to_torchvision(),
}


@torch.no_grad()
def settle(peer):
    "Batch norm as after some training; residual branches that do not add up to huge numbers."
    for name, layer in peer.named_modules():
        if not isinstance(layer, (nn.BatchNorm2d, FrozenBatchNorm2d)): continue
        last_of_branch = name.endswith(("bn3", "downsample.1"))
        layer.running_mean.normal_(0, 0.1)
        layer.running_var.uniform_(0.5, 1.5)
        layer.weight.fill_(0.2 if last_of_branch else 1).add_(0.1 * torch.rand_like(layer.weight))
        layer.bias.normal_(0, 0.1)
    return peer


def pair(peer, fast=False):
    "Our model and torchvision's with the same weights, in float64, ready to find things."
    peer = settle(peer).double().eval()
    ours = loud(MaskRCNN.from_torchvision(peer))
    peer.load_state_dict(ours.state_dict())
    return (speed_up(ours) if fast else ours), peer


def example(height, width, n=3, dtype=torch.float64):
    image, at = torch.rand(3, height, width, dtype=dtype), torch.rand(n, 2, dtype=dtype)
    size = torch.tensor([width, height])
    boxes = torch.cat([at * size * 0.5, at * size * 0.5 + 8 + torch.rand(n, 2) * size * 0.4], 1)
    masks = torch.zeros(n, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()): mask[y1:y2, x1:x2] = 1
    return image, dict(boxes=boxes, labels=torch.randint(1, 4, (n,)), masks=masks)


def assert_same(mine, theirs, least=5):
    "Equal to float64's last digits, in the same order."
    for a, b in zip(mine, theirs, strict=True):
        assert len(a["boxes"]) == len(b["boxes"]) >= least and torch.equal(a["labels"], b["labels"])
        for key in ("boxes", "scores", "masks"):
            torch.testing.assert_close(a[key], b[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", PEERS)
def test_same_answers_losses_and_gradients_as_torchvision(kind): same_as_torchvision(kind, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["resnet50_fpn", "resnet50_fpn_v2", "ours: laptop"])
def test_the_same_on_a_gpu(gpu, kind): same_as_torchvision(kind if gpu == "cuda" else "ours: tiny", gpu)


def same_as_torchvision(kind, device):
    "The same detections, losses, gradients and batch norm in float64, of the plain and of the fast model."
    torch.manual_seed(0)
    plain, peer = (model.to(device) for model in pair(PEERS[kind]()))
    fast = speed_up(copy.deepcopy(plain))
    torch.manual_seed(1)
    images, targets = map(list, zip(example(96, 130), example(112, 80), example(60, 64)))
    images = [image.to(device) for image in images]
    targets = [{key: value.to(device) for key, value in t.items()} for t in targets]
    with torch.no_grad(): found, alone = peer(images), peer(images[1:2])
    theirs = peer.train()(images, targets)
    sum(theirs.values()).backward()
    for ours in (plain, fast):
        with torch.no_grad():
            assert_same(ours(images), found)
            assert_same(ours(images[1:2]), alone)
        mine = ours.train()(images, targets)
        assert mine.keys() == theirs.keys()
        for key in theirs:
            torch.testing.assert_close(mine[key], theirs[key].double(), rtol=1e-6, atol=1e-9)
        sum(mine.values()).backward()
        assert_same_gradients(ours, peer)
        moved = peer.state_dict()  # batch norm that learns has seen the same batches
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(value, moved[name], rtol=1e-9, atol=1e-12)


def assert_same_gradients(ours, peer):
    trained = 0
    for name, weight in ours.named_parameters():
        there = peer.get_parameter(name)
        assert weight.requires_grad == there.requires_grad, name
        if not weight.requires_grad: continue
        assert (weight.grad - there.grad).abs().max() <= 1e-6 * there.grad.abs().max() + 1e-10, name
        trained += 1
    assert trained > 15


@torch.no_grad()
def match(mine, theirs):
    "Index of the detection of `theirs` that each of `mine` is: the same class, the nearest box."
    far = torch.cdist(mine["boxes"].double(), theirs["boxes"].double(), p=float("inf"))
    return far.masked_fill(mine["labels"][:, None] != theirs["labels"], 1e9).min(1)


SIZES = {"800/1333": dict(min_size=800, max_size=1333), "300/400": dict(min_size=300, max_size=400),
         "rehearsal": dict(min_size=160, max_size=224)}


@pytest.mark.parametrize("size", ["800/1333", "300/400"])
def test_single_precision_at_real_sizes(size): same_in_single_precision(size, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("size", ["800/1333", "300/400"])
def test_single_precision_at_real_sizes_on_a_gpu(gpu, size):
    if gpu == "cpu" and size != "300/400": pytest.skip("one size is enough for a rehearsal")
    same_in_single_precision(size if gpu == "cuda" else "rehearsal", gpu)


def same_in_single_precision(size, device):
    "The same detections in float64, and but for a few that rounding decides in float32."
    torch.manual_seed(0)
    ours, peer = (model.to(device) for model in pair(Peer(resnet("resnet18"), num_classes=91, **SIZES[size])))
    images = [example(*s, dtype=torch.float32)[0].to(device) for s in ((427, 640), (500, 375), (240, 320))]
    with torch.no_grad():
        assert_same(ours([images[0].double()]), peer([images[0].double()]), 90)
        for mine, theirs in zip(ours.float()(images), peer.float()(images), strict=True):
            assert len(mine["boxes"]) > 90
            off, there = match(mine, theirs)
            # rounding may swap two at the limit of a hundred, or which of two survives suppression
            same = off < 0.01
            assert same.float().mean() > 0.95
            assert (mine["scores"] - theirs["scores"][there])[same].abs().max() < 1e-4
            assert (mine["masks"] - theirs["masks"][there])[same].abs().max() < 1e-3


SIDES = {
    "800/1333": dict(min_size=800, max_size=1333),
    "the last of several": dict(min_size=(480, 576, 672), max_size=900),
    "one size for all": dict(fixed_size=(96, 64)),
}


@pytest.mark.parametrize("kind", SIDES)
def test_images_are_resized_to_torchvisions_sizes(kind):
    ours = Transform(**SIDES[kind]).eval()
    theirs = {"min_size": 800, "max_size": 1333} | SIDES[kind]
    peer = GeneralizedRCNNTransform(
        **theirs, image_mean=list(ours.image_mean), image_std=list(ours.image_std)).eval()
    generator = torch.Generator().manual_seed(0)
    for h, w in torch.randint(20, 1500, (200, 2), generator=generator).tolist():
        resized, _ = peer.resize(torch.empty(3, h, w, device="meta"))
        assert ours.resized((h, w)) == tuple(resized.shape[-2:]), (h, w)


def tiny_peer(**kwargs):
    "torchvision's Mask R-CNN on a small body, with other arguments."
    anchors = AnchorGenerator(((8, 12),) * 5, ((0.5, 1.0, 1.5, 2.0),) * 5)
    arguments = dict(
        min_size=64, max_size=100, rpn_anchor_generator=anchors, box_score_thresh=0.01,
        mask_head=tv_masks.MaskRCNNHeads(16, (32,), 1),
        mask_predictor=tv_masks.MaskRCNNPredictor(32, 32, 4),
        box_predictor=tv_boxes.FastRCNNPredictor(1024, 4))
    return Peer(build_model("tiny").to_torchvision().backbone, **{**arguments, **kwargs})


def pools(size, *rest, **kwargs): return MultiScaleRoIAlign(list("0123"), size, *rest, **kwargs)


def both_pools(*rest, **kwargs):
    return dict(box_roi_pool=pools(7, *rest, **kwargs), mask_roi_pool=pools(14, *rest, **kwargs))


SETTINGS = {
    "several sizes, the last counts": dict(min_size=(40, 50, 80), max_size=120),
    "one size for all": dict(fixed_size=(96, 64)),
    "multiples of 64": dict(size_divisible=64, min_size=140, max_size=140),
    "other colours": dict(image_mean=[0.1, 0.2, 0.3], image_std=[1.0, 0.5, 2.0]),
    "many anchors": dict(
        rpn_anchor_generator=AnchorGenerator(((8, 16, 24),) * 5, ((0.3, 1.0, 3.0, 5.0),) * 5)),
    "counts": dict(
        rpn_pre_nms_top_n_train=30, rpn_pre_nms_top_n_test=20,
        rpn_post_nms_top_n_train=25, rpn_post_nms_top_n_test=15, box_detections_per_img=7),
    "thresholds": dict(
        rpn_nms_thresh=0.4, rpn_score_thresh=0.3, rpn_fg_iou_thresh=0.5, rpn_bg_iou_thresh=0.2,
        box_score_thresh=0.2, box_nms_thresh=0.2, box_fg_iou_thresh=0.4, box_bg_iou_thresh=0.3),
    "samples": dict(
        rpn_batch_size_per_image=32, rpn_positive_fraction=0.25,
        box_batch_size_per_image=20, box_positive_fraction=0.75),
    "scales of the deltas": dict(bbox_reg_weights=(1.0, 2.0, 3.0, 4.0)),
    "four samples a bin": both_pools(4),
    "as many samples as cells": both_pools(-1),
    "levels for small objects": both_pools(2, canonical_scale=30),
    "another middle level": both_pools(2, canonical_level=6),
    "other bins": dict(
        box_roi_pool=pools(5, 2), box_head=tv_boxes.TwoMLPHead(16 * 25, 1024), mask_roi_pool=pools(10, 2)),
    "convolutions and norm in the heads": dict(
        box_head=tv_boxes.FastRCNNConvFCHead((16, 7, 7), [24, 8], [40], nn.BatchNorm2d),
        box_predictor=tv_boxes.FastRCNNPredictor(40, 4),
        mask_head=tv_masks.MaskRCNNHeads(16, (24, 8), 1, nn.BatchNorm2d),
        mask_predictor=tv_masks.MaskRCNNPredictor(8, 8, 4)),
}


@BOTH
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_comes_along_and_goes_back(name, fast):
    torch.manual_seed(0)
    ours, peer = pair(tiny_peer(**copy.deepcopy(SETTINGS[name])), fast)
    images = [example(70, 90)[0], example(64, 50)[0]]
    with torch.no_grad():
        found = ours(images)
        assert_same(found, peer(images), 3)
        back = ours.to_torchvision()
        assert_same(found, back(images), 3)
    again = MaskRCNN.from_torchvision(back)
    assert again.settings == ours.settings
    kept = again.state_dict()
    assert list(kept) == list(ours.state_dict())
    for name, value in ours.state_dict().items(): assert torch.equal(value, kept[name]), name


def test_training_draws_one_of_several_sizes():
    model = build_model("tiny", min_size=(32, 48, 64), max_size=200)
    image, g = [torch.rand(3, 70, 70)], torch.Generator().manual_seed(0)
    drawn = {model.train().prepare(image, generator=g).sizes[0, 0].item() for _ in range(50)}
    assert drawn == {32, 48, 64}
    for _ in range(10):  # one for a batch: nothing is padded up to another size
        assert len(set(model.prepare(image * 3).sizes[:, 0].tolist())) == 1
    assert model.eval().prepare(image).sizes.tolist() == [[64, 64]]


@pytest.mark.parametrize("kind", ["resnet50_fpn", "resnet50_fpn_v2", "mobilenet_v3_large"])
def test_weights_survive_the_way_there_and_back(kind):
    peer = settle(PEERS[kind]())
    back = MaskRCNN.from_torchvision(peer).to_torchvision().state_dict()
    assert set(back) == set(peer.state_dict())
    assert all(torch.equal(back[k], v) for k, v in peer.state_dict().items())


def without_counterpart(kind):
    peer = tiny_peer()
    if kind == "a last level": peer.backbone.fpn.extra_blocks = LastLevelP6P7(16, 16)
    if kind == "not square": peer.roi_heads.box_roi_pool.output_size = (7, 5)
    if kind == "differ in more": peer.roi_heads.mask_roi_pool.sampling_ratio = 4
    if kind == "dilated": peer.roi_heads.mask_head[0][0].dilation = (2, 2)
    if kind == "all levels but the last":
        for pool in (peer.roi_heads.box_roi_pool, peer.roi_heads.mask_roi_pool):
            pool.featmap_names = ["0", "1", "2", "3", "pool"]
    if kind == "missing there": del peer.roi_heads.mask_predictor.mask_fcn_logits.bias
    if kind == "missing here": peer.roi_heads.quality = nn.Linear(2, 3)
    if kind == "32, 16, 2, 2": peer.roi_heads.mask_predictor = tv_masks.MaskRCNNPredictor(32, 16, 4)
    if kind == "not a torchvision Mask R-CNN": return torchvision.models.resnet18()
    return peer


@pytest.mark.parametrize("kind", [
    "a last level", "not square", "differ in more", "dilated", "all levels but the last",
    "missing there", "missing here", "32, 16, 2, 2", "not a torchvision Mask R-CNN"])
def test_what_has_no_counterpart_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=kind): MaskRCNN.from_torchvision(without_counterpart(kind))


def served(folder):
    "A server for the files of a folder, on this machine."
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), dict(log_message=lambda *a: None))
    handler = functools.partial(quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize("name,kind", [("coco", "resnet50_fpn"), ("coco_v2", "resnet50_fpn_v2")])
def test_coco_weights_are_fetched_checked_and_kept(name, kind, tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    state = torchvision.models.get_model(f"maskrcnn_{kind}", weights=None, weights_backbone=None).state_dict()
    halves = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    torch.save(halves, tmp_path / "weights.pth")
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()[:8]
    file = (tmp_path / "weights.pth").rename(tmp_path / f"coco-{digest}.pth")
    weights = torchvision.models.get_model_weights(f"maskrcnn_{kind}").DEFAULT
    server, address = served(tmp_path)
    monkeypatch.setattr(weights.value, "url", f"{address}/{file.name}")
    model = MaskRCNN.from_pretrained(name)
    server.shutdown()
    assert (model.num_classes, len(model.classes), model.classes[0]) == (91, 90, "person")
    assert model.source.endswith(file.name) and not model.training
    cached, found = MaskRCNN.from_pretrained(name), model.state_dict()  # without the server, from its copy
    for key, value in cached.state_dict().items():
        assert torch.equal(value, found[key]) and torch.equal(value, halves[key].to(value.dtype)), key
    saved = save_model(model, tmp_path / "m.safetensors", model.classes, "joint")
    again, classes, _ = load_model(saved, fast=False)
    image = [torch.rand(3, 64, 64)]
    for m in (model, again): m.transform.min_size = m.transform.max_size = 64
    assert classes == model.classes
    with torch.no_grad():
        assert torch.equal(again.stages(image)["features"][0], model.stages(image)["features"][0])


def test_coco_weights_that_cannot_be_had_are_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    weights = torchvision.models.get_model_weights("maskrcnn_resnet50_fpn").DEFAULT
    (tmp_path / "coco-00000000.pth").write_bytes(b"not these weights")
    server, address = served(tmp_path)
    monkeypatch.setattr(weights.value, "url", f"{address}/coco-00000000.pth")
    with pytest.raises(OSError, match="could not be had from .*invalid hash.*put the whole file into"):
        MaskRCNN.from_pretrained("coco")
    server.shutdown(), server.server_close()
    with pytest.raises(OSError, match="coco-00000000.pth .*refused.*checkpoints"):
        MaskRCNN.from_pretrained("coco")
    with pytest.raises(ValueError, match="no weights called 'cocoa'"): MaskRCNN.from_pretrained("cocoa")


def test_random_samples_have_torchvisions_counts_and_shares():
    "Which proposals the heads learn from is random; how many, of which kind, and how often each, is not."
    torch.manual_seed(0)
    model = build_model("tiny", box_batch_size_per_image=20, rpn_post_nms_top_n_train=60)
    ours, peer = pair(model.to_torchvision())
    images, targets = map(list, zip(example(64, 64), example(64, 50)))
    draws, batch = 300, ours.train().prepare(images, targets)
    output = ours.rpn(ours.backbone(batch.images), batch.image_size)
    proposals = ours.rpn.filter_proposals(output, batch.sizes, train=True)
    boxes = [p[v] for p, v in zip(proposals.boxes, proposals.valid)]
    given = zip(*(batch.targets[k] for k in ("boxes", "labels", "valid")))
    truth = [dict(boxes=b[v], labels=l[v], masks=None) for b, l, v in given]
    for i in range(2):
        places = torch.cat([boxes[i], truth[i]["boxes"]])
        often = torch.zeros(2, len(places))
        for _ in range(draws):
            mine = ours.roi_heads.select_training_samples(proposals, batch.targets)
            theirs, _, labels, _ = peer.roi_heads.select_training_samples(boxes, truth)
            v = mine.valid[i]
            assert v.sum() == len(labels[i]) and (mine.labels[i] > 0).sum() == (labels[i] > 0).sum()
            for count, chosen in zip(often, (mine.boxes[i][v], theirs[i])):
                count[torch.cdist(chosen, places).argmin(1)] += 1
        share = often / draws
        noise = (share.mean(0) * (1 - share.mean(0)) * 2 / draws).sqrt()
        assert ((share[0] - share[1]).abs() <= 5 * noise + 1e-9).all()
        assert (share.mean(0) % 1 > 0).sum() > 20


def test_mean_losses_of_many_draws_are_torchvisions():
    torch.manual_seed(0)
    ours, peer = pair(build_model("tiny").to_torchvision())
    images, targets = map(list, zip(example(64, 64), example(64, 50)))
    targets = [{**t, "boxes": t["boxes"].clone()} for t in targets]
    names = sorted(ours(images, targets))

    @torch.no_grad()
    def draws(model):
        losses = [model.train()(images, targets) for _ in range(150)]
        assert sorted(losses[0]) == names
        return torch.stack([torch.stack([draw[name].double() for name in names]) for draw in losses])

    mine, theirs = draws(ours), draws(peer)
    error = ((mine.var(0) + theirs.var(0)) / len(mine)).sqrt()
    assert ((mine.mean(0) - theirs.mean(0)).abs() <= 5 * error + 1e-9).all()
    torch.testing.assert_close(mine.std(0), theirs.std(0), rtol=0.4, atol=1e-3)


def target_of(boxes, size=64):
    "Objects of class 1, each with a mask over the whole image."
    boxes = torch.tensor(boxes).reshape(-1, 4)
    n = len(boxes)
    masks = torch.ones(n, size, size, dtype=torch.uint8)
    return dict(boxes=boxes, labels=torch.ones(n, dtype=torch.long), masks=masks)


HARD = {
    "no object": [], "one pixel": [[20., 20, 21, 21]], "the whole image": [[0., 0, 64, 64]],
    "500 objects": [[float(i % 50), float(i % 40), i % 50 + 9., i % 40 + 9.] for i in range(500)]}


@BOTH
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm in the heads"])
@pytest.mark.parametrize("others", [True, False], ids=["beside an image without objects", "alone"])
@pytest.mark.parametrize("kind", HARD)
def test_losses_are_finite_whatever_the_objects(kind, others, norm, fast):
    torch.manual_seed(0)
    target = target_of(HARD[kind])
    model = build_model("tiny", head_norm=norm, fast=fast)
    losses = model([torch.rand(3, 64, 64) for _ in range(1 + others)], [target, target_of([])][:1 + others])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert all(v.isfinite().all() for v in model.state_dict().values())
    if kind == "no object":
        assert losses["loss_mask"] == losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0
        assert losses["loss_objectness"] > 0
    else: assert losses["loss_mask"] > 0 and losses["loss_rpn_box_reg"] > 0


WRONG = {"reversed": [[30., 30, 10, 10]], "without width": [[10., 10, 10, 30]],
         "not a number": [[1., 1, float("nan"), 9]]}


@pytest.mark.parametrize("kind", WRONG)
def test_a_box_that_is_none_is_refused(kind):
    "As torchvision refuses it: boxes given as x y w h would else train on nothing, without a word."
    good, bad = target_of([[1., 1, 9, 9]]), target_of([[1., 1, 9, 9], *WRONG[kind]])
    with pytest.raises(ValueError, match="box 1 of target 1 is .* x1 < x2 and y1 < y2"):
        build_model("tiny")([torch.rand(3, 64, 64)] * 2, [good, bad])


@pytest.mark.parametrize("boxes, message", [
    ([[1., 1, 9, 9]], "got list"), (torch.rand(4), r"got \[4\]"), (torch.rand(1, 5), r"got \[1, 5\]")])
def test_boxes_of_another_shape_are_refused(boxes, message):
    target = target_of([[1., 1, 9, 9]]) | dict(boxes=boxes)
    with pytest.raises(ValueError, match="boxes of target 0 must be a tensor of shape .* " + message):
        build_model("tiny")([torch.rand(3, 64, 64)], [target])


def test_what_torchvision_takes_is_taken():
    "Boolean masks that have to be resized, boxes in whole numbers, and a batch as one tensor."
    model = build_model("tiny", min_size=96, max_size=96)
    boxes, masks = torch.tensor([[4, 4, 40, 50]]), torch.zeros(1, 64, 64, dtype=torch.uint8)
    masks[:, 4:50, 4:40] = 1
    images, labels = torch.rand(2, 3, 64, 64), torch.tensor([1])
    plain = [dict(boxes=boxes.float(), labels=labels, masks=masks)] * 2
    other = [dict(boxes=boxes, labels=labels, masks=masks.bool())] * 2
    expected, found = (model(x, t, torch.Generator().manual_seed(0))
                       for x, t in ((list(images), plain), (images, other)))
    for name in expected: assert torch.equal(expected[name], found[name]), name


@BOTH
def test_the_losses_reach_the_images(fast):
    "Saliency and adversarial examples need the gradient of the losses with respect to the images."
    torch.manual_seed(0)
    images, targets = map(list, zip(example(64, 80, dtype=torch.float32),
                                    example(70, 64, dtype=torch.float32)))
    for image in images: image.requires_grad_()
    sum(build_model("tiny", fast=fast)(images, targets).values()).backward()
    for image in images: assert image.grad.isfinite().all() and (image.grad != 0).float().mean() > 0.5


@BOTH
def test_a_new_model_does_not_move_its_frozen_norms(fast):
    "Before any call of `train` or `eval`: one step once moved all 48 running statistics."
    model = build_model("laptop", pretrained=False, fast=fast)
    before = copy.deepcopy(model.state_dict())
    model(*map(list, zip(example(64, 80, dtype=torch.float32, n=1))))
    for name, value in model.state_dict().items(): assert torch.equal(value, before[name]), name


@BOTH
def test_no_proposal_above_the_threshold(fast):
    torch.manual_seed(0)
    image, target = example(64, 64, dtype=torch.float32)
    target["boxes"] = target["boxes"].float()
    model = build_model("tiny", rpn_score_thresh=1.1, fast=fast)
    losses = model([image], [target])  # the objects themselves are proposals in training
    assert all(loss.isfinite() for loss in losses.values()) and losses["loss_classifier"] > 0
    losses = model([image], [target_of([])])
    sum(losses.values()).backward()
    assert losses["loss_classifier"] == losses["loss_box_reg"] == losses["loss_mask"] == 0
    with torch.no_grad(): found = model.eval()([image])[0]
    assert found["boxes"].shape == (0, 4) and found["masks"].shape == (0, 1, 64, 64)


@BOTH
def test_losses_come_in_eval_mode_too(fast):
    torch.manual_seed(0)
    model = build_model("tiny", fast=fast, **EVERYTHING).eval()
    image, target = example(64, 64, dtype=torch.float32)
    target["boxes"] = target["boxes"].float()
    before, losses = copy.deepcopy(model.state_dict()), model([image], [target])
    assert len(losses) == 5
    for name, loss in model.train()([image], [target]).items(): torch.testing.assert_close(loss, losses[name])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_number_changed_in_its_place_counts_from_the_next_call():
    torch.manual_seed(0)
    model, image = loud(build_model("tiny")), [torch.rand(3, 64, 64)]
    with torch.no_grad():
        found = model(image)[0]
        model.roi_heads.box_detections_per_img = 3
        model.rpn.rpn_post_nms_top_n_test = 9
        model.transform.min_size = model.transform.max_size = 96
        fewer, stages = model(image)[0], model.stages(image)
    assert len(found["boxes"]) > 3 == len(fewer["boxes"])
    assert stages["proposals"]["valid"].shape == (1, 9) and stages["batch"].images.shape == (1, 3, 96, 96)
    changed = {k for k, v in model.settings.items() if build_model("tiny").settings[k] != v}
    assert changed == {"box_detections_per_img", "rpn_post_nms_top_n_test", "min_size", "max_size"}


def test_stages_are_what_a_prediction_is_made_of():
    torch.manual_seed(0)
    model = loud(build_model("tiny"))
    images, targets = map(list, zip(
        example(64, 80, dtype=torch.float32), example(70, 64, dtype=torch.float32)))
    stages = model.stages(images, targets)
    assert list(stages) == ["batch", "features", "objectness", "deltas", "anchors", "proposals", "detections",
                            "mask_logits"]
    assert stages["batch"].targets["masks"].shape[1:] == stages["batch"].image_size
    with torch.no_grad(): found = model(images)
    for a, b in zip(model.transform.postprocess(stages), found):
        for key in b: assert torch.equal(a[key], b[key])
    least = sorted(found[0]["scores"].tolist())[-3]
    kept = model.stages(images, score_thresh=least)["detections"]
    assert kept["valid"].sum() < stages["detections"]["valid"].sum()
    assert (kept["scores"][kept["valid"]] >= least).all() and kept["valid"][0].sum() == 3


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("kind", ["ours: laptop", "resnet50_fpn_v2"])
def test_the_gpu_gives_the_answers_losses_and_gradients_of_the_cpu(gpu, kind, fast):
    torch.manual_seed(0)
    ours, _ = pair(PEERS[kind if gpu == "cuda" else "ours: tiny"](), fast)
    images, targets = map(list, zip(example(96, 130), example(112, 80)))
    there = copy.deepcopy(ours).to(gpu)
    with torch.no_grad():
        for a, b in zip(ours(images), there(images)):
            for key in ("boxes", "scores", "masks"):
                torch.testing.assert_close(a[key], b[key].cpu(), rtol=1e-6, atol=1e-6)
    here, far = ours.train()(images, targets), there.train()(images, targets)
    for key in here: torch.testing.assert_close(here[key], far[key].cpu(), rtol=1e-6, atol=1e-8)
    sum(here.values()).backward(), sum(far.values()).backward()
    for (name, a), b in zip(ours.named_parameters(), there.parameters()):
        if not a.requires_grad: continue
        assert (a.grad - b.grad.cpu()).abs().max() <= 1e-6 * a.grad.abs().max() + 1e-9, name
