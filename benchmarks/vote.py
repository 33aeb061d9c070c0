"""What second opinions are worth on photos: a trained model without them, with masks that vote on where their boxes end, with a look at the mirror image too, and at
two other sizes.

    python benchmarks/vote.py runs/photos data/coco3.h5

Nothing is trained. The weight in use is the presets' (`mask_box_weight` of `photos` and `photos_large`), chosen on photos split off the training part; `tta` is the
command's `--tta`. Without help and with votes alone, the model is also asked about the photos that it learnt from. `core_seconds` is what an evaluation cost. The result is named after the run.
"""
import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from maskrcnn_course.data import InstanceDataset
from maskrcnn_course.mask_rcnn import PRESETS, TEST_AUGMENTATION, load_model
from maskrcnn_course.training import evaluate_model
from photos import about


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("data")
    args = parser.parse_args()
    model, _, _ = load_model(Path(args.run) / "model.safetensors")
    weight = PRESETS["photos"][1]["mask_box_weight"]
    plain = dict(mask_box_weight=0.0, flip_test=False, scale_test=())
    variants = {"without": plain, "with": plain | dict(mask_box_weight=weight), "mirror": plain | dict(mask_box_weight=weight, flip_test=True), "tta": dict(mask_box_weight=weight, **TEST_AUGMENTATION)}
    result = dict(command=f"python benchmarks/vote.py {args.run} {args.data}", **about(None), mask_box_weight=weight, core_seconds={})
    for row in ("val without", "val with", "val mirror", "val tta", "train without", "train with"):
        split, name = row.split()
        model.settings = replace(model.settings, **variants[name])
        before = time.process_time()
        result[row] = metrics = evaluate_model(model, InstanceDataset(args.data, split))[0]
        result["core_seconds"][row] = time.process_time() - before
        print(f"{row}: " + ", ".join(f"{kind} {n} {metrics[kind][n]:.3f}" for kind in ("bbox", "segm") for n in ("AP", "AP50", "AP75")), flush=True)
    Path(f"benchmarks/results/{Path(args.run).name}_vote.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__": main()
