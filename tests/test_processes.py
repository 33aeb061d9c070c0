"""Several processes train as one does with the same images in a step.

They talk through gloo on the CPU. All anchors and proposals are samples here, so that nothing is left to
chance.
"""
import json
import socket
import subprocess
import sys

import pytest
import torch

from maskrcnn_course.presets import load_model
from maskrcnn_course.scenes import write_scenes

CODE = """
import sys, json, torch
from pathlib import Path
from maskrcnn_course import training
from maskrcnn_course.data import InstanceDataset
from maskrcnn_course.checkpoints import processes
torch.set_num_threads(1)
data, out, stages = Path(sys.argv[1]), Path(sys.argv[2]), tuple(sys.argv[3].split(","))
build = training.build_model

def build_model(*args, backbone):
    "One whose samples are all that there are."
    return build(
        *args, rpn_batch_size_per_image=4000, rpn_positive_fraction=1.0, rpn_nms_thresh=1.1,
        rpn_score_thresh=-1., box_batch_size_per_image=24, box_positive_fraction=1.0,
        rpn_pre_nms_top_n_train=4, rpn_post_nms_top_n_train=16)

training.build_model = build_model
# AdamW would make a whole step of a gradient that is nothing but rounding
torch.optim.AdamW = lambda groups, weight_decay: torch.optim.SGD(groups, 0.1, 0.9, weight_decay=weight_decay)
training.train(data, out, stages, "tiny", dict.fromkeys(stages, 2), batch_size=4, mixed_precision="no",
               augment=("flip",))
model = training.load_model(out / "model.safetensors")[0]
metrics, results = training.evaluate_model(model, InstanceDataset(data, "val"), batch_size=2)
(out / f"metrics{processes().process_index}.json").write_text(json.dumps(metrics))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes") / "scenes.h5"
    return write_scenes(path, n=25, size=(64, 64), val=5, instances=(1, 3))


def run(processes, *words):
    "The code above in so many processes; the port is one that is free."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = [sys.executable]
    if processes > 1:
        begin += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                  "--master_addr=127.0.0.1", f"--master_port={port}"]
    script = words[1].parent / "code.py"
    script.write_text(CODE)
    done = subprocess.run([*begin, script, *map(str, words)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return words[1]


@pytest.mark.parametrize("stages, n", [("rpn,box,mask", 2), ("joint", 4)])
def test_processes_together_learn_what_one_learns(data, tmp_path, stages, n):
    one = run(1, data, tmp_path / "one", stages)
    history = json.loads((one / "history.json").read_text())
    weights = load_model(one / "model.safetensors")[0].state_dict()
    first, last = (sum(row["val"].values()) for row in history[:2])
    assert abs(first - last) > 1e-3  # it learns
    many = run(n, data, tmp_path / f"of{n}", stages)
    rows = json.loads((many / "history.json").read_text())
    assert [(r["stage"], r["epoch"]) for r in rows] == [(r["stage"], r["epoch"]) for r in history]
    for a, b in zip(rows, history):
        assert b["val"] == pytest.approx(a["val"], rel=1e-5)
    found = load_model(many / "model.safetensors")[0].state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=name)
    metrics = [json.loads((many / f"metrics{i}.json").read_text()) for i in range(n)]
    assert all(m == metrics[0] for m in metrics)
    names = {path.name for path in many.iterdir() if not path.name.startswith("metrics")}
    assert names == {p.name for p in one.iterdir() if not p.name.startswith("metrics")}
