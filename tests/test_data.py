"The container, its readers in worker processes, and COCO imports: faults and what a notebook cannot hold."
import hashlib, io, json, os, pickle, signal, subprocess, sys, weakref
from pathlib import Path
import h5py, numpy as np, pytest, torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from maskrcnn_course.data import (FORMAT, InstanceDataset, collate, decode_mask, encode_mask, pad_images,
                                  pad_targets, write_dataset)
from maskrcnn_course.importers import import_coco
from maskrcnn_course.scenes import write_scenes


def encoded(array, kind="PNG", **kwargs):
    buffer = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(buffer, kind, **kwargs)
    return buffer.getvalue()


def instance(mask, label=1, iscrowd=0):
    ys, xs = np.nonzero(mask)
    box = (float(xs.min()), float(ys.min()), float(xs.max()) + 1, float(ys.max()) + 1)
    return dict(label=label, box=box, area=float(mask.sum()), iscrowd=iscrowd, rle=encode_mask(mask))


def example(i, split="train", **changes):
    "Noise of odd sizes with i % 4 rectangles, the third of them a crowd."
    rng = np.random.default_rng(i)
    h, w = 40 + i % 3, 60
    masks = np.zeros((i % 4, h, w), bool)
    for j, m in enumerate(masks): m[5:20 + j, 3 + j:30] = True
    image = encoded(rng.integers(0, 255, (h, w, 3), dtype=np.uint8))
    instances = [instance(m, 1 + j % 2, int(j == 2)) for j, m in enumerate(masks)]
    plain = dict(image=image, width=w, height=h, id=100 + i, file_name=f"{i}.png",
                 split=split, instances=instances)
    return plain | changes


def examples(n):
    return (example(i, "val" if i % 5 == 0 else "train", license="CC BY", url=f"http://x/{i}")
            for i in range(n))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "d.h5", ["cat", "dög"], examples(150), "a test")


# ---------------------------------------------------------------------------------------------- the container

def test_round_trip(path):
    data = InstanceDataset(path)
    assert (len(data), data.classes, data.num_classes, data.path) == (150, ["cat", "dög"], 3, path)
    assert data.image_ids == list(range(100, 250))
    for i in (0, 1, 63, 64, 65, 127, 149):          # on both sides of the batches of 64
        e, (image, target) = example(i), data[i]
        stored = np.array(Image.open(io.BytesIO(e["image"])))
        assert torch.equal((image * 255).round().byte(), torch.from_numpy(stored).permute(2, 0, 1))
        assert target["boxes"].tolist() == [list(r["box"]) for r in e["instances"]]
        assert target["labels"].tolist() == [r["label"] for r in e["instances"]]
        assert target["iscrowd"].tolist() == [r["iscrowd"] for r in e["instances"]]
        assert [encode_mask(m) for m in target["masks"]] == [r["rle"] for r in e["instances"]]
        types = {k: v.dtype for k, v in target.items() if k != "image_id"}
        assert types == dict(boxes=torch.float32, labels=torch.int64, masks=torch.uint8,
                             area=torch.float32, iscrowd=torch.int64)
        assert type(target["image_id"]) is int and target["image_id"] == 100 + i
        assert data.info(i) == dict(id=100 + i, file_name=f"{i}.png", width=60, height=40 + i % 3,
                                    split="val" if i % 5 == 0 else "train",
                                    license="CC BY", url=f"http://x/{i}")


def test_image_bytes_are_kept_and_nothing_is_pickled(path):
    with h5py.File(path) as f:
        assert set(f) == {"images", "instances", "image_bytes", "rle_bytes"}
        for i in (0, 70, 149):
            assert f["image_bytes"][slice(*f["images"][i]["data"])].tobytes() == example(i)["image"]
        assert f["instances"]["image"].tolist() == [i for i in range(150) for _ in range(i % 4)]
        assert f.attrs["format"] == FORMAT and json.loads(f.attrs["classes"]) == ["cat", "dög"]


def test_readme_example(path, tmp_path, monkeypatch, capsys):
    "The lines of data/README.md read a file."
    text = (Path(__file__).parents[1] / "data/README.md").read_text(encoding="utf-8")
    code = next(block for block in text.split("```python\n")[1:] if "import io" in block).split("```")[0]
    write_dataset(tmp_path / "data/scenes.h5", ["a", "b"], [example(2)], "x")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("a ") and lines[0].endswith(str(15 * 27))


def test_streaming_holds_few_examples(tmp_path):
    "While the last example is made, the first ones are gone."
    class Row(dict): __hash__ = object.__hash__
    alive, peak = weakref.WeakSet(), 0
    def stream():
        nonlocal peak
        for i in range(300):
            row = Row(example(i))
            alive.add(row)
            peak = max(peak, len(alive))
            yield row
    write_dataset(tmp_path / "d.h5", ["a", "b"], stream(), "x")
    assert peak <= 2 * 64 + 2


@pytest.mark.parametrize("changes, message", [
    (dict(instances=[dict(label=3, box=(0, 0, 1, 1), area=1, iscrowd=0, rle=b"")]),
     "image 107 \\(7.png\\): label 3 is none of 1…2"),
    (dict(instances=[dict(label=0, box=(0, 0, 1, 1), area=1, iscrowd=0, rle=b"")]),
     "image 107 \\(7.png\\): label 0 is none of 1…2"),
    (dict(instances=[dict(label=1, box=(5, 5, 5, 9), area=1, iscrowd=0, rle=b"")]),
     "image 107 \\(7.png\\): box .* has no area"),
    (dict(instances=[dict(label=1, box=(5, 5, float("nan"), 9), area=1, iscrowd=0, rle=b"")]),
     "image 107 \\(7.png\\): box .*nan.* has no area"),
    (dict(id=100), "image 100 \\(7.png\\): another image has the same id"),
    (dict(split="valid"), "split 'valid' is neither 'train' nor 'val'")])
def test_wrong_examples_name_the_image_and_leave_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path / "d.h5", ["a", "b"], [example(0), example(7, **changes)], "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_writing_leaves_what_was_there(tmp_path, error):
    old = write_dataset(tmp_path / "d.h5", ["a", "b"], [example(1)], "old").read_bytes()
    def stream():
        yield from examples(100)
        raise error
    with pytest.raises(error): write_dataset(tmp_path / "d.h5", ["a", "b"], stream(), "new", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["d.h5"] and (tmp_path / "d.h5").read_bytes() == old


def test_ctrl_c_in_a_process(tmp_path):
    "A real SIGINT while the file is being written."
    code = ("import sys\n"
            "sys.path.insert(0, sys.argv[2])\n"
            "from test_data import *\n"
            "def slow():\n"
            "    for i in range(10**6):\n"
            "        yield example(i)\n"
            "        if i == 200: print(i, flush=True)\n"
            "write_dataset(sys.argv[1], ['a', 'b'], slow(), 'x')")
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "d.h5"), str(Path(__file__).parent)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert process.stdout.readline().strip() == b"200"
    assert [p.suffix for p in tmp_path.iterdir()] == [".tmp"]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0 and list(tmp_path.iterdir()) == []


def test_existing_file(path, tmp_path):
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="d.h5 exists: choose another name, or pass overwrite=True"):
        write_dataset(path, ["a"], [], "x")
    assert path.read_bytes() == before
    target = write_dataset(tmp_path / "new folder/d.h5", ["a", "b"], [example(1)], "x")
    opened = InstanceDataset(target)
    opened[0]
    # while another reader has it open
    write_dataset(target, ["a", "b"], [example(2), example(3)], "x", overwrite=True)
    assert len(InstanceDataset(target)) == 2 and len(opened[0][1]["labels"]) == 1


# ---------------------------------------------------------------------------------------- reading, and faults

def test_missing_truncated_and_foreign_files(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="no data set at .*none.h5: make one with"):
        InstanceDataset(tmp_path / "none.h5")
    for cut in (10, 1000, path.stat().st_size - 1):
        (tmp_path / "cut.h5").write_bytes(path.read_bytes()[:cut])
        with pytest.raises(ValueError, match="cut.h5 is not a whole HDF5 file, make it again"):
            InstanceDataset(tmp_path / "cut.h5")
    (tmp_path / "empty.h5").touch()
    with pytest.raises(ValueError, match="empty.h5 is not a whole HDF5 file"):
        InstanceDataset(tmp_path / "empty.h5")
    with h5py.File(tmp_path / "other.h5", "w") as f: f["x"] = 1
    with pytest.raises(ValueError, match="other.h5 is not a maskrcnn_course file"):
        InstanceDataset(tmp_path / "other.h5")
    with h5py.File(tmp_path / "newer.h5", "w") as f: f.attrs.update(format=FORMAT, version=99)
    with pytest.raises(ValueError, match="version 1 or below"): InstanceDataset(str(tmp_path / "newer.h5"))
    with pytest.raises(ValueError, match="split 'test' is none of"): InstanceDataset(path, "test")


def damage(path, tmp_path, change):
    copy = tmp_path / change.__name__ / "damaged.h5"
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    with h5py.File(copy, "r+") as f: change(f)
    return InstanceDataset(copy)


def test_damage_inside_names_file_and_image(path, tmp_path):
    def zero(f): f["image_bytes"][slice(*f["images"][7]["data"])] = 0
    data = damage(path, tmp_path, zero)
    with pytest.raises(ValueError, match="damaged.h5, image 107: the image is damaged"): data[7]
    assert torch.equal(data[8][0], InstanceDataset(path)[8][0])

    def one_bit(f):
        # such a PNG or JPEG would still decode
        f["image_bytes"][f["images"][7]["data"].sum() // 2] ^= 4
    with pytest.raises(ValueError, match="damaged.h5, image 107: the image is damaged"):
        damage(path, tmp_path, one_bit)[7]

    def runs(f):
        f["rle_bytes"][f["instances"][f["images"][7]["instances"][0]]["rle"][0]] ^= 1
    message = "damaged.h5, image 107: the runs of a mask add up to .*, and not to 41 × 60"
    with pytest.raises(ValueError, match=message): damage(path, tmp_path, runs)[7]

    def size(f):
        rows = f["images"][:]
        rows["width"][7] = 61
        f["images"][:] = rows
    with pytest.raises(ValueError, match="damaged.h5, image 107"): damage(path, tmp_path, size)[7]


def test_splits(path, tmp_path):
    train, val = InstanceDataset(path, "train"), InstanceDataset(path, "val")
    assert val.image_ids == list(range(100, 250, 5))
    assert len(train) == 120
    assert not set(train.image_ids) & set(val.image_ids)
    dealt = write_dataset(tmp_path / "d.h5", ["a", "b"], (example(i) for i in range(50)), "x")
    train, val = InstanceDataset(dealt, "train"), InstanceDataset(dealt, "val")
    assert (len(train), len(val)) == (40, 10)
    assert sorted(train.image_ids + val.image_ids) == list(range(100, 150))
    assert InstanceDataset(dealt, "val").image_ids == val.image_ids
    only_val = write_dataset(tmp_path / "v.h5", ["a", "b"], (example(i, "val") for i in range(3)), "x")
    assert len(InstanceDataset(only_val, "val")) == 3
    with pytest.raises(ValueError, match="v.h5 has no image in split 'train'"):
        InstanceDataset(only_val, "train")


def digests(data):
    return [hashlib.sha256(image.numpy().tobytes() + target["masks"].numpy().tobytes()).hexdigest()
            for image, target in data]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_what_the_parent_reads(path, context):
    "With the file open in the parent, which goes on reading, and two data sets on one file."
    if context not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {context}")
    train, val = InstanceDataset(path, "train"), InstanceDataset(path, "val")
    want = {id(data): digests(data) for data in (train, val)}
    for data in (train, val)[context == "spawn":]:                                    # spawning takes seconds
        loader = DataLoader(data, batch_size=4, collate_fn=collate, num_workers=2,
                            multiprocessing_context=context)
        got = []
        for i, (images, targets) in enumerate(loader):
            got += digests(zip(images, targets))
            assert digests([train[i]]) == want[id(train)][i:i + 1]
        assert got == want[id(data)]


def test_pickle_leaves_the_open_file(path):
    data = InstanceDataset(path)
    data[3]
    copy = pickle.loads(pickle.dumps(data))
    assert not copy._opened and data._opened and torch.equal(copy[3][0], data[3][0])


def test_decode_refuses_what_does_not_fill_the_image():
    mask = np.zeros((30, 50), np.uint8)
    mask[4:20, 9:31] = 1
    rle = encode_mask(mask)
    for wrong in (b"", rle[:-1], rle[:3]):
        with pytest.raises(ValueError, match="the run-length encoding of a mask is cut off"):
            decode_mask(wrong, 30, 50)
    for wrong in (rle + b"1", b"zzzz", b"\x00\x01", b"\xff" * 40, b"O" * 9):
        with pytest.raises(ValueError, match="the runs of a mask add up to .* pixels, and not to 30 × 50"):
            decode_mask(wrong, 30, 50)
    for h, w in ((30, 51), (1, 1), (0, 0)):
        with pytest.raises(ValueError, match=f"add up to 1500 pixels, and not to {h} × {w}"):
            decode_mask(rle, h, w)
    big = (np.random.default_rng(0).random((480, 640)) < 0.5).astype(np.uint8)
    assert np.array_equal(decode_mask(encode_mask(torch.from_numpy(big)), 480, 640), big)


# ---------------------------------------------------------------------------------------- transforms, batches

def test_coco_ground_truth_is_accepted_by_pycocotools(path):
    data = InstanceDataset(path, "val")
    gt = COCO()
    gt.dataset = json.loads(json.dumps(data.coco()))
    gt.createIndex()
    assert gt.getImgIds() == data.image_ids and [c["name"] for c in gt.loadCats([1, 2])] == ["cat", "dög"]
    for i, image_id in enumerate(data.image_ids):
        rows, target = gt.loadAnns(gt.getAnnIds(image_id)), data[i][1]
        assert [a["category_id"] for a in rows] == target["labels"].tolist()
        assert min([a["id"] for a in rows], default=1) > 0
        for a, mask, box in zip(rows, target["masks"], target["boxes"]):
            assert np.array_equal(gt.annToMask(a), mask.numpy())
            x, y, w, h = a["bbox"]
            assert [x, y, x + w, y + h] == box.tolist()


def test_transforms_keep_entries_together(path):
    everything = v2.Compose([
        v2.RandomHorizontalFlip(),
        v2.RandomPhotometricDistort(),
        v2.ScaleJitter((48, 64), (0.3, 2.5)),
        v2.RandomCrop((40, 40), pad_if_needed=True),
        v2.RandomAffine(20, (0.2, 0.2)),
    ])
    data, counts = InstanceDataset(path, transforms=everything), set()
    torch.manual_seed(0)
    for i in range(150):
        image, target = data[i]
        n = len(target["labels"])
        assert type(image) is torch.Tensor
        assert image.shape == (3, 40, 40)
        assert image.dtype == torch.float32
        assert 0 <= image.min()
        assert image.max() <= 1
        assert all(type(v) is torch.Tensor and len(v) == n for k, v in target.items() if k != "image_id")
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all() and (target["area"] > 0).all()
        assert target["area"].tolist() == [m.sum() for m in target["masks"].float()]
        counts.add((i % 4, n))
    assert any(n < was for was, n in counts) and (0, 0) in counts


def test_flip_moves_image_boxes_and_masks(path):
    plain, flipped = InstanceDataset(path)[3], InstanceDataset(path, transforms=v2.RandomHorizontalFlip(1))[3]
    assert torch.equal(flipped[0], plain[0].flip(-1))
    assert torch.equal(flipped[1]["masks"], plain[1]["masks"].flip(-1))
    x1, y1, x2, y2 = plain[1]["boxes"].T
    assert torch.equal(flipped[1]["boxes"], torch.stack([60 - x2, y1, 60 - x1, y2], 1))
    assert torch.equal(flipped[1]["iscrowd"], plain[1]["iscrowd"])


def test_padding(path):
    data = InstanceDataset(path)
    images, targets = collate([data[i] for i in range(4)])
    batch, sizes = pad_images(images)
    assert batch.shape == (4, 3, 64, 64)
    assert sizes.tolist() == [[40, 60], [41, 60], [42, 60], [40, 60]]
    assert sizes.dtype == torch.int64
    assert all(torch.equal(b[:, :h, :w], image) for b, image, (h, w) in zip(batch, images, sizes.tolist()))
    assert all(b[:, h:].abs().sum() + b[:, :, w:].abs().sum() == 0
               for b, (h, w) in zip(batch, sizes.tolist()))
    assert pad_images(images, 1)[0].shape == (4, 3, 42, 60)
    assert pad_images([torch.rand(3, 64, 32)])[0].shape == (1, 3, 64, 32)
    padded = pad_targets(targets, "cpu")
    # the third of the fourth is a crowd
    assert padded["valid"].tolist() == [
        [False] * 3, [True, False, False], [True, True, False], [True, True, False]]
    assert torch.equal(padded["boxes"][3, :2], targets[3]["boxes"][:2]) and padded["boxes"][0].sum() == 0
    assert [len(m) for m in padded["masks"]] == [0, 1, 2, 3] and padded["labels"].dtype == torch.int64


def test_padding_of_targets_without_area_masks_or_objects():
    # as torchvision allows: no iscrowd, no masks
    flat = dict(boxes=torch.tensor([[5., 5, 5, 9], [1, 1, 3, 3]]), labels=torch.tensor([1, 2]))
    padded = pad_targets([flat])
    assert padded["boxes"].tolist() == [[[0] * 4, [1, 1, 3, 3]]]
    assert padded["labels"].tolist() == [[0, 2]]
    assert padded["masks"] is None
    none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    padded = pad_targets([none, none])
    assert padded["boxes"].shape == (2, 1, 4) and not padded["valid"].any()


# ------------------------------------------------------------------------------------------------------- COCO

class Folder:
    """A COCO file with two photos.

    1.png, 40 × 30, with a square, a triangle and a crowd; 2.jpg, 20 × 20, with nothing.
    """
    def __init__(self, root):
        self.root, rng = root, np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(root / "1.png")
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(root / "2.jpg")
        self.crowd = np.zeros((30, 40), np.uint8)
        self.crowd[20:, 5:30] = 1
        runs = [int(n) for n in np.diff([0, *np.flatnonzero(np.diff(self.crowd.T.reshape(-1))) + 1, 1200])]
        self.coco = dict(
            images=[dict(id=1, file_name="1.png", width=40, height=30, license=4, flickr_url="http://f/1"),
                    dict(id=2, file_name="2.jpg", width=20, height=20, coco_url="http://c/2")],
            licenses=[dict(id=4, name="Attribution License", url="http://by/")],
            categories=[dict(id=18, name="dog", supercategory="animal"),
                        dict(id=6, name="bus", supercategory="vehicle"),
                        dict(id=17, name="cat", supercategory="animal")],
            annotations=[dict(id=10, image_id=1, category_id=18, iscrowd=0, area=99.5,
                              bbox=[1.5, 2, 10.25, 10],
                              segmentation=[[1.5, 2, 11.75, 2, 11.75, 12, 1.5, 12]]),
                         dict(id=11, image_id=1, category_id=6, iscrowd=0, area=50,
                              bbox=[20, 5, 10, 10],
                              segmentation=[[20, 5, 30, 15, 20, 15]]),
                         dict(id=12, image_id=1, category_id=17, iscrowd=1, area=250,
                              bbox=[5, 20, 25, 10],
                              segmentation=dict(size=[30, 40], counts=runs))])

    def add(self, **changes):
        self.coco["annotations"].append({**self.coco["annotations"][0], "id": 99, **changes})

    def run(self, **kwargs):
        (self.root / "a.json").write_text(json.dumps(self.coco))
        return InstanceDataset(import_coco(self.root / "out.h5", self.root / "a.json", self.root, **kwargs))

    def fails(self, message, error=ValueError, **kwargs):
        with pytest.raises(error, match=message): self.run(**kwargs)
        assert not [p for p in self.root.iterdir() if p.suffix in (".h5", ".tmp")]


@pytest.fixture
def folder(tmp_path): return Folder(tmp_path)


def test_import_keeps_bytes_boxes_masks_and_credit(folder, capsys):
    data = folder.run()
    assert data.classes == ["bus", "cat", "dog"]                   # in the order of their ids
    image, target = data[0]
    assert target["labels"].tolist() == [3, 1, 2]
    assert target["iscrowd"].tolist() == [0, 0, 1]
    assert target["area"].tolist() == [99.5, 50, 250]
    assert target["boxes"].tolist() == [[1.5, 2, 11.75, 12], [20, 5, 30, 15], [5, 20, 30, 30]]
    for mask, a in zip(target["masks"], folder.coco["annotations"][:2]):
        runs = coco_mask.merge(coco_mask.frPyObjects(a["segmentation"], 30, 40))
        assert np.array_equal(mask.numpy(), coco_mask.decode(runs))
    assert np.array_equal(target["masks"][2].numpy(), folder.crowd)
    with h5py.File(data.path) as f:
        for row, name in zip(f["images"], ("1.png", "2.jpg")):
            assert f["image_bytes"][slice(*row["data"])].tobytes() == (folder.root / name).read_bytes()
    assert data.info(0)["license"] == "Attribution License http://by/"
    assert [data.info(i)["url"] for i in (0, 1)] == ["http://f/1", "http://c/2"]
    assert data[1][1]["masks"].shape == (0, 20, 20)
    assert capsys.readouterr().out == "1 images kept that have no object\n"


def test_import_resizes_to_the_pixel_centres(folder):
    data = folder.run(size=(20, 15))
    image, target = data[0]
    assert image.shape == (3, 15, 20) and data[1][0].shape == (3, 15, 20) and data.info(0)["width"] == 20
    polygons = folder.coco["annotations"][0]["segmentation"]
    full = coco_mask.decode(coco_mask.frPyObjects(polygons, 30, 40))[..., 0]
    assert np.array_equal(target["masks"][0].numpy(), full[1::2, 1::2])
    for mask, box, area in zip(target["masks"], target["boxes"], target["area"]):
        ys, xs = mask.nonzero(as_tuple=True)
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] and area == mask.sum()


def test_import_resizes_only_photos_of_another_size(folder):
    data = folder.run(size=(40, 30))
    assert data[0][1]["boxes"][0].tolist() == [1.5, 2, 11.75, 12] and data[1][0].shape == (3, 30, 40)
    with h5py.File(data.path) as f:
        stored = f["image_bytes"][slice(*f["images"][0]["data"])].tobytes()
    assert stored == (folder.root / "1.png").read_bytes()


def test_import_groups_and_classes(folder, capsys):
    assert folder.run(groups="supercategory").classes == ["vehicle", "animal"]
    data = folder.run(groups={"pet": ["cat"], "car": ["bus"]}, overwrite=True)
    assert data.classes == ["pet", "car"] and data[0][1]["labels"].tolist() == [2, 1]
    assert "1 annotations dropped: a category that no class takes\n" in capsys.readouterr().out
    data = folder.run(groups="supercategory", classes=["animal"], overwrite=True)
    assert data.classes == ["animal"] and data[0][1]["labels"].tolist() == [1, 1]
    data = folder.run(classes=["dog", "bus"], overwrite=True)
    assert data.classes == ["dog", "bus"] and data[0][1]["labels"].tolist() == [1, 2]


@pytest.mark.parametrize("kwargs, message", [
    (dict(groups={"pet": ["cat", "hamster"]}),
     "groups names \\['hamster'\\], but the categories are \\['bus', 'cat', 'dog'\\]"),
    (dict(groups={"pet": ["cat"], "all": ["cat", "dog"]}), "a category into two classes"),
    (dict(classes=["cow"]), "classes \\['cow'\\] are not among"),
    (dict(groups="supercategory", classes=["dog"]),
     "classes \\['dog'\\] are not among \\['vehicle', 'animal'\\]")])
def test_import_refuses_unknown_names(folder, kwargs, message): folder.fails(message, **kwargs)


def test_import_says_which_categories_have_no_group(folder):
    del folder.coco["categories"][2]["supercategory"]
    folder.fails("\"supercategory\", but the categories \\['cat'\\] have none", groups="supercategory")


def test_import_drops_counts_and_says(folder, capsys):
    folder.add(id=90, bbox=[5, 5, 0, 8])
    folder.add(id=91, bbox=[5, 5, 8, -1])
    folder.add(id=92, segmentation=[])
    folder.add(id=93, segmentation=[[100, 100, 110, 100, 110, 110]])
    folder.add(id=94, segmentation=[[-20, 5, -10, 5, -10, 15]])
    folder.add(id=95, segmentation=[[5, -20, 15, -20, 15, -10]])
    folder.add(id=96, segmentation=[[5, 5, 9, 5]])
    folder.add(id=97, segmentation=dict(size=[30, 40], counts=[1200]))
    assert len(folder.run()[0][1]["labels"]) == 3
    assert capsys.readouterr().out == (
        "2 annotations dropped: a box without area\n"
        "6 annotations dropped: a mask that is empty or outside of the image\n"
        "1 images kept that have no object\n")
    folder.add(id=98, bbox=[4, 4, 1, 1], segmentation=dict(size=[30, 40], counts=[4 * 30 + 4, 1, 1075]))
    assert len(folder.run(size=(20, 15), overwrite=True)[0][1]["labels"]) == 3
    assert "1 annotations dropped: a mask that is too small for the new size\n" in capsys.readouterr().out


def test_import_keeps_the_part_inside(folder):
    folder.add(bbox=[30, 10, 20, 10], segmentation=[[30, 10, 50, 10, 50, 20, 30, 20]])
    target = folder.run()[0][1]
    assert target["masks"][-1].sum() == 100
    assert target["boxes"][-1].tolist() == [30, 10, 50, 20]     # the annotation's own box


@pytest.mark.parametrize("changes, message", [
    (dict(image_id=77), "a.json, annotation 99: image_id 77 is not in the file"),
    (dict(category_id=77), "a.json, annotation 99: category_id 77 is not in the file"),
    (dict(segmentation=dict(size=[40, 30], counts=[1200])),
     "annotation 99 of image 1 \\(1.png\\): ValueError: a mask of \\[40, 30\\]"),
    (dict(segmentation=dict(size=[30, 40], counts=[5, 5])),
     "annotation 99 of image 1 \\(1.png\\): .*add up to 10 pixels, and not to 30 × 40"),
    (dict(segmentation=dict(size=[30, 40], counts=[5, -5, 1200])),
     "annotation 99 of image 1 \\(1.png\\): OverflowError"),
    (dict(segmentation=dict(size=[30, 40], counts="04")),
     "annotation 99 of image 1 \\(1.png\\): .*add up to 4 pixels, and not to 30 × 40"),
    (dict(segmentation=[[1, 1, 5, float("nan"), 5, 5]]),
     "annotation 99 of image 1 \\(1.png\\): .*coordinates that are not finite"),
    (dict(segmentation=[[1, 1, 5, 1e12, 5, 5]]),
     "annotation 99 of image 1 \\(1.png\\): .*coordinates that are not finite"),
    (dict(segmentation=[1, 1, 5, 1, 5, 5]), "annotation 99 of image 1 \\(1.png\\): TypeError"),
    (dict(segmentation=None), "annotation 99 of image 1: it has no segmentation, but 3 others have one"),
    (dict(bbox=[1, 2, 3]), "annotation 99 of image 1 \\(1.png\\): ValueError: not enough values to unpack")])
def test_import_names_the_annotation(folder, changes, message):
    folder.add(**changes)
    folder.fails(message)


def test_import_photo_faults(folder):
    entry, photo = folder.coco["images"][0], folder.root / "1.png"
    entry.update(width=30, height=40)
    folder.fails("1.png, image 1: the photo has \\(40, 30\\) pixels, and the annotations say \\(30, 40\\)")
    entry.update(width=40, height=30)
    whole = photo.read_bytes()
    photo.write_bytes(whole[:len(whole) // 2])
    folder.fails("1.png, image 1: the image is damaged")
    photo.write_bytes(b"")
    folder.fails("1.png, image 1: the image is damaged")
    photo.unlink()
    folder.fails("1.png, image 1: there is no such file", FileNotFoundError)
    photo.write_bytes(whole)
    jpeg = folder.root / "2.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:-300])
    folder.fails("2.jpg, image 2: the image is damaged")


def test_import_file_faults(folder, tmp_path):
    out = tmp_path / "out.h5"
    with pytest.raises(FileNotFoundError): import_coco(out, tmp_path / "none.json", tmp_path)
    (tmp_path / "cut.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="cut.json is not whole JSON"):
        import_coco(out, tmp_path / "cut.json", tmp_path)
    (tmp_path / "list.json").write_text('{"images": [], "categories": []}')
    with pytest.raises(ValueError, match="list.json lacks {'annotations'}"):
        import_coco(out, tmp_path / "list.json", tmp_path)
    folder.coco["images"][1]["id"] = 1
    folder.fails("a.json: two images have the id 1")
    folder.coco["images"][1]["id"] = 2
    folder.run()
    with pytest.raises(FileExistsError, match="out.h5 exists"): folder.run()
    with pytest.raises(ValueError, match="annotations for \\['train'\\], but images for \\['val'\\]"):
        import_coco(out, {"train": tmp_path / "a.json"}, {"val": tmp_path}, overwrite=True)
    with pytest.raises(ValueError, match="split 'test' is neither"):
        import_coco(out, {"test": tmp_path / "a.json"}, tmp_path, overwrite=True)


def test_import_two_files_agree_on_labels_by_name(folder, tmp_path):
    "Categories may have other ids, and another order, in the second file."
    (tmp_path / "train.json").write_text(json.dumps(folder.coco))
    other = dict(
        images=[dict(id=5, file_name="1.png", width=40, height=30)],
        categories=[dict(id=1, name="dog"), dict(id=2, name="bus")],
        annotations=[{**folder.coco["annotations"][0], "image_id": 5, "category_id": 1}])
    (tmp_path / "val.json").write_text(json.dumps(other))
    files = {s: tmp_path / f"{s}.json" for s in ("train", "val")}
    path = import_coco(tmp_path / "o.h5", files, tmp_path, classes=["dog", "bus", "cat"])
    train, val = (InstanceDataset(path, s) for s in ("train", "val"))
    assert train[0][1]["labels"].tolist() == [1, 2, 3]
    assert val[0][1]["labels"].tolist() == [1]
    assert (len(train), len(val)) == (2, 1)


@pytest.mark.parametrize("mode, kind", [
    ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("1", "PNG")])
@pytest.mark.parametrize("size", [None, (20, 15)])
def test_import_any_colour_mode_becomes_rgb(folder, mode, kind, size):
    photo = Image.fromarray(np.full((30, 40, 3), 128, np.uint8)).convert(mode)
    (folder.root / "1.png").write_bytes(encoded(photo, kind))
    image, _ = folder.run(size=size)[0]
    assert image.shape == ((3, 30, 40) if size is None else (3, 15, 20))
    # a palette and black-and-white are dithered
    assert (image - 128 / 255).abs().max() < {"P": 0.11, "1": 1}.get(mode, 0.03)


def test_import_does_not_rotate_by_exif(folder):
    array = np.zeros((30, 40, 3), np.uint8)
    array[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder.root / "1.png").write_bytes(encoded(array, "JPEG", exif=exif, quality=95))
    assert folder.run()[0][0][:, :, :15].min() > 0.9
    data = folder.run(size=(20, 15), overwrite=True)
    assert data[0][0].shape == (3, 15, 20) and data[0][0][:, :, :8].min() > 0.9
    with h5py.File(data.path) as f:
        stored = Image.open(io.BytesIO(f["image_bytes"][slice(*f["images"][0]["data"])].tobytes()))
    assert stored.format == "JPEG"
    assert not stored.getexif()       # upright as stored, and nothing says otherwise


def test_import_of_real_photos(photos, tmp_path, capsys):
    files = {s: photos / f"instances_{s}.json" for s in ("train", "val")}
    path = import_coco(tmp_path / "coco3.h5", files, photos / "images")
    for split, count in (("train", 1007), ("val", 490)):
        data, want = InstanceDataset(path, split), json.loads(files[split].read_text())
        key = lambda a: (a["image_id"], a["category_id"], a["bbox"], a["area"])
        got = sorted(data.coco()["annotations"], key=key)
        assert data.classes == ["vehicle", "person", "animal"] and len(got) == count
        for a, b in zip(got, sorted(want["annotations"], key=key)):
            assert key(a) == key(b)
            assert a["iscrowd"] == b["iscrowd"]
            assert a["segmentation"] == b["segmentation"]
    assert capsys.readouterr().out == ""
    small = InstanceDataset(import_coco(
        tmp_path / "small.h5", files["val"], photos / "images",
        size=(200, 150), classes=["animal", "person"]))
    assert small.classes == ["animal", "person"] and all(image.shape == (3, 150, 200) for image, _ in small)
    def area(coco, names):
        name_of = lambda a: coco["categories"][a["category_id"] - 1]["name"]
        return sum(a["area"] for a in coco["annotations"] if name_of(a) in names)
    assert area(data.coco(), small.classes) / area(small.coco(), small.classes) == pytest.approx(4, rel=0.002)


FLIPS = """
import os, random, sys
from pathlib import Path
from maskrcnn_course.data import InstanceDataset
from maskrcnn_course.inspect_data import inspect_dataset
whole, damaged, draw = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), random.Random(0)
for _ in range(60):
    at = draw.randrange(6000)
    damaged.write_bytes(whole[:at] + bytes([whole[at] ^ draw.randrange(1, 256)]) + whole[at + 1:])
    child = os.fork()
    if not child:
        try:
            dataset = InstanceDataset(damaged)
            for i in range(len(dataset)): dataset[i]
            inspect_dataset(damaged)
        except (ValueError, OSError): os._exit(1)
        except BaseException as e: print(at, type(e), e, flush=True)
        os._exit(0)
    print("code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_flipped_byte_is_read_or_refused(tmp_path):
    "Never another error. (HDF5 itself may crash, which nobody can catch: that is a signal, not an error.)"
    path = write_scenes(tmp_path / "s.h5", n=4, size=(64, 64), val=1)
    words = [sys.executable, "-c", FLIPS, path, tmp_path / "damaged.h5"]
    lines = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 60 and all(line.startswith("code") for line in lines), lines
    assert lines.count("code 1") > 5 and lines.count("code 0") > 5
