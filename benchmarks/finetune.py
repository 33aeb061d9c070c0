"""What a start from trained weights is worth on photos whose classes differ, on a budget of minutes.

The photos of a folder with images/, instances_train.json and instances_val.json in three classes (vehicle,
person, animal) become two data sets with other classes. Each is trained jointly twice, on the same minutes:
from the body's ImageNet weights, and from a run on the scenes. Written to benchmarks/results/finetune.json,
from where benchmarks/readme.py takes it.

    python benchmarks/finetune.py coco3/ --start runs/course --minutes 4
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
    parser.add_argument("--minutes", type=float, default=4.)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    args = parser.parse_args()
    found = json.loads(OUT.read_text()) if OUT.is_file() else dict(sets={})
    found |= dict(minutes=args.minutes, machine=machine())
    for name in args.sets:
        groups = SETS[name]
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "photos.h5"
            import_coco(data, {s: args.photos / f"instances_{s}.json" for s in ("train", "val")},
                        args.photos / "images", groups, classes=list(groups))
            arms = {"ImageNet": None, "scenes": args.start}
            found["sets"][name] = {
                arm: one(data, Path(folder) / arm, start, args.minutes) for arm, start in arms.items()}
        OUT.write_text(json.dumps(found, indent=1) + "\n")


def one(data, out, start, minutes):
    "Train and measure."
    history = train(
        data, out, ("joint",), epochs=100, minutes=minutes, start=start, callback=progress_lines())
    model = load_model(out / "model.safetensors")[0]
    metrics, _ = evaluate_model(model, InstanceDataset(data, "val"))
    figures = {kind: {ap: metrics[kind][ap] for ap in ("AP", "AP50")} for kind in ("bbox", "segm")}
    print(out.name, figures, flush=True)
    return dict(figures, epochs=len(history), seconds=history[-1]["seconds"])


if __name__ == "__main__": main()
