"The whole model against torchvision's, with the same weights; weights there and back; and targets that have nothing to teach."
import copy
import dataclasses
import functools
import hashlib
import http.server
import json
import threading

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import MaskRCNN as Peer, faster_rcnn as tv_boxes, mask_rcnn as tv_masks
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from maskrcnn_course.mask_rcnn import MaskRCNN, load_model, build_model, save_model
from maskrcnn_course.torchvision_weights import torchvision_name

EVERYTHING = dict(rpn_batch_size_per_image=10**6, box_batch_size_per_image=10**4, box_positive_fraction=0.5, rpn_pre_nms_top_n_train=100,
                  rpn_post_nms_top_n_train=40, rpn_pre_nms_top_n_test=100, rpn_post_nms_top_n_test=40, box_score_thresh=0.01,
                  box_detections_per_img=20)
SMALL = dict(num_classes=4, min_size=96, max_size=150, **EVERYTHING)


def anchors(levels): return AnchorGenerator(((16, 40, 90),) * levels, ((0.5, 1.0, 2.0),) * levels)
def resnet(name, **kwargs): return resnet_fpn_backbone(backbone_name=name, weights=None, **kwargs)
def mobilenet(name, **kwargs): return mobilenet_backbone(backbone_name=name, weights=None, fpn=True, **kwargs)


PEERS = {
    "resnet50_fpn": lambda: torchvision.models.get_model("maskrcnn_resnet50_fpn", weights=None, weights_backbone=None, **SMALL),
    "resnet50_fpn_v2": lambda: torchvision.models.get_model("maskrcnn_resnet50_fpn_v2", weights=None, weights_backbone=None, **SMALL),
    "resnet18, frozen norm, three layers trained": lambda: Peer(resnet("resnet18", trainable_layers=3), **SMALL),
    "resnet18, norm that learns, all trained": lambda: Peer(resnet("resnet18", norm_layer=nn.BatchNorm2d, trainable_layers=5), **SMALL),
    "resnet34, three levels, none trained": lambda: Peer(resnet("resnet34", returned_layers=[2, 3, 4], trainable_layers=0),
                                                        rpn_anchor_generator=anchors(4), **SMALL),
    "mobilenet_v3_large": lambda: Peer(mobilenet("mobilenet_v3_large", trainable_layers=4), rpn_anchor_generator=anchors(3), **SMALL),
    "mobilenet_v2, norm that learns": lambda: Peer(mobilenet("mobilenet_v2", norm_layer=nn.BatchNorm2d), rpn_anchor_generator=anchors(3), **SMALL),
    "ours: tiny": lambda: build_model("tiny", **EVERYTHING).to_torchvision(),
    "ours: laptop": lambda: build_model("laptop", **EVERYTHING).to_torchvision(),
}


@torch.no_grad()
def settle(peer):
    "Batch norm as after some training: statistics of its own, and residual branches that do not add up to huge numbers."
    for name, layer in peer.named_modules():
        if isinstance(layer, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
            layer.weight.fill_(0.2 if name.endswith(("bn3", "downsample.1")) else 1).add_(0.1 * torch.rand_like(layer.weight))
            layer.bias.normal_(0, 0.1)
    return peer


@torch.no_grad()
def loud(model):
    "Random last layers whose answers vary by about one, so that an untrained model finds many things, no two with the same score."
    model.eval()
    torch.manual_seed(2)
    image = [torch.rand(3, 128, 128).to(model.rpn_head.cls_logits.weight)]
    for layer, answer, spread in ((model.rpn_head.cls_logits, "objectness", 2), (model.rpn_head.bbox_pred, "deltas", 0.3)):
        nn.init.normal_(layer.weight)
        layer.weight *= spread / torch.cat([a.flatten() for a in model.stages(image)[answer]]).std()
    stages = model.stages(image)
    for layer, answer, spread in ((model.box_head.cls_score, 0, 2), (model.box_head.bbox_pred, 1, 1)):
        nn.init.normal_(layer.weight)
        proposals = stages["proposals"]
        layer.weight *= spread / model.run_box_head(stages["features"], proposals["boxes"], proposals["valid"], stages["batch"])[answer].std()
    nn.init.normal_(model.mask_head.mask_fcn_logits.weight, std=0.3)
    return model


def pair(peer):
    "Our model and torchvision's with the same weights, in float64, ready to find things."
    peer = settle(peer).double().eval()
    ours = loud(MaskRCNN.from_torchvision(peer))
    peer.load_state_dict({torchvision_name(k, ours.settings): v for k, v in ours.state_dict().items()})
    return ours, peer


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
        for key in ("boxes", "scores", "masks"): torch.testing.assert_close(a[key], b[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", PEERS)
def test_same_answers_losses_and_gradients_as_torchvision(kind): same_as_torchvision(kind, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["resnet50_fpn", "resnet50_fpn_v2", "ours: laptop"])
def test_the_same_on_a_gpu(gpu, kind): same_as_torchvision(kind if gpu == "cuda" else "ours: tiny", gpu)


def same_as_torchvision(kind, device):
    "The same detections, losses, gradients and batch norm, in float64."
    torch.manual_seed(0)
    ours, peer = (model.to(device) for model in pair(PEERS[kind]()))
    torch.manual_seed(1)
    images, targets = map(list, zip(example(96, 130), example(112, 80), example(60, 64)))
    images = [image.to(device) for image in images]
    targets = [{key: value.to(device) for key, value in t.items()} for t in targets]
    with torch.no_grad():
        assert_same(ours(images), peer(images))
        assert_same(ours(images[1:2]), peer(images[1:2]))
    mine, theirs = ours.train()(images, targets), peer.train()(images, targets)
    assert mine.keys() == theirs.keys()
    for key in theirs: torch.testing.assert_close(mine[key], theirs[key].double(), rtol=1e-6, atol=1e-9)
    sum(mine.values()).backward()
    sum(theirs.values()).backward()
    names, trained = {name: torchvision_name(name, ours.settings) for name in ours.state_dict()}, 0
    for name, weight in ours.named_parameters():
        there = peer.get_parameter(names[name])
        assert weight.requires_grad == there.requires_grad, name
        if weight.requires_grad: assert (weight.grad - there.grad).abs().max() <= 1e-6 * there.grad.abs().max() + 1e-10, name
        trained += weight.requires_grad
    assert trained > 15
    moved = peer.state_dict()  # batch norm that learns has seen the same batches
    for name, value in ours.state_dict().items(): torch.testing.assert_close(value, moved[names[name]], rtol=1e-9, atol=1e-12)


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
            same = off < 0.01  # rounding may swap two at the limit of a hundred, or which of two survives suppression
            assert same.float().mean() > 0.95
            assert (mine["scores"] - theirs["scores"][there])[same].abs().max() < 1e-4
            assert (mine["masks"] - theirs["masks"][there])[same].abs().max() < 1e-3


def test_images_are_resized_to_torchvisions_sizes():
    model = build_model("tiny", min_size=800, max_size=1333)
    peer = model.to_torchvision().transform.eval()
    for h, w in torch.randint(20, 1500, (200, 2), generator=torch.Generator().manual_seed(0)).tolist():
        theirs = peer([torch.zeros(3, h, w)])[0].image_sizes[0] if h * w < 10**5 else None
        scale = min(800 / min(h, w), 1333 / max(h, w))
        assert model._size(torch.empty(3, h, w)) == (theirs or (int(h * scale), int(w * scale)))


def tiny_peer(**kwargs):
    "torchvision's Mask R-CNN on a small body, with other arguments."
    return Peer(build_model("tiny").to_torchvision().backbone, **{**dict(min_size=64, max_size=100, rpn_anchor_generator=AnchorGenerator(
        ((8, 12),) * 5, ((0.5, 1.0, 1.5, 2.0),) * 5), box_score_thresh=0.01, mask_head=tv_masks.MaskRCNNHeads(16, (32,), 1),
        mask_predictor=tv_masks.MaskRCNNPredictor(32, 32, 4),
        box_predictor=tv_boxes.FastRCNNPredictor(1024, 4)), **kwargs})


def pools(size, *rest, **kwargs): return MultiScaleRoIAlign(list("0123"), size, *rest, **kwargs)


SETTINGS = {
    "several sizes, the last counts": dict(min_size=(40, 50, 80), max_size=120),
    "one size for all": dict(fixed_size=(96, 64)),
    "multiples of 64": dict(size_divisible=64, min_size=140, max_size=140),
    "other colours": dict(image_mean=[0.1, 0.2, 0.3], image_std=[1.0, 0.5, 2.0]),
    "many anchors": dict(rpn_anchor_generator=AnchorGenerator(((8, 16, 24),) * 5, ((0.3, 1.0, 3.0, 5.0),) * 5)),
    "counts": dict(rpn_pre_nms_top_n_train=30, rpn_pre_nms_top_n_test=20, rpn_post_nms_top_n_train=25, rpn_post_nms_top_n_test=15, box_detections_per_img=7),
    "thresholds": dict(rpn_nms_thresh=0.4, rpn_score_thresh=0.3, box_score_thresh=0.2, box_nms_thresh=0.2, rpn_fg_iou_thresh=0.5, rpn_bg_iou_thresh=0.2,
                       box_fg_iou_thresh=0.4, box_bg_iou_thresh=0.3),
    "samples": dict(rpn_batch_size_per_image=32, rpn_positive_fraction=0.25, box_batch_size_per_image=20, box_positive_fraction=0.75),
    "scales of the deltas": dict(bbox_reg_weights=(1.0, 2.0, 3.0, 4.0)),
    "four samples a bin": dict(box_roi_pool=pools(7, 4), mask_roi_pool=pools(14, 4)),
    "as many samples as cells": dict(box_roi_pool=pools(7, -1), mask_roi_pool=pools(14, -1)),
    "levels for small objects": dict(box_roi_pool=pools(7, 2, canonical_scale=30), mask_roi_pool=pools(14, 2, canonical_scale=30)),
    "another middle level": dict(box_roi_pool=pools(7, 2, canonical_level=6), mask_roi_pool=pools(14, 2, canonical_level=6)),
    "other bins": dict(box_roi_pool=pools(5, 2), box_head=tv_boxes.TwoMLPHead(16 * 25, 1024), mask_roi_pool=pools(10, 2)),
    "convolutions and norm in the heads": dict(
        box_head=tv_boxes.FastRCNNConvFCHead((16, 7, 7), [24, 8], [40], nn.BatchNorm2d), box_predictor=tv_boxes.FastRCNNPredictor(40, 4),
        mask_head=tv_masks.MaskRCNNHeads(16, (24, 8), 1, nn.BatchNorm2d), mask_predictor=tv_masks.MaskRCNNPredictor(8, 8, 4)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_comes_along_and_goes_back(name):
    torch.manual_seed(0)
    ours, peer = pair(tiny_peer(**copy.deepcopy(SETTINGS[name])))
    images = [example(70, 90)[0], example(64, 50)[0]]
    with torch.no_grad():
        found = ours(images)
        assert_same(found, peer(images), 3)
        back = ours.to_torchvision()
        assert_same(found, back(images), 3)
    again = MaskRCNN.from_torchvision(back)
    assert again.settings == ours.settings
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values()))


def test_training_draws_one_of_several_sizes():
    model = build_model("tiny", min_size=(32, 48, 64), max_size=200)
    image, g = [torch.rand(3, 70, 70)], torch.Generator().manual_seed(0)
    drawn = {model.train().prepare(image, generator=g).sizes[0, 0].item() for _ in range(50)}
    assert drawn == {32, 48, 64}
    assert all(len(set(model.prepare(image * 3).sizes[:, 0].tolist())) == 1 for _ in range(10))  # one for a batch: nothing is padded up to another size
    assert model.eval().prepare(image).sizes.tolist() == [[64, 64]]


def test_masks_vote_on_boxes_only_if_asked():
    torch.manual_seed(0)
    ours, peer = pair(tiny_peer())
    images = [example(70, 90)[0], example(64, 50)[0]]
    for layer in (ours.mask_head.mask_fcn_logits, peer.roi_heads.mask_predictor.mask_fcn_logits): layer.weight.data *= 0
    with torch.no_grad(): common = torch.cat([p["labels"] for p in ours(images)]).mode().values
    bias = torch.full_like(layer.bias.data, -3)  # masks that are empty, but full for the class that is found most
    bias[common] = 3
    for layer in (ours.mask_head.mask_fcn_logits, peer.roi_heads.mask_predictor.mask_fcn_logits): layer.bias.data = bias.clone()
    with torch.no_grad():
        plain = ours(images)
        assert_same(plain, peer(images), 3)
        ours.settings = dataclasses.replace(ours.settings, mask_box_weight=0.5)
        voted = ours(images)
        assert_same(plain, ours.to_torchvision()(images), 3)  # which has no such thing
    moved = 0
    for a, b, image in zip(plain, voted, images):
        assert torch.equal(a["labels"], b["labels"]) and torch.equal(a["scores"], b["scores"])
        full = bias[a["labels"]].sigmoid() > 0.6
        assert torch.equal(a["boxes"][~full], b["boxes"][~full])
        room = 0.1 * (a["boxes"][:, 2:] - a["boxes"][:, :2])
        assert (b["boxes"][full, :2] <= a["boxes"][full, :2] + 1).all() and (b["boxes"][full, 2:] >= a["boxes"][full, 2:] - 1e-9).all()
        assert ((b["boxes"] - a["boxes"]).abs() <= room.tile(2) / 2 + 1).all()
        assert b["boxes"].min() >= 0 and (b["boxes"][:, 2:].amax(0) <= torch.tensor([image.shape[2], image.shape[1]]) + 1e-4).all()
        moved += (a["boxes"] != b["boxes"]).any(1).sum()
    assert moved > 10


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
    if kind == "all levels but the last": peer.roi_heads.box_roi_pool.featmap_names = peer.roi_heads.mask_roi_pool.featmap_names = ["0", "1", "2", "3", "pool"]
    if kind == "missing there": del peer.roi_heads.mask_predictor.mask_fcn_logits.bias
    if kind == "missing here": peer.roi_heads.quality = nn.Linear(2, 3)
    if kind == "32, 16, 2, 2": peer.roi_heads.mask_predictor = tv_masks.MaskRCNNPredictor(32, 16, 4)
    if kind == "not a torchvision Mask R-CNN": return torchvision.models.resnet18()
    return peer


@pytest.mark.parametrize("kind", ["a last level", "not square", "differ in more", "dilated", "all levels but the last", "missing there", "missing here",
                                  "32, 16, 2, 2", "not a torchvision Mask R-CNN"])
def test_what_has_no_counterpart_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=kind): MaskRCNN.from_torchvision(without_counterpart(kind))


def served(folder):
    "A server for the files of a folder, on this machine."
    handler = functools.partial(type("Quiet", (http.server.SimpleHTTPRequestHandler,), dict(log_message=lambda *a: None)), directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize("name,kind", [("coco", "resnet50_fpn"), ("coco_v2", "resnet50_fpn_v2")])
def test_coco_weights_are_fetched_checked_and_kept(name, kind, tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    state = torchvision.models.get_model(f"maskrcnn_{kind}", weights=None, weights_backbone=None).state_dict()
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "weights.pth")
    file = tmp_path / f"coco-{hashlib.sha256((tmp_path / 'weights.pth').read_bytes()).hexdigest()[:8]}.pth"
    (tmp_path / "weights.pth").rename(file)
    weights = torchvision.models.get_model_weights(f"maskrcnn_{kind}").DEFAULT
    server, address = served(tmp_path)
    monkeypatch.setattr(weights.value, "url", f"{address}/{file.name}")
    model = MaskRCNN.from_pretrained(name)
    server.shutdown()
    assert model.num_classes == 91 and len(model.classes) == 90 and model.classes[0] == "person" and model.source.endswith(file.name)
    assert torch.equal(model.box_head.cls_score.weight, state["roi_heads.box_predictor.cls_score.weight"].half().float())
    assert not model.training and torch.equal(MaskRCNN.from_pretrained(name).mask_head.conv5_mask.bias, model.mask_head.conv5_mask.bias)  # from its copy
    saved = save_model(model, tmp_path / "m.safetensors", model.classes, "joint")
    again, classes, _ = load_model(saved)
    image = [torch.rand(3, 64, 64)]
    model.settings = again.settings = type(again.settings)(**{**vars(again.settings), "min_size": 64, "max_size": 64})
    assert classes == model.classes
    with torch.no_grad(): assert torch.equal(again.stages(image)["features"][0], model.stages(image)["features"][0])


def test_coco_weights_that_cannot_be_had_are_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    weights = torchvision.models.get_model_weights("maskrcnn_resnet50_fpn").DEFAULT
    (tmp_path / "coco-00000000.pth").write_bytes(b"not these weights")
    server, address = served(tmp_path)
    monkeypatch.setattr(weights.value, "url", f"{address}/coco-00000000.pth")
    with pytest.raises(OSError, match="could not be had from .*invalid hash.*put the whole file into"): MaskRCNN.from_pretrained("coco")
    server.shutdown(), server.server_close()
    with pytest.raises(OSError, match="coco-00000000.pth .*refused.*checkpoints"): MaskRCNN.from_pretrained("coco")
    with pytest.raises(ValueError, match="no weights called 'cocoa'"): MaskRCNN.from_pretrained("cocoa")


def test_random_samples_have_torchvisions_counts_and_shares():
    "Which proposals the heads learn from is left to chance; how many, of which kind, and how often each, is not."
    torch.manual_seed(0)
    ours, peer = pair(build_model("tiny", box_batch_size_per_image=20, rpn_post_nms_top_n_train=60).to_torchvision())
    images, targets = map(list, zip(example(64, 64), example(64, 50)))
    draws, batch = 300, ours.train().prepare(images, targets)
    proposals = ours.propose(ours.run_rpn(ours.backbone(batch.images), batch), batch, train=True)
    boxes = [p[v] for p, v in zip(proposals[0], proposals[2])]
    truth = [dict(boxes=b[v], labels=l[v], masks=None) for b, l, v in zip(*(batch.targets[k] for k in ("boxes", "labels", "valid")))]
    for i in range(2):
        places = torch.cat([boxes[i], truth[i]["boxes"]])
        often = torch.zeros(2, len(places))
        for _ in range(draws):
            mine = ours.select_samples(proposals, batch)
            theirs, _, labels, _ = peer.roi_heads.select_training_samples(boxes, truth)
            v = mine.valid[i]
            assert (v.sum(), (mine.labels[i] > 0).sum()) == (len(labels[i]), (labels[i] > 0).sum())
            for count, chosen in zip(often, (mine.boxes[i][v], theirs[i])): count[torch.cdist(chosen, places).argmin(1)] += 1
        share = often / draws
        noise = (share.mean(0) * (1 - share.mean(0)) * 2 / draws).sqrt()
        assert ((share[0] - share[1]).abs() <= 5 * noise + 1e-9).all() and (share.mean(0) % 1 > 0).sum() > 20


def test_mean_losses_of_many_draws_are_torchvisions():
    torch.manual_seed(0)
    ours, peer = pair(build_model("tiny").to_torchvision())
    images, targets = map(list, zip(example(64, 64), example(64, 50)))
    targets = [{**t, "boxes": t["boxes"].clone()} for t in targets]
    with torch.no_grad():
        mine, theirs = (torch.stack([torch.stack([v.double() for v in model.train()(images, targets).values()]) for _ in range(150)]) for model in (ours, peer))
    names = list(ours(images, targets))
    assert names == list(peer(images, targets)) or sorted(names) == sorted(peer(images, targets))
    order = [list(peer(images, targets)).index(name) for name in names]
    theirs = theirs[:, order]
    error = ((mine.var(0) + theirs.var(0)) / len(mine)).sqrt()
    assert ((mine.mean(0) - theirs.mean(0)).abs() <= 5 * error + 1e-9).all()
    torch.testing.assert_close(mine.std(0), theirs.std(0), rtol=0.4, atol=1e-3)


def none(height, width):
    return dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), masks=torch.zeros(0, height, width, dtype=torch.uint8))


HARD = {
    "no object": [], "one pixel": [[20., 20, 21, 21]], "the whole image": [[0., 0, 64, 64]],
    "500 objects": [[float(i % 50), float(i % 40), i % 50 + 9., i % 40 + 9.] for i in range(500)]}


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm in the heads"])
@pytest.mark.parametrize("others", [True, False], ids=["beside an image without objects", "alone"])
@pytest.mark.parametrize("kind", HARD)
def test_losses_are_finite_whatever_the_objects(kind, others, norm):
    torch.manual_seed(0)
    n, boxes = len(HARD[kind]), torch.tensor(HARD[kind]).reshape(-1, 4)
    target = dict(boxes=boxes, labels=torch.ones(n, dtype=torch.long), masks=torch.ones(n, 64, 64, dtype=torch.uint8)) if n else none(64, 64)
    model = build_model("tiny", head_norm=norm)
    losses = model([torch.rand(3, 64, 64) for _ in range(1 + others)], [target, none(64, 64)][:1 + others])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert all(v.isfinite().all() for v in model.state_dict().values())
    if kind == "no object":
        assert losses["loss_mask"] == losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0 < losses["loss_objectness"]
    else: assert losses["loss_mask"] > 0 and losses["loss_rpn_box_reg"] > 0


WRONG = {"reversed": [[30., 30, 10, 10]], "without width": [[10., 10, 10, 30]],
         "not a number": [[1., 1, float("nan"), 9]]}


@pytest.mark.parametrize("kind", WRONG)
def test_a_box_that_is_none_is_refused(kind):
    "As torchvision refuses it: boxes given as x y w h would else train on nothing, without a word."
    good = dict(boxes=torch.tensor([[1., 1, 9, 9]]), labels=torch.tensor([1]),
                masks=torch.ones(1, 64, 64, dtype=torch.uint8))
    bad = good | dict(boxes=torch.tensor([[1., 1, 9, 9], *WRONG[kind]]), labels=torch.tensor([1, 1]),
                      masks=torch.ones(2, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="box 1 of target 1 is .* x1 < x2 and y1 < y2"):
        build_model("tiny")([torch.rand(3, 64, 64)] * 2, [good, bad])


@pytest.mark.parametrize("boxes, message", [([[1., 1, 9, 9]], "got list"), (torch.rand(4), r"got \[4\]"),
                                            (torch.rand(1, 5), r"got \[1, 5\]")])
def test_boxes_of_another_shape_are_refused(boxes, message):
    target = dict(boxes=boxes, labels=torch.tensor([1]), masks=torch.ones(1, 64, 64, dtype=torch.uint8))
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


def test_the_losses_reach_the_images():
    "Saliency and adversarial examples need the gradient of the losses with respect to the images."
    torch.manual_seed(0)
    images, targets = map(list, zip(example(64, 80, dtype=torch.float32),
                                    example(70, 64, dtype=torch.float32)))
    for image in images: image.requires_grad_()
    sum(build_model("tiny")(images, targets).values()).backward()
    for image in images: assert image.grad.isfinite().all() and (image.grad != 0).float().mean() > 0.5


def test_a_new_model_does_not_move_its_frozen_norms():
    "Before any call of `train` or `eval`: one step once moved all 48 running statistics."
    model = build_model("laptop", pretrained=False)
    before = copy.deepcopy(model.state_dict())
    model(*map(list, zip(example(64, 80, dtype=torch.float32, n=1))))
    for name, value in model.state_dict().items(): assert torch.equal(value, before[name]), name


def test_no_proposal_above_the_threshold():
    torch.manual_seed(0)
    image, target = example(64, 64, dtype=torch.float32)
    model = build_model("tiny", rpn_score_thresh=1.1)
    losses = model([image], [{**target, "boxes": target["boxes"].float()}])  # the objects themselves are proposals in training
    assert all(loss.isfinite() for loss in losses.values()) and losses["loss_classifier"] > 0
    losses = model([image], [none(64, 64)])
    sum(losses.values()).backward()
    assert losses["loss_classifier"] == losses["loss_box_reg"] == losses["loss_mask"] == 0
    with torch.no_grad(): found = model.eval()([image])[0]
    assert found["boxes"].shape == (0, 4) and found["masks"].shape == (0, 1, 64, 64)


def test_losses_come_in_eval_mode_too():
    torch.manual_seed(0)
    model = build_model("tiny", **EVERYTHING).eval()
    image, target = example(64, 64, dtype=torch.float32)
    target["boxes"] = target["boxes"].float()
    before, losses = copy.deepcopy(model.state_dict()), model([image], [target])
    assert len(losses) == 5
    for name, loss in model.train()([image], [target]).items(): torch.testing.assert_close(loss, losses[name])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_saved_model_is_the_same_and_a_broken_file_is_named(tmp_path):
    model = build_model("tiny", num_classes=3, rpn_nms_thresh=0.6)
    path = save_model(model, tmp_path / "m.safetensors", ["cat", "dog"], "joint")
    again, classes, stage = load_model(path)
    assert (classes, stage, again.settings) == (["cat", "dog"], "joint", model.settings)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="m.safetensors is not a whole"): load_model(path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_file_from_before_a_setting_detects_as_it_did(tmp_path):
    path = save_model(build_model("photos", pretrained=False, max_size=700), tmp_path / "m.safetensors", ["vehicle", "person", "animal"], "joint")
    assert load_model(path)[0].settings.mask_box_weight == build_model("photos", pretrained=False).settings.mask_box_weight > 0
    with safe_open(path, "pt") as f: about, weights = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    older = {k: v for k, v in json.loads(about["settings"]).items() if k != "mask_box_weight"}
    save_file(weights, path, about | dict(settings=json.dumps(older)))
    assert (found := load_model(path)[0].settings).mask_box_weight == 0 and found.max_size == 700


@pytest.mark.parametrize("votes", [0.0, 0.5])
def test_the_mirror_image_is_asked_as_well(votes):
    torch.manual_seed(0)
    model = loud(build_model("tiny").double())
    model.settings = dataclasses.replace(model.settings, mask_box_weight=votes, flip_test=True)
    images = [example(70, 90)[0], example(64, 50)[0]]
    with torch.no_grad():
        both, again = model(images), model(images[1:])
        model.settings = dataclasses.replace(model.settings, flip_test=False, mask_box_weight=0.0)
        alone = model(images)
        assert_same(alone, model.to_torchvision()(images), 3)
        model.settings = dataclasses.replace(model.settings, flip_test=True)
        assert_same(alone, model.to_torchvision()(images), 3)  # which looks into no mirror
    for k, v in both[1].items(): torch.testing.assert_close(again[0][k], v)
    assert all(len(b["boxes"]) for b in both) and not any(a["scores"].shape == b["scores"].shape and torch.allclose(a["scores"], b["scores"]) for a, b in zip(alone, both))


def test_every_size_has_the_same_say():
    torch.manual_seed(0)
    model = loud(build_model("tiny").double())
    images = [example(70, 90)[0], example(64, 50)[0]]
    model.settings = dataclasses.replace(model.settings, rpn_pre_nms_top_n_test=100_000)
    with torch.no_grad():
        batch, once = model.prepare(images), model(images)
        alone = model.to_torchvision()
        model.settings = dataclasses.replace(model.settings, scale_test=(1.0,))
        for a, b in zip(model(images), once):
            for k in a: torch.testing.assert_close(a[k], b[k])  # who looks twice at the same size sees the same
        assert_same(once, model.to_torchvision()(images), 3)
        assert_same(once, alone(images), 3)
        model.settings = dataclasses.replace(model.settings, scale_test=(1.5,))
        features = model.extract_features(batch)
        boxes, _, valid = model.propose(model.run_rpn(features, batch), batch, train=False)
        logits, deltas = model.run_box_head(features, boxes, valid, batch)
        masks = model.run_mask_head(features, boxes, labels := valid.long(), valid, batch)
        sizes = [tuple(batch.images.shape[-2:]), tuple(4 * side for side in features[5].shape[-2:])]
        assert sizes == [(64, 64), (96, 96)] and {tuple(f.shape[:1]) for f in features} == {(2,)}
        views = [(features[:5], boxes, batch), (features[5:], boxes * 1.5, batch._replace(images=torch.zeros(2, 3, *sizes[1])))]
        small, large = ((*model.run_box_head(f, b, valid, at), model.run_mask_head(f, b, labels, valid, at)) for f, b, at in views)
    torch.testing.assert_close(logits[valid].exp(), (small[0].softmax(-1) + large[0].softmax(-1))[valid] / 2)
    torch.testing.assert_close(deltas, (small[1] + large[1]) / 2)
    torch.testing.assert_close(masks, (small[2] + large[2]) / 2)
    assert (small[0] - large[0])[valid].abs().max() > 1e-3


def test_mirror_and_sizes_have_no_part_in_training():
    torch.manual_seed(0)
    model, (image, target) = build_model("tiny").train(), example(64, 64, dtype=torch.float32)
    losses = []
    for settings in ({}, dict(flip_test=True), dict(scale_test=(2.0,))):
        model.settings = dataclasses.replace(model.settings, **settings)
        with FlopCounterMode(display=False) as flops: losses.append(model([image], [target], torch.Generator().manual_seed(0)))
        losses[-1]["flops"] = torch.tensor(flops.get_total_flops())
    for other in losses[1:]: torch.testing.assert_close(other, losses[0], rtol=0, atol=0)


def test_a_model_from_torchvision_is_saved_if_a_preset_can_build_it(tmp_path):
    ours = MaskRCNN.from_torchvision(build_model("laptop", 3).to_torchvision())
    again, _, _ = load_model(save_model(ours, tmp_path / "m.safetensors", ["cat", "dog"], "joint"))
    assert again.preset == "laptop" and again.backbone.frozen_norm
    odd = MaskRCNN.from_torchvision(Peer(resnet("resnet18"), 3))
    with pytest.raises(ValueError, match="no preset .* has this model's architecture"): save_model(odd, tmp_path / "odd.safetensors", ["cat", "dog"], "joint")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ours: laptop", "resnet50_fpn_v2"])
def test_the_gpu_gives_the_answers_losses_and_gradients_of_the_cpu(gpu, kind):
    torch.manual_seed(0)
    ours, _ = pair(PEERS[kind if gpu == "cuda" else "ours: tiny"]())
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
        if a.requires_grad: assert (a.grad - b.grad.cpu()).abs().max() <= 1e-6 * a.grad.abs().max() + 1e-9, name
