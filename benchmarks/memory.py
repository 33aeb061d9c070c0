"""Peak memory against the number of images: writing a data set, training from it, measuring it.

Made-up images of 64x64 with three objects each. Every figure is the peak of a process of its own, above what
a process has after its imports. Written to benchmarks/results/memory.json and into benchmarks/README.md by
benchmarks/readme.py.

    python benchmarks/memory.py                  # 1,000, 10,000 and 120,000 images: about ten minutes
    python benchmarks/memory.py --images 1000
"""
import argparse
import json
import resource
import subprocess
import sys
import tempfile
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from maskrcnn_course.augment import data_loader
from maskrcnn_course.data import InstanceDataset, encode_mask, write_dataset
from maskrcnn_course.evaluation import evaluate
from maskrcnn_course.presets import build_model
from maskrcnn_course.training import Stage

OUT = Path(__file__).parent / "results" / "memory.json"


def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # MB, on Linux


def examples(n):
    "Noise with three rectangles; eight different pictures take turns."
    rng, pictures = np.random.default_rng(0), []
    for _ in range(8):
        file = BytesIO()
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
        pictures.append(file.getvalue())
    for i in range(n):
        rows = []
        for label in (1, 2, 3):
            x, y = rng.integers(0, 40, 2)
            mask = np.zeros((64, 64), bool)
            mask[y:y + 20, x:x + 20] = True
            box = float(x), float(y), float(x + 20), float(y + 20)
            rows.append(dict(label=label, box=box, area=400., iscrowd=False, rle=encode_mask(mask)))
        yield dict(image=pictures[i % 8], width=64, height=64, id=i + 1, file_name=f"{i:06}.jpg",
                   split="val" if i % 20 == 0 else "train", instances=rows)


def write(path, n): write_dataset(path, ["a", "b", "c"], examples(n), "made up", total=n)


def learn(path, n):
    "One hundred steps of the RPN."
    stage = Stage(build_model("tiny", 4), "rpn").train()
    optimizer = torch.optim.SGD([p for p in stage.parameters() if p.requires_grad], 0.01)
    for inputs in islice(data_loader(path, "train", 8), 100):
        optimizer.zero_grad()
        sum(stage(inputs, torch.Generator()).values()).backward()
        optimizer.step()


def measure(path, n):
    "AP of boxes and masks, of the truth as its own detections, on a twentieth of the images."
    truth = InstanceDataset(path, "val").coco()
    found = [dict(a, score=0.5) for a in truth["annotations"]]
    for kind in ("bbox", "segm"): assert evaluate(truth, found, kind)["AP"] > 0.99


PARTS = {"write": write, "train": learn, "evaluate": measure}


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--images", type=int, nargs="+", default=[1_000, 10_000, 120_000])
    parser.add_argument("--part", nargs=3, metavar=("NAME", "PATH", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        name, path, n = args.part
        before = peak()
        PARTS[name](path, int(n))
        print(json.dumps(peak() - before))
        return
    found = {}
    for n in args.images:
        with tempfile.TemporaryDirectory() as folder:
            found[n] = {name: part(name, Path(folder) / "made_up.h5", n) for name in PARTS}
        print(n, {name: f"{mb:.0f} MB" for name, mb in found[n].items()}, flush=True)
    OUT.write_text(json.dumps(found, indent=1) + "\n")


def part(name, path, n):
    "Run one part in a process of its own."
    words = [sys.executable, __file__, "--part", name, str(path), str(n)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__": main()
