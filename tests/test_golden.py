"""What must not change unnoticed: the losses of ten steps, and the options of the command line.

Where a change is meant, write the files again: python tests/test_golden.py
"""
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from maskrcnn_course.augment import data_loader
from maskrcnn_course.cli import _COMMANDS
from maskrcnn_course.presets import build_model
from maskrcnn_course.scenes import write_scenes
from maskrcnn_course.training import Stage

FIXTURES = Path(__file__).parent / "fixtures"
LOSSES, OPTIONS = FIXTURES / "golden_losses.json", FIXTURES / "options.txt"


def ten_steps(folder):
    "Losses of ten joint steps of the tiny preset, in float64: rounding plays no part."
    data = write_scenes(folder / "scenes.h5", n=24, size=(64, 64), val=4, instances=(1, 3), seed=5)
    torch.manual_seed(0)
    model = build_model("tiny", 4, pretrained=False).double()
    stage = Stage(model, "joint").double().train()
    optimizer = torch.optim.SGD([p for p in stage.parameters() if p.requires_grad], 0.01, 0.9)
    loader, generator = data_loader(data, "train", 2, seed=1, augment=("flip",)), torch.Generator()
    found = []
    for step, (images, targets) in enumerate(loader):
        images = [image.double() for image in images]
        targets = [target | dict(boxes=target["boxes"].double()) for target in targets]
        losses = stage((images, targets), generator.manual_seed(step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        found.append({name: loss.item() for name, loss in losses.items()})
    return found


def options():
    "Every command with its options, a line each."
    lines = []
    for words, (_, _, choices) in sorted(_COMMANDS.items()):
        lines += [f"{words} {name}" for names, _ in choices for name in names]
    return "\n".join(lines) + "\n"


def test_ten_steps_give_the_losses_that_they_gave(tmp_path):
    golden = json.loads(LOSSES.read_text())
    found = ten_steps(tmp_path)
    assert len(found) == len(golden) == 10
    for now, then in zip(found, golden): assert now == pytest.approx(then, rel=1e-6)


def test_the_command_line_has_the_options_that_it_had():
    assert options() == OPTIONS.read_text()


if __name__ == "__main__":
    if "options" not in sys.argv:
        LOSSES.write_text(json.dumps(ten_steps(Path(tempfile.mkdtemp())), indent=1) + "\n")
    OPTIONS.write_text(options())
