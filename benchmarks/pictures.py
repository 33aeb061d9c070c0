"""Draw what trained models find on images that they were not trained on, and what they get wrong.

The pictures are for the README and chapter 14.

    python benchmarks/pictures.py scenes runs/scenes data/scenes.h5
    python benchmarks/pictures.py photos runs/photos data/coco3.h5
    python benchmarks/pictures.py mistakes runs/photos data/coco3.h5

Of photos, only those whose licence is plain CC BY are shown. Their credits are written into
nbs/images/CREDITS.md. `mistakes` shows the worst of each kind among them, and writes what each kind costs on
all validation photos to benchmarks/results/photos_ladder.json.
"""
import argparse
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import InterpolationMode, resize, to_pil_image
from torchvision.utils import make_grid

from maskrcnn_course.data import InstanceDataset
from maskrcnn_course.errors import MISTAKES, classify_mistakes, oracle_ladder
from maskrcnn_course.evaluation import paired_iou
from maskrcnn_course.presets import load_model, with_test_augmentation
from maskrcnn_course.prediction import draw, predict
from maskrcnn_course.training import evaluate_model
from photos import about

ROOT = Path(__file__).resolve().parent.parent
IMAGES, CC_BY = ROOT / "nbs/images", "http://creativecommons.org/licenses/by/2.0/"
GREEN, RED = "#2ca02c", "#d62728"


def photo(dataset, i): return (dataset[i][0] * 255).round().to(torch.uint8)


def may_be_shown(dataset):
    return [i for i in range(len(dataset)) if dataset.info(i)["license"].endswith(CC_BY)]


def credit(picture, text, entries):
    "Write whom to thank for a picture's photos, in the place of what was said of that picture before."
    path = IMAGES / "CREDITS.md"
    written = re.split(r"(?m)^(?=## )", path.read_text())[1:] if path.is_file() else []
    others = [s for s in written if not s.startswith(f"## {picture}\n")]
    rows = [f"| {i} | COCO {e['id']} | <{e['url']}> | [CC BY 2.0]({CC_BY}) |"
            for i, e in enumerate(entries, 1)]
    head = [f"## {picture}", "", text, "", "| | photo | from | licence |", "|---|---|---|---|"]
    section = "\n".join([*head, *rows, "", ""])
    path.write_text("# Credits\n\n" + "".join(sorted([*others, section])))


def found(kind, model, classes, dataset):
    "Eight images in a grid, with what the model finds in them."
    if kind == "scenes":
        images = [resize(photo(dataset, i), [384, 512], InterpolationMode.BICUBIC) for i in range(8)]
    else:
        chosen = [i for i in may_be_shown(dataset) if len(dataset[i][1]["labels"])][:8]
        images = [photo(dataset, i) for i in chosen]
        credit("photos_masks.jpg", "Row by row: cropped and scaled, with masks and boxes drawn over them.",
               [dataset.info(i) for i in chosen])
    drawn = [draw(image, predict(model, [image])[0], classes, 0.5) for image in images]
    size = [min(image.shape[i] for image in drawn) for i in (1, 2)]
    grid = make_grid([image[:, :size[0], :size[1]] for image in drawn], nrow=4, padding=6, pad_value=255)
    picture = to_pil_image(grid)
    size = 1200, round(1200 * picture.height / picture.width)
    picture.resize(size, Image.LANCZOS).save(IMAGES / f"{kind}_masks.jpg", quality=85)


def badness(kind, row, annotation):
    "The surer a detection and the farther from its object, the worse; of the objects missed, the largest."
    if kind == "missed": return annotation["area"]
    if kind == "localization":
        boxes = np.array([row["bbox"]]), np.array([annotation["bbox"]])
        return row["score"] * (1 - paired_iou(*boxes, np.array([False]))[0])
    return row["score"] * (kind != "background" or annotation is None)  # a crowd is no background


def show_mistakes(mistakes, classes, dataset, columns=4):
    "A row of photos for each kind of mistake: what was found (red), what was there (green, dashed)."
    allowed = {dataset.image_ids[i]: i for i in may_be_shown(dataset)}
    fig, axes = plt.subplots(len(MISTAKES), columns, figsize=(12, 12.6), layout="constrained")
    shown = []
    for kind, row_of_axes in zip(MISTAKES, axes):
        worst = {}  # one of each photo
        for k, row, a, _ in sorted((m for m in mistakes if m[0] == kind), key=lambda m: -badness(*m[:3])):
            image = (row or a)["image_id"]
            if image in allowed: worst.setdefault(image, (row, a))
        for ax in row_of_axes: ax.axis("off")
        first = row_of_axes[0]
        first.text(-0.03, 0.5, kind, rotation=90, ha="right", va="center", fontsize=13,
                   transform=first.transAxes)
        for ax, (image, (row, a)) in zip(row_of_axes, worst.items()):
            ax.imshow(photo(dataset, allowed[image]).permute(1, 2, 0))
            shown.append(dataset.info(allowed[image]))
            for r, color, style in ((a, GREEN, "--"), (row, RED, "-")):
                if not r: continue
                ax.add_patch(plt.Rectangle(
                    r["bbox"][:2], *r["bbox"][2:], fill=False, ec=color, ls=style, lw=2.2))
            said = f"found: {classes[row['category_id'] - 1]} {row['score']:.2f}" if row else "found: nothing"
            there = classes[a["category_id"] - 1] if a else "nothing"
            ax.set_title(f"{said}; there: {there}", fontsize=9)
    fig.savefig(IMAGES / "photos_mistakes.jpg", dpi=100, pil_kwargs=dict(quality=80))
    credit("photos_mistakes.jpg", "Row by row: with boxes drawn over them.", shown)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("kind", choices=["scenes", "photos", "mistakes"])
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("data", help="the HDF5 file")
    args = parser.parse_args()
    model, classes, _ = load_model(Path(args.run) / "model.safetensors")
    dataset = InstanceDataset(args.data, "val")
    if args.kind != "mistakes": return found(args.kind, model, classes, dataset)
    _, results = evaluate_model(with_test_augmentation(model), dataset)
    gt = dataset.coco()
    mistakes = classify_mistakes(gt, results)
    show_mistakes(mistakes, classes, dataset)
    ladders = {kind: oracle_ladder(gt, results, kind) for kind in ("bbox", "segm")}
    counts = {step: sum(m[0] == step for m in mistakes) for step in MISTAKES}
    command = f"python benchmarks/pictures.py mistakes {args.run} {args.data}"
    report = dict(command=command, **about(None), images=len(dataset), counts=counts, **ladders)
    (ROOT / "benchmarks/results/photos_ladder.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__": main()
