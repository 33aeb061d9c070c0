"The command, as a person types it: help, a whole tiny run, mistakes, Ctrl-C."
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from maskrcnn_course.cli import main
from maskrcnn_course.presets import load_model
from maskrcnn_course.scenes import make_scene, write_scenes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A folder with a few scenes and a tiny model trained on them."
    folder = tmp_path_factory.mktemp("cli")
    write_scenes(folder / "s.h5", n=12, val=4, size=(64, 64), instances=(1, 2))
    assert main(["train", str(folder / "s.h5"), "--out", str(folder / "run"),
                 "--preset", "tiny", "--epochs", "1"]) == 0
    return folder


def fails(capsys, *words, status=1):
    "The one line that a mistake ends in."
    capsys.readouterr()
    assert main(list(map(str, words))) == status
    text = capsys.readouterr().err
    assert text.startswith("maskrcnn-course: ") and text.count("\n") == 1
    return text


@pytest.mark.parametrize("command", ["scenes", "import", "train", "evaluate", "predict", "lab", "exercises"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as e: main([command, "--help"])
    assert e.value.code == 0
    assert f"Example: maskrcnn-course {command}" in " ".join(capsys.readouterr().out.split())


def test_a_run_leaves_all_that_is_needed_later(run):
    names = {p.name for p in (run / "run").iterdir()}
    assert names == {"settings.json", "history.json", "metrics.json", "report.html", "model.safetensors",
                     "rpn.safetensors", "box.safetensors", "mask.safetensors"}
    assert {"rpn", "bbox", "segm", "seconds", "machine"} <= set(
        json.loads((run / "run/metrics.json").read_text()))


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
    assert main(["predict", str(run / "run"), str(photos), "--out", str(tmp_path / "out"),
                 "--threshold", "0.01", "--json", str(tmp_path / "r.json")]) == 0
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
    coco = dict(images=[dict(id=7, file_name="a.png", width=80, height=60)],
                categories=[dict(id=3, name="cat", supercategory="animal")],
                annotations=[dict(id=1, image_id=7, category_id=3, bbox=box, area=w * h, iscrowd=0,
                                  segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]])])
    (tmp_path / "ann.json").write_text(json.dumps(coco))
    words = ["import", "coco", tmp_path / "c.h5", "--train", tmp_path / "ann.json",
             "--val", tmp_path / "ann.json", "--images", tmp_path]
    coco["images"][0]["id"] = 8
    (tmp_path / "wrong.json").write_text(json.dumps(coco))
    said = fails(capsys, *words[:4], tmp_path / "wrong.json", *words[7:])
    assert "wrong.json, annotation 1: image_id 7 is not in the file" in said
    assert not (tmp_path / "c.h5").exists()
    assert main([*map(str, words[:5]), "--images", str(tmp_path), "--groups", "supercategory"]) == 0
    fails(capsys, *words[:5], "--images", tmp_path)   # the file exists


def test_mistakes_end_in_one_line_and_write_nothing(run, capsys, tmp_path):
    assert "no data set" in fails(capsys, "train", tmp_path / "none.h5", "--out", tmp_path / "x")
    assert "no such file" in fails(capsys, "train", run / "s.h5", "--out", tmp_path / "x",
                                   "--config", tmp_path / "none.json")
    assert "already has" in fails(capsys, "train", run / "s.h5", "--preset", "tiny", "--out", run / "run")
    cut = tmp_path / "cut.h5"
    cut.write_bytes((run / "s.h5").read_bytes()[:5000])
    assert "cut.h5" in fails(capsys, "train", cut, "--out", tmp_path / "x")
    assert "exists" in fails(capsys, "scenes", run / "s.h5")
    assert "no model" in fails(capsys, "evaluate", tmp_path / "none", run / "s.h5")
    assert "--size" in fails(capsys, "scenes", tmp_path / "n.h5", "--size", "big")
    assert "--epochs" in fails(capsys, "train", run / "s.h5", "--epochs", "many", "--out", tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.h5"]


@pytest.mark.parametrize("words", [
    "--preset huge", "--stages maks", "--lr nan", "--lr inf", "--lr -1", "--lr 0", "--batch-size 0",
    "--batch-size -3", "--workers -1", "--looks 0", "--minutes 0", "--patience 0", "--validate -1",
    "--seed -1", "--accumulate 0", "--mixed-precision bf8", "--log paper", "--device tpu",
    "--checkpoint-minutes -1", "--no-such-option"])
def test_words_that_make_no_command_end_with_status_2(words, run, capsys, tmp_path):
    said = fails(capsys, "train", run / "s.h5", "--out", tmp_path / "x", *words.split(), status=2)
    assert words.split()[0] in said and "--help" in said
    assert not (tmp_path / "x").exists()


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("maskrcnn-course 0")


def test_paths_that_do_not_exist_and_places_that_cannot_be_written(run, capsys, tmp_path, monkeypatch):
    data, file = run / "s.h5", tmp_path / "file"
    file.write_text("not a folder")
    for words in (["inspect"], ["evaluate", run / "run"]):
        assert "no such file: there is no data set at" in fails(capsys, *words, tmp_path / "none.h5")
    none = tmp_path / "none.json"
    assert fails(capsys, "evaluate", "--results", none, data) == f"maskrcnn-course: no such file: {none}\n"
    said = fails(capsys, "import", "coco", tmp_path / "c.h5", "--train", none, "--images", tmp_path)
    assert said == f"maskrcnn-course: no such file: {none}\n"
    said = fails(capsys, "import", "coco", tmp_path / "c.h5", "--train", tmp_path, "--images", tmp_path)
    assert said == f"maskrcnn-course: {tmp_path}: is a directory\n"
    for place, reason in (
            (file / "s", f"{file} is a file, and no folder"), ("/proc/nowhere/s", "No such file"),
            (tmp_path / "taken", "it is a folder")):
        if str(place).startswith("/proc") and not Path("/proc/self").exists(): continue
        (tmp_path / "taken.h5").mkdir(exist_ok=True)
        (tmp_path / "taken.jpg").mkdir(exist_ok=True)
        for words, ending in ((["scenes"], ".h5"), (["inspect", data, "--out"], ".jpg")):
            said = fails(capsys, *words, f"{place}{ending}", "--overwrite")
            assert f"cannot write {place}{ending}: " in said and reason in said
    monkeypatch.setattr("os.access", lambda *args: False)
    assert "is read-only" in fails(capsys, "scenes", tmp_path / "s.h5")
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**20))
    assert "s.h5: the disk is full" in fails(capsys, "scenes", tmp_path / "s.h5", "--n", 6, "--size", "64x64")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken.h5", "taken.jpg"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ there")
def test_ctrl_c_leaves_a_model_that_works(run, tmp_path):
    words = ["train", run / "s.h5", "--out", tmp_path / "run", "--preset", "tiny", "--epochs", "10000"]
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; from maskrcnn_course.cli import main; sys.exit(main())",
         *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.time() + 120
    while process.poll() is None and not (tmp_path / "run/history.json").exists() and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped" in err
    assert load_model(tmp_path / "run/model.safetensors")[2] == "rpn"
    assert not [*tmp_path.rglob("*.part"), *tmp_path.rglob(".*.tmp")]


def test_augmentation_looks_and_start(run, capsys, tmp_path):
    words = ["train", run / "s.h5", "--out", tmp_path / "run", "--preset", "tiny", "--epochs", "1",
             "--augment", "flip", "paste", "--looks", "1", "--start", run / "run"]
    assert main(list(map(str, words))) == 0
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert (settings["augment"], settings["looks"], settings["start"]) == (
        ["flip", "paste"], 1, str(run / "run"))
    assert "blur" in fails(capsys, "train", run / "s.h5", "--out", tmp_path / "other", "--preset", "tiny",
                           "--augment", "blur")
    assert "no model at" in fails(capsys, "train", run / "s.h5", "--out", tmp_path / "other",
                                  "--preset", "tiny", "--start", tmp_path / "nowhere")


def test_help_loads_no_torch():
    code = ("import sys; from maskrcnn_course.cli import main\n"
            "try: main(['train', '--help'])\n"
            "except SystemExit: pass\n"
            "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_wrong_stage_class_or_group_is_named(run, capsys, tmp_path):
    assert "rbn=5" in fails(capsys, "train", run / "s.h5", "--epochs", "rbn=5", "--out", tmp_path / "x")
    coco = dict(images=[], annotations=[], categories=[dict(id=1, name="cat", supercategory="animal")])
    (tmp_path / "a.json").write_text(json.dumps(coco))
    words = ["import", "coco", tmp_path / "c.h5", "--train", tmp_path / "a.json", "--images", tmp_path]
    assert "['dog']" in fails(capsys, *words, "--classes", "dog")
    assert "['dog']" in fails(capsys, *words, "--groups", "pet=cat,dog")
    assert "--groups cat" in fails(capsys, *words, "--groups", "cat")
    assert "b.json" in fails(capsys, *words[:4], tmp_path / "b.json", *words[5:])
    (tmp_path / "b.json").write_text(json.dumps(coco)[:40])
    assert "b.json is not whole JSON" in fails(capsys, *words[:4], tmp_path / "b.json", *words[5:])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_import_names_a_truncated_photo_and_writes_nothing(tmp_path, capsys):
    Image.fromarray(make_scene(np.random.default_rng(3), (60, 80))[0]).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:900])
    coco = dict(images=[dict(id=7, file_name="a.jpg", width=80, height=60)], annotations=[],
                categories=[dict(id=3, name="cat", supercategory="animal")])
    (tmp_path / "a.json").write_text(json.dumps(coco))
    words = ["import", "coco", tmp_path / "c.h5", "--train", tmp_path / "a.json", "--images", tmp_path]
    assert "a.jpg" in fails(capsys, *words)
    (tmp_path / "a.jpg").unlink()
    assert "there is no such file" in fails(capsys, *words)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_model_is_not_measured_on_other_classes(run, capsys, tmp_path):
    import h5py, shutil
    shutil.copy(run / "s.h5", tmp_path / "t.h5")
    with h5py.File(tmp_path / "t.h5", "r+") as f:
        f.attrs["classes"] = json.dumps(["animal", "person", "vehicle"])
    assert "knows the classes" in fails(capsys, "evaluate", run / "run", tmp_path / "t.h5")


def test_evaluate_refuses_what_is_no_list_of_results(run, capsys, tmp_path):
    for text in ("[", "{}", "[1]", '[{"image_id": 99, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]'):
        (tmp_path / "r.json").write_text(text)
        fails(capsys, "evaluate", "--results", tmp_path / "r.json", run / "s.h5")
    assert "RUN and DATA" in fails(capsys, "evaluate", "--results", tmp_path / "r.json",
                                   run / "run", run / "s.h5")
    assert "exists" in fails(capsys, "evaluate", run / "run", run / "s.h5", "--out", tmp_path / "r.json")


def test_predict_never_overwrites_a_photo_or_mixes_two(run, capsys, tmp_path):
    for name in ("a.jpg", "b/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(make_scene(np.random.default_rng(0), (64, 64))[0]).save(tmp_path / name)
    before = (tmp_path / "a.jpg").read_bytes()
    predict = ["predict", run / "run", tmp_path / "a.jpg"]
    assert "exists" in fails(capsys, *predict, "--out", tmp_path)
    assert "made from" in fails(capsys, *predict, "--out", tmp_path, "--overwrite")
    assert "second file" in fails(capsys, *predict, tmp_path / "b", "--out", tmp_path / "out")
    assert "none.jpg" in fails(capsys, *predict, tmp_path / "none.jpg", "--out", tmp_path / "out")
    assert (tmp_path / "a.jpg").read_bytes() == before and not (tmp_path / "out").exists()
    # the same file twice is one
    assert main([*map(str, predict), str(tmp_path / "a.jpg"), "--out", str(tmp_path / "out")]) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.jpg"]


def test_predict_takes_videos_beside_photos(run, capsys, tmp_path):
    import av
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 80 * i, np.uint8))))
        container.mux(stream.encode())
    (tmp_path / "cut.mov").write_bytes((tmp_path / "film.mp4").read_bytes()[:500])
    (tmp_path / "cut.png").write_bytes(b"no")
    model = ["predict", str(run / "run")]
    words = [str(tmp_path / name) for name in ("film.mp4", "cut.mov", "cut.png")]
    assert main([*model, *words, "--out", str(tmp_path / "all"), "--json", str(tmp_path / "r.json")]) == 0
    said = capsys.readouterr().err
    assert "cut.mov" in said and "cut.png" in said and not (tmp_path / "r.json").exists()
    assert main([*model, str(tmp_path / "film.mp4"), str(tmp_path / "cut.mov"),
                 "--out", str(tmp_path / "out")]) == 0
    assert "cut.mov" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["film.mp4"]
    assert main([*model, str(tmp_path / "cut.mov"), "--out", str(tmp_path / "out2")]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "maskrcnn-course: none of the 1 videos could be read"


def test_lab_opens_the_front_page(monkeypatch, tmp_path, capsys):
    called = []
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/index.ipynb").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("subprocess.call", lambda words: called.append(words) or 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    assert main(["lab", "--", "--no-browser"]) == 0
    front, root = str(tmp_path / "nbs/index.ipynb"), f"--ServerApp.root_dir={tmp_path}"
    assert called[0][1:] == ["-m", "jupyterlab", front, root, "--no-browser"]
    monkeypatch.setattr("maskrcnn_course.cli.__file__", str(tmp_path / "lib" / "package" / "cli.py"))
    monkeypatch.chdir(tmp_path / "nbs")
    assert "clone it" in fails(capsys, "lab")
