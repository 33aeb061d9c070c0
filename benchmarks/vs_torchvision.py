"""Ours against torchvision's Mask R-CNN, pycocotools, faster-coco-eval and a folder of JPEGs.

Both sides have equal weights and inputs and take turns in one process. A round runs each side once, in
changing order, and gives one ratio: the other's time over ours. The result is the median of the ratios, so
that a disturbance of the machine hits both sides alike. Where a side comes in two variants, plain and
compiled, its faster one counts. Peak memory is what a call needs above what was in use before it.
Results are written to benchmarks/results/.

    python benchmarks/vs_torchvision.py                      # every case on the CPU
    python benchmarks/vs_torchvision.py paste evaluation     # cases whose names contain one of these words
    python benchmarks/vs_torchvision.py --list

A newer processor stands in for one with AVX2 alone, on one thread:

    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 OMP_NUM_THREADS=1 \\
        python benchmarks/vs_torchvision.py "300x400 batch 1 float32" \\
        --out benchmarks/results/vs_torchvision_avx2.json

All of them take more than an hour and about 10 GB of memory; a batch of eight photos of 800x1333 needs the
most of both. The cases on a GPU are run by benchmarks/gpu.sh.
"""
import argparse
import contextlib
import copy
import ctypes
import functools
import gc
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.detection import MaskRCNN as Peer
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.roi_heads import paste_masks_in_image as peer_paste
from torchvision.ops import MultiScaleRoIAlign, batched_nms
from torchvision.ops.misc import FrozenBatchNorm2d
from torchvision.transforms.v2 import functional as tvf

from maskrcnn_course.anchors import Matcher, assign_targets_to_anchors, balanced_sample
from maskrcnn_course.box_head import select_training_samples
from maskrcnn_course.data import InstanceDataset, decode_mask
from maskrcnn_course.evaluation import evaluate
from maskrcnn_course.kernels import nms_mask_by_kernel
from maskrcnn_course.mask_rcnn import MaskRCNN
from maskrcnn_course.speed import paste_in_boxes, slow_down, speed_up
from maskrcnn_course.training import has_fast_bfloat16

SIZES = {"300x400": (300, 400), "800x1333": (800, 1333)}
CPU_PRECISIONS = ("float32", "bf16")[:1 + has_fast_bfloat16(torch.device("cpu"))]


# ---- measuring

def wait(device):
    if device == "cuda": torch.cuda.synchronize()


def memory(device, peak=False):
    "Bytes in use, or the most since the count began."
    if device == "cuda": return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    field = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def seconds_of(function, device):
    "How long a call takes."
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def peak_of(function, device):
    "Bytes that a call needs at most above what was in use before it."
    gc.collect()
    if device == "cuda": torch.cuda.reset_peak_memory_stats()
    else:
        # what was freed goes back to the system, so that it is counted when it is taken again
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    before = memory(device)
    function()
    wait(device)
    return memory(device, peak=True) - before


def versus(functions, device, seconds, per_call=1):
    "Rounds of all functions until the time is up, at least three; the fastest variant of each side counts."
    for function in [*functions.values()] * 2: function()
    rounds, end = [], time.time() + seconds
    while len(rounds) < 3 or time.time() < end and len(rounds) < 200:
        order = list(functions)[::1 if len(rounds) % 2 else -1]
        rounds.append({name: seconds_of(functions[name], device) for name in order})
    ms = {name: 1000 * statistics.median(r[name] for r in rounds) for name in functions}
    def fastest(side): return min((name for name in functions if name.startswith(side)), key=ms.get)
    ours, theirs = fastest("ours"), fastest("theirs")
    ratios = sorted(r[theirs] / r[ours] for r in rounds)
    quartiles = [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]]
    peak = {name: peak_of(function, device) / 1e6 for name, function in functions.items()}
    return dict(ratio=statistics.median(ratios), quartiles=quartiles, rounds=len(rounds),
                compared=[ours, theirs], ms=ms,
                per_second={name: 1000 * per_call / t for name, t in ms.items()}, peak_mb=peak)


# ---- what both sides get

def some_boxes(size, n, generator):
    "n boxes with sides of 15 to 300 pixels."
    side = torch.exp(torch.rand(n, 2, generator=generator) * 3 + 2.7).clamp(max=min(size) * 0.9)
    low = torch.rand(n, 2, generator=generator) * (torch.tensor([size[1], size[0]]) - side)
    return torch.cat([low, low + side], 1)


def photo(size, n, generator):
    "Noise, and n objects of all sizes with round masks."
    boxes = some_boxes(size, n, generator)
    y, x = torch.arange(size[0])[:, None] + 0.5, torch.arange(size[1]) + 0.5
    center = (boxes[:, :2] + boxes[:, 2:])[..., None, None] / 2
    half = (boxes[:, 2:] - boxes[:, :2])[..., None, None] / 2
    masks = ((x - center[:, 0]) / half[:, 0]) ** 2 + ((y - center[:, 1]) / half[:, 1]) ** 2 <= 1
    image = torch.rand(3, *size, generator=generator)
    labels = torch.randint(1, 91, (n,), generator=generator)
    return image, dict(boxes=boxes, labels=labels, masks=masks.to(torch.uint8))


@torch.no_grad()
def outspoken(model):
    "Random last layers whose answers vary as a trained model's do, so that many objects are found."
    image = [torch.rand(3, 256, 256)]
    head, roi_heads = model.rpn.head, model.roi_heads
    for layer, answer, spread in ((head.cls_logits, "objectness", 2), (head.bbox_pred, "deltas", 0.3)):
        nn.init.normal_(layer.weight)
        layer.weight *= spread / torch.cat([a.flatten() for a in model.stages(image)[answer]]).std()
    stages = model.stages(image)
    proposals, image_size = stages["proposals"], stages["batch"].image_size
    predictor = roi_heads.box_predictor
    for layer, answer, spread in ((predictor.cls_score, 0, 3), (predictor.bbox_pred, 1, 0.5)):
        nn.init.normal_(layer.weight)
        answers = roi_heads.predict_boxes(
            stages["features"], proposals["boxes"], proposals["valid"], image_size)
        layer.weight *= spread / answers[answer].std()
    nn.init.normal_(roi_heads.mask_predictor.mask_fcn_logits.weight, std=0.3)


@functools.lru_cache(maxsize=2)
def both_models(device, size, detections=100, fast=True):
    """Our model, sped up or plain, and torchvision's `maskrcnn_resnet50_fpn` with the same weights.

    Both are in eval mode.

    Batch norm is frozen, as in torchvision's recipe. All cases of one device and size get the same two.
    """
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d,
                                   trainable_layers=3)
    for name, layer in backbone.named_modules():
        # else sixteen residual blocks add up to huge numbers
        if name.endswith("bn3"): layer.weight.fill_(0.2)
    threshold = 0.05 if detections == 100 else 0.005
    peer = Peer(backbone, 91, min_size=min(size), max_size=max(size), box_score_thresh=threshold,
                box_detections_per_img=detections).eval()
    ours = speed_up(MaskRCNN.from_torchvision(peer).eval())
    outspoken(ours)
    peer.load_state_dict(ours.state_dict())
    if not fast: slow_down(ours)
    return ours.to(device), peer.to(device)


def batch(size, n, device, objects=8):
    "n photos with their targets, on the device."
    generator = torch.Generator().manual_seed(n)
    images, targets = zip(*(photo(size, objects, generator) for _ in range(n)))
    return [i.to(device) for i in images], [{k: v.to(device) for k, v in t.items()} for t in targets]


@contextlib.contextmanager
def precision(name, device):
    "float32, TF32 in matrix products and convolutions, or bfloat16 where autocast says so."
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    with torch.autocast(device, torch.bfloat16, enabled=name == "bf16"): yield


DENSE = ("backbone", "rpn.head", "roi_heads.box_head", "roi_heads.mask_head")


def compiled(model, backend="inductor"):
    "A copy with channels-last weights and its dense parts compiled; what depends on data stays as it is."
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for name in DENSE: model.get_submodule(name).compile(backend=backend)
    return model


def variants(models, n, function, backend=None):
    "`function` of our model and of theirs and, if a backend is given, of both compiled with it."
    models = dict(zip(("ours", "theirs"), models))
    if backend: models |= {f"{side} compiled": compiled(model, backend) for side, model in models.items()}
    return {name: function(model) for name, model in models.items()}, n


# ---- the cases: each is a function that returns what is timed, ours first, and the images per call

def train_step(device, size, n, number, objects=8, backend=None, fast=True):
    images, targets = batch(SIZES[size], n, device, objects)
    def step(model):
        learning = [p for p in model.train().parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learning, lr=1e-9, momentum=0.9)  # weights stay where they are
        def run():
            optimizer.zero_grad()
            with precision(number, device): losses = sum(model(images, targets).values())
            losses.backward()
            optimizer.step()
        return run
    return variants(both_models(device, SIZES[size], fast=fast), n, step, backend)


def inference(device, size, n, number, detections=100, backend=None, fast=True):
    images, _ = batch(SIZES[size], n, device)
    def find(model):
        model.eval()
        @torch.no_grad()
        def run():
            with precision(number, device): return model(images)
        return run
    functions, _ = variants(both_models(device, SIZES[size], detections, fast), n, find, backend)
    found = [len(p["boxes"]) for f in functions.values() for p in f()]
    assert min(found) >= 0.9 * detections, f"too few detections to speak of: {found}"
    return functions, n


def roi_align(device, size):
    ours, peer = both_models(device, SIZES[size])
    images, _ = batch(SIZES[size], 2, device)
    ready = ours.prepare(images)
    with torch.no_grad(): maps = [m.detach().requires_grad_() for m in ours.backbone(ready.images)]
    generator = torch.Generator().manual_seed(0)
    boxes = [some_boxes(SIZES[size], 512, generator).to(device) for _ in images]
    sizes = [tuple(s) for s in ready.sizes.tolist()]
    rois = torch.cat([torch.cat([torch.full_like(b[:, :1], i), b], 1) for i, b in enumerate(boxes)])
    named, upstream = dict(zip("0123", maps)), torch.randn(len(rois), 256, 7, 7, device=device)
    def align(): return ours.roi_heads.pool(maps, rois, 7, ready.image_size)
    def their_align(): return peer.roi_heads.box_roi_pool(named, boxes, sizes)
    def run(out): torch.autograd.grad(out, maps[:4], upstream)
    torch.testing.assert_close(align(), their_align(), atol=1e-3, rtol=1e-3)
    return dict(ours=lambda: run(align()), theirs=lambda: run(their_align())), 2


def kernel(device, size):
    "RoIAlign forward and backward by the Triton kernel; without a GPU Triton's interpreter takes its place."
    if device == "cpu": os.environ["TRITON_INTERPRET"] = "1"
    from maskrcnn_course.kernels import roi_align_by_kernel
    generator = torch.Generator().manual_seed(0)
    n, channels, bins = (512, 256, 7) if device == "cuda" else (2, 16, 2)
    maps = [torch.rand(2, channels, *(-(-side // stride) for side in SIZES[size]),
                       device=device, requires_grad=True)
            for stride in (4, 8, 16, 32)]
    padded = tuple(4 * side for side in maps[0].shape[-2:])
    boxes = [some_boxes(SIZES[size], n, generator).to(device) for _ in range(2)]
    rois = torch.cat([torch.cat([torch.full_like(b[:, :1], i), b], 1) for i, b in enumerate(boxes)])
    pool = MultiScaleRoIAlign(list("0123"), bins, 2)
    upstream = torch.randn(len(rois), channels, bins, bins, device=device)
    def run(out): return out, *torch.autograd.grad(out, maps, upstream)
    def ours(): return run(roi_align_by_kernel(maps, rois, bins, padded))
    def theirs(): return run(pool(dict(zip("0123", maps)), boxes, [padded] * 2))
    for a, b in zip(ours(), theirs()): torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    return dict(ours=ours, theirs=theirs), 2


def nms(device, size):
    generator = torch.Generator().manual_seed(0)
    boxes = torch.stack([some_boxes(SIZES[size], 4000, generator) for _ in range(2)]).to(device)
    scores = torch.rand(boxes.shape[:2]).to(device)
    levels = torch.arange(4000, device=device).expand(2, -1) // 1000
    valid = torch.ones(2, 4, 1000, dtype=torch.bool, device=device)
    rows = boxes.view(2, 4, 1000, 4), scores.view(2, 4, 1000), valid
    def theirs(): return [batched_nms(b, s, l, 0.7) for b, s, l in zip(boxes, scores, levels)]
    def ours(): return nms_mask_by_kernel(*rows, 0.7)
    assert [set(k.tolist()) for k in theirs()] == [set(k.flatten().nonzero()[:, 0].tolist()) for k in ours()]
    return dict(ours=ours, theirs=theirs), 2


def padded(targets):
    boxes = torch.stack([t["boxes"] for t in targets])
    labels = torch.stack([t["labels"] for t in targets])
    return boxes, labels, boxes.new_ones(boxes.shape[:2], dtype=torch.bool)


def matching(device, size):
    ours, peer = both_models(device, SIZES[size])
    images, targets = batch(SIZES[size], 2, device, objects=20)
    ready = ours.prepare(images)
    with torch.no_grad(): features = ours.backbone(ready.images)
    anchors = torch.cat(ours.rpn.anchor_generator(ready.image_size, features))
    boxes, _, valid = padded(targets)
    mine = partial(assign_targets_to_anchors, anchors, boxes, valid, ours.rpn.matcher())
    theirs = partial(peer.rpn.assign_targets_to_anchors, [anchors] * 2, targets)
    torch.testing.assert_close(mine()[0], torch.stack(theirs()[0]))
    return dict(ours=mine, theirs=theirs), 2


def sampling(device, size):
    "Anchors for the RPN's loss, and proposals for the heads."
    ours, peer = both_models(device, SIZES[size])
    _, targets = batch(SIZES[size], 2, device, objects=20)
    generator = torch.Generator().manual_seed(0)
    proposals = torch.stack([some_boxes(SIZES[size], 2000, generator) for _ in range(2)]).to(device)
    labels = (torch.rand(2, 250_000, device=device) * 1.002).floor()
    boxes, classes, valid = padded(targets)
    known = proposals.new_ones(proposals.shape[:2], dtype=torch.bool)
    def mine():
        balanced_sample(labels == 1, labels == 0, 256, 0.5)
        select_training_samples(proposals, known, boxes, classes, valid, Matcher(0.5, 0.5), 512, 0.25)
    def theirs():
        peer.rpn.fg_bg_sampler(list(labels))
        peer.roi_heads.select_training_samples(list(proposals), targets)
    return dict(ours=mine, theirs=theirs), 2


def pasting(device, size):
    generator = torch.Generator().manual_seed(0)
    boxes = some_boxes(SIZES[size], 100, generator).to(device)
    masks = torch.rand(100, 28, 28, generator=generator).to(device)
    def ours(): return paste_in_boxes(masks, boxes, SIZES[size])
    def theirs(): return peer_paste(masks[:, None], boxes, SIZES[size])
    torch.testing.assert_close(ours(), theirs()[:, 0], atol=1e-4, rtol=0)
    return dict(ours=ours, theirs=theirs), 1


def scene_results(images):
    "Ground truth of so many images, and results with noise, misses and false alarms, from the scenes' masks."
    data = InstanceDataset("data/scenes.h5", "val").coco()
    random, ids = np.random.default_rng(0), [i["id"] for i in data["images"]]
    of = {i: [] for i in ids}
    for a in data["annotations"]: of[a["image_id"]].append(a)
    gt, results = dict(categories=data["categories"], images=[], annotations=[]), []
    for n in range(images):
        here = of[ids[n % len(ids)]]
        gt["images"].append({**data["images"][n % len(ids)], "id": n})
        first = len(gt["annotations"]) + 1
        gt["annotations"] += [{**a, "id": first + k, "image_id": n} for k, a in enumerate(here)]
        for k in random.integers(0, len(here), 20) if here else ():
            box = np.asarray(here[k]["bbox"]) * random.normal(1, 0.05, 4)
            right = random.random() < 0.9
            results.append(dict(
                image_id=n,
                category_id=here[k]["category_id"] if right else int(random.integers(1, 4)),
                bbox=box.tolist(),
                segmentation=here[random.integers(0, len(here))]["segmentation"],
                score=float(random.random())))
    return gt, results


def coco_eval(library, gt, results, kind):
    "The twelve numbers, by pycocotools or faster-coco-eval, from the same lists."
    if library == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else: from faster_coco_eval import COCO, COCOeval_faster as COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(gt)
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), kind)
        run.evaluate(), run.accumulate(), run.summarize()
    return run.stats


def evaluation(device, kind, library):
    gt, results = scene_results(5000)
    ours, theirs = lambda: evaluate(gt, results, kind), lambda: coco_eval(library, gt, results, kind)
    assert abs(ours()["AP"] - theirs()[0]) < 1e-9
    return dict(ours=ours, theirs=theirs), 5000


def reading(device, against):
    """Images and targets out of one HDF5 file, against a file per image with the annotations in memory.

    Or against decoding bytes that are in memory already.
    """
    data = InstanceDataset("data/scenes.h5", "train")
    n, folder, coco = 200, Path(tempfile.mkdtemp()), data.coco()
    masks = {i: [] for i in data.image_ids[:n]}
    for a in coco["annotations"]:
        if a["image_id"] not in masks: continue
        masks[a["image_id"]].append({**a, "rle": a["segmentation"]["counts"].encode()})
    with h5py.File("data/scenes.h5") as f:
        place = {row["id"]: row["data"] for row in f["images"]}
        encoded = {i: f["image_bytes"][slice(*place[i])].tobytes() for i in masks}
    for i, data_bytes in encoded.items(): (folder / str(i)).write_bytes(data_bytes)
    def decode(i, file):
        image = tvf.to_image(Image.open(file).convert("RGB"))
        boxes = torch.tensor([a["bbox"] for a in masks[i]], dtype=torch.float32).view(-1, 4)
        return tvf.to_dtype(image, torch.float32, scale=True), dict(
            boxes=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
            labels=torch.tensor([a["category_id"] for a in masks[i]]),
            area=torch.tensor([a["area"] for a in masks[i]]),
            iscrowd=torch.tensor([a["iscrowd"] for a in masks[i]]), image_id=i,
            masks=torch.from_numpy(np.stack([decode_mask(a["rle"], *image.shape[-2:]) for a in masks[i]])))
    def ours(): return [data[i] for i in range(n)]
    def source(i): return folder / str(i) if against == "folder" else io.BytesIO(encoded[i])
    def theirs(): return [decode(i, source(i)) for i in masks]
    for (x, t), (y, u) in zip(ours(), theirs()):
        assert torch.equal(x, y)
        assert torch.equal(t["masks"], u["masks"]) and torch.equal(t["boxes"], u["boxes"])
    return dict(ours=ours, theirs=theirs), n


def start(code):
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})


def importing(device):
    return dict(ours=lambda: start("import maskrcnn_course.mask_rcnn"),
                theirs=lambda: start("import torchvision.models.detection")), 1


def first_prediction(device):
    run = (f"; import torch; model.eval().to('{device}'); torch.set_grad_enabled(False); "
           f"model([torch.rand(3, 300, 400).to('{device}')])")
    theirs = ("from torchvision.models import get_model; "
              "model = get_model('maskrcnn_resnet50_fpn', weights=None, weights_backbone=None)")
    return dict(ours=lambda: start(
        "from maskrcnn_course import build_model; model = build_model('standard', 91, False)" + run),
                theirs=lambda: start(theirs + run)), 1


OPERATORS = {"RoIAlign, forward and backward": roi_align, "NMS": nms, "matching": matching,
             "sampling": sampling, "paste 100 masks": pasting}


def cases():
    "Every case on the CPU by its name: device, what is done, size, batch, precision."
    known = {}
    for size in SIZES:
        for number in CPU_PRECISIONS:
            for n in (1, 2, 8):
                backend = "inductor" if n == 2 else None  # compiling takes minutes
                for name, function in (("train", train_step), ("inference", inference)):
                    known[f"cpu {name} {size} batch {n} {number}"] = partial(
                        function, "cpu", size, n, number, backend=backend)
                    if n < 8 and number == "float32":  # the modules of the lessons, not sped up
                        known[f"plain {name} {size} batch {n} {number}"] = partial(
                            function, "cpu", size, n, number, fast=False)
            # in 16 bits torchvision mixes up objects beyond the 256th
            if size == "800x1333" and number != "bf16":
                known[f"cpu train {size} batch 1 {number}, 500 objects"] = partial(
                    train_step, "cpu", size, 1, number, 500)
        known |= {f"cpu {name} {size}": partial(function, "cpu", size)
                  for name, function in OPERATORS.items()}
    known["cpu first prediction"] = partial(first_prediction, "cpu")
    for kind in ("bbox", "segm"):
        for library in ("pycocotools", "faster-coco-eval"):
            known[f"evaluation {kind} vs {library}"] = partial(evaluation, "cpu", kind, library)
    known |= {f"reading vs {against}": partial(reading, "cpu", against)
              for against in ("folder", "decoding alone")}
    return known | {"import": partial(importing, "cpu")}


def machine():
    "What the figures belong to."
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration): cpu = platform.processor() or platform.machine()
    if held := os.environ.get("ATEN_CPU_CAPABILITY"): cpu += f", held to {held.upper()}"
    about = dict(cpu=cpu, cores=os.cpu_count(), threads=torch.get_num_threads(), torch=torch.__version__,
                 torchvision=torchvision.__version__)
    return about | ({"gpu": torch.cuda.get_device_name(), "driver": driver()}
                    if torch.cuda.is_available() else {})


def driver():
    "Version of the GPU's driver."
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError): return "not known"


def line(name, r):
    "One case in one line."
    ours, theirs = r["compared"]
    return (f"{name:50} {r['ratio']:6.2f}x  ({r['quartiles'][0]:.2f} to {r['quartiles'][1]:.2f})  "
            f"{ours} {r['ms'][ours]:.1f} ms, {theirs} {r['ms'][theirs]:.1f} ms;  "
            f"{r['peak_mb'][ours]:.0f} MB, {r['peak_mb'][theirs]:.0f} MB")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("words", nargs="*", help="cases whose name contains one of these (all)")
    parser.add_argument("--seconds", type=float, default=20, help="of rounds for each case")
    parser.add_argument("--out", default="benchmarks/results/vs_torchvision.json",
                        help="the file to write or to complete")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    args = parser.parse_args()
    def wanted(name): return not args.words or any(word in name for word in args.words)
    chosen = {name: make for name, make in cases().items() if wanted(name)}
    if args.list or not chosen: sys.exit("\n".join(chosen or cases()))
    warnings.filterwarnings("ignore")
    out = Path(args.out)
    results = json.loads(out.read_text()) if out.is_file() else {}
    for name, make in chosen.items():
        try: functions, per_call = make()
        except ImportError as missing: print(f"{name:60} left out: {missing}"); continue
        results[name] = versus(functions, "cpu", args.seconds, per_call) | {"machine": machine()}
        del functions
        print(line(name, results[name]), flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__": main()
