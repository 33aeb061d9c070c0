"""Train torchvision's Mask R-CNN and ours on the same scenes for the same minutes.

Reports AP on the kinds of objects that were never seen in training.

Both have the same body with the same ImageNet weights, the same pyramid, heads, anchors and sample sizes, the
same images, augmentation, optimiser and schedule; torchvision's model is made by `to_torchvision`, so that
even the first weights agree. They run side by side, each on half of the cores, so that whatever else the
machine does slows both. A run of three stages is measured with `maskrcnn-course train` itself; one side alone
gets all cores.

    python benchmarks/scenes_vs_torchvision.py --minutes 40
    python benchmarks/scenes_vs_torchvision.py torchvision --minutes 15
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from maskrcnn_course.data import InstanceDataset, collate
from maskrcnn_course.evaluation import evaluate, results_from_predictions
from maskrcnn_course.presets import PRESETS, build_model
from maskrcnn_course.augment import augmentation


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration): return platform.processor() or platform.machine()


def endless(loader):
    for _ in count(): yield from loader


def train_for(model, loader, minutes, lr, body_lr):
    "Step until the time is up, the learning rate falling with the clock; returns the steps taken."
    body = [p for p in model.backbone.body.parameters() if p.requires_grad]
    new = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("backbone.body.")]
    groups = [dict(params=new, lr=lr), dict(params=body, lr=lr * body_lr)]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [lr, lr * body_lr], total_steps=1001, pct_start=0.1)
    start, steps = time.time(), 0
    with tqdm(total=round(minutes * 60), unit="s") as bar:
        for images, targets in endless(loader):
            spent = time.time() - start
            if spent >= minutes * 60: return steps
            while one_cycle.last_epoch < 1000 * spent / (minutes * 60): one_cycle.step()
            losses = model(images, targets)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            torch.nn.utils.clip_grad_norm_(new + body, 10.0)
            optimizer.step()
            steps += 1
            bar.update(round(time.time() - start) - bar.n)
            shown = {k.removeprefix("loss_"): f"{v.item():.3f}" for k, v in losses.items()}
            bar.set_postfix(shown, refresh=False)


@torch.no_grad()
def measure(model, dataset):
    "AP of boxes and masks on a data set."
    results = []
    for images, targets in tqdm(DataLoader(dataset, 8, collate_fn=collate), "evaluate"):
        results += results_from_predictions(model.eval()(images), [t["image_id"] for t in targets])
    return {kind: evaluate(dataset.coco(), results, kind) for kind in ("bbox", "segm")}


def without_crowds(images, targets):
    "A batch as torchvision takes it: crowds are not trained on."
    return images, [{k: t[k][t["iscrowd"] == 0] for k in ("boxes", "labels", "masks")} for t in targets]


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("side", nargs="?", choices=["torchvision", "ours"],
                        help="one side alone (both, side by side)")
    parser.add_argument("--data", default="data/scenes.h5")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="benchmarks/results")
    args = parser.parse_args()
    if not args.side:
        half = dict(os.environ, OMP_NUM_THREADS=str(max(1, os.cpu_count() // 2)))
        both = [subprocess.Popen([sys.executable, __file__, side, *sys.argv[1:]], env=half)
                for side in ("ours", "torchvision")]
        sys.exit(max(process.wait() for process in both))
    recipe = PRESETS["laptop"].recipe
    torch.manual_seed(args.seed)
    model = build_model("laptop").train()
    if args.side == "torchvision":
        model = model.to_torchvision()
        model.train()
        for layer in model.backbone.body.modules():  # torchvision's own recipe freezes batch norm as well
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm): layer.eval()
    loader = DataLoader(InstanceDataset(args.data, "train", augmentation()), recipe["batch_size"],
                        shuffle=True, collate_fn=lambda batch: without_crowds(*collate(batch)),
                        generator=torch.Generator().manual_seed(args.seed))
    steps = train_for(model, loader, args.minutes, recipe["lr"]["joint"], recipe["body_lr"]["joint"])
    result = dict(
        command=f"python benchmarks/scenes_vs_torchvision.py {' '.join(sys.argv[1:])}",
        side=args.side, minutes=args.minutes, seed=args.seed, steps=steps,
        images=steps * recipe["batch_size"], torch=torch.__version__, cpu=cpu_name(), cores=os.cpu_count(),
        threads=torch.get_num_threads(), **measure(model, InstanceDataset(args.data, "val")))
    core_minutes = args.minutes * torch.get_num_threads()
    out = Path(args.out) / f"scenes_joint_{args.side}_{core_minutes:.0f}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1))
    found = (f"{k} AP {result[k]['AP']:.3f} AP50 {result[k]['AP50']:.3f}" for k in ("bbox", "segm"))
    print(f"{args.side}: {steps} steps, " + ", ".join(found))


if __name__ == "__main__": main()
