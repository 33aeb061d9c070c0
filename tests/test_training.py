"""Training: what is frozen does not move, kept results are what was computed.

Also other precisions and worker processes.
"""
import copy
import json
import math
import shutil
import subprocess
import sys

import h5py
import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader

from helpers import never_waits
from maskrcnn_course.data import InstanceDataset, _transform, collate
from maskrcnn_course.fpn import Backbone, tiny_backbone
from maskrcnn_course.mask_rcnn import MaskRCNN
from maskrcnn_course.presets import PRESETS, build_model, load_model
from maskrcnn_course.speed import speed_up
from maskrcnn_course.scenes import write_scenes
from maskrcnn_course.augment import augmentation, copy_paste, data_loader
from maskrcnn_course.features import FeatureCache
from maskrcnn_course.training import Stage, class_maps, mean_losses, train, train_stage

ALL = ("flip", "colour", "shrink", "crop", "paste")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    path = tmp_path_factory.mktemp("training") / "scenes.h5"
    return write_scenes(path, n=10, size=(64, 64), val=2, instances=(1, 3))


def with_batch_norm():
    body = tiny_backbone().body
    backbone = Backbone(body, [8, 16, 16, 16], 16, norm_layer=nn.BatchNorm2d)
    return speed_up(MaskRCNN(backbone, 4, **PRESETS["tiny"].settings))


HEADS = {f"roi_heads.{head}_{part}" for head in ("box", "mask") for part in ("head", "predictor")}


def part_of(name):
    "The part of the model that a weight belongs to."
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == "roi_heads" else words[0]


@pytest.mark.parametrize("stage, moves", [
    ("rpn", {"backbone", "rpn"}), ("box", {h for h in HEADS if "box" in h}),
    ("mask", {h for h in HEADS if "mask" in h}), ("joint", {"backbone", "rpn"} | HEADS)])
def test_only_the_stage_moves_batch_norm_included(scenes, stage, moves):
    torch.manual_seed(0)
    model = with_batch_norm()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train_stage(model, stage, scenes, epochs=1, batch_size=4, lr=1e-2)
    moved = {part_of(k) for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == moves


@pytest.mark.parametrize("gigabytes", [0.0, 20.0])
def test_frozen_results_are_what_the_model_says(scenes, gigabytes):
    torch.manual_seed(0)
    model, loader = build_model("tiny"), DataLoader(InstanceDataset(scenes, "train"), 4, collate_fn=collate)
    frozen = sorted(FeatureCache(model, loader, gigabytes), key=lambda kept: kept[1][0].sum().item())
    live = []
    with torch.no_grad():
        for images, targets in loader:
            batch = model.prepare(images, targets)
            features = model.backbone(batch.images)
            rpn = model.rpn(features, batch.image_size)
            live.append((features, model.rpn.filter_proposals(rpn, batch.sizes, train=True), batch))
    live.sort(key=lambda kept: kept[1][0].sum().item())
    assert len(frozen) == len(live) == 2
    for (features, proposals, batch), (features_, proposals_, batch_) in zip(frozen, live):
        for a, b in zip(features, features_):
            torch.testing.assert_close(a.float(), b, rtol=2 ** -4, atol=2 ** -9)
        for a, b in zip(proposals, proposals_): assert torch.equal(a, b)
        assert batch.image_size == batch_.image_size and batch.targets.keys() == batch_.targets.keys()
        for k in batch.targets: assert torch.equal(batch.targets[k], batch_.targets[k])


def test_values_too_large_for_8_bits_are_cut(scenes):
    model = build_model("tiny")
    for block in model.backbone.fpn.layer_blocks: block[0].weight.data *= 1e6
    frozen = FeatureCache(model, DataLoader(InstanceDataset(scenes, "train"), 4, collate_fn=collate))
    for features, *_ in frozen:
        assert all(f.float().isfinite().all() for f in features)
        assert max(f.float().abs().max() for f in features) == 448


@pytest.mark.parametrize("stage", ["box", "mask"])
def test_a_frozen_stage_learns(scenes, stage):
    torch.manual_seed(0)
    history = train_stage(build_model("tiny"), stage, scenes, epochs=20, batch_size=4, lr=1e-2)
    first, last = (sum(row["train"].values()) for row in (history[0], history[-1]))
    assert last < 0.95 * first


def test_other_precision_and_workers(scenes, tmp_path):
    "In a process of its own: accelerate settles the precision once for each."
    code = "import sys; from maskrcnn_course.cli import main; main(sys.argv[1:])"
    words = ["train", scenes, "--out", tmp_path / "run", "--preset", "tiny", "--epochs", "1",
             "--workers", "2", "--mixed-precision", "bf16"]
    subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True, capture_output=True)
    history = json.loads((tmp_path / "run/history.json").read_text())
    assert [h["stage"] for h in history] == ["rpn", "box", "mask"]
    assert all(math.isfinite(v) for h in history for part in ("train", "val") for v in h[part].values())
    model, classes, stage = load_model(tmp_path / "run/model.safetensors")
    assert stage == "mask"
    assert all(v.dtype in (torch.float32, torch.int64) for v in model.state_dict().values())


def test_stage_refuses_a_name_that_is_none():
    with pytest.raises(KeyError): Stage(build_model("tiny"), "masks")


def square(labels, *corners, size=64):
    "A target of squares with sides of 16 pixels."
    masks = torch.zeros(len(labels), size, size, dtype=torch.uint8)
    for mask, (x, y) in zip(masks, corners): mask[y:y + 16, x:x + 16] = 1
    boxes = torch.tensor([[x, y, x + 16, y + 16] for x, y in corners], dtype=torch.float32).reshape(-1, 4)
    return dict(boxes=boxes, labels=torch.tensor(labels, dtype=torch.long), masks=masks,
                iscrowd=torch.zeros(len(labels), dtype=torch.long))


def test_the_class_of_every_pixel():
    crowd = square([1, 3], (0, 0), (32, 32))
    crowd["iscrowd"][0] = 1
    targets = [square([3, 1], (0, 0), (8, 8)), square([]), crowd, square([2], (40, 8))]
    classes = class_maps(build_model("tiny").prepare([torch.rand(3, 64, 64) for _ in targets], targets))
    expected = torch.zeros(4, 64, 64, dtype=torch.long)
    expected[0, 8:24, 8:24] = 1
    expected[0, :16, :16] = 3  # where two overlap, the higher number
    expected[2, 32:48, 32:48] = 3
    expected[3, 8:24, 40:56] = 2
    assert torch.equal(classes, expected)


def test_the_question_for_the_features_reaches_them_and_not_the_model():
    torch.manual_seed(0)
    model = build_model("tiny")
    stage, names = Stage(model, "rpn"), set(model.state_dict())
    losses = stage(([torch.rand(3, 64, 64)], [square([2], (8, 8))]), torch.Generator())
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_semantic"}
    assert abs(losses["loss_semantic"].item() - 1.386) < 0.3
    losses["loss_semantic"].backward()
    assert all(w.grad.abs().sum() > 0 for n, w in model.backbone.named_parameters() if "weight" in n)
    assert model.rpn.head.cls_logits.weight.grad is None
    assert set(model.state_dict()) == names


@pytest.mark.gpu
def test_the_class_of_every_pixel_does_not_wait_for_the_gpu(gpu):
    model = build_model("tiny").to(gpu)
    batch = model.prepare([torch.rand(3, 64, 64)] * 2, [square([3, 1], (0, 0), (8, 8)), square([])])
    with never_waits(gpu): classes = class_maps(batch)
    assert classes.sum() == 3 * 256 + 256 - 64


def test_pasting_keeps_targets_true(scenes):
    "Masks of what is seen, boxes around them, pixels of one image or the other."
    data, pasted = InstanceDataset(scenes, "train"), 0
    for seed in range(20):
        images, targets = collate([data[seed % len(data)], data[(seed + 1) % len(data)],
                                   data[(seed + 2) % len(data)]])
        new_images, new_targets = copy_paste(images, targets, torch.Generator().manual_seed(seed))
        for i, (image, t) in enumerate(zip(new_images, new_targets)):
            other = images[(i + 1) % 3]
            assert ((image == images[i]) | (image == other)).all() and t["image_id"] == targets[i]["image_id"]
            n = len(t["labels"])
            assert all(len(t[k]) == n for k in ("boxes", "masks", "area", "iscrowd"))
            assert (t["masks"].sum(0) <= 1).all()  # the scenes' masks are what is seen, and so are these
            tight = torchvision.ops.masks_to_boxes(t["masks"]) + torch.tensor([0, 0, 1, 1])
            assert (t["area"] == t["masks"].flatten(1).sum(1)).all() and (t["boxes"] - tight).abs().max() <= 1
            pasted += image is not images[i]
    assert pasted > 20


def test_pasting_needs_no_equal_sizes(scenes):
    """After shrink and crop hardly two images are of one size.

    Objects are pasted all the same, as large as they were, and targets stay true.
    """
    data, pasted, whole = InstanceDataset(scenes, "train", augmentation(("flip", "shrink", "crop"))), 0, 0
    torch.manual_seed(0)
    for seed in range(20):
        images, targets = collate([data[seed % len(data)], data[(seed + 1) % len(data)],
                                   data[(seed + 2) % len(data)]])
        new_images, new_targets = copy_paste(images, targets, torch.Generator().manual_seed(seed))
        for i, (image, t) in enumerate(zip(new_images, new_targets)):
            assert image.shape == images[i].shape and t["masks"].shape[1:] == image.shape[1:]
            assert (t["masks"].sum(0) <= 1).all()
            if image is images[i]: continue
            tight = torchvision.ops.masks_to_boxes(t["masks"]) + torch.tensor([0, 0, 1, 1])
            assert (t["area"] - t["masks"].flatten(1).sum(1)).abs().max() == 0
            assert (t["boxes"] - tight).abs().max() <= 1.01
            height, width = image.shape[1:]
            assert (t["boxes"] >= 0).all()
            assert (t["boxes"] <= torch.tensor([width, height, width, height])).all()
            changed = (image != images[i]).any(0)
            assert (t["masks"].sum(0)[changed] == 1).all()  # whatever is new is an object
            donors = targets[(i + 1) % 3]
            pasted += images[(i + 1) % 3].shape != image.shape
            whole += any(m.sum() == d.sum() for m in t["masks"] for d in donors["masks"])
    assert pasted > 15 and whole > 5


def test_the_joint_stage_asks_about_pixels_too(scenes):
    images, targets = collate([InstanceDataset(scenes, "train")[i] for i in range(2)])
    model = build_model("tiny")
    names = set(model.state_dict())
    losses = Stage(model, "joint").train()((images, targets), torch.Generator().manual_seed(0))
    plain = model(images, targets, torch.Generator().manual_seed(0))
    assert set(losses) == {*plain, "loss_semantic"}
    assert all(torch.equal(losses[k], v) for k, v in plain.items())
    assert set(model.state_dict()) == names



def test_an_image_without_objects_takes_every_augmentation():
    nothing = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long),
                   masks=torch.zeros(0, 40, 60, dtype=torch.uint8),
                   image_id=1, area=torch.zeros(0), iscrowd=torch.zeros(0, dtype=torch.long))
    for seed in range(20):
        torch.manual_seed(seed)
        image, target = _transform(augmentation(ALL), torch.zeros(3, 40, 60, dtype=torch.uint8), nothing)
        assert target["masks"].shape == (0, *image.shape[-2:])
    image = image.float()
    images, targets = copy_paste([image, image], [target, target])
    assert images[0] is image and len(targets[0]["labels"]) == 0


def test_all_augmentations_at_once(scenes, tmp_path):
    history = train(scenes, tmp_path / "run", preset="tiny", epochs=dict(rpn=1, box=1, mask=1),
                    augment=ALL, looks=3)
    assert all(math.isfinite(v) for h in history for v in h["train"].values())
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert settings["augment"] == list(ALL) and settings["looks"] == 3


@pytest.mark.parametrize("wrong, message", [(dict(augment=("flip", "blur")), "unknown augmentation"),
                                            (dict(looks=0), "looks .--looks. is 0"),
                                            (dict(start="nowhere"), "no model at")])
def test_wrong_choices_write_nothing(scenes, tmp_path, wrong, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(scenes, tmp_path / "run", preset="tiny", **wrong)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("n, epochs", [(4, 1), (4, 2), (8, 5)])
def test_few_steps_are_enough_for_a_schedule(tmp_path, n, epochs):
    "One, two and ten steps: a tenth of ten for warming up would make the schedule divide by zero."
    write_scenes(tmp_path / "few.h5", n=n + 2, val=2, size=(64, 64), seed=1, instances=(1, 3))
    history = train(tmp_path / "few.h5", tmp_path / "run", ("rpn",), "tiny",
                    epochs=dict(rpn=epochs), mixed_precision="no")
    assert len(history) == epochs and all(v == v for v in history[-1]["train"].values())


def test_validation_moves_no_statistic_and_draws_no_size(scenes):
    "Batch norm that learns would else learn from validation images, and their size would be left to chance."
    torch.manual_seed(0)
    model = with_batch_norm()
    model.transform.min_size = (32, 64)
    stage = Stage(model, "rpn").train()
    before = copy.deepcopy(model.state_dict())
    loader = DataLoader(InstanceDataset(scenes, "val"), 2, collate_fn=collate)
    first, second = mean_losses(stage, loader), mean_losses(stage, loader)
    assert first == second and stage.training
    for name, value in model.state_dict().items(): assert torch.equal(value, before[name]), name


def with_classes(path, names, out):
    "A copy of a data set whose classes have other names."
    shutil.copy(path, out)
    with h5py.File(out, "a") as f: f.attrs["classes"] = json.dumps(names)
    return out


@pytest.mark.parametrize("start", ["run", "run/model.safetensors"])
def test_fine_tuning_takes_over_all_but_the_classes_that_are_new(scenes, tmp_path, start, capsys):
    train(scenes, tmp_path / "run", ("joint",), "tiny", dict(joint=1))
    others = with_classes(scenes, ["person", "tree", "animal"], tmp_path / "others.h5")
    train(others, tmp_path / "tuned", ("joint",), "tiny", dict(joint=1), lr=1e-12, start=tmp_path / start)
    assert "only the last layers of tree begin anew" in capsys.readouterr().out
    old, new = (load_model(tmp_path / run / "model.safetensors")[0].state_dict() for run in ("run", "tuned"))
    last = [name for name in new if "predictor" in name and "conv5" not in name]
    for name in new.keys() - set(last): torch.testing.assert_close(new[name], old[name], rtol=0, atol=1e-6)
    for name in last:  # old classes: background, vehicle, person, animal
        was, now = (weights[name].unflatten(0, (4, -1)) for weights in (old, new))
        torch.testing.assert_close(now[[0, 1, 3]], was[[0, 2, 3]], rtol=0, atol=1e-6)
        if "weight" in name: assert not torch.allclose(now[2], was[1], atol=1e-4)
    settings = json.loads((tmp_path / "tuned/settings.json").read_text())
    assert settings["classes"] == ["person", "tree", "animal"]


def test_fine_tuning_from_torchvisions_weights(scenes, tmp_path, monkeypatch, capsys):
    "Their file is not here, so a model of the right classes stands in for what the network would bring."
    old = build_model("tiny", num_classes=3)
    old.classes = ["person", "car"]
    monkeypatch.setattr(MaskRCNN, "from_pretrained", staticmethod(lambda name: old))
    train(scenes, tmp_path / "run", ("joint",), "tiny", dict(joint=1), lr=1e-12, start="coco")
    assert "only the last layers of vehicle, animal begin anew" in capsys.readouterr().out
    new = load_model(tmp_path / "run/model.safetensors")[0].state_dict()
    weights = old.state_dict()
    for name, rows in (("roi_heads.box_predictor.cls_score.weight", 1), ("rpn.head.conv.0.0.weight", None)):
        if rows is None: torch.testing.assert_close(new[name], weights[name], rtol=0, atol=1e-6)
        else: torch.testing.assert_close(new[name][[0, 2]], weights[name][[0, 1]], rtol=0, atol=1e-6)


def test_batches_do_not_depend_on_worker_processes_or_on_what_was_drawn_before(scenes):
    def epoch(workers, number):
        loader = data_loader(scenes, "train", 4, seed=3, workers=workers, augment=ALL)
        loader.batch_sampler.set_epoch(number)
        return list(loader)
    one = epoch(0, 5)
    torch.rand(17)
    for again in (epoch(0, 5), epoch(2, 5)):
        for (images, targets), (images_, targets_) in zip(one, again, strict=True):
            assert all(map(torch.equal, images, images_))
            for a, b in zip(targets, targets_):
                assert a.keys() == b.keys() and torch.equal(a["masks"], b["masks"])
    orders = [[t["image_id"] for _, targets in batches for t in targets] for batches in (one, epoch(0, 6))]
    assert orders[0] != orders[1]
