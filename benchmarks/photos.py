"""What the parts of the recipe for photos are worth, and torchvision's Mask R-CNN with the same recipe.

One run a call, one result file a run.

All runs train on the same photos for the same epochs (in three stages the RPN has as many and each head
half of them), with every augmentation unless one is left out, and begin with the weights that
`maskrcnn-course train` found on scenes; torchvision's model begins with exactly these (`to_torchvision`), and
has the same optimiser and schedule. Ours has a semantic loss (`semantic_loss`) and computes in bfloat16 where
the processor has it, as it does by default; torchvision's does neither.

    python benchmarks/photos.py ours
    python benchmarks/photos.py torchvision --seed 1
    python benchmarks/photos.py stages               # ours, in three stages
    python benchmarks/photos.py no-scenes            # begin with ImageNet's body and random heads
    python benchmarks/photos.py no-flip              # or colour, shrink, crop, paste
"""
import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from maskrcnn_course.data import InstanceDataset, collate
from maskrcnn_course.presets import PRESETS, build_model, load_model, with_test_augmentation
from maskrcnn_course.augment import augmentation, copy_paste
from maskrcnn_course.training import evaluate_model, train
from scenes_vs_torchvision import cpu_name, measure, without_crowds

AUGMENT = ("flip", "colour", "shrink", "crop", "paste")
NAMES = ("ours", "torchvision", "stages", "no-scenes", *(f"no-{a}" for a in AUGMENT))


def about(seed):
    "Where and with what a result came to be."
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    machine = dict(cpu=cpu_name(), cores=os.cpu_count(), threads=torch.get_num_threads(),
                   torch=torch.__version__)
    return dict(commit=asked.stdout.strip(), seed=seed, machine=machine)


def train_torchvision(args, out):
    "Torchvision's model after as many epochs as ours, with the same optimiser and schedule."
    recipe = PRESETS["laptop"].recipe
    lr = recipe["lr"]["joint"]
    torch.manual_seed(args.seed)
    ours = build_model("laptop")  # what is frozen in a pretrained body stays frozen
    ours.load_state_dict(load_model(Path(args.start) / "model.safetensors")[0].state_dict())
    model = ours.to_torchvision().train()
    for layer in model.backbone.body.modules():  # torchvision's own recipe freezes batch norm as well
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm): layer.eval()
    loader = DataLoader(
        InstanceDataset(args.data, "train", augmentation(AUGMENT)), recipe["batch_size"], shuffle=True,
        collate_fn=lambda batch: without_crowds(*copy_paste(*collate(batch))),
        generator=torch.Generator().manual_seed(args.seed))
    body = [p for p in model.backbone.body.parameters() if p.requires_grad]
    new = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("backbone.body.")]
    rates = [lr, lr * recipe["body_lr"]["joint"]]
    groups = [dict(params=new, lr=rates[0]), dict(params=body, lr=rates[1])]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, args.epochs * len(loader), pct_start=0.1)
    for _ in tqdm(range(args.epochs), "torchvision"):
        for images, targets in loader:
            losses = model(images, targets)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            torch.nn.utils.clip_grad_norm_(new + body, 10.0)
            optimizer.step()
            schedule.step()
    return model


def train_ours(args, out):
    "Ours, jointly or in three stages."
    names = tuple(a for a in AUGMENT if args.name != f"no-{a}")
    stages = ("rpn", "box", "mask") if args.name == "stages" else ("joint",)
    epochs = dict(rpn=args.epochs, box=args.epochs // 2, mask=args.epochs // 2, joint=args.epochs)
    start = None if args.name == "no-scenes" else args.start
    train(args.data, out, stages, epochs=epochs, seed=args.seed, augment=names, looks=4, start=start)
    return load_model(Path(out) / "model.safetensors")[0]


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--data", default="data/coco3.h5")
    parser.add_argument("--start", default="runs/scenes", help="the folder of a run on scenes")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="benchmarks/results")
    args = parser.parse_args()
    start, cpu = time.time(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        model = (train_torchvision if args.name == "torchvision" else train_ours)(args, folder)
    spent = dict(seconds=time.time() - start, core_seconds=time.process_time() - cpu)
    dataset = InstanceDataset(args.data, "val")
    if args.name == "torchvision": metrics = measure(model, dataset)
    else: metrics, _ = evaluate_model(with_test_augmentation(model), dataset)
    command = f"python benchmarks/photos.py {args.name} --epochs {args.epochs} --seed {args.seed}"
    result = dict(command=command, **about(args.seed), epochs=args.epochs,
                  images=len(InstanceDataset(args.data, "train")), **spent, **metrics)
    out = Path(args.out) / f"photos_{args.name}_{args.seed}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1))
    found = (f"{k} AP {result[k]['AP']:.3f} AP50 {result[k]['AP50']:.3f}" for k in ("bbox", "segm"))
    print(f"{args.name}: " + ", ".join(found))


if __name__ == "__main__": main()
