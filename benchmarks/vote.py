"""What it is worth on photos that masks vote on where their boxes end: a trained model with and without it, on photos it learnt from and on others.

    python benchmarks/vote.py runs/photos data/coco3.h5

Nothing is trained. The weight in use is the preset's (`mask_box_weight` of `photos`), chosen on photos split off the training part.
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path

from maskrcnn_course.data import InstanceDataset
from maskrcnn_course.mask_rcnn import PRESETS, load_model
from maskrcnn_course.training import evaluate_model
from photos import about


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("data")
    parser.add_argument("--out", default="benchmarks/results/photos_vote.json")
    args = parser.parse_args()
    model, _, _ = load_model(Path(args.run) / "model.safetensors")
    weight = PRESETS["photos"][1]["mask_box_weight"]
    result = dict(command=f"python benchmarks/vote.py {args.run} {args.data}", **about(None), mask_box_weight=weight)
    for split in ("val", "train"):
        for name, say in (("without", 0.0), ("with", weight)):
            model.settings = replace(model.settings, mask_box_weight=say)
            result[f"{split} {name}"] = metrics = evaluate_model(model, InstanceDataset(args.data, split))[0]
            print(f"{split} {name}: " + ", ".join(f"{kind} {n} {metrics[kind][n]:.3f}" for kind in ("bbox", "segm") for n in ("AP", "AP50", "AP75")), flush=True)
    Path(args.out).write_text(json.dumps(result, indent=1))


if __name__ == "__main__": main()
