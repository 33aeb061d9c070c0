"Every format but scenes: what comes in, what is refused in one line, and no pickle runs."
import io
import json
import os
import pickle

import h5py
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

from maskrcnn_course.cli import main
from maskrcnn_course.data import InstanceDataset, encode_mask, pad_targets, write_dataset
from maskrcnn_course.folders import import_folder, import_mask_folder, import_object_masks
from maskrcnn_course.importers import import_cis680, import_coco
from maskrcnn_course.presets import build_model
from maskrcnn_course.scenes import write_scenes
from maskrcnn_course.training import train


def nothing_new(folder, before):
    return sorted(p.name for p in folder.iterdir()) == sorted(before)


# ---------------------------------------------------------------------------------------------------- CIS 680

def save_arrays(path, arrays, protocol=None):
    rows = np.empty(len(arrays), object)
    for i, array in enumerate(arrays): rows[i] = array
    if protocol is None: return np.save(path, rows)
    save_pickle(path, pickle.dumps(rows, protocol), len(arrays))


def save_pickle(path, data, n=1):
    "A .npy file of objects with this pickle in it."
    with open(path, "wb") as f:
        np.lib.format.write_array_header_1_0(f, dict(descr="|O", fortran_order=False, shape=(n,)))
        f.write(data)


class Assignment:
    "Four files: 6 images of 30 × 40, of which number i has i % 4 objects."
    def __init__(self, root):
        self.root, rng = root, np.random.default_rng(0)
        counts = [i % 4 for i in range(6)]
        def picture():
            small = Image.fromarray(rng.integers(0, 255, (3, 4, 3), dtype=np.uint8))
            return np.asarray(small.resize((40, 30))).transpose(2, 0, 1)
        self.images = np.stack([picture() for _ in counts])
        self.masks = np.zeros((sum(counts), 30, 40), np.uint8)
        for k, mask in enumerate(self.masks): mask[3 + k:13 + k, 5 + 2 * k:20 + 2 * k] = 1
        every = [[5 + 2 * k, 3 + k, 20 + 2 * k, 13 + k] for k in range(len(self.masks))]
        starts = np.cumsum([0, *counts])
        self.boxes = [np.array(every[a:b], np.float32).reshape(-1, 4) for a, b in zip(starts, starts[1:])]
        self.labels = [np.arange(n) % 3 + 1 for n in counts]

    def file(self, kind):
        return self.root / f"my_{kind}_comp_zlib.{'h5' if kind in ('img', 'mask') else 'npy'}"

    def save(self, protocol=None):
        for kind, table in (("img", self.images), ("mask", self.masks)):
            with h5py.File(self.file(kind), "w") as f:
                f.create_dataset("data", data=table, compression="gzip")
        for kind, arrays in (("labels", self.labels), ("bboxes", self.boxes)):
            save_arrays(self.file(kind), arrays, protocol)
        return self

    def run(self, **kwargs): return InstanceDataset(import_cis680(self.root / "out.h5", self.root, **kwargs))

    def fails(self, message, error=ValueError):
        before = [p.name for p in self.root.iterdir()]
        with pytest.raises(error, match=message): self.run()
        assert nothing_new(self.root, before)


@pytest.fixture
def assignment(tmp_path): return Assignment(tmp_path)


@pytest.mark.parametrize("protocol", [None, 2, 3, 4])
def test_cis680_comes_in(assignment, protocol, capsys):
    data = assignment.save(protocol).run()
    assert data.classes == ["vehicle", "person", "animal"] and len(data) == 6 and data.has_masks
    masks = []
    for i, (image, target) in enumerate(data):
        assert target["labels"].tolist() == assignment.labels[i].tolist()
        assert target["boxes"].tolist() == assignment.boxes[i].tolist()
        assert (image - torch.from_numpy(assignment.images[i]) / 255).abs().mean() < 0.03
        assert target["area"].tolist() == [150] * len(target["labels"])
        assert data.info(i)["file_name"] == f"my_img_comp_zlib[{i}]"
        masks += [*target["masks"].numpy()]
    assert np.array_equal(masks, assignment.masks)
    assert capsys.readouterr().out == "2 images kept that have no object\n"


def test_cis680_other_kinds_of_numbers(assignment):
    "Other types, byte orders, bool masks and 255 for 1."
    of_labels, of_boxes = ("u1", ">i4", "<i8", ">u2", "f4", "i2"), ("f8", ">f4", "i4", "<f8", "i2", ">i8")
    assignment.labels = [a.astype(t) for a, t in zip(assignment.labels, of_labels)]
    assignment.boxes = [a.astype(t) for a, t in zip(assignment.boxes, of_boxes)]
    assignment.masks = assignment.masks * np.uint8(255)
    data = assignment.save().run()
    assert [t["labels"].tolist() for _, t in data] == [a.tolist() for a in assignment.labels]
    assignment.masks = assignment.masks > 0
    assert torch.equal(assignment.save().run(overwrite=True)[3][1]["masks"], data[3][1]["masks"])


def test_cis680_takes_arrays_that_are_no_objects(assignment):
    "Every image has one object: NumPy then needs no pickle."
    assignment.images, assignment.masks = assignment.images[:2], assignment.masks[:2]
    assignment.labels, assignment.boxes = [np.array([1]), np.array([2])], [np.array([[5, 3, 20, 13]])] * 2
    assignment.save()
    np.save(assignment.file("labels"), np.stack(assignment.labels))
    np.save(assignment.file("bboxes"), np.stack(assignment.boxes))
    assert [t["labels"].tolist() for _, t in assignment.run()] == [[1], [2]]


def test_cis680_reads_masks_in_slices(assignment, monkeypatch):
    assignment.images = assignment.images[:1]
    assignment.masks = np.zeros((500, 30, 40), np.uint8)
    assignment.masks[:, 5:9, 5:9] = 1
    assignment.labels, assignment.boxes = [np.ones(500, int)], [np.array([[5., 5, 9, 9]] * 500)]
    assignment.save()
    largest, get = [0], h5py.Dataset.__getitem__
    def watch(table, key, **kwargs):
        rows = get(table, key, **kwargs)
        if table.file.filename.endswith("my_mask_comp_zlib.h5"): largest[0] = max(largest[0], len(rows))
        return rows
    monkeypatch.setattr(h5py.Dataset, "__getitem__", watch)
    assert len(assignment.run()[0][1]["labels"]) == 500 and 0 < largest[0] <= 128


def test_cis680_drops_and_says(assignment, capsys):
    assignment.masks[0] = 0
    assignment.boxes[2][1] = (9, 9, 9, 20)
    data = assignment.save().run()
    assert [len(t["labels"]) for _, t in data] == [0, 0, 1, 3, 0, 1]
    said = capsys.readouterr().out
    assert "1 objects dropped: an empty mask\n" in said
    assert "1 objects dropped: a box without area\n" in said
    assert "3 images kept" in said


def change(name, value): return lambda a: setattr(a, name, value(getattr(a, name)))


@pytest.mark.parametrize("spoil, message", [
    (change("labels", lambda v: v[:-1]),
     "my_img_comp_zlib.h5 has 6 images, my_labels_comp_zlib.npy has labels for 5 "
     "and my_bboxes_comp_zlib.npy boxes for 6"),
    (change("images", lambda v: v[:-1]),
     "my_img_comp_zlib.h5 has 5 images, my_labels_comp_zlib.npy has labels for 6"),
    (change("masks", lambda v: v[:-1]),
     "my_mask_comp_zlib.h5 has 6 masks, but my_labels_comp_zlib.npy has labels of 7 objects"),
    (change("masks", lambda v: v[:, :, :-1]),
     "my_mask_comp_zlib.h5: masks of \\(30, 39\\), but the images of my_img_comp_zlib.h5 are \\(30, 40\\)"),
    (change("images", lambda v: v.astype(np.float32)),
     "my_img_comp_zlib.h5: float32 of \\(6, 3, 30, 40\\), and not uint8 of \\(images, 3"),
    (change("masks", lambda v: v / 2),
     "my_mask_comp_zlib.h5: masks of float64: they must be yes or no, so store them as uint8"),
    (change("images", lambda v: v.transpose(0, 2, 3, 1)),
     "my_img_comp_zlib.h5: uint8 of \\(6, 30, 40, 3\\), and not uint8 of \\(images, 3"),
    (change("boxes", lambda v: [*v[:3], v[3][:2], *v[4:]]),
     "image 3: labels of \\(3,\\) in my_labels_comp_zlib.npy, "
     "but boxes of \\(2, 4\\) in my_bboxes_comp_zlib.npy"),
    (change("boxes", lambda v: [*v[:3], v[3].reshape(-1), *v[4:]]),
     "image 3: labels of \\(3,\\) in my_labels_comp_zlib.npy, "
     "but boxes of \\(12,\\) in my_bboxes_comp_zlib.npy"),
    (change("labels", lambda v: [*v[:3], v[3] + 1, *v[4:]]),
     "image 3 \\(my_img_comp_zlib\\[3\\]\\): label 4 is none of 1…3"),
    (change("labels", lambda v: [*v[:3], v[3] - 1, *v[4:]]),
     "image 3 \\(my_img_comp_zlib\\[3\\]\\): label 0 is none of 1…3")])
def test_cis680_contradictions_are_named(assignment, spoil, message):
    spoil(assignment)
    assignment.save().fails(message)


def test_cis680_file_faults(assignment):
    assignment.save()
    for kind in ("img", "mask"):
        whole = assignment.file(kind).read_bytes()
        assignment.file(kind).write_bytes(whole[:len(whole) // 2])
        assignment.fails(f"my_{kind}_comp_zlib.h5 is not a whole HDF5 file, fetch it again")
        with h5py.File(assignment.file(kind), "w") as f: f["images"] = [1]
        assignment.fails(f"my_{kind}_comp_zlib.h5 has no table 'data', only \\['images'\\]")
        assignment.file(kind).write_bytes(whole)
    with h5py.File(assignment.file("mask")) as f: where = f["data"].id.get_chunk_info(0).byte_offset
    data = bytearray(assignment.file("mask").read_bytes())
    data[where:where + 40] = b"?" * 40
    assignment.file("mask").write_bytes(data)
    assignment.fails("my_mask_comp_zlib.h5: rows 0 to 128 are damaged")
    for kind in ("labels", "bboxes"):
        whole = assignment.file(kind).read_bytes()
        for cut in (0, 5, 40, 130, len(whole) - 20):
            assignment.file(kind).write_bytes(whole[:cut])
            assignment.fails(f"my_{kind}_comp_zlib.npy is not a file of one array per image")
        assignment.file(kind).write_bytes(whole)
    (assignment.root / "other_img_comp_zlib.h5").touch()
    assignment.fails("there should be one file \\*_img_comp_zlib.h5, and there are 2", FileNotFoundError)
    for p in assignment.root.glob("*img*"): p.unlink()
    assignment.fails("there should be one file \\*_img_comp_zlib.h5, and there are 0", FileNotFoundError)


class Call:
    "Pickles as a call of `function`."
    def __init__(self, function, *args): self.call = function, args
    def __reduce__(self): return self.call


def hostile(canary):
    """Pickles that make a folder `canary` when they are loaded, each in another way.

    With each its name, and whether NumPy itself falls for it.
    """
    path, text = str(canary), repr(str(canary)).encode()
    array = lambda item: pickle.dumps(np.array([item, None], object))
    yield "a call in an array", array(Call(os.mkdir, path)), True
    oldest = pickle.dumps(np.array([Call(os.mkdir, path), None], object), 0)
    yield "the same in the oldest protocol", oldest, True
    yield "eval", array(Call(eval, f"__import__('os').mkdir({path!r})")), True
    yield "exec beside good arrays", array([np.ones(3), Call(exec, f"import os; os.mkdir({path!r})")]), True
    yield "no array at all", pickle.dumps(Call(os.mkdir, path)), True
    yield "the opcode INST", b"(S" + text + b"\nios\nmkdir\n.", True
    yield "the opcode OBJ", b"(cos\nmkdir\nS" + text + b"\no.", True
    yield "a module's attribute", b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93S" + text + b"\n\x85R.", True
    attribute = b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93S" + text + b"\n\x85R."
    yield "an attribute of what is known", attribute, False
    yield "other functions of NumPy", array(Call(np.load, path)), False
    yield "getattr on what is known", array(Call(getattr, np.ndarray, "tofile")), False
    yield "a codec", array(Call(__import__("_codecs").decode, b"x", "rot13")), False
    yield "a persistent name", b"P" + text + b"\n.", False
    yield "a registered extension", b"\x80\x02\x82\x01.", False


def test_no_pickle_runs_anything(assignment, tmp_path_factory):
    canary = tmp_path_factory.mktemp("canary") / "bird"
    assignment.save()
    whole = assignment.file("labels").read_bytes()
    for what, data, falls in hostile(canary):
        for kind in ("labels", "bboxes"):
            assignment.file(kind).write_bytes(b"")
            save_pickle(assignment.file(kind), data)
            if kind == "labels":
                assignment.fails("my_labels_comp_zlib.npy is not a file of one array per image")
            assert not canary.exists(), what
            assignment.file("labels").write_bytes(whole)
        if falls:                                           # that it is a real one
            try: np.load(assignment.file("bboxes"), allow_pickle=True)
            except Exception: pass
            assert canary.exists(), what
            canary.rmdir()
        assignment.fails("my_bboxes_comp_zlib.npy is not a file of one array per image")
        assert not canary.exists(), what


@pytest.mark.parametrize("kind", ["O", "O8", "V8", "M8", "U4", "S8", "c8", "i8,O", "notatype"])
def test_bytes_that_claim_to_be_something_else_are_refused(assignment, kind):
    "A dtype whose bytes would be addresses; NumPy's own loader trusts the flags that the file gives."
    class Kind:
        def __reduce__(self): return np.dtype, (kind, False, True), (3, "<", None, None, None, -1, -1, 0)
    class Array:
        def __reduce__(self):
            state = 1, (1,), Kind(), False, b"A" * 8
            return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state
    assignment.save()
    rows = np.empty(6, object)
    for i in range(6): rows[i] = Array()
    save_pickle(assignment.file("labels"), pickle.dumps(rows, 3), 6)
    assignment.fails("my_labels_comp_zlib.npy is not a file of one array per image: "
                     f"it has an array of {kind}, and not of numbers")


# ------------------------------------------------------------------------------------------- folders of masks

class Photos:
    "a.jpg of 40 × 30 with two objects, b.png of 20 × 20 with none."
    def __init__(self, root):
        self.root, rng = root, np.random.default_rng(0)
        for name in ("photos", "masks", "out"): (root / name).mkdir()
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(root / "photos/a.jpg")
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(root / "photos/b.png")
        (root / "photos/Thumbs.db").touch()
        self.numbers = np.zeros((30, 40), np.uint8)
        self.numbers[2:9, 3:11], self.numbers[15:30, 20:40] = 1, 2
        self.save("a_mask.png", self.numbers)
        self.save("b.png", np.zeros((20, 20), np.uint8))

    def save(self, name, numbers, mode=None):
        image = Image.fromarray(numbers)
        (self.root / "masks" / name).parent.mkdir(exist_ok=True)
        (image.convert(mode) if mode else image).save(self.root / "masks" / name)

    def run(self, **kwargs):
        return InstanceDataset(import_mask_folder(
            self.root / "out/o.h5", self.root / "photos", self.root / "masks", overwrite=True, **kwargs))

    def fails(self, message, error=ValueError, **kwargs):
        with pytest.raises(error, match=message): self.run(**kwargs)
        assert nothing_new(self.root / "out", [])


@pytest.fixture
def folders(tmp_path): return Photos(tmp_path)


def test_mask_folder_comes_in(folders, capsys):
    data = folders.run(classes=["pedestrian"])
    assert data.classes == ["pedestrian"]
    assert [data.info(i)["file_name"] for i in (0, 1)] == ["a.jpg", "b.png"]
    _, target = data[0]
    assert target["boxes"].tolist() == [[3, 2, 11, 9], [20, 15, 40, 30]]
    assert target["area"].tolist() == [56, 300]
    assert all(np.array_equal(m.numpy(), folders.numbers == k) for k, m in enumerate(target["masks"], 1))
    assert len(data[1][1]["labels"]) == 0 and capsys.readouterr().out == "1 images kept that have no object\n"
    with h5py.File(data.path) as f:
        for row, name in zip(f["images"], ("a.jpg", "b.png")):
            stored = f["image_bytes"][slice(*row["data"])].tobytes()
            assert stored == (folders.root / "photos" / name).read_bytes()
    assert folders.run().classes == ["object"]


@pytest.mark.parametrize("mode", ["P", "L", "I;16"])
def test_mask_folder_takes_every_picture_of_numbers(folders, mode):
    kind, scale = (np.uint16, 1000) if mode == "I;16" else (np.uint8, 7)
    numbers = folders.numbers.astype(kind) * scale
    image = Image.fromarray(numbers)
    if mode == "P":
        image.putpalette([c for i in range(256) for c in (i * 37 % 256, i * 91 % 256, i * 11 % 256)])
    assert image.mode.startswith(mode)
    image.save(folders.root / "masks/a_mask.png")
    assert folders.run()[0][1]["area"].tolist() == [56, 300]


def test_mask_folder_of_one_black_and_white_object(folders):
    Image.fromarray(folders.numbers > 0).save(folders.root / "masks/a_mask.png")
    target = folders.run()[0][1]
    assert target["area"].tolist() == [356] and target["boxes"].tolist() == [[3, 2, 40, 30]]


def test_mask_folder_of_several_classes(folders):
    for name in ("a_mask.png", "b.png"): (folders.root / "masks" / name).unlink()
    folders.save("dog/a.png", (folders.numbers == 2).astype(np.uint8))
    folders.save("cat/a_mask.png", (folders.numbers == 1).astype(np.uint8) * 9)
    folders.save("cat/b.png", np.zeros((20, 20), np.uint8))
    target = folders.run(classes=["cat", "dog"])[0][1]
    assert target["labels"].tolist() == [1, 2] and target["area"].tolist() == [56, 300]


def cut(path, length): path.write_bytes(path.read_bytes()[:length])


def copy(old, new): new.write_bytes(old.read_bytes())


@pytest.mark.parametrize("spoil, message", [
    (lambda f: f.save("a_mask.png", f.numbers, "RGB"), "a_mask.png: a mask in colours \\(RGB\\)"),
    (lambda f: f.save("a_mask.png", f.numbers, "RGBA"), "a_mask.png: a mask in colours \\(RGBA\\)"),
    (lambda f: f.save("a_mask.png", f.numbers.T.copy()),
     "a_mask.png: the mask has \\(30, 40\\) pixels, its photo \\(40, 30\\)"),
    (lambda f: cut(f.root / "masks/a_mask.png", 60), "a_mask.png: the mask is damaged"),
    (lambda f: cut(f.root / "photos/a.jpg", 300), "a.jpg: the image is damaged"),
    (lambda f: f.save("c_mask.png", f.numbers),
     "c_mask.png: no photo in .*photos has this name, with or without _mask"),
    (lambda f: copy(f.root / "photos/b.png", f.root / "photos/a.png"),
     "a.png and a.jpg would have the same mask")])
def test_mask_folder_faults_are_named(folders, spoil, message):
    spoil(folders)
    folders.fails(message)


def test_mask_folder_missing_things(folders):
    (folders.root / "masks/b.png").unlink()
    folders.fails(
        "b.png: no b_mask.png or b.png in .*masks; if there is no object on it, its mask is all 0",
        FileNotFoundError)
    folders.fails("cat: there is no such folder", FileNotFoundError, classes=["cat", "dog"])
    for p in (folders.root / "photos").iterdir(): p.unlink()
    folders.fails("photos: no photos in this folder", FileNotFoundError)


def test_mask_folder_refuses_fractions_twins_and_turned_photos(folders):
    Image.fromarray(folders.numbers / np.float32(2)).save(folders.root / "masks/a_mask.png", "TIFF")
    folders.fails("a_mask.png: a mask of fractions: .*save it with numpy's uint8 or uint16")
    folders.save("a_mask.png", folders.numbers)
    folders.save("disc/a.png", folders.numbers)
    folders.save("disc/b.png", np.zeros((20, 20), np.uint8))
    folders.fails("classes \\['disc', 'disc'\\]: \\['disc'\\] is there twice", classes=["disc", "disc"])
    folders.save("a_mask.png", folders.numbers.T.copy())
    folders.fails("do the photo's EXIF notes turn it\\? Then save it upright")


# ----------------------------------------------------------------------------------- a picture of each object

def nuclei(root, layout):
    "Two photos a.png and a_b.png with two objects and one, in one of the layouts; where their masks lie."
    rng = np.random.default_rng(0)
    for name, n in (("a", 2), ("a_b", 1)):
        photo = Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8))
        place = root / ("all/{0}/images" if layout == "nuclei" else "photos").format(name)
        place.mkdir(parents=True, exist_ok=True)
        photo.save(place / f"{name}.png")
        for k in range(n):
            mask = np.zeros((20, 30), np.uint8)
            mask[2 + k:12, 3:10 + k] = 255 - k              # they overlap, as single pictures can
            file = {"nuclei": f"all/{name}/masks/{k}.png", "folders": f"masks/{name}/{k}.png",
                    "names": f"masks/{name}_{k}.png"}[layout]
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(root / file)
    return (root / "all", None) if layout == "nuclei" else (root / "photos", root / "masks")


@pytest.mark.parametrize("layout", ["nuclei", "folders", "names"])
def test_a_picture_of_each_object_comes_in(tmp_path, layout, capsys):
    images, masks = nuclei(tmp_path, layout)
    words = ["import", "objects", str(tmp_path / "o.h5"), "--images", str(images), "--classes", "nucleus"]
    assert main([*words, *(["--masks", str(masks)] if masks else [])]) == 0
    assert "o.h5 is written" in capsys.readouterr().out
    data = InstanceDataset(tmp_path / "o.h5")
    assert data.classes == ["nucleus"] and len(data) == 2
    boxes = {data.info(i)["file_name"]: target["boxes"].tolist() for i, (_, target) in enumerate(data)}
    assert boxes == {"a.png": [[3, 2, 10, 12], [3, 3, 11, 12]], "a_b.png": [[3, 2, 10, 12]]}


def test_masks_of_objects_without_a_partner_are_named(tmp_path):
    def fails(message, error=ValueError, **kwargs):
        with pytest.raises(error, match=message):
            import_object_masks(tmp_path / "o.h5", tmp_path / "photos", tmp_path / "masks", **kwargs)
        assert not (tmp_path / "o.h5").exists()
    nuclei(tmp_path, "names")
    fails("photos: no photos in|cat: there is no such folder", FileNotFoundError, classes=["cat", "dog"])
    (tmp_path / "masks/a_b_0.png").rename(tmp_path / "masks/a_9.png")
    fails("a_b.png: no mask in .*masks; .*give it one that is all 0", FileNotFoundError)
    Image.new("L", (30, 20)).save(tmp_path / "masks/a_b_0.png")
    data = InstanceDataset(import_object_masks(tmp_path / "o.h5", tmp_path / "photos", tmp_path / "masks"))
    assert [len(target["labels"]) for _, target in data] == [3, 0]
    (tmp_path / "o.h5").unlink()
    (tmp_path / "masks/a_9.png").rename(tmp_path / "masks/c_9.png")
    fails("c_9.png: no photo has the name of its folder, or begins its name")


# --------------------------------------------------------------------------------- a text file for each photo

CORNERS = [(10, 20), (30, 20), (30, 45), (10, 45)]
VOC = """<annotation><size><width>{w}</width><height>{h}</height></size>
<object><name>cat</name><difficult>{difficult}</difficult>
<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>30</xmax><ymax>45</ymax></bndbox></object></annotation>"""


def labelme(*shapes, w=100, h=80):
    shapes = [dict(label=label, shape_type=kind, group_id=group, points=points)
              for label, kind, group, points in shapes]
    return json.dumps(dict(imagePath="a.png", imageWidth=w, imageHeight=h, shapes=shapes))


def yolo(points, number=0): return " ".join([str(number), *(f"{x / 100} {y / 80}" for x, y in points)])


FORMATS = {"yolo": (".txt", yolo(CORNERS, 0)), "voc": (".xml", VOC.format(w=100, h=80, difficult=0)),
           "labelme": (".json", labelme(("cat", "polygon", None, CORNERS)))}


class Notes:
    "A photo a.png of 100 × 80 with one object, in one of the formats; `text` may be replaced."
    def __init__(self, root, format):
        self.root, self.format, (self.ending, text) = root, format, FORMATS[format]
        (root / "in").mkdir(exist_ok=True)
        Image.new("RGB", (100, 80)).save(root / "in/a.png")
        self.write(text)

    def write(self, text, name="a"): (self.root / f"in/{name}{self.ending}").write_text(text)

    def run(self, classes=("cat",), **kwargs):
        return InstanceDataset(import_folder(
            self.root / "o.h5", self.format, self.root / "in", classes=list(classes or []),
            overwrite=True, **kwargs))

    def fails(self, message, error=ValueError, **kwargs):
        with pytest.raises(error, match=message): self.run(**kwargs)
        assert not (self.root / "o.h5").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_notes_beside_photos_come_in(tmp_path, format, capsys):
    notes = Notes(tmp_path, format)
    for classes in ([], ["--classes", "cat"]):
        words = ["import", format, str(tmp_path / "o.h5"), "--images", str(tmp_path / "in"), "--overwrite"]
        assert (main([*words, *classes]) == 0) == (format != "yolo" or bool(classes))
    assert "o.h5 is written" in capsys.readouterr().out
    data = notes.run()
    assert data.classes == ["cat"] and data.has_masks == (format != "voc")
    assert torch.allclose(data[0][1]["boxes"], torch.tensor([[10., 20, 30, 45]]))
    if data.has_masks:
        rle = coco_mask.merge(coco_mask.frPyObjects([[c for p in CORNERS for c in p]], 80, 100))
        assert np.array_equal(data[0][1]["masks"][0], coco_mask.decode(rle)) and coco_mask.area(rle) == 500


@pytest.mark.parametrize("format", FORMATS)
def test_notes_agree_with_supervision_on_boxes_and_labels(tmp_path, format):
    """Its masks hold what lies under the polygon's line, too: so we do not use it.

    A disc 14 pixels wide, of area 154, has 174 pixels there and 153 here.
    """
    supervision = pytest.importorskip("supervision")
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    disc = np.stack([50.3 + 7 * np.cos(angle), 40.2 + 7 * np.sin(angle)], 1).tolist()
    notes = Notes(tmp_path, format)
    if format == "yolo": notes.write(f"{yolo(disc, 1)}\n{yolo(CORNERS, 0)}\n")
    if format == "labelme":
        notes.write(labelme(("dog", "polygon", None, disc), ("cat", "polygon", None, CORNERS)))
    place, names = str(tmp_path / "in"), ["cat", "dog"][:1 if format == "voc" else 2]
    (tmp_path / "data.yaml").write_text(f"names: {json.dumps(names)}\n")
    names_file = [str(tmp_path / "data.yaml")] if format == "yolo" else []
    reader = f"from_{'pascal_voc' if format == 'voc' else format}"
    _, _, found = getattr(supervision.DetectionDataset, reader)(place, place, *names_file)[0]
    _, target = notes.run(classes=names)[0]
    assert np.allclose(target["boxes"], found.xyxy, atol=1e-4)
    assert target["labels"].tolist() == (found.class_id + 1).tolist()
    if format == "voc": return
    assert [found.mask[0].sum(), target["masks"][0].sum()] == [174, 153]


def test_yolo_boxes_scores_float_numbers_and_photos_without_a_file(tmp_path, capsys):
    notes = Notes(tmp_path, "yolo")
    notes.write("1 0.5 0.5 0.2 0.5\n\n0.0 0.25 0.25 0.1 0.1 0.93\n")
    notes.write("cat\ndog\n", "classes")
    Image.new("RGB", (100, 80)).save(tmp_path / "in/b.png")
    data = notes.run(classes=["cat", "dog"])
    assert torch.allclose(data[0][1]["boxes"], torch.tensor([[40., 20, 60, 60], [20, 16, 30, 24]]))
    assert data[0][1]["labels"].tolist() == [2, 1] and not data.has_masks and len(data[1][1]["labels"]) == 0
    assert "1 images kept that have no object" in capsys.readouterr().out


def test_folders_of_a_split_and_a_size(tmp_path):
    for split, number in (("train", 0), ("val", 1)):
        (tmp_path / "labels" / split).mkdir(parents=True)
        (tmp_path / "images" / split).mkdir(parents=True)
        Image.new("RGB", (100, 80)).save(tmp_path / "images" / split / "a.png")
        (tmp_path / "labels" / split / "a.txt").write_text(yolo(CORNERS, number))
    path = import_folder(
        tmp_path / "o.h5", "yolo", tmp_path / "images", tmp_path / "labels", ["cat", "dog"], (50, 40))
    train, val = (InstanceDataset(path, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1, 1) and val[0][1]["labels"].tolist() == [2]
    assert train[0][1]["boxes"].tolist() == [[5, 10, 15, 22]] and train[0][0].shape == (3, 40, 50)


def test_labelme_groups_rectangles_and_difficult_objects_of_voc(tmp_path):
    notes = Notes(tmp_path, "labelme")
    second = [(60, 20), (70, 20), (70, 30), (60, 30)]
    notes.write(labelme(("cat", "polygon", 1, CORNERS), ("cat", "polygon", 1, second),
                        ("dog", "polygon", 1, second)))
    data = notes.run(classes=None)
    assert data.classes == ["cat", "dog"]
    assert data[0][1]["boxes"].tolist() == [[10, 20, 70, 45], [60, 20, 70, 30]]
    assert data[0][1]["area"].tolist() == [600, 100]
    notes.write(labelme(("cat", "rectangle", None, [(30, 45), (10, 20)])))
    data = notes.run()
    assert data[0][1]["boxes"].tolist() == [[10, 20, 30, 45]] and not data.has_masks
    (tmp_path / "voc").mkdir()
    hard = Notes(tmp_path / "voc", "voc")
    hard.write(VOC.format(w=100, h=80, difficult=1))
    assert hard.run()[0][1]["iscrowd"].tolist() == [1]


@pytest.mark.parametrize("format, text, message", [
    ("yolo", "2 0.5 0.5 0.1 0.1", "a.txt, object 1: ValueError: class 2 is none of 0…0"),
    ("yolo", "0 0.5 0.5 0.1 0.1\n0 50 50 10 10", "a.txt, object 2: .*shares of the photo's width and height"),
    ("yolo", "0 0.5 0.5", "a.txt, object 1: .*2 numbers are neither x y w h nor the corners"),
    ("yolo", "cat 0.5 0.5 0.1 0.1", "a.txt, object 1: ValueError: could not convert string to float: 'cat'"),
    ("yolo", "0 nan 0.5 0.1 0.1", "a.txt, object 1: .*shares of"),
    ("voc", "<annotation><object>", "a.xml: ParseError: no element found"),
    ("voc", "<annotation><object><name>cat</name></object></annotation>",
     "a.xml, object 1: ValueError: could not convert string to float: 'nothing'"),
    ("voc", VOC.format(w=100, h=80, difficult=0).replace("<name>cat</name>", ""),
     "a.xml, object 1: ValueError: it has no name of a class"),
    ("voc", VOC.format(w=50, h=40, difficult=0),
     "a.png, image 1: the photo has \\(100, 80\\) pixels, and the annotations say \\(50, 40\\)$"),
    ("labelme", "{", "a.json: JSONDecodeError"),
    ("labelme", "[]", "a.json: TypeError"),
    ("labelme", labelme(("cat", "circle", None, CORNERS[:2])),
     "a.json, object 1: ValueError: it is drawn as circle: draw polygons, or one rectangle"),
    ("labelme", labelme(("cat", "polygon", None, CORNERS), ("cat", "rectangle", None, CORNERS[::2])),
     "annotation 2 of image 1: it has no segmentation, but 1 others have one")])
def test_faults_of_notes_are_named(tmp_path, format, text, message):
    notes = Notes(tmp_path, format)
    notes.write(text)
    notes.fails(message)


def test_notes_and_photos_without_a_partner(tmp_path):
    notes = Notes(tmp_path, "voc")
    notes.write(VOC, "b")
    notes.fails("b.xml: no photo in .*in has this name")
    (tmp_path / "in/b.xml").unlink()
    Image.new("RGB", (9, 9)).save(tmp_path / "in/b.png")
    notes.fails("b.png: no b.xml in .*in; if there is no object on it, save one without objects",
                FileNotFoundError)
    notes.fails("none: there is no such folder", FileNotFoundError, labels=tmp_path / "none")
    notes.format = "yolo"
    notes.fails("in: no .txt files in this folder", FileNotFoundError)
    notes.fails("give their names, in the order of the numbers", classes=None)
    notes.format = "coco"
    notes.fails("format 'coco' is none of")


# ------------------------------------------------------------------------------------- COCO: what is refused

class Coco:
    "A photo p/1.png with one square, and its COCO file; `said` is the line that an import ends in."
    def __init__(self, root, capsys):
        self.root, self.capsys = root, capsys
        (root / "p").mkdir()
        Image.new("RGB", (40, 30)).save(root / "p/1.png")
        Image.new("RGB", (40, 30)).save(root / "outside.png")

    def said(self, changes=None, annotation=None, *words):
        coco = dict(images=[dict(id=1, file_name="1.png", width=40, height=30)],
                    categories=[dict(id=1, name="disc")],
                    annotations=[dict(id=5, image_id=1, category_id=1, bbox=[5, 5, 10, 10], area=100,
                                      segmentation=[[5, 5, 15, 5, 15, 15, 5, 15]])])
        coco["annotations"][0].update(annotation or {})
        if changes: coco = changes(coco) or coco
        (self.root / "a.json").write_text(json.dumps(coco))
        before = sorted(self.root.rglob("*"))
        status = main(["import", "coco", str(self.root / "o.h5"), "--train", str(self.root / "a.json"),
                       "--images", str(self.root / "p"), *words])
        text = self.capsys.readouterr().err
        assert status == 1 and text.startswith("maskrcnn-course: ") and text.count("\n") == 1
        assert sorted(self.root.rglob("*")) == before
        return text


@pytest.fixture
def coco(tmp_path, capsys): return Coco(tmp_path, capsys)


@pytest.mark.parametrize("changes, message", [
    (lambda c: c["annotations"], "a.json holds a list, and a COCO file of instances is {"),
    (lambda c: c["images"][0].pop("file_name") and None, "a.json: file_name of images[0] (id 1) is None"),
    (lambda c: c.update(categories=None), "a.json: categories is None, and should be a list"),
    (lambda c: c.update(categories=["disc"]), "a.json: categories[0] is disc, and should be an object"),
    (lambda c: c["categories"][0].update(name=7), "name of categories[0] (id 1) is 7, and should be text"),
    (lambda c: c["images"][0].update(id="x"), "id of images[0] (id x) is x, and should be a whole number"),
    (lambda c: c["annotations"][0].update(image_id=[1]), "image_id of annotations[0] (id 5) is [1]"),
    (lambda c: c["images"][0].update(file_name="../outside.png"), "1: the photo lies outside of")])
def test_a_broken_coco_file_ends_in_one_line(coco, changes, message): assert message in coco.said(changes)


@pytest.mark.parametrize("annotation, message", [
    (dict(bbox="5 5 10 10"), "the bbox is '5 5 10 10', and should be [x, y, width, height]"),
    (dict(bbox=None), "the bbox is None, and should be [x, y, width, height]"),
    (dict(bbox=[5, 5, "wide", 10]), "and should be [x, y, width, height]"),
    (dict(bbox=[5, 5, float("inf"), 10]), "is not finite"),
    (dict(segmentation="polygon"), "the segmentation is 'polygon', and should be a list of polygons"),
    (dict(segmentation=[5, 5, 15, 5, 15, 15]), "a segmentation should be a list of polygons"),
    (dict(segmentation=dict(size=[30, 40])), "or run lengths, {size: [height, width], counts: "),
    (dict(segmentation=dict(size=[30, 40], counts=[5, -5, 1200])), "a run length below 0")])
def test_a_broken_annotation_is_named(coco, annotation, message):
    said = coco.said(None, annotation)
    assert "a.json, annotation 5 of image 1 (1.png): " in said and message in said


def test_words_that_make_no_sense_for_coco(coco):
    for size in ("99999999x99999999", "0x9"):
        assert f"--size {size}: give from 1 to 8192" in coco.said(None, None, "--size", size)
    assert "['disc'] is there twice" in coco.said(None, None, "--classes", "disc", "disc")
    assert "--groups a=disc: a is there twice" in coco.said(None, None, "--groups", "a=disc", "a=disc")


def test_a_photo_that_exif_turns_is_refused_with_the_reason(coco):
    exif = Image.Exif()
    for orientation, turned in ((6, True), (3, False)):
        exif[ExifTags.Base.Orientation] = orientation
        Image.new("RGB", (30, 40)).save(coco.root / "p/1.png", exif=exif)
        said = coco.said()
        assert "the photo has (30, 40) pixels, and the annotations say (40, 30)" in said
        assert ("its EXIF notes say that it is to be turned" in said) == turned
        assert ("save it upright, as PIL.ImageOps.exif_transpose" in said) == turned
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (80, 100)).save(coco.root / "p/1.png", exif=exif)   # shown as 100 × 80
    (coco.root / "p/1.txt").write_text(yolo(CORNERS))
    with pytest.raises(ValueError, match="its EXIF notes say that it is to be turned"):
        import_folder(coco.root / "o.h5", "yolo", coco.root / "p", classes=["cat"])


# ---------------------------------------------------------------------------------------- boxes without masks

@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    "A folder with a few scenes: photos, a COCO file of boxes alone, and the data set made of it."
    folder = tmp_path_factory.mktemp("boxes")
    data = InstanceDataset(write_scenes(folder / "s.h5", n=12, val=4, size=(64, 64), instances=(1, 2)))
    coco = data.coco()
    for a in coco["annotations"]: del a["segmentation"]
    for i, image in enumerate(coco["images"]):
        image["file_name"] = f"{i}.png"
        Image.fromarray((data[i][0] * 255).round().byte().permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    (folder / "boxes.json").write_text(json.dumps(coco))
    import_coco(folder / "boxes.h5", folder / "boxes.json", folder)
    return folder


def test_boxes_come_in_without_masks(boxes):
    data, source = InstanceDataset(boxes / "boxes.h5"), InstanceDataset(boxes / "s.h5")
    for (_, target), (_, before) in zip(data, source):
        assert "masks" not in target
        assert torch.equal(target["boxes"], before["boxes"])
        assert torch.equal(target["area"], before["area"])
    assert not data.has_masks and pad_targets([data[0][1]])["masks"] is None
    assert data.coco()["annotations"][0]["bbox"] == source.coco()["annotations"][0]["bbox"]
    with h5py.File(boxes / "boxes.h5") as f: assert not f.attrs["masks"] and len(f["rle_bytes"]) == 0
    with h5py.File(boxes / "s.h5", "r") as f: assert f.attrs["masks"]


def test_files_from_before_boxes_alone_have_masks(boxes, tmp_path):
    (tmp_path / "old.h5").write_bytes((boxes / "s.h5").read_bytes())
    with h5py.File(tmp_path / "old.h5", "r+") as f: del f.attrs["masks"]
    assert InstanceDataset(tmp_path / "old.h5").has_masks
    assert "masks" in InstanceDataset(tmp_path / "old.h5")[0][1]


@pytest.mark.parametrize("absent", [{}, {"segmentation": None}, {"segmentation": []}])
def test_all_annotations_without_masks_in_any_spelling(boxes, tmp_path, absent, capsys):
    coco = json.loads((boxes / "boxes.json").read_text())
    for a in coco["annotations"]: a.update(absent)
    coco["annotations"][0]["bbox"] = [70, 5, 9, 9]
    coco["annotations"][1]["bbox"] = [5, 5, 0, 9]
    (tmp_path / "a.json").write_text(json.dumps(coco))
    data = InstanceDataset(import_coco(tmp_path / "a.h5", tmp_path / "a.json", boxes, size=(32, 16)))
    said = capsys.readouterr().out
    assert not data.has_masks
    assert "boxes alone" in said
    assert "a box outside of the image" in said
    assert "a box without area" in said
    x, y, w, h = coco["annotations"][-1]["bbox"]
    resized = torch.tensor([x / 2, y / 4, (x + w) / 2, (y + h) / 4])
    assert torch.allclose(data[len(data) - 1][1]["boxes"][-1], resized)


def test_masks_for_some_are_refused(boxes, tmp_path):
    coco = json.loads((boxes / "boxes.json").read_text())
    coco["annotations"][3]["segmentation"] = [[1, 1, 9, 1, 9, 9]]
    (tmp_path / "a.json").write_text(json.dumps(coco))
    message = "a.json, annotation 1 of image .*: it has no segmentation, but 1 others have one"
    with pytest.raises(ValueError, match=message):
        import_coco(tmp_path / "a.h5", tmp_path / "a.json", boxes)
    mask = np.ones((8, 8), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    rows = [dict(label=1, box=(0, 0, 8, 8), area=64, iscrowd=0, rle=rle) for rle in (encode_mask(mask), b"")]
    examples = [dict(image=buffer.getvalue(), width=8, height=8, id=i, file_name=f"{i}.png",
                     split="train", instances=[row]) for i, row in enumerate(rows)]
    message = "image 1 \\(1.png\\): some objects have a mask and others have none"
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path / "a.h5", ["a"], examples, "x")
    assert nothing_new(tmp_path, ["a.json"])


def test_the_model_says_what_it_needs_masks_for():
    model = build_model("tiny")
    image = torch.rand(3, 64, 64)
    target = dict(boxes=torch.tensor([[5., 5, 30, 40]]), labels=torch.tensor([2]))
    batch = model.prepare([image], [target])
    features = model.backbone(batch.images)
    output = model.rpn(features, batch.image_size)
    proposals = model.rpn.filter_proposals(output, batch.sizes, train=True)
    samples = model.roi_heads.select_training_samples(proposals, batch.targets)
    losses = model.rpn.losses(features, output, batch.targets["boxes"], batch.targets["valid"])
    losses |= model.roi_heads.box_losses(features, samples, batch)
    assert len(losses) == 4
    assert all(loss.isfinite() for loss in losses.values())
    assert set(batch.targets) == {"boxes", "labels", "valid"}
    with pytest.raises(ValueError, match="boxes but no masks"): model([image], [target])
    drawn = {**target, "masks": torch.ones(1, 64, 64, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="some of these targets have masks and others have none"):
        model([image] * 2, [target, drawn])
    with pytest.raises(ValueError, match="target 0 has 1 boxes, 1 labels and 2 masks"):
        model([image], [{**drawn, "masks": torch.ones(2, 64, 64)}])
    with pytest.raises(ValueError, match="target 0 has no \\['labels'\\]"):
        model([image], [{"boxes": target["boxes"]}])


@pytest.mark.parametrize("stages", [("rpn", "box", "mask"), ("mask",), ("joint",)])
def test_training_says_at_once_that_masks_are_missing(boxes, tmp_path, stages):
    with pytest.raises(ValueError, match="boxes.h5 has boxes but no masks, .*: train the stages rpn and box"):
        train(boxes / "boxes.h5", tmp_path / "run", stages, "tiny")
    assert nothing_new(tmp_path, [])


def test_boxes_alone_from_training_to_report(boxes, tmp_path, capsys):
    run = ["train", str(boxes / "boxes.h5"), "--out", str(tmp_path / "run"),
           "--preset", "tiny", "--epochs", "1"]
    assert main(run) == 1 and "--stages rpn box" in capsys.readouterr().err and nothing_new(tmp_path, [])
    assert main([*run, "--stages", "rpn", "box"]) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    history = json.loads((tmp_path / "run/history.json").read_text())
    assert "bbox" in metrics and "segm" not in metrics and [h["stage"] for h in history] == ["rpn", "box"]
    assert set(history[0]["train"]) == {"loss_objectness", "loss_rpn_box_reg"}
    assert set(history[1]["val"]) == {"loss_classifier", "loss_box_reg"}
    page = (tmp_path / "run/report.html").read_text()
    assert "box AP50" in page and "mask AP50" not in page and "</b> Masks" not in page
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--out", str(tmp_path / "r.json")]) == 0
    first = capsys.readouterr().out.splitlines()[-4:]
    assert main(["evaluate", "--results", str(tmp_path / "r.json"), str(boxes / "boxes.h5")]) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == first
    assert not any("segmentation" in row for row in json.loads((tmp_path / "r.json").read_text()))


# ------------------------------------------------------------------------------------------------ the command

def test_import_commands(folders, tmp_path_factory, capsys):
    root = tmp_path_factory.mktemp("assignment")
    Assignment(root).save()
    out = folders.root / "out"
    assert main(["import", "cis680", str(out / "c.h5"), str(root)]) == 0
    photos, masks = str(folders.root / "photos"), str(folders.root / "masks")
    folders_of = ["--images", photos, "--masks", masks]
    assert main(["import", "masks", str(out / "m.h5"), *folders_of, "--classes", "dog"]) == 0
    assert len(InstanceDataset(out / "c.h5")) == 6 and InstanceDataset(out / "m.h5").classes == ["dog"]
    capsys.readouterr()
    assert main(["import"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("coco", "masks", "cis680"))
    wrong = [
        (["cis680", out / "c.h5", root], "c.h5 exists: choose another name, or add --overwrite"),
        (["cis680", out / "x.h5", out], "there should be one file *_img_comp_zlib.h5, and there are 0"),
        (["masks", out / "x.h5", "--images", out, "--masks", out], "out: no photos in this folder"),
        (["masks", out / "x.h5"], "the following arguments are required: --images, --masks"),
        (["film", out / "x.h5"], "invalid choice: 'film'"),
    ]
    for words, message in wrong:
        assert main(["import", *map(str, words)]) in (1, 2)
        said = capsys.readouterr().err
        assert said.startswith("maskrcnn-course: ") and message in said and said.count("\n") == 1
    assert nothing_new(out, ["c.h5", "m.h5"])


@pytest.mark.parametrize("kind", ["coco", "masks", "cis680"])
def test_import_help_has_an_example(kind, capsys):
    with pytest.raises(SystemExit) as e: main(["import", kind, "--help"])
    assert e.value.code == 0
    assert f"Example: maskrcnn-course import {kind}" in " ".join(capsys.readouterr().out.split())
