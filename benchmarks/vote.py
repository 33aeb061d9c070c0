"""What second opinions are worth on photos: a trained model without them, with masks that vote on where their boxes end, and with a look at the mirror image too.

    python benchmarks/vote.py runs/photos data/coco3.h5

Nothing is trained. Both settings in use are the preset's (`mask_box_weight` and `flip_test` of `photos`), chosen on photos split off the training part.
Without them and with votes alone also on the photos that the model learnt from. `core_seconds`: what an evaluation cost.
"""
import argparse
import json
import time
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
    variants = {"without": (0.0, False), "with": (weight, False), "mirror": (weight, True)}
    result = dict(command=f"python benchmarks/vote.py {args.run} {args.data}", **about(None), mask_box_weight=weight, core_seconds={})
    for row in ("val without", "val with", "val mirror", "train without", "train with"):
        split, name = row.split()
        model.settings = replace(model.settings, **dict(zip(("mask_box_weight", "flip_test"), variants[name])))
        before = time.process_time()
        result[row] = metrics = evaluate_model(model, InstanceDataset(args.data, split))[0]
        result["core_seconds"][row] = time.process_time() - before
        print(f"{row}: " + ", ".join(f"{kind} {n} {metrics[kind][n]:.3f}" for kind in ("bbox", "segm") for n in ("AP", "AP50", "AP75")), flush=True)
    Path(args.out).write_text(json.dumps(result, indent=1))


if __name__ == "__main__": main()
