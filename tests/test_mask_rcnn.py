"The whole model against torchvision's, with the same weights, in float64; and targets that have nothing to teach."
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from maskrcnn_course.mask_rcnn import MaskRCNN, load_model, mask_rcnn, save_model, torchvision_name

EVERYTHING = dict(rpn_batch_size_per_image=10**6, box_batch_size_per_image=10**4, box_positive_fraction=0.5, rpn_pre_nms_top_n_train=100,
                  rpn_post_nms_top_n_train=60, rpn_pre_nms_top_n_test=100, rpn_post_nms_top_n_test=60, box_score_thresh=0.01)


@torch.no_grad()
def loud(model):
    "Random last layers whose answers vary by about one, so that an untrained model finds many things, no two with the same score."
    torch.manual_seed(2)
    image = [torch.rand(3, 128, 128, dtype=torch.float64)]
    for layer, answer, spread in ((model.rpn_head.cls_logits, "objectness", 2), (model.rpn_head.bbox_pred, "deltas", 0.3)):
        nn.init.normal_(layer.weight)
        layer.weight *= spread / torch.cat([a.flatten() for a in model.stages(image)[answer]]).std()
    stages = model.stages(image)
    for layer, answer, spread in ((model.box_head.cls_score, 0, 2), (model.box_head.bbox_pred, 1, 1)):
        nn.init.normal_(layer.weight)
        proposals = stages["proposals"]
        layer.weight *= spread / model.run_box_head(stages["features"], proposals["boxes"], proposals["valid"], stages["batch"])[answer].std()
    return model


def example(height, width, n=3):
    image, at = torch.rand(3, height, width, dtype=torch.float64), torch.rand(n, 2, dtype=torch.float64)
    size = torch.tensor([width, height])
    boxes = torch.cat([at * size * 0.5, at * size * 0.5 + 8 + torch.rand(n, 2) * size * 0.4], 1)
    masks = torch.zeros(n, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()): mask[y1:y2, x1:x2] = 1
    return image, dict(boxes=boxes, labels=torch.randint(1, 4, (n,)), masks=masks)


def pair(kind):
    "Our model and torchvision's with the same weights."
    torch.manual_seed(0)
    if kind != "resnet50":
        ours = loud(mask_rcnn(kind, **EVERYTHING).double())
        return ours, ours.to_torchvision()
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3)
    for name, buffer in backbone.body.named_buffers():  # untrained residual blocks would add up to huge numbers
        if name.endswith("bn3.weight"): buffer.fill_(0.2)
    peer = torchvision.models.detection.MaskRCNN(backbone, 4, min_size=96, max_size=150, **EVERYTHING).double()
    peer = loud(MaskRCNN.from_torchvision(peer)).to_torchvision()
    return MaskRCNN.from_torchvision(peer), peer


@pytest.mark.parametrize("kind", ["tiny", "laptop", "resnet50"])
def test_same_answers_losses_and_gradients_as_torchvision(kind):
    ours, peer = pair(kind)
    torch.manual_seed(1)
    images, targets = map(list, zip(example(96, 130), example(112, 80)))
    with torch.no_grad(): mine, theirs = ours.eval()(images), peer.eval()(images)
    for a, b in zip(mine, theirs):
        assert len(a["boxes"]) == len(b["boxes"]) > 5 and torch.equal(a["labels"], b["labels"])
        for key in ("boxes", "scores", "masks"): torch.testing.assert_close(a[key], b[key], rtol=1e-6, atol=1e-7)
    mine, theirs = ours.train()(images, targets), peer.train()(images, targets)
    for key in theirs: torch.testing.assert_close(mine[key], theirs[key].double(), rtol=1e-6, atol=1e-9)
    sum(mine.values()).backward()
    sum(theirs.values()).backward()
    for name, weight in ours.named_parameters():
        there = peer.get_parameter(torchvision_name(name, ours.settings))
        assert weight.requires_grad == there.requires_grad
        if weight.requires_grad: assert (weight.grad - there.grad).abs().max() <= 1e-6 * there.grad.abs().max() + 1e-12, name


def test_weights_survive_the_way_there_and_back():
    peer = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=7)
    back = MaskRCNN.from_torchvision(peer).to_torchvision().state_dict()
    assert list(back) == list(peer.state_dict())
    assert all(torch.equal(back[k], v) for k, v in peer.state_dict().items())


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="not a torchvision Mask R-CNN"): MaskRCNN.from_torchvision(torchvision.models.resnet18())


def none(height, width):
    return dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), masks=torch.zeros(0, height, width, dtype=torch.uint8))


@pytest.mark.parametrize("boxes", [[], [[10., 10, 10, 30]], [[20., 20, 21, 21]], [[0., 0, 64, 64]], [[float(i % 50), float(i % 40), i % 50 + 9., i % 40 + 9.] for i in range(500)]],
                         ids=["no object", "no area", "one pixel", "the whole image", "500 objects"])
def test_losses_are_finite_whatever_the_objects(boxes):
    torch.manual_seed(0)
    n = len(boxes)
    target = dict(boxes=torch.tensor(boxes).reshape(n, 4), labels=torch.ones(n, dtype=torch.long), masks=torch.ones(n, 64, 64, dtype=torch.uint8)) if n else none(64, 64)
    model = mask_rcnn("tiny")
    losses = model([torch.rand(3, 64, 64), torch.rand(3, 64, 64)], [target, none(64, 64)])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if n < 2 and (not n or boxes[0][0] == boxes[0][2]): assert losses["loss_mask"] == losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0


def test_losses_come_in_eval_mode_too():
    model = mask_rcnn("tiny").eval()
    assert len(model([torch.rand(3, 64, 64)], [none(64, 64)])) == 5


def test_a_saved_model_is_the_same_and_a_broken_file_is_named(tmp_path):
    model = mask_rcnn("tiny", num_classes=3, rpn_nms_thresh=0.6)
    path = save_model(model, tmp_path / "m.safetensors", ["cat", "dog"], "joint")
    again, classes, stage = load_model(path)
    assert (classes, stage, again.settings) == (["cat", "dog"], "joint", model.settings)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="m.safetensors is not a whole"): load_model(path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.gpu
def test_the_gpu_gives_the_answers_of_the_cpu():
    ours, _ = pair("laptop")
    images = [example(128, 170)[0]]
    with torch.no_grad(): cpu, gpu = ours.eval()(images)[0], ours.cuda()(images)[0]
    for key in ("boxes", "scores", "masks"): torch.testing.assert_close(cpu[key], gpu[key].cpu(), rtol=1e-6, atol=1e-6)
