"""How long the default training will take here: a few steps of each stage are timed, as `train` does.

Written to benchmarks/results/minutes.json, from where benchmarks/readme.py takes it. Needs data/scenes.h5.

    python benchmarks/minutes.py

And with AVX2 alone, for which a newer processor stands in:

    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
        python benchmarks/minutes.py --mixed-precision no
"""
import argparse
import json
from pathlib import Path

import torch
from vs_torchvision import machine

from maskrcnn_course.presets import PRESETS, build_model
from maskrcnn_course.progress import Estimate
from maskrcnn_course.training import has_fast_bfloat16, time_parts

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "minutes.json"


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--mixed-precision", choices=["auto", "no", "bf16"], default="auto")
    precision = parser.parse_args().mixed_precision
    if precision == "auto": precision = "bf16" if has_fast_bfloat16(torch.device("cpu")) else "no"
    recipe, stages = PRESETS["laptop"].recipe, ["rpn", "box", "mask"]
    settings = dict(batch_size=recipe["batch_size"], looks=2, augment=["flip", "colour"],
                    mixed_precision=precision, epochs={name: recipe["epochs"][name] for name in stages})
    parts = time_parts(build_model("laptop", 4), ROOT / "data" / "scenes.h5", stages, settings)
    minutes = Estimate(parts).left("rpn", 0., 0.) / 60
    found = json.loads(OUT.read_text()) if OUT.is_file() else {}
    found[f"{machine()['cpu']}, {precision}"] = dict(
        minutes=minutes, mixed_precision=precision, machine=machine(), parts=parts)
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{minutes:.0f} minutes with {precision}")


if __name__ == "__main__": main()
