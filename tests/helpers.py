"What several test files need."
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def never_waits(device):
    "An error where Python waits for the GPU meanwhile; on a CPU, in a rehearsal, nothing is asked."
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try: yield
    finally: torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def loud(model, mask_std=0.3):
    "Random last layers whose answers vary by about one, so that an untrained model finds many things."
    model.eval()
    torch.manual_seed(2)
    rpn_head, predictor = model.rpn.head, model.roi_heads.box_predictor
    image = [torch.rand(3, 128, 128).to(rpn_head.cls_logits.weight)]
    for layer, answer, spread in (
            (rpn_head.cls_logits, "objectness", 2), (rpn_head.bbox_pred, "deltas", 0.3)):
        nn.init.normal_(layer.weight)
        layer.weight *= spread / torch.cat([a.flatten() for a in model.stages(image)[answer]]).std()
    stages = model.stages(image)
    proposals, image_size = stages["proposals"], stages["batch"].image_size
    for i, layer, spread in ((0, predictor.cls_score, 2), (1, predictor.bbox_pred, 1)):
        nn.init.normal_(layer.weight)
        answers = model.roi_heads.predict_boxes(
            stages["features"], proposals["boxes"], proposals["valid"], image_size)
        layer.weight *= spread / answers[i].std()
    nn.init.normal_(model.roi_heads.mask_predictor.mask_fcn_logits.weight, std=mask_std)
    return model
