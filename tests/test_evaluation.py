"COCO evaluation held against pycocotools on data made to hurt, and against files that cannot be right."
import contextlib, copy, io, json, math
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from maskrcnn_course.data import InstanceDataset
from maskrcnn_course.evaluation import (evaluate, paired_iou, proposal_recall,
                                        results_from_predictions, rpn_accuracy)
from maskrcnn_course.scenes import write_scenes

NAMES = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
H, W = 110, 140


def peer(gt, results, iou_type):
    "pycocotools' twelve numbers, and AP and AP50 of each class."
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(gt)
        truth.createIndex()
        e = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), iou_type)
        e.evaluate()
        e.accumulate()
        e.summarize()
    mean = lambda x: x[x > -1].mean() if (x > -1).any() else -1
    precision = e.eval["precision"][:, :, :, 0, 2]
    return e.stats, [(mean(precision[:, :, k]), mean(precision[0, :, k])) for k in range(precision.shape[2])]


def assert_equal(gt, results, iou_type):
    "Ours equals pycocotools' to 1e-12, and leaves its inputs alone."
    before = json.dumps([gt, results])
    ours = evaluate(gt, results, iou_type)
    assert json.dumps([gt, results]) == before
    theirs, classes = peer(gt, results, iou_type)
    assert list(ours) == [*NAMES, "per_class"]
    np.testing.assert_allclose([ours[k] for k in NAMES], theirs, rtol=0, atol=1e-12)
    per_class = [(c["AP"], c["AP50"]) for c in ours["per_class"].values()]
    np.testing.assert_allclose(per_class, classes, rtol=0, atol=1e-12)
    return ours


def packed(mask):
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return dict(size=rle["size"], counts=rle["counts"].decode())


def disc(x, y, w, h):
    inside = lambda n, low, length: ((np.arange(n) + .5 - low) / (length / 2) - 1) ** 2
    return packed(inside(H, y, h)[:, None] + inside(W, x, w) < 1)


def spell(rng, rle, box):
    "One of the three ways in which ground truth may write a mask, and its area."
    kind = rng.integers(3)
    if kind == 0: return rle
    if kind == 1:
        flat = coco_mask.decode(rle).ravel("F")
        ends = np.flatnonzero(np.diff(flat, prepend=1 - flat[0], append=1 - flat[-1]))
        return dict(size=rle["size"], counts=[0] * int(flat[0]) + np.diff(ends).tolist())
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h], [x, y, x + w / 2, y, x, y + h / 2]]


def hard_case(seed, images=5, most=4, decimals=1, whole=True, boxes=True):
    """Noise, duplicates, wrong classes, crowds, ties.

    Some images have no objects, some no results, one class no objects.
    `whole` boxes put IoUs right on the thresholds.
    """
    rng = np.random.default_rng(seed)
    number = (lambda v: [int(q) for q in v]) if whole else (lambda v: [float(q) for q in v])
    table = [dict(id=int(i), height=H, width=W) for i in rng.permutation(1000)[:images]]
    annotations, results = [], []
    for image in table:
        for _ in range(rng.integers(0, 6) * (rng.random() < .85)):
            wh = np.exp(rng.uniform(np.log(4), np.log(105), 2))
            box = number([*rng.uniform(0, 30, 2), *wh])
            rle, label, crowd = disc(*box), int(rng.integers(1, 4)), int(rng.random() < .25)
            for _ in range(1 + (rng.random() < .2)):
                annotations.append(dict(
                    id=len(annotations) + 1, image_id=image["id"], category_id=label, bbox=box, iscrowd=crowd,
                    area=float(rng.choice([wh.prod(), 32**2, 96**2])), segmentation=spell(rng, rle, box)))
            for _ in range(rng.integers(0, most + 1)):
                near = np.array(box) + rng.normal(0, rng.choice([0, .05, .3]), 4) * np.tile(wh, 2)
                near = number([*near[:2].clip(0), *near[2:].clip(1)])
                results.append(dict(
                    image_id=image["id"],
                    category_id=label if rng.random() < .85 else int(rng.integers(1, 5)),
                    score=round(rng.random(), decimals),
                    segmentation=disc(*near),
                    **dict(bbox=near) if boxes else {}))
    if not results:
        results = [dict(
            image_id=table[0]["id"], category_id=1, score=.5, segmentation=disc(5, 5, 9, 9),
            **dict(bbox=[5, 5, 9, 9]) if boxes else {})]
    for rows in (results, annotations, table): rng.shuffle(rows)
    categories = [dict(id=i, name=f"class {i}") for i in (4, 2, 1, 3)]
    return dict(images=table, annotations=list(annotations), categories=categories), list(results)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(0, 6), st.integers(1, 6), st.booleans())
def test_boxes_equal_pycocotools(seed, images, most, decimals, whole):
    assert_equal(*hard_case(seed, images, most, decimals, whole), "bbox")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(0, 6), st.integers(1, 6), st.booleans())
def test_masks_equal_pycocotools(seed, images, most, decimals, boxes):
    assert_equal(*hard_case(seed, images, most, decimals, boxes=boxes), "segm")


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_more_than_a_hundred_detections_of_a_class_in_an_image(iou_type):
    gt, results = hard_case(3, 2, 150)
    counts = np.unique([(r["image_id"], r["category_id"]) for r in results], axis=0, return_counts=True)[1]
    assert counts.max() > 100
    assert_equal(gt, results, iou_type)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_all_scores_tied(iou_type):
    gt, results = hard_case(8, 6, 6, decimals=0)
    assert_equal(gt, [r | {"score": .5} for r in results], iou_type)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_real_annotations_equal_pycocotools(photos, iou_type):
    gt, rng = json.loads((photos / "instances_val.json").read_text()), np.random.default_rng(0)
    results = []
    for a in gt["annotations"]:
        mask = coco_mask.decode(a["segmentation"])
        for _ in range(rng.integers(0, 4)):
            dx, dy = rng.integers(-9, 10, 2)
            rle = packed(np.roll(mask, (dy, dx), (0, 1)))
            results.append(dict(
                image_id=a["image_id"], category_id=int(rng.choice([a["category_id"]] * 8 + [1, 2, 3])),
                segmentation=rle, bbox=coco_mask.toBbox(rle).tolist(), score=round(rng.random(), 2)))
    ours = assert_equal(gt, results, iou_type)
    assert 0 < ours["AP"] < 1 and set(ours["per_class"]) == {"vehicle", "person", "animal"}


def one(box=(10, 10, 40, 40), **changes):
    plain = dict(id=1, image_id=1, category_id=1, bbox=list(box), area=box[2] * box[3], iscrowd=0,
                 segmentation=disc(*box))
    return plain | changes


def truth(*annotations, categories=("thing", "other")):
    return dict(images=[dict(id=1, height=H, width=W), dict(id=2, height=H, width=W)],
                annotations=list(annotations),
                categories=[dict(id=i, name=c) for i, c in enumerate(categories, 1)])


def detection(box=(10, 10, 40, 40), score=.5, **changes):
    return dict(image_id=1, category_id=1, bbox=list(box), score=score, segmentation=disc(*box)) | changes


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_perfect_empty_and_nothing_to_find(iou_type):
    gt = truth(one())
    assert evaluate(gt, [detection()], iou_type)["AP"] == pytest.approx(1)
    nothing = evaluate(gt, [], iou_type)   # pycocotools fails here
    assert (nothing["AP"], nothing["AR100"], nothing["APl"]) == (0, 0, -1)
    assert nothing["per_class"]["thing"]["AP"] == 0 and nothing["per_class"]["other"]["AP"] == -1
    assert all(v == -1 for k, v in evaluate(truth(), [detection()], iou_type).items() if k != "per_class")
    assert evaluate(truth(one(iscrowd=1)), [detection()], iou_type)["AP"] == -1
    assert all(v == -1 for k, v in evaluate(truth(), [], iou_type).items() if k != "per_class")


def test_annotation_with_id_zero_is_an_object():
    gt = truth(one(id=0))
    assert evaluate(gt, [detection()])["AP"] == pytest.approx(1)
    assert peer(gt, [detection()], "bbox")[0][0] == 0   # a known trap


def test_annotations_of_other_images_and_categories_are_not_counted():
    gt, results = truth(one(), one(id=2, image_id=77), one(id=3, category_id=9)), [detection()]
    assert assert_equal(gt, results, "bbox")["AP"] == pytest.approx(1)


def test_reads_paths(tmp_path):
    gt, results = hard_case(5)
    for name, content in (("gt", gt), ("results", results)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert evaluate(tmp_path / "gt.json", str(tmp_path / "results.json")) == evaluate(gt, results)
    with pytest.raises(FileNotFoundError): evaluate(tmp_path / "none.json", results)


RLE = disc(10, 10, 40, 40)
RUNS = r"the runs of its mask do not fill \[110, 140\]"
BAD = {  # what is wrong with a result: the changes, what the error says
    "image": (dict(image_id=99), "unknown image_id 99"),
    "image as text": (dict(image_id="1"), "unknown image_id 1"),
    "category": (dict(category_id=0), "unknown category_id 0"),
    "score is nan": (dict(score=math.nan), "its score is nan"),
    "score is infinite": (dict(score=math.inf), "its score is inf"),
    "no score": (dict(score=None), "NoneType"),
    "three numbers": (dict(bbox=[1, 2, 3]), "values to unpack"),
    "negative side": (dict(bbox=[1, 2, -3, 4]),
                      "a bbox is x, y, width, height in pixels, not \\[1, 2, -3, 4\\]"),
    "box with nan": (dict(bbox=[1, 2, math.nan, 4]),
                     "a bbox is x, y, width, height in pixels, not \\[1, 2, nan, 4\\]"),
    "box of text": (dict(bbox=["1", "2", "3", "4"]), "real number"),
    "box is none": (dict(bbox=None), "NoneType"),
    "cut": (dict(segmentation=RLE | {"counts": RLE["counts"][:-1]}), RUNS),
    "one run too few": (dict(segmentation=dict(size=[H, W], counts=[10, 5])), RUNS),
    "one run too many": (dict(segmentation=dict(size=[H, W], counts=[H * W, 5])), RUNS),
    "no runs": (dict(segmentation=RLE | {"counts": ""}), RUNS),
    "counts are none": (dict(segmentation=RLE | {"counts": None}), "NoneType"),
    "not text": (dict(segmentation=RLE | {"counts": "ü~~" + RLE["counts"]}), RUNS),
    "endless number": (dict(segmentation=RLE | {"counts": "o" * 50 + "0"}), RUNS),
    "negative run": (dict(segmentation=dict(size=[H, W], counts=[H * W + 5, -5])), "out of bounds|convert"),
    "other size": (dict(segmentation=RLE | {"size": [W, H]}),
                   r"a mask of \[140, 110\] in an image of \[110, 140\]"),
    "no size": (dict(segmentation=dict(counts=RLE["counts"])), "no 'size'"),
    "no mask": (dict(segmentation=None), "NoneType"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_results_name_their_index(case):
    changes, message = BAD[case]
    iou_type = "segm" if "segmentation" in changes else "bbox"
    results = [detection(), detection(score=.1), detection(**changes), detection()]
    with pytest.raises(ValueError, match=f"^result 2: .*({message})"):
        evaluate(truth(one()), results, iou_type)


def test_bad_results_among_thousands():
    results = [detection(segmentation=RLE) for _ in range(1000)]
    results[777]["segmentation"] = RLE | {"counts": RLE["counts"][:-2]}
    with pytest.raises(ValueError, match="^result 777: the runs"): evaluate(truth(one()), results, "segm")


@pytest.mark.parametrize("iou_type,key", [("bbox", "bbox"), ("segm", "segmentation")])
def test_results_without_shapes(iou_type, key):
    lacking = {k: v for k, v in detection().items() if k != key}
    with pytest.raises(ValueError, match=f"^result 1: no '{key}'"):
        evaluate(truth(one()), [detection(), lacking], iou_type)


def test_bad_arguments_and_ground_truth(tmp_path):
    gt = truth(one(id=42))
    (tmp_path / "gt.json").write_text(json.dumps(gt))
    with pytest.raises(ValueError, match="iou_type is 'bbox' or 'segm', not 'keypoints'"):
        evaluate(gt, [], "keypoints")
    with pytest.raises(ValueError, match="results are a list"): evaluate(gt, tmp_path / "gt.json")
    with pytest.raises(ValueError, match="the truth lacks \\['categories'\\]"):
        evaluate(dict(images=[], annotations=[]), [])
    for key in ("area", "bbox"):
        lacking = gt | {"annotations": [{k: v for k, v in gt["annotations"][0].items() if k != key}]}
        with pytest.raises(ValueError, match=f"annotation 42: no '{key}'"): evaluate(lacking, [])
    with pytest.raises(ValueError, match="image 1: no 'height'"):
        evaluate(gt | {"images": [dict(id=1)]}, [], "segm")
    cut = truth(one(id=42, segmentation=RLE | {"counts": RLE["counts"][:-1]}))
    with pytest.raises(ValueError, match="annotation 42: the runs"): evaluate(cut, [], "segm")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_broken_masks_never_hang(data):
    """Any change to a mask's text is refused by name, or gives a whole mask.

    Of such a mask pycocotools says the same.
    """
    characters = [*map(chr, range(40, 127)), ""]
    text = list(RLE["counts"])
    for _ in range(data.draw(st.integers(1, 3))):
        character = data.draw(st.sampled_from(characters))
        text[data.draw(st.integers(0, len(text) - 1))] = character
    rle = dict(size=[H, W], counts="".join(text))
    results = [detection(segmentation=rle)]
    try: ours = evaluate(truth(one()), results, "segm")
    except ValueError as e: assert str(e).startswith("result 0: the runs")
    else:
        assert coco_mask.area(rle) == coco_mask.decode(rle).sum()
        assert ours["AP"] == pytest.approx(peer(truth(one()), results, "segm")[0][0], abs=1e-12)


def test_box_overlap_is_pycocotools_to_the_last_bit():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0, 60, (2, 500, 4))
    for crowd in (False, True):
        theirs = coco_mask.iou(a, b, [crowd] * 500).diagonal()
        assert (paired_iou(a, b, np.full(500, crowd)) == theirs).all()


def test_rpn_accuracy():
    objectness, labels = torch.randn(1000), torch.randint(-1, 2, (1000,))
    accuracy = rpn_accuracy(objectness, labels.float())
    assert accuracy == rpn_accuracy(objectness.view(10, 100), labels.view(10, 100))
    assert rpn_accuracy(labels.float(), labels) == 1 and rpn_accuracy(-labels.float() - .5, labels) == .5
    assert math.isnan(rpn_accuracy(objectness, torch.ones(1000)))


def test_proposal_recall():
    boxes = [torch.tensor([[0., 0, 10, 10], [20, 20, 30, 30]]),
             torch.zeros(0, 4),
             torch.tensor([[0., 0, 4, 4]])]
    proposals = [torch.tensor([[0., 0, 10, 5.1], [20, 20, 30, 30]]), torch.rand(3, 4), torch.zeros(0, 4)]
    assert proposal_recall(proposals, boxes, at=(1, 2, 50)) == {1: 1/3, 2: 2/3, 50: 2/3}
    assert proposal_recall(proposals, boxes, .6, at=(2,)) == {2: 1/3}
    assert math.isnan(proposal_recall(proposals[1:2], boxes[1:2])[10])
    with pytest.raises(ValueError): proposal_recall(proposals, boxes[:2])


def test_results_from_predictions():
    n = 300   # more than pycocotools' own area() can take at once
    corners = torch.rand(n, 2).mul(60).round()
    boxes = torch.cat([corners, corners + torch.rand(n, 2).mul(30).round() + 1], 1)
    masks = torch.rand(n, 1, H, W)
    prediction = dict(boxes=boxes, labels=torch.ones(n, dtype=torch.int64), scores=torch.rand(n), masks=masks)
    empty = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64),
                 scores=torch.zeros(0), masks=torch.zeros(0, 1, H, W))
    results = json.loads(json.dumps(results_from_predictions([empty, prediction], [1, 2], .7)))
    assert [r["image_id"] for r in results] == [2] * n
    for r, box, mask in zip(results, boxes, masks):
        assert r["bbox"] == [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
        assert (coco_mask.decode(r["segmentation"]) == (mask[0] > .7).numpy()).all()
    assert_equal(truth(one(image_id=2)), results, "segm")
    del prediction["masks"]
    assert all("segmentation" not in r for r in results_from_predictions([prediction], [1]))
    with pytest.raises(ValueError): results_from_predictions([prediction], [1, 2])


def as_predictions(gt, seed):
    "Every object up to three times, shifted, some as another class, as torchvision says it; the images' ids."
    rng, predictions = np.random.default_rng(seed), []
    for image in gt["images"]:
        boxes, labels, scores, masks = [], [], [], []
        for a in (a for a in gt["annotations"] if a["image_id"] == image["id"]):
            for _ in range(rng.integers(0, 4)):
                dx, dy = rng.integers(-6, 7, 2)
                masks.append(np.roll(coco_mask.decode(a["segmentation"]), (dy, dx), (0, 1)))
                x, y, w, h = a["bbox"]
                boxes.append([x + dx, y + dy, x + dx + w, y + dy + h])
                labels.append(a["category_id"] if rng.random() < .8 else rng.integers(1, 4))
                scores.append(rng.random())
        n = len(boxes)
        masks = np.stack(masks)[:, None] if n else np.zeros((0, 1, image["height"], image["width"]))
        predictions.append(dict(
            boxes=torch.tensor(boxes).reshape(n, 4).float(),
            labels=torch.tensor(labels, dtype=torch.long),
            scores=torch.tensor(scores, dtype=torch.float32),
            masks=torch.tensor(masks, dtype=torch.float32)))
    return predictions, [image["id"] for image in gt["images"]]


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_scenes_and_files_that_others_read(tmp_path, iou_type):
    "Ground truth and results as files: ours, pycocotools and faster-coco-eval read them, and agree."
    faster = pytest.importorskip("faster_coco_eval")
    write_scenes(tmp_path / "scenes.h5", 40, (96, 128), val=30)
    gt = InstanceDataset(tmp_path / "scenes.h5", "val").coco()
    results = results_from_predictions(*as_predictions(gt, 0))
    paths = [tmp_path / "truth.json", tmp_path / "results.json"]
    for path, content in zip(paths, (gt, results)): path.write_text(json.dumps(content))
    ours = evaluate(*paths, iou_type)
    assert 0.02 < ours["AP"] < 0.9 and min(c["AP"] for c in ours["per_class"].values()) > 0
    assert_equal(gt, results, iou_type)
    for coco, evaluation_class in ((COCO, COCOeval), (faster.COCO, faster.COCOeval_faster)):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = coco(str(paths[0]))
            e = evaluation_class(truth, truth.loadRes(str(paths[1])), iou_type)
            e.evaluate()
            e.accumulate()
            e.summarize()
        np.testing.assert_allclose([ours[k] for k in NAMES], e.stats[:12], rtol=0, atol=1e-12)
