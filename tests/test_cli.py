"The command, as a person types it: help, a whole tiny run, mistakes, Ctrl-C."
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from maskrcnn_course.cli import main
from maskrcnn_course.mask_rcnn import load_model
from maskrcnn_course.scenes import make_scene, write_scenes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A folder with a few scenes and a tiny model trained on them."
    folder = tmp_path_factory.mktemp("cli")
    write_scenes(folder / "s.h5", n=12, val=4, size=(64, 64), instances=(1, 2))
    assert main(["train", str(folder / "s.h5"), "--out", str(folder / "run"), "--preset", "tiny", "--epochs", "1"]) == 0
    return folder


def fails(capsys, *words):
    "The one line that a mistake ends in."
    capsys.readouterr()
    assert main(list(map(str, words))) == 1
    text = capsys.readouterr().err
    assert text.startswith("maskrcnn-course: ") and text.count("\n") == 1
    return text


@pytest.mark.parametrize("command", ["scenes", "import", "train", "evaluate", "predict", "lab"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as e: main([command, "--help"])
    assert e.value.code == 0 and f"Example: maskrcnn-course {command}" in " ".join(capsys.readouterr().out.split())


def test_a_run_leaves_all_that_is_needed_later(run):
    names = {p.name for p in (run / "run").iterdir()}
    assert names == {"settings.json", "history.json", "metrics.json", "report.html", "model.safetensors", "rpn.safetensors", "box.safetensors", "mask.safetensors"}
    assert {"rpn", "bbox", "segm", "seconds", "machine"} <= set(json.loads((run / "run/metrics.json").read_text()))


def test_evaluate_a_model_and_its_results_agree(run, capsys, tmp_path):
    assert main(["evaluate", str(run / "run"), str(run / "s.h5"), "--out", str(tmp_path / "r.json")]) == 0
    first = capsys.readouterr().out
    assert main(["evaluate", "--results", str(tmp_path / "r.json"), str(run / "s.h5")]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-4:] == first.strip().splitlines()[-4:]


def test_predict_names_damaged_photos_and_goes_on(run, capsys, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(make_scene(np.random.default_rng(0), (80, 100))[0]).save(photos / "good.png")
    (photos / "bad.jpg").write_bytes(b"not a photo")
    assert main(["predict", str(run / "run"), str(photos), "--out", str(tmp_path / "out"), "--threshold", "0.01", "--json", str(tmp_path / "r.json")]) == 0
    assert "bad.jpg" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.jpg"]
    assert isinstance(json.loads((tmp_path / "r.json").read_text()), list)
    assert main(["predict", str(run / "run"), str(photos / "bad.jpg"), "--out", str(tmp_path / "out2")]) == 1
    assert "none of the 1 photos" in capsys.readouterr().err and not (tmp_path / "out2").exists()


def test_import_train_on_coco_files(tmp_path, capsys):
    image, labels, masks = make_scene(np.random.default_rng(3), (60, 80), instances=(2, 3))
    Image.fromarray(image).save(tmp_path / "a.png")
    ys, xs = np.nonzero(masks[0])
    box = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
    x, y, w, h = box
    coco = dict(images=[dict(id=7, file_name="a.png", width=80, height=60)], categories=[dict(id=3, name="cat", supercategory="animal")],
                annotations=[dict(id=1, image_id=7, category_id=3, bbox=box, area=w * h, iscrowd=0, segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]])])
    (tmp_path / "ann.json").write_text(json.dumps(coco))
    words = ["import", "coco", tmp_path / "c.h5", "--train", tmp_path / "ann.json", "--val", tmp_path / "ann.json", "--images", tmp_path]
    coco["images"][0]["id"] = 8
    (tmp_path / "wrong.json").write_text(json.dumps(coco))
    assert "1" in fails(capsys, *words[:4], tmp_path / "wrong.json", *words[7:])
    assert not (tmp_path / "c.h5").exists()
    assert main([*map(str, words[:5]), "--images", str(tmp_path), "--groups", "supercategory"]) == 0
    fails(capsys, *words[:5], "--images", tmp_path)   # the file exists


def test_mistakes_end_in_one_line_and_write_nothing(run, capsys, tmp_path):
    assert "no data set" in fails(capsys, "train", tmp_path / "none.h5", "--out", tmp_path / "x")
    assert "unknown preset" in fails(capsys, "train", run / "s.h5", "--preset", "huge", "--out", tmp_path / "x")
    assert "unknown stage" in fails(capsys, "train", run / "s.h5", "--preset", "tiny", "--stages", "maks", "--out", tmp_path / "x")
    assert "already has" in fails(capsys, "train", run / "s.h5", "--preset", "tiny", "--out", run / "run")
    cut = tmp_path / "cut.h5"
    cut.write_bytes((run / "s.h5").read_bytes()[:5000])
    assert "cut.h5" in fails(capsys, "train", cut, "--out", tmp_path / "x")
    assert "exists" in fails(capsys, "scenes", run / "s.h5")
    assert "no model" in fails(capsys, "evaluate", tmp_path / "none", run / "s.h5")
    assert "--size" in fails(capsys, "scenes", tmp_path / "n.h5", "--size", "big")
    assert "--epochs" in fails(capsys, "train", run / "s.h5", "--epochs", "many", "--out", tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.h5"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ there")
def test_ctrl_c_leaves_a_model_that_works(run, tmp_path):
    words = ["train", run / "s.h5", "--out", tmp_path / "run", "--preset", "tiny", "--epochs", "10000"]
    process = subprocess.Popen([sys.executable, "-c", "import sys; from maskrcnn_course.cli import main; sys.exit(main())", *map(str, words)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "run/history.json").exists(): time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped" in err
    assert load_model(tmp_path / "run/model.safetensors")[2] == "rpn"
    assert not list(tmp_path.rglob("*.part"))
