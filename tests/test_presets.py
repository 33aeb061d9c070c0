"A model that is kept is the same model: new files, old files, and models that came from torchvision."
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models.detection import MaskRCNN as Peer
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from maskrcnn_course.mask_rcnn import MaskRCNN
from maskrcnn_course.presets import PRESETS, build_model, load_model, save_model, with_test_augmentation
from maskrcnn_course.speed import slow_down
from maskrcnn_course.tta import MaskRCNNWithTTA

FIXTURES = Path(__file__).parent / "fixtures"  # see make_24a19b3.py there
CLASSES = ["vehicle", "person", "animal"]
BOTH = pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])


def parts_of(path):
    "Header and weights of a file."
    with safe_open(path, "pt") as f: return f.metadata(), {k: f.get_tensor(k) for k in f.keys()}


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name, value in a.items(): assert torch.equal(value, b[name]), name


@BOTH
def test_a_saved_model_is_the_same_and_a_broken_file_is_named(tmp_path, fast):
    model = build_model("tiny", num_classes=3, fast=fast, rpn_nms_thresh=0.6)
    path = save_model(model, tmp_path / "m.safetensors", ["cat", "dog"], "joint")
    again, classes, stage = load_model(path, fast=fast)
    assert (classes, stage, again.settings) == (["cat", "dog"], "joint", model.settings)
    assert (again.preset, again.classes, again.training) == ("tiny", ["cat", "dog"], False)
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert_same_weights(model, again)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="m.safetensors is not a whole"): load_model(path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_number_that_was_changed_is_kept(tmp_path):
    model = build_model("tiny")
    model.roi_heads.box_score_thresh, model.transform.min_size = 0.3, (40, 56)
    again, _, _ = load_model(save_model(model, tmp_path / "m.safetensors", CLASSES, "joint"))
    assert again.settings == model.settings
    assert again.settings == build_model("tiny").settings | dict(box_score_thresh=0.3, min_size=(40, 56))


def test_a_file_of_another_kind_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model at"): load_model(tmp_path / "m.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "m.safetensors", {"classes": "[]"})
    missing = r"not written by save_model: its metadata lack \['preset', 'settings', 'stage'\]"
    with pytest.raises(ValueError, match=missing): load_model(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="unknown preset 'huge'; there are .*'tiny'"): build_model("huge")


def test_a_model_from_torchvision_is_saved_if_a_preset_can_build_it(tmp_path):
    ours = MaskRCNN.from_torchvision(build_model("laptop", 3).to_torchvision())
    again, _, _ = load_model(save_model(ours, tmp_path / "m.safetensors", ["cat", "dog"], "joint"))
    assert again.preset == "laptop" and again.backbone.frozen_norm
    odd = MaskRCNN.from_torchvision(Peer(resnet_fpn_backbone(backbone_name="resnet18", weights=None), 3))
    with pytest.raises(ValueError, match="no preset .* has this model's architecture"):
        save_model(odd, tmp_path / "odd.safetensors", ["cat", "dog"], "joint")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_goes_to_torchvision(name):
    "Without memory for its weights; torchvision's model has them all, under the same names."
    with torch.device("meta"):
        model = build_model(name, pretrained=False, fast=False)
        peer = model.to_torchvision()
    assert model.preset == name
    shapes, theirs = ({k: v.shape for k, v in m.state_dict().items()} for m in (model, peer))
    assert shapes == theirs


def test_presets_detect_with_what_helps_them():
    laptop, photos, large = (build_model(n, pretrained=False) for n in ("laptop", "photos", "photos_large"))
    assert with_test_augmentation(laptop) is laptop
    for model, flip in ((photos, False), (large, True)):
        tta = with_test_augmentation(model)
        assert (tta.model, tta.scales, tta.flip, tta.mask_box_weight) == (model, (), flip, 0.65)
    for model, weight in ((laptop, 0), (photos, 0.65), (large, 0.65)):
        tta = with_test_augmentation(model, every_view=True)
        assert (tta.model, tta.scales, tta.flip, tta.mask_box_weight) == (model, (0.75, 1.25), True, weight)


def test_a_model_of_no_preset_can_have_every_view():
    model = MaskRCNN.from_torchvision(build_model("tiny").to_torchvision())
    assert model.preset is None and with_test_augmentation(model) is model
    assert with_test_augmentation(model, every_view=True).scales == (0.75, 1.25)


# Files written by commit 24a19b3, when the model had names of its own and test-time augmentation in it

@BOTH
def test_an_old_file_gives_its_old_answers(fast):
    model, classes, stage = load_model(FIXTURES / "model_24a19b3.safetensors", fast=fast)
    answers = load_file(FIXTURES / "answers_24a19b3.safetensors")
    assert (classes, stage, model.preset, model.training) == (CLASSES, "joint", "tiny", False)
    assert (model.roi_heads.box_layers, model.roi_heads.box_detections_per_img) == ((8,), 6)
    image = answers["image"] / 255
    with torch.no_grad():
        plain = model([image])[0]
        both = MaskRCNNWithTTA(model, scales=(), flip=True, mask_box_weight=0.5)([image])[0]
    assert len(set(plain["labels"].tolist())) > 1 and not torch.equal(plain["labels"], both["labels"])
    for name, found in dict(plain=plain, both=both).items():
        assert torch.equal(found["labels"], answers[f"{name}.labels"])
        for key, atol in dict(boxes=1e-3, scores=1e-5, masks=1e-3).items():  # masks are kept in 16 bits
            torch.testing.assert_close(found[key], answers[f"{name}.{key}"].float(), rtol=0, atol=atol)


def test_an_old_file_that_is_saved_again_is_a_new_one(tmp_path):
    model, _, _ = load_model(FIXTURES / "model_24a19b3.safetensors")
    path = save_model(model, tmp_path / "m.safetensors", CLASSES, "joint")
    about, weights = parts_of(path)
    assert not {"flip_test", "scale_test", "mask_box_weight"} & set(json.loads(about["settings"]))
    assert set(weights) == set(model.to_torchvision().state_dict())
    assert_same_weights(model, load_model(path)[0])


OLD = {  # settings of a model, and where its fully connected layers are now
    "two fully connected layers": ({}, ["fc6", "fc7"]),
    "one": (dict(box_hidden=(24,)), ["1"]),
    "two of different width": (dict(box_hidden=(24, 16)), ["1", "3"]),
    "convolutions before them": (dict(box_layers=(8, 8)), ["3", "5"]),
    "batch norm in the heads": (
        dict(rpn_conv_depth=2, box_layers=(8, 8), box_hidden=(16,), mask_layers=(8, 8), head_norm=True),
        ["3"]),
}


def old_name(name, fully_connected):
    "The name of a weight in files of commit 24a19b3."
    part, _, rest = name.partition(".")
    if part == "rpn": return f"rpn_{rest}"
    if part != "roi_heads": return name
    part, _, rest = rest.partition(".")
    if part.endswith("_predictor"): return f"{part.removesuffix('_predictor')}_head.{rest}"
    layer, _, rest = rest.partition(".")
    if part == "box_head" and layer in fully_connected:
        return f"box_head.fcs.{fully_connected.index(layer)}.{rest}"
    return f"{part}.convs.{layer}.{rest}"


@pytest.mark.parametrize("kind", OLD)
def test_an_old_file_loads_whatever_its_heads(kind, tmp_path):
    settings, fully_connected = OLD[kind]
    model = build_model("tiny", **settings)
    for weight in model.parameters(): nn.init.normal_(weight)  # no two of one shape are equal
    path = save_model(model, tmp_path / "m.safetensors", CLASSES, "joint")
    about, weights = parts_of(path)
    old = {old_name(name, fully_connected): value for name, value in weights.items()}
    assert len(old) == len(weights) and "box_head.fcs.0.weight" in old and "box_head.cls_score.bias" in old
    tta = dict(mask_box_weight=0.5, flip_test=True, scale_test=[0.75])
    save_file(old, path, about | dict(settings=json.dumps(json.loads(about["settings"]) | tta)))
    again, _, _ = load_model(path)
    assert again.settings == model.settings
    assert_same_weights(again, model)


def test_an_older_file_lacks_settings_that_came_later(tmp_path):
    path = save_model(build_model("tiny", max_size=70), tmp_path / "m.safetensors", CLASSES, "joint")
    about, weights = parts_of(path)
    older = {k: v for k, v in json.loads(about["settings"]).items() if k not in ("head_norm", "fixed_size")}
    save_file(weights, path, about | dict(settings=json.dumps(older)))
    settings = load_model(path)[0].settings
    assert (settings["head_norm"], settings["fixed_size"], settings["max_size"]) == (False, None, 70)


@BOTH
def test_load_model_gives_the_modules_that_are_asked_for(fast):
    model, _, _ = load_model(FIXTURES / "model_24a19b3.safetensors", fast=fast)
    names = {type(m).__name__ for m in model.modules()}
    assert ({"FastTransform", "FastRoIHeads"} <= names) == fast
    assert not any(hasattr(m, "plain") for m in slow_down(model).modules())


def test_a_body_of_timm_is_saved_by_its_name(tmp_path):
    "Its colours too; and without a network nothing is fetched to load it."
    torch.manual_seed(0)
    model = build_model("tiny", 3, pretrained=False, backbone="resnet18").eval()
    assert model.transform.image_mean == (0.485, 0.456, 0.406)
    save_model(model, tmp_path / "m.safetensors", ["cat", "dog"], "joint")
    again, *_ = load_model(tmp_path / "m.safetensors")
    image = [torch.rand(3, 60, 90)]
    with torch.no_grad(): a, b = model(image)[0], again(image)[0]
    assert again.backbone.timm_name == "resnet18" and again.settings == model.settings
    assert all(torch.equal(a[name], b[name]) for name in a)
