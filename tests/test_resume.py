"""A training that is stopped, by whatever and whenever, ends with the weights of one that was never stopped.

Each attempt is a process of its own, forked from one that has imported everything, so that many fit
into a test.
"""
import json
import math
import subprocess
import sys

import pytest
import torch

from maskrcnn_course.checkpoints import read_checkpoint
from maskrcnn_course.cli import main
from maskrcnn_course.presets import load_model
from maskrcnn_course.scenes import write_scenes
from maskrcnn_course.training import train

ATTEMPTS = """
import json, os, random, signal, sys, time, traceback
from pathlib import Path
import torch
from maskrcnn_course import checkpoints, training

data, folder, stages, how, kills = *sys.argv[1:5], int(sys.argv[5])
stages, choose = tuple(stages.split(",")), random.Random(how)
epochs = {"rpn": 3, "box": 3, "mask": 3, "joint": 4}

def half_a_file(tensors, path, about):
    "What a machine that loses power in the middle of a write leaves."
    whole(tensors, path, about)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[:len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

whole = checkpoints.save_file

def attempt(out, resume, stop=None, number=signal.SIGKILL, at_write=None):
    "Train in a process of its own, and stop it after so many seconds; returns whether it came to the end."
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)
            if at_write is not None:
                writes = iter([whole] * at_write + [half_a_file])
                checkpoints.save_file = lambda *args: next(writes)(*args)
            training.train(data, out, stages, "tiny", epochs, batch_size=4, mixed_precision="no",
                           augment=("flip", "colour", "crop", "paste"), resume=resume,
                           checkpoint_minutes=0.001)
            os._exit(0)
        except KeyboardInterrupt: os._exit(3)
        except BaseException: traceback.print_exc(); os._exit(1)
    if stop is not None:
        time.sleep(stop)
        os.kill(child, number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 3, -number), code
    return code == 0

start = time.time()
assert attempt(Path(folder) / "whole", False)
takes, stopped, runs = time.time() - start, 0, 0
while stopped < kills:
    out, done = Path(folder) / f"run{runs}", False
    while not done:
        how_it_stops = dict(
            kill=dict(stop=choose.uniform(0, takes / 2)),
            term=dict(stop=choose.uniform(0.1, takes / 2), number=signal.SIGTERM),
            write=dict(at_write=choose.randrange(6)))[how]
        done = attempt(out, (out / "settings.json").is_file(), **(how_it_stops if stopped < kills else {}))
        stopped += not done
    runs += 1
print(json.dumps(dict(stopped=stopped, runs=runs)))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("resume") / "scenes.h5"
    return write_scenes(path, n=26, size=(64, 64), val=4, instances=(1, 3))


@pytest.mark.parametrize("stages, how, kills", [
    ("rpn,box,mask", "kill", 20), ("joint", "kill", 5), ("rpn,box", "term", 5), ("rpn,box", "write", 5)])
def test_a_stopped_training_ends_with_the_same_weights(data, tmp_path, stages, how, kills):
    words = [sys.executable, "-c", ATTEMPTS, data, tmp_path, stages, how, kills]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["stopped"] >= kills
    expected = load_model(tmp_path / "whole/model.safetensors")[0].state_dict()
    history = json.loads((tmp_path / "whole/history.json").read_text())
    for i in range(said["runs"]):
        run = tmp_path / f"run{i}"
        found = load_model(run / "model.safetensors")[0].state_dict()
        for name in expected: assert torch.equal(found[name], expected[name]), name
        rows = json.loads((run / "history.json").read_text())
        assert [row | dict(seconds=0) for row in rows] == [row | dict(seconds=0) for row in history]
        assert not list(run.glob("*checkpoint*"))


def stop_after(epochs):
    def stop(now):
        if len(now.history) == epochs: raise KeyboardInterrupt
    return stop


@pytest.fixture
def stopped(data, tmp_path):
    "A run that was stopped after the first of two epochs."
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "run", ("rpn",), "tiny", dict(rpn=2), callback=stop_after(1))
    return tmp_path / "run"


def test_a_checkpoint_cut_short_gives_way_to_the_one_before(data, stopped):
    newest, before = (stopped / f"{name}checkpoint.safetensors" for name in ("", "before_"))
    assert read_checkpoint(newest)[0]["epoch"] == 1
    newest.write_bytes(newest.read_bytes()[:-100])
    assert before.is_file() and read_checkpoint(newest)[0] == read_checkpoint(before)[0]
    history = train(data, stopped, resume=True)
    assert [row["epoch"] for row in history] == [1, 2]


def test_a_run_that_was_stopped_is_not_replaced_unasked(data, stopped):
    with pytest.raises(FileExistsError, match="--resume"):
        train(data, stopped, ("rpn",), "tiny", dict(rpn=2))
    assert read_checkpoint(stopped / "checkpoint.safetensors")
    history = train(data, stopped, ("rpn",), "tiny", dict(rpn=1), overwrite=True)
    assert [row["epoch"] for row in history] == [1]


def test_a_finished_run_has_nothing_left_to_do(data, stopped):
    history = train(data, stopped, resume=True)
    before = (stopped / "model.safetensors").stat().st_mtime_ns
    assert train(data, stopped, resume=True) == history
    assert (stopped / "model.safetensors").stat().st_mtime_ns == before


def test_only_the_data_it_began_with(data, stopped, tmp_path):
    other = write_scenes(tmp_path / "other.h5", n=8, size=(64, 64), val=2, instances=(1, 3))
    with pytest.raises(ValueError, match="begun with 22 training images"): train(other, stopped, resume=True)
    with pytest.raises(FileNotFoundError, match="no training to go on with"):
        train(data, tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_losses_that_are_not_finite_end_the_training(data, tmp_path):
    "One line says what and where, and no checkpoint holds weights that are no numbers."
    with pytest.raises(ValueError, match="stage rpn, epoch .* not finite; choose a lower learning rate"):
        train(data, tmp_path / "run", ("rpn",), "tiny", dict(rpn=30), lr=1e20, mixed_precision="no",
              checkpoint_minutes=0.)  # after every step
    about, tensors = read_checkpoint(tmp_path / "run/checkpoint.safetensors")
    assert about["step"] >= 1 and all(map(math.isfinite, about["sums"].values()))
    assert all(tensors[name].isfinite().all() for name in tensors if name.startswith("module."))


LIMITED = """
import resource, sys
from maskrcnn_course.cli import main
data, out, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
sys.exit(main(["train", data, "--out", out, "--preset", "tiny", "--epochs", "2", "--device", "cpu",
               "--stages", "rpn", "--mixed-precision", "no"]))
"""


def in_a_process(program, *words):
    "Run a program that ends in one line."
    done = subprocess.run([sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True)
    assert done.stderr.startswith("maskrcnn-course: ") and done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="files of limited size are POSIX")
@pytest.mark.parametrize("size", [100, 200_000])
def test_a_disk_that_is_full_ends_in_one_line(data, tmp_path, size):
    "A limit on the size of files stands in for it: neither settings nor a checkpoint fit."
    status, said = in_a_process(LIMITED, data, tmp_path / "run", size)
    assert status == 1 and "arge" in said  # File too large
    assert not list(tmp_path.glob("run/.*")) and not list(tmp_path.glob("run/*checkpoint*"))


def test_a_folder_that_cannot_be_written_ends_in_one_line(data, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert main(["train", str(data), "--out", str(out), "--preset", "tiny", "--epochs", "1"]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


WORKER = """
import os, signal, sys
from maskrcnn_course import training
from maskrcnn_course.cli import main
from maskrcnn_course.data import InstanceDataset
data, out, how = sys.argv[1:]
read, parent = InstanceDataset.__getitem__, os.getpid()

def fail(self, i):
    if os.getpid() != parent and os.path.exists(os.path.join(out, "history.json")):
        if how == "dies": os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("image 7 is damaged")
    return read(self, i)

InstanceDataset.__getitem__ = fail
sys.exit(main(["train", data, "--out", out, "--preset", "tiny", "--epochs", "20", "--device", "cpu",
               "--stages", "rpn", "--mixed-precision", "no", "--workers", "1"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("how, words", [("dies", "reads images died"), ("raises", "image 7 is damaged")])
def test_a_worker_that_fails_ends_in_one_line_and_loses_nothing(data, tmp_path, how, words):
    status, said = in_a_process(WORKER, data, tmp_path / "run", how)
    assert status == 1 and words in said and "Traceback" not in said
    about, _ = read_checkpoint(tmp_path / "run" / "checkpoint.safetensors")
    assert about["epoch"] >= 1
    assert len(train(data, tmp_path / "run", resume=True)) == 20
