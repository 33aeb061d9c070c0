"A server that misbehaves in every way we know, and a data set with every mistake that `inspect` looks for."
import functools
import http.server
import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from maskrcnn_course import download
from maskrcnn_course.cli import main
from maskrcnn_course.data import InstanceDataset, encode_mask, write_dataset
from maskrcnn_course.download import CLASSES, download_coco3
from maskrcnn_course.inspect_data import MANY, SIDES, SMALL, contact_sheet, inspect_dataset
from maskrcnn_course.presets import PRESETS

LICENSES = [dict(id=i, name=name, url=f"http://{url}") for i, name, url in (
    (1, "Attribution-NonCommercial-ShareAlike License", "creativecommons.org/licenses/by-nc-sa/2.0/"),
    (4, "Attribution License", "creativecommons.org/licenses/by/2.0/"),
    (5, "Attribution-ShareAlike License", "creativecommons.org/licenses/by-sa/2.0/"),
    (6, "Attribution-NoDerivs License", "creativecommons.org/licenses/by-nd/2.0/"),
    (7, "No known copyright restrictions", "flickr.com/commons/usage/"),
    (8, "United States Government Work", "www.usa.gov/copyright.shtml"))]
FREE = {4, 5, 7, 8}
CATEGORIES = [dict(id=i, name=n, supercategory=s) for i, n, s in (
    (1, "person", "person"), (3, "car", "vehicle"), (17, "cat", "animal"), (62, "chair", "furniture"))]
# the fourth is upright, the fifth too small
SHAPES = [(640, 480), (640, 427), (500, 375), (480, 640), (300, 200), (640, 426)]


def small_coco(split, first, n):
    """Annotations and photos: blocks of colour with one or two rectangles.

    On every seventh there is a speck, on every ninth a crowd.
    """
    coco, photos = dict(images=[], annotations=[], categories=CATEGORIES, licenses=LICENSES), {}
    for i in range(first, first + n):
        (w, h), rng, name = SHAPES[i % len(SHAPES)], np.random.default_rng(i), f"{i:012}.jpg"
        buffer = io.BytesIO()
        blocks = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        blocks.resize((w, h), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=80)
        photos[f"/{split}2017/{name}"] = buffer.getvalue()
        coco["images"].append(dict(
            id=i, file_name=name, width=w, height=h,
            license=LICENSES[i % 6]["id"], flickr_url=f"http://flickr/{i}"))
        boxes = [(w // 8, h // 8, w // 3, h // 2)]
        if i % 2: boxes.append((w // 2, h // 3, w // 2, h // 2))
        if i % 7 == 0: boxes.append((w // 2, h // 4, 12, 9))
        for k, (x, y, bw, bh) in enumerate(boxes):
            coco["annotations"].append(dict(
                id=100 * i + k, image_id=i, category_id=(1, 1, 1, 3, 17)[(i + k) % 5],
                bbox=[x, y, bw, bh], area=bw * bh, iscrowd=0,
                segmentation=[[x, y, x + bw, y, x + bw, y + bh, x, y + bh]]))
        coco["annotations"].append(dict(
            id=100 * i + 50, image_id=i, category_id=62,
            bbox=[0, 0, 9, 9], area=81, iscrowd=0, segmentation=[[0, 0, 9, 0, 9, 9]]))
        if i % 9 == 0:
            runs = dict(size=[h, w], counts=[0, w * h // 3, w * h - w * h // 3])
            coco["annotations"].append(dict(
                id=100 * i + 60, image_id=i, category_id=1,
                bbox=[0, 0, w // 3, h], area=w * h // 3, iscrowd=1, segmentation=runs))
    return coco, photos


def archive_of(**cocos):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("annotations/captions.json", np.random.default_rng(0).bytes(200_000))
        for split, coco in cocos.items():
            z.writestr(f"annotations/instances_{split}2017.json", json.dumps(coco))
    return buffer.getvalue()


ARCHIVE = "/annotations/annotations_trainval2017.zip"


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64  # of 5, a sixth caller waits for seconds


class Handler(http.server.BaseHTTPRequestHandler):
    "Answers from `server.files`; `server.plan` has for a path what to do the first time, the second time, …"
    def log_message(self, *args): pass

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        with server.lock:
            server.asked.append((self.path, wanted))
            how = server.always.get(self.path) or server.always.get("*", "well")
            if server.plan.get(self.path): how = server.plan[self.path].pop(0)
        whole = server.files.get(self.path)
        if whole is None or how == 404: return self.send_error(404)
        if isinstance(how, int): return self.send_error(how)
        begin = int(wanted[6:-1]) if wanted and how not in ("no range", "cut, no range") else 0
        if begin >= len(whole): return self.send_error(416)
        body = b"<html>Please log in to this network</html>" if how == "another page" else whole[begin:]
        if how == "flipped":
            body = body[:len(body) // 2] + bytes([body[len(body) // 2] ^ 255]) + body[len(body) // 2 + 1:]
        self.send_response(206 if begin else 200)
        if how != "short, unsaid": self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if how in ("cut", "cut, no range", "short, unsaid"): body = body[:len(body) // 2]
        if how == "nothing": body = b""
        if how == "slow":
            self.wfile.write(body[:50])
            self.wfile.flush()
            time.sleep(1)
            body = body[50:]
        try: self.wfile.write(body)
        except OSError: pass


@pytest.fixture(scope="module")
def content():
    (train, photos), (val, more) = small_coco("train", 1000, 48), small_coco("val", 5000, 24)
    return dict(train=train, val=val), {ARCHIVE: archive_of(train=train, val=val), **photos, **more}


@pytest.fixture
def server(content, monkeypatch):
    monkeypatch.setattr(download, "RETRIES", dict(total=3, backoff_factor=0))
    server = Server(("127.0.0.1", 0), Handler)
    server.files, server.lock = dict(content[1]), threading.Lock()
    server.plan, server.always, server.asked = {}, {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=functools.partial(server.serve_forever, 0.05), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def get(server, folder, **kwargs):
    choice = dict(train=9, val=4, source=server.url) | kwargs
    return InstanceDataset(download_coco3(folder / "d.h5", **choice))


def photos_of(data):
    return {f"/{info['split']}2017/{info['file_name']}" for info in map(data.info, range(len(data)))}


def fails(server, folder, message, error, **kwargs):
    with pytest.raises(error, match=message) as e: get(server, folder, **kwargs)
    assert "\n" not in str(e.value) and not list(folder.glob("*.h5")) and not list(folder.glob(".*.tmp"))


# -------------------------------------------------------------------------------------- a server that behaves

def test_pictures_and_masks_are_cut_alike(server, content, tmp_path, capsys):
    data, whole = get(server, tmp_path), {a["id"]: a for coco in content[0].values() for a in coco["images"]}
    assert data.classes == CLASSES
    assert Counter(data.info(i)["split"] for i in range(13)) == {"train": 9, "val": 4}
    assert capsys.readouterr().out == ""
    by_image = {}
    for coco in content[0].values():
        for a in coco["annotations"]: by_image.setdefault(a["image_id"], []).append(a)
    class_of = {1: 2, 3: 1, 17: 3}
    for i, (image, target) in enumerate(data):
        info, entry = data.info(i), whole[data.image_ids[i]]
        w, h = entry["width"], entry["height"]
        assert image.shape == (3, 300, 400)
        assert (w, h) in SHAPES[:3] + SHAPES[5:]
        assert entry["id"] % 7
        assert entry["id"] % 9
        assert info["url"] == f"http://flickr/{entry['id']}"
        assert info["license"] in {f"{o['name']} {o['url']}" for o in LICENSES}
        cw = min(w, round(h * 4 / 3))
        x = (w - cw) // 2
        rows = ((np.arange(300) + 0.5) * h / 300).astype(int)
        columns = x + ((np.arange(400) + 0.5) * cw / 400).astype(int)
        wanted = [a for a in by_image[entry["id"]] if a["category_id"] != 62]
        assert target["labels"].tolist() == [class_of[a["category_id"]] for a in wanted]
        for a, mask, box, area in zip(wanted, target["masks"], target["boxes"], target["area"]):
            full = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(a["segmentation"], h, w)))
            assert np.array_equal(mask.numpy(), full[rows[:, None], columns]) and area == mask.sum() >= 2000
            ys, xs = mask.nonzero(as_tuple=True)
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        whole_photo = Image.open(io.BytesIO(content[1][f"/{info['split']}2017/{info['file_name']}"]))
        photo = np.asarray(whole_photo)[rows[:, None], columns]
        assert (image - torch.from_numpy(photo.copy()).permute(2, 0, 1) / 255).abs().mean() < 0.02
    assert len(server.asked) == 14 and {path for path, _ in server.asked} == photos_of(data) | {ARCHIVE}
    with h5py.File(data.path) as f: assert server.url in f.attrs["made_by"]


def test_the_choice_is_the_same_for_everybody(server, tmp_path):
    for name in "abc": (tmp_path / name).mkdir()
    a, b, c = (get(server, tmp_path / name, seed=seed, train=6, val=3)
               for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert a.image_ids == b.image_ids != c.image_ids


def test_classes_share_the_photos(server, content, tmp_path):
    "Three quarters of the objects are persons, and they are not three quarters of what is chosen."
    data = get(server, tmp_path, train=6, val=3)
    counts = Counter(label for _, target in data for label in target["labels"].tolist())
    assert set(counts) == {1, 2, 3} and counts[2] <= counts.total() / 2


def test_size_and_number_of_objects(server, tmp_path):
    data = get(server, tmp_path, most=1, min_size=100, train=5, val=2)
    assert {len(target["labels"]) for _, target in data} == {1}
    (tmp_path / "b").mkdir()
    specks = get(server, tmp_path / "b", most=3, min_size=20, train=99, val=99)
    assert min(target["area"].min() for _, target in specks) < 200
    assert any(i % 7 == 0 for i in specks.image_ids)


def test_fewer_photos_than_asked_for_and_none(server, tmp_path, capsys):
    data = get(server, tmp_path, train=99, val=2)
    assert len(data) < 40
    assert f"train: only {len(data) - 2} photos fit, and not 99\n" in capsys.readouterr().out
    message = "no photo for train fits; ask for smaller objects, or for more in a photo"
    with pytest.raises(ValueError, match=message):
        get(server, tmp_path, min_size=119_999, overwrite=True)
    assert len(get(server, tmp_path, val=0, train=3, overwrite=True)) == 3


def test_redistributable_takes_free_licences_alone(server, content, tmp_path):
    data = get(server, tmp_path, redistributable=True, train=99, val=99)
    licence = {entry["id"]: entry["license"] for coco in content[0].values() for entry in coco["images"]}
    assert {licence[i] for i in data.image_ids} <= FREE and len({licence[i] for i in data.image_ids}) > 1
    (tmp_path / "all").mkdir()
    everything = get(server, tmp_path / "all", train=99, val=99)
    assert set(data.image_ids) == {i for i in everything.image_ids if licence[i] in FREE}
    assert len(everything) > len(data)


def test_a_second_call_asks_for_nothing_and_another_choice_for_what_is_new(server, tmp_path):
    first = photos_of(get(server, tmp_path))
    server.asked.clear()
    with pytest.raises(FileExistsError, match="d.h5 exists: choose another name, or pass overwrite=True"):
        get(server, tmp_path)
    assert photos_of(get(server, tmp_path, overwrite=True)) == first and not server.asked
    more = get(server, tmp_path, train=12, overwrite=True)
    assert {path for path, _ in server.asked} == photos_of(more) - first


# ------------------------------------------------------------------------------------- a server that does not

@pytest.mark.parametrize("plan", [
    ["cut"], ["cut"] * 3, ["cut, no range"], ["slow"], ["cut", "slow", "cut"], [500], [503, 502, 500], [429],
    ["another page"], ["flipped"], ["nothing"], ["nothing"] * 4, ["cut", "no range"], ["cut", 500, "cut"],
    ["cut", "flipped"], ["short, unsaid"]], ids=str)
def test_trouble_that_passes(server, content, tmp_path, plan):
    "The first answers about the archive and about every photo are bad, and all comes whole in the end."
    flipped = plan == ["flipped"] or plan == ["cut", "flipped"]
    paths = [path for path in server.files if path != ARCHIVE and path.endswith("5.jpg")]
    plans = dict.fromkeys(paths if flipped else server.files, plan)
    server.plan = {path: list(p) for path, p in plans.items()}
    data = get(server, tmp_path, train=5, val=2)
    assert len(data) == 7
    for path in photos_of(data):
        assert plan[-1] == "flipped" or (tmp_path / "coco" / path[1:]).read_bytes() == content[1][path]
    assert (tmp_path / "coco" / ARCHIVE.split("/")[-1]).read_bytes() == content[1][ARCHIVE]
    assert not list(tmp_path.rglob("*.part"))
    if plan == ["cut"]:
        ranges = [wanted for path, wanted in server.asked if path == ARCHIVE]
        assert ranges[0] is None and int(ranges[1][6:-1]) > 0.3 * len(content[1][ARCHIVE])


def test_photos_that_are_not_to_be_had_are_passed_over(server, tmp_path, capsys):
    chosen = sorted(photos_of(get(server, tmp_path, train=20, val=5)))
    for p in (tmp_path / "coco").rglob("*.jpg"): p.unlink()
    server.always = {chosen[0]: 404, chosen[1]: "another page"}
    capsys.readouterr()
    data = get(server, tmp_path, train=20, val=5, overwrite=True)
    said = capsys.readouterr().out
    assert photos_of(data) == set(chosen[2:])
    assert f"passed over: {server.url}{chosen[0]}: the server does not have it (404)\n" in said
    assert f"passed over: {server.url}{chosen[1]} comes damaged: " in said
    server.always = dict.fromkeys(chosen[:4], 404)
    for p in (tmp_path / "coco").rglob("*.jpg"): p.unlink()
    data.path.unlink()
    message = "4 of 25 photos are not to be had; the first: .*does not have it"
    fails(server, tmp_path, message, OSError, train=20, val=5)


@pytest.mark.parametrize("how, message", [
    (500, "cannot be fetched: too many 500 error responses; what has come is kept"),
    (418, "cannot be fetched: the server answers 418"),
    ("nothing", "breaks off again and again, now after 0 bytes; what has come is kept"),
    ("cut, no range", "breaks off again and again, now after \\d+ bytes; what has come is kept")])
def test_trouble_that_stays_ends_in_one_line_and_keeps_what_came(server, tmp_path, how, message):
    chosen = sorted(photos_of(get(server, tmp_path)))
    (tmp_path / "d.h5").unlink()
    for path in chosen[:3]: (tmp_path / "coco" / path[1:]).unlink()
    server.always = {chosen[1]: how}
    fails(server, tmp_path, f"{chosen[1]} {message}", OSError)
    server.always = {}
    server.asked.clear()
    assert len(get(server, tmp_path)) == 13 and {path for path, _ in server.asked} <= set(chosen[:3])


def test_no_archive(server, tmp_path):
    server.always = {ARCHIVE: 404}
    missing = "annotations_trainval2017.zip: the server does not have it \\(404\\)"
    fails(server, tmp_path, missing, FileNotFoundError)
    server.always = {ARCHIVE: "another page"}
    damaged = "annotations_trainval2017.zip comes damaged: .* is not a whole zip archive"
    fails(server, tmp_path, damaged, ValueError)
    server.shutdown()
    server.server_close()
    fails(server, tmp_path, "cannot be fetched: .*refused; what has come is kept", OSError)
    with pytest.raises(OSError, match="nowhere/annotations/annotations_trainval2017.zip cannot be fetched: "):
        get(server, tmp_path, source="nowhere")
    assert not list(tmp_path.rglob("*.zip"))


def test_a_damaged_archive_is_removed_and_named(server, content, tmp_path):
    whole = content[1][ARCHIVE]
    at = whole.index(b"annotations/instances_train2017.json") + 200
    spoiled = lambda k: whole[:k] + bytes(b ^ 255 for b in whole[k:k + 10]) + whole[k + 10:]
    message = "annotations_trainval2017.zip was damaged .* and has been removed: try again"
    for bad in (spoiled(at), spoiled(at + 2000), archive_of(train=content[0]["train"])):
        server.files[ARCHIVE] = bad
        fails(server, tmp_path, message, ValueError)
        assert not list(tmp_path.rglob("*.zip"))
    server.files[ARCHIVE] = whole
    assert len(get(server, tmp_path)) == 13


def change_all(key, **changes): return lambda coco: [row.update(changes) for row in coco[key]]


def say_other_sizes(coco):
    coco["annotations"] = [a for a in coco["annotations"] if not a["iscrowd"]]
    for entry in coco["images"]: entry.update(width=640, height=480)


@pytest.mark.parametrize("change, message", [
    (change_all("images", file_name="../../../evil.jpg"),
     "image \\d+: '../../../evil.jpg' is no name for a photo"),
    (change_all("images", file_name="/tmp/evil.jpg"), "image \\d+: '/tmp/evil.jpg' is no name for a photo"),
    (change_all("annotations", segmentation=dict(size=[1, 1], counts=[1])),
     "annotation \\d+ of image \\d+ \\(\\d+.jpg\\): a mask of \\[1, 1\\]"),
    (lambda coco: coco.pop("categories"), "lacks {'categories'}"),
    (lambda coco: coco["annotations"][0].update(image_id=1),
     "annotation 100000: image_id 1 is not in the file"),
    (say_other_sizes, "photos are not to be had; the first: .*the photo has .* pixels, "
                      "and the annotations say \\(640, 480\\)")])
def test_annotations_are_not_trusted(server, content, tmp_path, change, message):
    coco = json.loads(json.dumps(content[0]["train"]))
    change(coco)
    server.files[ARCHIVE] = archive_of(train=coco, val=content[0]["val"])
    fails(server, tmp_path, message, (ValueError, OSError))
    assert {p.name for p in tmp_path.iterdir()} == {"coco"}


def test_a_kept_photo_that_went_bad_is_named(server, tmp_path):
    data = get(server, tmp_path)
    photo = tmp_path / "coco" / min(photos_of(data))[1:]
    photo.write_bytes(photo.read_bytes()[:500])
    data.path.unlink()
    fails(server, tmp_path, f"{photo.name}: the image is damaged", ValueError)


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ there")
def test_ctrl_c_and_going_on(server, tmp_path):
    server.always = {"*": "slow", ARCHIVE: "well"}
    code = ("import signal, sys\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from maskrcnn_course.cli import main\n"
            "sys.exit(main())")
    words = ["download", "coco3", tmp_path / "d.h5", "--train", "20", "--val", "5",
             "--from", server.url, "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(server.asked) < 6: time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped" in err and not list(tmp_path.glob("*.h5"))
    whole = {p for p in (tmp_path / "coco").rglob("*.jpg")}
    assert 0 < len(whole) < 25
    assert all(server.files["/" + str(p.relative_to(tmp_path / "coco"))] == p.read_bytes() for p in whole)
    server.always, before = {}, len(server.asked)
    assert main(list(map(str, words))) == 0
    assert len(InstanceDataset(tmp_path / "d.h5")) == 25 and len(server.asked) - before == 25 - len(whole)


def test_the_real_photos(photos, server, tmp_path):
    "COCO's own photos and masks, brought to 400 × 300 before: nothing is cut, no mask changes."
    cocos = {}
    for split in ("train", "val"):
        coco = cocos[split] = json.loads((photos / f"instances_{split}.json").read_text())
        for c in coco["categories"]: c["supercategory"] = c["name"]
        for entry in coco["images"]:
            photo = photos / "images" / entry["file_name"]
            server.files[f"/{split}2017/{entry['file_name']}"] = photo.read_bytes()
    server.files[ARCHIVE] = archive_of(**cocos)
    server.plan = {path: ["cut"] for path in server.files}
    data = get(server, tmp_path, train=40, val=20, redistributable=True)
    wanted, entries = {}, {e["id"]: e for coco in cocos.values() for e in coco["images"]}
    for coco in cocos.values():
        for a in coco["annotations"]: wanted.setdefault(a["image_id"], []).append(a)
    assert len(data) > 20 and all(entries[i]["redistributable"] for i in data.image_ids)
    for i, (_, target) in zip(data.image_ids, data):
        runs = [a["segmentation"]["counts"] for a in wanted[i]]
        assert [encode_mask(m).decode() for m in target["masks"]] == runs
        assert target["labels"].tolist() == [a["category_id"] for a in wanted[i]]
    kinds = Counter(f["kind"] for f in inspect_dataset(data.path)["findings"])
    assert set(kinds) <= {"rare class"}


# ---------------------------------------------------------------------------------------------------- inspect

def picture(seed, w=60, h=40):
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (h, w, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def thing(x1, y1, x2, y2, label=1, **changes):
    mask = np.zeros((40, 60), np.uint8)
    mask[y1:y2, x1:x2] = 1
    plain = dict(label=label, box=(x1, y1, x2, y2), area=float(mask.sum()), iscrowd=0, rle=encode_mask(mask))
    return plain | changes


def example(i, *things, **changes):
    plain = dict(image=picture(i), width=60, height=40, id=i, file_name=f"{i}.png",
                 split="train", instances=[*things])
    return plain | changes


def good_examples(n, **changes):
    "With two objects each, and nothing wrong."
    return [example(i, thing(5, 5, 25, 20), thing(30, 8, 55, 33, 2), **changes) for i in range(n)]


def findings(folder, *examples, classes=("cat", "dog")):
    path = write_dataset(folder / "i.h5", classes, examples, "x", overwrite=True)
    return [(f["kind"], f["image_id"], f["text"]) for f in inspect_dataset(path)["findings"]]


def test_nothing_wrong_is_found_where_nothing_is(tmp_path):
    crowd = thing(0, 0, 60, 40, iscrowd=1)
    good = good_examples(4)
    for i, one in enumerate(good): one["split"] = ("train", "val")[i % 2]
    loose, looser = (5.6, 4.2, 26.9, 22.5), (30, 8, 56.2, 33)  # boxes as drawn by hand
    by_hand = example(9, thing(5, 5, 25, 20, box=loose), thing(30, 8, 55, 33, 2, box=looser), crowd,
                      split="val")
    assert findings(tmp_path, *good, by_hand, example(10, split="train")) == []
    report = inspect_dataset(tmp_path / "i.h5")
    assert report["images"] == 6
    assert report["splits"] == {"train": 3, "val": 3}
    assert report["without_objects"] == 1
    assert report["crowds"] == 1
    assert report["image_sizes"] == {"60 x 40": 6} and report["masks"] and report["classes"] == ["cat", "dog"]
    assert report["objects"]["dog"] == dict(count=5, smallest=625, median=625, largest=625)
    assert report["objects"]["cat"]["count"] == 6


@pytest.mark.parametrize("wrong, wanted", [
    (thing(5, 5, 25, 20, box=(2, 2, 12, 10)),
     [("box off its mask", "box 2 2 12 10, mask within 5 5 25 20")]),
    (thing(5, 5, 25, 20, box=(5, 5, 29, 20)),
     [("box off its mask", "box 5 5 29 20, mask within 5 5 25 20")]),
    (thing(40, 20, 60, 40, box=(40, 20, 75, 55)),
     [("box outside of the image", "box 40 20 75 55 in 60 x 40 pixels"),
      ("box off its mask", "box 40 20 75 55, mask within 40 20 60 40")]),
    (thing(0, 0, 20, 20, box=(-9, -9, 20, 20)),
     [("box outside of the image", "box -9 -9 20 20 in 60 x 40 pixels"),
      ("box off its mask", "box -9 -9 20 20, mask within 0 0 20 20")]),
    (thing(5, 5, 25, 20, rle=encode_mask(np.zeros((40, 60)))), [("empty mask", "box 5 5 25 20")]),
    (thing(5, 5, 10, 9), [("tiny object", "20 pixels")])])
def test_odd_objects_are_found(tmp_path, wrong, wanted):
    found = findings(tmp_path, example(7, wrong), *good_examples(3))
    assert found == [(kind, 7, f"object 0 (cat): {text}") for kind, text in wanted]


def test_objects_marked_twice_are_found(tmp_path):
    once, again, other = thing(5, 5, 25, 25), thing(5, 5, 25, 24, 2), thing(5, 5, 25, 15)
    good = example(3, thing(5, 5, 25, 25, 2), thing(30, 8, 55, 33))
    twice = ("object twice", 0, "objects 1 and 2 share 95% of their pixels")
    assert findings(tmp_path, example(0, other, once, again), good) == [twice]
    assert findings(tmp_path, example(0, once, {**once, "iscrowd": 1}), good) == []
    boxed = [{**t, "rle": b""} for t in (other, once, again, thing(30, 5, 55, 30))]
    assert findings(tmp_path, example(0, *boxed)) == [twice]


def test_pictures_that_are_there_twice_or_damaged_are_found(tmp_path):
    both = [thing(5, 5, 25, 20), thing(30, 8, 55, 33, 2)]
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(0))).save(buffer, "BMP")           # the same pixels in other bytes
    found = findings(tmp_path, example(0, *both), example(1, *both, split="val"),
                     example(2, *both, image=buffer.getvalue(), split="val"))
    assert found == [("image twice", 2, "the pixels of image 0 (0.png, train)")]
    with h5py.File(tmp_path / "i.h5", "r+") as f: f["image_bytes"][f["images"][1]["data"].sum() // 2] ^= 1
    report = inspect_dataset(tmp_path / "i.h5")
    found = [(f["kind"], f["image_id"], f["file_name"]) for f in report["findings"]]
    assert found == [("damaged", 1, "1.png"), ("image twice", 2, "2.png")]
    with h5py.File(tmp_path / "i.h5", "r+") as f: f["rle_bytes"][0] ^= 1
    report = inspect_dataset(tmp_path / "i.h5")
    assert [f["image_id"] for f in report["findings"] if f["kind"] == "damaged"] == [0, 1]


def test_rare_and_missing_classes_are_found(tmp_path):
    cats = [example(i, thing(5, 5, 25, 20), thing(30, 5, 55, 30), split="val" if i > 7 else "train")
            for i in range(10)]
    assert findings(tmp_path, *cats) == [("rare class", None, "dog: 0 of 20 objects")]
    dogs = [example(20 + i, thing(5, 5, 25, 20, 2)) for i in range(5)]
    assert findings(tmp_path, *cats, *dogs) == [("rare class", None, "dog: no object in val")]
    assert findings(tmp_path, *cats, dogs[0]) == [("rare class", None, "dog: 1 of 21 objects")]
    assert [kind for kind, *_ in findings(tmp_path, example(0), example(1))] == []


def spoil(folder, change):
    "The findings of a good file after `change` was done to it."
    path = write_dataset(folder / "i.h5", ["cat", "dog"], good_examples(4), "x", overwrite=True)
    with h5py.File(path, "r+") as f: change(f)
    report = inspect_dataset(path)
    contact_sheet(path, report["findings"])
    return [(f["kind"], f["image_id"], f["text"]) for f in report["findings"]]


def set_rows(table, row, column, value):
    def change(f):
        rows = f[table][:]
        rows[column][row] = value
        f[table][...] = rows
    return change


@pytest.mark.parametrize("column, value, wanted", [
    ("label", 3, [("no such class", 1, "object 0 (label 3): labels are 1 to 2")]),
    ("label", 0, [("no such class", 1, "object 0 (label 0): labels are 1 to 2")]),
    ("label", -1, [("no such class", 1, "object 0 (label -1): labels are 1 to 2")]),
    ("box", np.nan, [("broken box", 1, "object 0 (cat): box nan nan nan nan is not x1 y1 x2 y2")]),
    ("box", np.inf, [("broken box", 1, "object 0 (cat): box inf inf inf inf is not x1 y1 x2 y2")]),
    ("box", (25, 5, 5, 20), [("broken box", 1, "object 0 (cat): box 25 5 5 20 is not x1 y1 x2 y2")]),
    ("area", np.nan, [("tiny object", 1, "object 0 (cat): nan pixels")]),
    ("rle", (0, 10**9), [("damaged", 1, "the runs of a mask|the run-length encoding|negative")]),
    ("rle", (-9, 5), [("damaged", 1, "the runs of a mask|the run-length encoding|negative")])])
def test_rows_that_no_importer_writes_are_found(tmp_path, column, value, wanted):
    found = spoil(tmp_path, set_rows("instances", 2, column, value))
    assert [row[:2] for row in found] == [row[:2] for row in wanted]
    words = wanted[0][2] if column == "rle" else re.escape(wanted[0][2])
    assert re.search(words, found[0][2])


@pytest.mark.parametrize("span", [(2, 3), (2, 6), (1, 3), (0, 2), (4, 2), (100, 102), (-2, 0), (6, 9)])
def test_broken_spans_of_objects_are_found(tmp_path, span):
    (kind, image_id, text), = spoil(tmp_path, set_rows("images", 1, "instances", span)) or [(None, 1, "")]
    if span == (2, 3): return                     # an object fewer: nothing says that it is missing
    assert (kind, image_id) == ("damaged", 1)
    assert f"image 1: rows {span[0]} to {span[1]} of the table instances are not those of its objects" in text


@pytest.mark.parametrize("span", [(0, 10), (-5, 3), (50, 10), (10**9, 10**9 + 5)])
def test_broken_spans_of_bytes_are_found(tmp_path, span):
    assert spoil(tmp_path, set_rows("images", 1, "data", span))[0][:2] == ("damaged", 1)


@pytest.mark.parametrize("change, message", [
    (lambda f: f.__delitem__("instances"), "its table instances is missing or lacks columns"),
    (lambda f: f.__delitem__("image_bytes"), "its table image_bytes is missing"),
    (lambda f: f.attrs.__delitem__("classes"), "its attribute classes is None, and should be a JSON list"),
    (lambda f: f.attrs.update(classes="cat, dog"), "its attribute classes is cat, dog, and should be a JSON"),
    (lambda f: f.attrs.update(classes='{"1": "cat"}'), "and should be a JSON list of names"),
    (lambda f: f.attrs.__delitem__("version"), "is not a maskrcnn_course file of version 1 or below")])
def test_inspect_names_what_a_file_lacks(tmp_path, capsys, change, message):
    path = write_dataset(tmp_path / "i.h5", ["cat", "dog"], good_examples(2), "x")
    with h5py.File(path, "r+") as f: change(f)
    assert main(["inspect", str(path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("maskrcnn-course: ") and said.count("\n") == 1
    assert f"{path}" in said and message in said


def test_hints_fit_the_presets(tmp_path):
    laptop, photos = PRESETS["laptop"], PRESETS["photos"]
    assert SIDES == (laptop.settings["min_size"], laptop.settings["max_size"])
    assert SMALL == laptop.settings["anchor_sizes"][0][0] * laptop.settings["rpn_fg_iou_thresh"] ** 0.5
    assert 2 * MANY == laptop.settings["rpn_post_nms_top_n_test"]
    assert photos.settings["min_size"][-1] == 2 * SIDES[0]
    assert photos.settings["rpn_post_nms_top_n_test"] == 300
    cells = [thing(x, y, x + 2, y + 2) for x in range(0, 60, 4) for y in range(0, 40, 4)]
    few = [example(i, *cells[:3]) for i in range(3)]
    kinds = Counter(kind for kind, *_ in findings(tmp_path, example(9, *cells), *few, classes=["cat"]))
    assert set(kinds) == {"tiny object", "small objects", "many objects"}
    text = {kind: text for kind, _, text in findings(tmp_path, example(9, *cells), *few, classes=["cat"])}
    assert "half are less than 12.8 pixels wide" in text["small objects"]
    assert "1 images have more than 50, the fullest 150" in text["many objects"]
    assert "rpn_post_nms_top_n_test=300, box_detections_per_img=150)" in text["many objects"]
    crowds = [{**cell, "iscrowd": 1} for cell in cells]
    kinds = {kind for kind, *_ in findings(tmp_path, example(9, *crowds), *good_examples(3))}
    assert not kinds & {"small objects", "many objects"}


def test_inspect_has_an_answer_for_every_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data set at"): inspect_dataset(tmp_path / "none.h5")
    (tmp_path / "half.h5").write_bytes(b"\x89HDF\r\n")
    with pytest.raises(ValueError, match="half.h5 is not a whole HDF5 file"):
        inspect_dataset(tmp_path / "half.h5")


@pytest.mark.parametrize("n, tiles", [(1, 1), (3, 3), (12, 6)])
def test_contact_sheet_shows_every_kind_first(tmp_path, n, tiles):
    speck, off = thing(5, 5, 10, 9), thing(5, 5, 25, 20, box=(0, 0, 9, 9))
    examples = [*good_examples(4), example(8, speck), example(9, off)]
    report = inspect_dataset(write_dataset(tmp_path / "i.h5", ["cat", "dog"], examples, "x"))
    sheet = contact_sheet(tmp_path / "i.h5", report["findings"], n)
    titles = [ax.get_title() for ax in sheet.axes if ax.get_title()]
    assert len(titles) == tiles and set(titles[:2]) <= {"8: 8.png\ntiny object", "9: 9.png\nbox off its mask"}


def test_commands(server, tmp_path, capsys):
    out = tmp_path / "d.h5"
    words = ["download", "coco3", str(out), "--train", "5", "--val", "2", "--from", server.url + "/"]
    assert main([*words, "--redistributable", "--min-size", "1500", "--most", "2"]) == 0
    assert "is written; look at it with" in capsys.readouterr().out
    assert main(["inspect", str(out), "--out", str(tmp_path / "new/sheet.jpg")]) == 0
    said = capsys.readouterr().out
    assert f"{out}: 7 images (5 train, 2 val)" in said
    assert "images of 400 x 300 (7)" in said
    assert "vehicle" in said
    assert "boxes and masks" in said
    assert Image.open(tmp_path / "new/sheet.jpg").size[0] > 1000
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["sheet.jpg"]
    specks = [example(i, thing(5, 5, 10, 9)) for i in range(7)]
    write_dataset(tmp_path / "bad.h5", ["cat", "dog"], specks, "x")
    assert main(["inspect", str(tmp_path / "bad.h5")]) == 0
    said = capsys.readouterr().out
    assert "tiny object: 7\n  image 0 (0.png), object 0 (cat): 20 pixels\n" in said
    assert "  and 2 more\n" in said
    assert "rare class: 1\n  dog: 0 of 7 objects\n" in said
    sheet, nothing = str(tmp_path / "new/sheet.jpg"), str(tmp_path / "none.h5")
    wrong = [
        (words, "d.h5 exists: choose another name, or add --overwrite"),
        (["inspect", str(out), "--out", sheet], "sheet.jpg exists: choose another name, or add --overwrite"),
        (["inspect", str(out), "--out", "sheet.h5"], "--out sheet.h5: give a picture, as in sheet.jpg"),
        (["inspect", nothing], "no data set at"),
        (["download", "coco4"], "invalid choice: 'coco4'"),
        (["download", "coco3", str(tmp_path / "x.h5"), "--from", "http://127.0.0.1:9"],
         ".jpg cannot be fetched: "),  # the archive is here already
    ]
    for line, message in wrong:
        assert main(line) in (1, 2)
        said = capsys.readouterr().err
        assert said.startswith("maskrcnn-course: ") and message in said and said.count("\n") == 1, line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.h5", "coco", "d.h5", "new"]


@pytest.mark.parametrize("command", ["download", "inspect"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as e: main([command, "--help"])
    assert e.value.code == 0
    assert f"Example: maskrcnn-course {command}" in " ".join(capsys.readouterr().out.split())
