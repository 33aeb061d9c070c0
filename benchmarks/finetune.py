"""What a start from trained weights is worth on photos whose classes differ, with the same epochs for both.

The photos of a folder with images/, instances_train.json and instances_val.json in three classes (vehicle,
person, animal) become two data sets with other classes. Each is trained jointly twice, for the same number
of epochs: from the body's ImageNet weights, and from a run on the scenes. Written to
benchmarks/results/finetune.json, from where benchmarks/readme.py takes it.

    python benchmarks/finetune.py coco3/ --start runs/course
"""
import argparse
import json
import tempfile
from pathlib import Path

from vs_torchvision import machine

from maskrcnn_course.data import InstanceDataset
from maskrcnn_course.importers import import_coco
from maskrcnn_course.presets import load_model
from maskrcnn_course.progress import progress_lines
from maskrcnn_course.training import evaluate_model, train

OUT = Path(__file__).parent / "results" / "finetune.json"
SETS = {"person and animal": dict(person=["person"], animal=["animal"]),
        "vehicle and living": dict(vehicle=["vehicle"], living=["person", "animal"])}


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--start", required=True, help="a run on the scenes")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    found = dict(epochs=args.epochs, machine=machine(), sets={})
    for name, groups in SETS.items():
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "photos.h5"
            import_coco(data, {s: args.photos / f"instances_{s}.json" for s in ("train", "val")},
                        args.photos / "images", groups, classes=list(groups))
            arms = {"ImageNet": None, "scenes": args.start}
            found["sets"][name] = {
                arm: one(data, Path(folder) / arm, start, args.epochs) for arm, start in arms.items()}
    OUT.write_text(json.dumps(found, indent=1) + "\n")


def one(data, out, start, epochs):
    "Train and measure."
    train(data, out, ("joint",), epochs=epochs, start=start, callback=progress_lines())
    model = load_model(out / "model.safetensors")[0]
    metrics, _ = evaluate_model(model, InstanceDataset(data, "val"))
    figures = {kind: {ap: metrics[kind][ap] for ap in ("AP", "AP50")} for kind in ("bbox", "segm")}
    print(out.name, figures, flush=True)
    return figures


if __name__ == "__main__": main()
