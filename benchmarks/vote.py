"""What test-time augmentation is worth on photos: a trained model alone, with boxes that move towards their
masks, with the mirror image as well, and with two more sizes.

    python benchmarks/vote.py runs/photos data/coco3.h5

Nothing is trained. The weight is that of the presets `photos` and `photos_large`, chosen on photos split off
the training part; `tta` is the command's `--tta`. The first two variants are also measured on the photos that
the model was trained on. `core_seconds` is what an evaluation cost. The result is named after the run.
"""
import argparse
import json
import time
from pathlib import Path

from maskrcnn_course.data import InstanceDataset
from maskrcnn_course.presets import PRESETS, load_model, with_test_augmentation
from maskrcnn_course.training import evaluate_model
from maskrcnn_course.tta import MaskRCNNWithTTA
from photos import about

ROWS = ("val without", "val with", "val mirror", "val tta", "train without", "train with")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("data")
    args = parser.parse_args()
    model, _, _ = load_model(Path(args.run) / "model.safetensors")
    variants = {
        "without": model,
        "with": MaskRCNNWithTTA(model, **PRESETS["photos"].tta),
        "mirror": MaskRCNNWithTTA(model, **PRESETS["photos_large"].tta),
        "tta": with_test_augmentation(model, every_view=True)}
    result = dict(
        command=f"python benchmarks/vote.py {args.run} {args.data}", **about(None),
        mask_box_weight=variants["with"].mask_box_weight, core_seconds={})
    for row in ROWS:
        split, name = row.split()
        before = time.process_time()
        result[row] = metrics = evaluate_model(variants[name], InstanceDataset(args.data, split))[0]
        result["core_seconds"][row] = time.process_time() - before
        numbers = [f"{kind} {n} {metrics[kind][n]:.3f}"
                   for kind in ("bbox", "segm") for n in ("AP", "AP50", "AP75")]
        print(f"{row}: {', '.join(numbers)}", flush=True)
    path = Path(f"benchmarks/results/{Path(args.run).name}_vote.json")
    path.write_text(json.dumps(result, indent=1))


if __name__ == "__main__": main()
