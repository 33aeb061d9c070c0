"Test-time augmentation: boxes from masks, mirror images and sizes around a model that stays as it is."
import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import tensor

from helpers import loud
from maskrcnn_course.mask_head import project_masks_on_boxes
from maskrcnn_course.presets import PRESETS, build_model, with_test_augmentation
from maskrcnn_course.tta import MaskRCNNWithTTA, View, boxes_from_masks

ALONE = dict(scales=(), flip=False, mask_box_weight=0.0)


def examples():
    "Two images of different sizes."
    g = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=g, dtype=torch.float64) for size in ((70, 90), (64, 50))]


def model_and_images(fast=False, **kwargs):
    torch.manual_seed(0)
    model = build_model("tiny", fast=fast, **kwargs).double()
    return loud(model, mask_std=3), examples()


def same(a, b):
    return all(torch.equal(p[k], q[k]) for p, q in zip(a, b, strict=True) for k in p)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(30, 160), min_size=4, max_size=4), st.floats(1.2, 1.6))
def test_boxes_come_back_from_the_targets_of_rectangles(edges, times):
    "Every edge to within a tenth of a pixel and of a cell, in windows with as much room as `refine` gives."
    (x1, x2), (y1, y2) = sorted(edges[:2]), sorted(edges[2:])
    box = tensor([[x1, y1, x2 + 8, y2 + 8]]).double()
    mask = torch.zeros(1, 200, 200, dtype=torch.uint8)
    mask[0, y1:y2 + 8, x1:x2 + 8] = 1
    center, half = (box[:, :2] + box[:, 2:]) / 2, (box[:, 2:] - box[:, :2]) / 2 * times
    window = torch.cat([center - half, center + half], 1)
    found, sure = boxes_from_masks(project_masks_on_boxes(mask, window, tensor([0]), 28), window)
    cells = (window[:, 2:] - window[:, :2]).tile(2) / 28
    assert sure.all() and ((found - box).abs() <= 0.1 + 0.1 * cells).all()


def test_a_mask_that_is_cut_off_ends_with_its_window_and_one_without_a_clear_answer_is_named():
    window = tensor([[10.0, 20, 38, 48]]).repeat(4, 1)
    masks = torch.zeros(4, 28, 28)
    masks[0] = 1
    masks[1, :, 14:] = 1
    masks[2] = 0.55
    masks[3, 5, 7] = 0.9  # a single cell: between the centres around it
    found, sure = boxes_from_masks(masks, window)
    assert sure.tolist() == [True, True, False, True]
    torch.testing.assert_close(found[:2] - 0.5, tensor([[10.0, 20, 38, 48], [24.0, 20, 38, 48]]))
    inside = 0.4 / 0.9  # from the cell's centre to one half
    single = tensor([17.5 - inside, 25.5 - inside, 17.5 + inside, 25.5 + inside])
    torch.testing.assert_close(found[3] - 0.5, single)
    assert [len(x) for x in boxes_from_masks(masks[:0], window[:0])] == [0, 0]


@pytest.mark.parametrize("fast", [False, True])
def test_one_view_and_no_weight_are_exactly_the_model(fast):
    model, images = model_and_images(fast)
    wrapper = MaskRCNNWithTTA(model, **ALONE)
    with torch.no_grad(): plain, wrapped = model(images), wrapper(images)
    assert all(len(p["boxes"]) >= 3 for p in plain) and same(plain, wrapped)
    a, b = model.stages(images, score_thresh=0.3), wrapper.stages(images, score_thresh=0.3)
    assert a.keys() == b.keys() and torch.equal(a["mask_logits"], b["mask_logits"])
    for key in ("proposals", "detections"):
        assert all(torch.equal(v, b[key][k]) for k, v in a[key].items())
    for key in ("features", "objectness", "deltas", "anchors"):
        assert all(torch.equal(u, v) for u, v in zip(a[key], b[key], strict=True))


def test_the_model_inside_is_left_as_it_is():
    model, images = model_and_images()
    state, numbers = copy.deepcopy(model.state_dict()), model.settings
    names = [(name, type(module)) for name, module in model.named_modules()]
    with torch.no_grad():
        plain = model(images)
        augmented = MaskRCNNWithTTA(model)(images)
        assert same(model(images), plain) and not same(augmented, plain)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.settings == numbers and [(n, type(m)) for n, m in model.named_modules()] == names


def test_the_wrapper_has_no_part_in_training():
    torch.manual_seed(0)
    model = build_model("tiny").train()
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[0, 10:40, 8:50] = 1
    target = dict(boxes=tensor([[8.0, 10, 50, 40]]), labels=tensor([1]), masks=mask)
    def losses(): return model([torch.ones(3, 64, 64)], [target], torch.Generator().manual_seed(0))
    before = losses()
    MaskRCNNWithTTA(model).stages([torch.ones(3, 64, 64)])
    torch.testing.assert_close(losses(), before, rtol=0, atol=0)
    assert model.training


def test_masks_move_boxes_as_far_as_asked():
    model, images = model_and_images()
    layer = model.roi_heads.mask_predictor.mask_fcn_logits
    with torch.no_grad():
        plain = model(images)
        common = torch.cat([p["labels"] for p in plain]).mode().values
        layer.weight.zero_()
        layer.bias.fill_(-3)  # masks that are empty, but full for the class that is found most
        layer.bias[common] = 3
        plain, moved = model(images), MaskRCNNWithTTA(model, (), False, 0.5)(images)
    count = 0
    for a, b, image in zip(plain, moved, images):
        assert torch.equal(a["labels"], b["labels"]) and torch.equal(a["scores"], b["scores"])
        full = a["labels"] == common
        assert torch.equal(a["boxes"][~full], b["boxes"][~full])
        room = 0.1 * (a["boxes"][:, 2:] - a["boxes"][:, :2])
        assert (b["boxes"][full, :2] <= a["boxes"][full, :2] + 1).all()
        assert (b["boxes"][full, 2:] >= a["boxes"][full, 2:] - 1e-9).all()
        assert ((b["boxes"] - a["boxes"]).abs() <= room.tile(2) / 2 + 1).all()
        assert b["boxes"].min() >= 0
        assert (b["boxes"][:, 2:].amax(0) <= tensor([image.shape[2], image.shape[1]]) + 1e-4).all()
        count += (a["boxes"] != b["boxes"]).any(1).sum()
    assert count > 10


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_mirror_image_is_detected_in_as_well(weight):
    model, images = model_and_images()
    wrapper = MaskRCNNWithTTA(model, (), True, weight)
    with torch.no_grad(): both, again, alone = wrapper(images), wrapper(images[1:]), model(images)
    for k, v in both[1].items(): torch.testing.assert_close(again[0][k], v)  # alone or in a batch
    for a, b in zip(alone, both):
        assert len(b["boxes"])
        assert a["scores"].shape != b["scores"].shape or not torch.allclose(a["scores"], b["scores"])


def answers(wrapper, batch, proposals):
    "Probabilities, deltas and mask logits of the proposals that are no padding."
    views, valid = wrapper.views(batch), proposals.valid
    logits, deltas = wrapper.predict_boxes(views, proposals)
    masks = wrapper.predict_masks(views, proposals.boxes, valid.long(), valid)
    return logits.softmax(-1)[valid], deltas[valid], masks[valid]


@torch.no_grad()
@pytest.mark.parametrize("scales", [(), (0.5, 2.0)])
def test_a_mirrored_batch_has_the_mirrored_answers(scales):
    model, _ = model_and_images()
    images = [torch.rand(3, height, 64, dtype=torch.float64) for height in (64, 48)]  # padded below alone
    wrapper = MaskRCNNWithTTA(model, scales, True, 0.0)
    batch = model.prepare(images)
    turned = batch._replace(images=batch.images.flip(-1))
    proposals = model.rpn.filter_proposals(wrapper.rpn_output(wrapper.views(batch)), batch.sizes)
    there = proposals._replace(boxes=View([], batch.image_size, 1.0, True).place(proposals.boxes))
    probabilities, deltas, masks = answers(wrapper, batch, proposals)
    turned = answers(wrapper, turned, there)
    assert deltas.std() > 0.1 and masks.std() > 0.1
    for a, b in zip(turned, (probabilities, deltas * tensor([-1, 1, 1, 1]), masks.flip(-1))):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_every_size_counts_the_same():
    model, images = model_and_images(rpn_pre_nms_top_n_test=100_000)
    heads = model.roi_heads
    with torch.no_grad():
        for a, b in zip(MaskRCNNWithTTA(model, (1.0,), False, 0.0)(images), model(images)):
            for k in a: torch.testing.assert_close(a[k], b[k])  # twice the same size is one look
        wrapper, batch = MaskRCNNWithTTA(model, (1.5,), False, 0.0), model.prepare(images)
        views = wrapper.views(batch)
        proposals = model.rpn.filter_proposals(wrapper.rpn_output(views), batch.sizes)
        boxes, valid = proposals.boxes, proposals.valid
        logits, deltas = wrapper.predict_boxes(views, proposals)
        masks = wrapper.predict_masks(views, boxes, labels := valid.long(), valid)
        assert [view.image_size for view in views] == [(64, 64), (96, 96)]
        assert all(tuple(f.shape[:1]) == (2,) for view in views for f in view.features)
        small, large = (
            (*heads.predict_boxes(view.features, boxes * factor, valid, view.image_size),
             heads.predict_masks(view.features, boxes * factor, labels, valid, view.image_size))
            for view, factor in zip(views, (1.0, 1.5)))
    probabilities = (small[0].softmax(-1) + large[0].softmax(-1)) / 2
    torch.testing.assert_close(logits[valid].exp(), probabilities[valid])
    torch.testing.assert_close(deltas, (small[1] + large[1]) / 2)
    torch.testing.assert_close(masks, (small[2] + large[2]) / 2)
    assert (small[0] - large[0])[valid].abs().max() > 1e-3


def test_a_preset_says_how_its_pictures_are_looked_at():
    model = build_model("tiny")
    assert with_test_augmentation(model) is model
    every = with_test_augmentation(model, every_view=True)
    assert (every.model, every.scales, every.flip) == (model, (0.75, 1.25), True)
    with torch.device("meta"): model = build_model("photos_large", pretrained=False)
    wrapper = with_test_augmentation(model)
    assert dict(scales=wrapper.scales, flip=wrapper.flip) == PRESETS["photos_large"].tta
    assert wrapper.mask_box_weight == 0.65


@pytest.mark.gpu
def test_a_gpu_agrees(gpu):
    model, images = model_and_images()
    with torch.no_grad():
        a = MaskRCNNWithTTA(model)(images)
        b = MaskRCNNWithTTA(copy.deepcopy(model).to(gpu))(images)
    for x, y in zip(a, b, strict=True):
        for k in x: torch.testing.assert_close(y[k].cpu(), x[k], rtol=1e-6, atol=1e-6)
