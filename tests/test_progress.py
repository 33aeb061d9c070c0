"""What a training says of itself, and what is chosen by watching it: budget, best epoch, early stopping."""
import json

import pytest
import torch

from maskrcnn_course import training
from maskrcnn_course.cli import main
from maskrcnn_course.presets import load_model
from maskrcnn_course.progress import Part, progress_lines
from maskrcnn_course.scenes import write_scenes
from maskrcnn_course.training import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("progress") / "scenes.h5"
    return write_scenes(path, n=26, size=(64, 64), val=6, instances=(1, 3))


def weights(run):
    return load_model(run / "model.safetensors")[0].state_dict()


def same(a, b):
    a, b = weights(a), weights(b)
    return all(torch.equal(a[name], b[name]) for name in a)


def test_watching_changes_no_bit(data, tmp_path):
    seen = []
    chosen = dict(preset="tiny", epochs=1, mixed_precision="no")
    watched = train(data, tmp_path / "watched", callback=seen.append, **chosen)
    alone = train(data, tmp_path / "alone", **chosen)
    assert same(tmp_path / "watched", tmp_path / "alone")
    assert [row | dict(seconds=0) for row in watched] == [row | dict(seconds=0) for row in alone]
    steps = [(now.stage, now.step, now.epoch_done) for now in seen if now.stage == "rpn"]
    assert steps == [("rpn", i, False) for i in range(1, 6)] + [("rpn", 5, True)]
    assert [now.left for now in seen if now.stage == "mask" and now.epoch_done] == [0]
    assert seen[0].left > 0 and seen[-1].history == watched


def test_lines_are_said_every_half_minute(data, tmp_path, capsys):
    seen = []
    train(data, tmp_path / "run", ("rpn",), "tiny", 1, callback=seen.append, mixed_precision="no")
    capsys.readouterr()
    say = progress_lines(0.)
    for now in seen: say(now._replace(left=42.))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "step    3 of 5" in lines[2] and "about 42 s left" in lines[2]
    assert lines[-1].startswith("rpn   epoch  1   loss")


def test_a_budget_fits_the_epochs(data, tmp_path, monkeypatch, capsys):
    parts = dict(rpn=Part(0., 30., 2), box=Part(10., 10., 2), mask=Part(0., 10., 2))
    monkeypatch.setattr(training, "time_parts", lambda *args: parts)
    history = train(data, tmp_path / "run", preset="tiny", minutes=1.3)  # 78 s: 30 + 10 + 2 * 10 + 10
    assert [row["stage"] for row in history] == ["rpn", "box", "box", "mask"]
    assert json.loads((tmp_path / "run/settings.json").read_text())["epochs"] == dict(rpn=1, box=2, mask=1)
    assert "1 of 2 epochs of rpn" in capsys.readouterr().out
    with pytest.raises(ValueError, match="one epoch of each stage takes"):
        train(data, tmp_path / "other", preset="tiny", minutes=0.1)
    assert not (tmp_path / "other").exists()


@pytest.fixture
def losses(monkeypatch):
    "Validation losses as they are wanted, one after the other."
    def set_to(*values):
        values = iter(values)
        monkeypatch.setattr(training, "mean_losses", lambda *args: dict(loss_objectness=next(values)))
    return set_to


def test_patience_stops_and_keeps_the_best(data, tmp_path, losses):
    chosen = dict(stages=("rpn",), preset="tiny", epochs=6, mixed_precision="no")
    losses(0.9, 0.5, 0.6, 0.7, 0.1)
    history = train(data, tmp_path / "run", patience=2, **chosen)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    after = {}
    losses(*[0.9] * 4, 0.9, 0.5, 0.6, 0.7, 0.1, 0.1)  # the first four while steps are timed
    copy_model(tmp_path / "all", after, data, chosen)
    found = weights(tmp_path / "run")
    assert all(torch.equal(found[name], after[2][name]) for name in found)
    assert not all(torch.equal(found[name], after[4][name]) for name in found)


def copy_model(out, after, data, chosen):
    "Train, and keep the weights of every epoch."
    stage = training.Stage
    made = []
    class Kept(stage):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)
    training.Stage = Kept
    def keep(now):
        if now.epoch_done:
            state = made[-1].model.state_dict()
            after[now.epoch] = {name: value.clone() for name, value in state.items()}
    try: train(data, out, callback=keep, **chosen)
    finally: training.Stage = stage


def test_patience_survives_a_stop(data, tmp_path, losses):
    "The best weights are in the checkpoint."
    chosen = dict(stages=("rpn",), preset="tiny", epochs=6, mixed_precision="no", patience=2)
    losses(0.9, 0.5, 0.6, 0.7)
    train(data, tmp_path / "whole", **chosen)
    def stop(now):
        if now.epoch_done and now.epoch == 3: raise KeyboardInterrupt
    losses(*[0.9] * 4, 0.9, 0.5, 0.6)  # the first four while steps are timed
    with pytest.raises(KeyboardInterrupt): train(data, tmp_path / "run", callback=stop, **chosen)
    losses(0.7)
    history = train(data, tmp_path / "run", resume=True)
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert same(tmp_path / "whole", tmp_path / "run")


def test_ap_is_measured_after_every_epoch(data, tmp_path):
    history = train(data, tmp_path / "run", preset="tiny", epochs=2, validate=3, mixed_precision="no")
    kinds = [list(row.get("AP", {})) for row in history]
    assert kinds == [[], [], ["bbox"], ["bbox"], ["bbox", "segm"], ["bbox", "segm"]]
    assert all(-1 <= ap <= 1 for row in history for ap in row.get("AP", {}).values())


def test_batches_can_be_added_up_for_a_step(data, tmp_path):
    chosen = dict(stages=("rpn",), preset="tiny", epochs=2, mixed_precision="no", accumulate=2)
    seen = []
    whole = train(data, tmp_path / "whole", callback=seen.append, **chosen)
    assert (seen[0].steps, seen[0].images) == (3, 8)  # five batches of four
    def stop(now):
        if now.epoch == 2 and now.step == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train(data, tmp_path / "run", callback=stop, **chosen)
    resumed = train(data, tmp_path / "run", resume=True)
    assert same(tmp_path / "whole", tmp_path / "run")
    assert [row["train"] for row in resumed] == [row["train"] for row in whole]


@pytest.mark.parametrize("name, value", [
    ("lr", float("nan")), ("lr", float("inf")), ("lr", -1.), ("lr", 0.), ("lr", dict(rpn=-1.)), ("epochs", 0),
    ("epochs", dict(box=-1)), ("batch_size", 0), ("looks", 0), ("accumulate", 0), ("patience", 0),
    ("validate", -1)])
def test_numbers_that_cannot_be_are_refused(data, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name}.*--{name.replace('_', '-')}"):
        train(data, tmp_path / "run", preset="tiny", **{name: value})
    assert not (tmp_path / "run").exists()


def test_the_report_holds_every_epoch(data, tmp_path, capsys):
    words = ["train", data, "--out", tmp_path / "run", "--preset", "tiny", "--epochs", "1", "--validate", "2"]
    assert main(list(map(str, words))) == 0
    page = (tmp_path / "run/report.html").read_text()
    assert "images/s" in page and page.count("<td>rpn</td><td>1</td>") == 1


def test_a_config_is_a_recipe(data, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    words = f"train {data} --out {first} --preset tiny --epochs rpn=2 --stages rpn --lr 0.002 --seed 3"
    assert main(words.split()) == 0
    words = f"train {data} --out {second} --config {first}/settings.json --seed 4"
    assert main(words.split()) == 0
    a, b = (json.loads((run / "settings.json").read_text()) for run in (first, second))
    assert b == a | dict(seed=4) and a["lr"] == dict(rpn=0.002)
    (tmp_path / "bad.json").write_text("[1]")
    assert main(f"train {data} --out {tmp_path / 'x'} --config {tmp_path / 'bad.json'}".split()) == 1
    assert "give an object" in capsys.readouterr().err and not (tmp_path / "x").exists()
