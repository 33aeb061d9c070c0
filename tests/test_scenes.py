"The embedded data set: exact masks, kinds kept apart, the same scenes everywhere."
import h5py
import numpy as np
import pytest

from maskrcnn_course.data import InstanceDataset
from maskrcnn_course.scenes import (CLASSES, FLYING, HELD_OUT, KINDS, OUTDOORS, THINGS, lay, make_scene,
                                    over, place, variants, write_scenes)


def scene(*seed, **kwargs): return make_scene(np.random.default_rng(seed), **kwargs)


def files(table): return {p for kinds in table.values() for emoji in kinds.values() for p in variants(emoji)}


def same(a, b): return all(np.array_equal(x, y) for x, y in zip(a, b))


def test_held_out_kinds_and_clutter_share_no_file_with_training():
    assert not files(KINDS) & files(HELD_OUT)
    assert not (files(KINDS) | files(HELD_OUT)) & set(variants(OUTDOORS) + variants(THINGS))
    names = [kind for table in (KINDS, HELD_OUT) for kinds in table.values() for kind in kinds]
    assert len(names) == len(set(names)) and FLYING <= set(names)


def test_every_emoji_has_a_picture():
    emojis = [e for t in (KINDS, HELD_OUT) for k in t.values() for v in k.values() for e in v.split()]
    assert [e for e in [*emojis, *OUTDOORS.split(), *THINGS.split()] if not variants(e)] == []


@pytest.mark.parametrize("held_out", [False, True])
def test_a_scene_draws_only_its_own_kinds(held_out, monkeypatch):
    import maskrcnn_course.scenes as scenes
    drawn, cutout = set(), scenes.cutout
    monkeypatch.setattr(scenes, "cutout", lambda path: (drawn.add(path), cutout(path))[1])
    for i in range(30): scene(3, i, held_out=held_out)
    assert drawn <= files(HELD_OUT if held_out else KINDS) | set(variants(OUTDOORS) + variants(THINGS))


@pytest.mark.parametrize("size", [(192, 256), (64, 64), (300, 100), (48, 200)])
def test_masks_are_exact_and_no_pixel_has_two_owners(size):
    for i in range(12):
        image, labels, masks = scene(1, i, size=size)
        assert image.shape == (*size, 3) and image.dtype == np.uint8 and masks.shape == (len(labels), *size)
        assert 1 <= len(labels) <= 8 and set(labels.tolist()) <= {1, 2, 3}
        assert masks.sum(0).max() == 1 and masks.sum((1, 2)).min() >= 20


def test_objects_are_visible_in_the_picture_where_the_mask_says():
    from maskrcnn_course.scenes import _compose, background
    picture, _, _, masks = _compose(np.random.default_rng(8), (192, 256), KINDS, 3)
    empty, *_ = background(np.random.default_rng(8), (192, 256))
    assert np.abs(picture - empty).max(-1)[np.any(masks, 0)].mean() > .1
    untouched = (picture == empty).all(-1)
    assert untouched.mean() > .3 and not (untouched & np.any(masks, 0)).mean() > .01


@pytest.mark.parametrize("fewest,most", [(1, 1), (3, 3), (6, 8)])
def test_the_number_of_instances_is_kept(fewest, most):
    for i in range(8): assert fewest <= len(scene(2, i, instances=(fewest, most))[1]) <= most


def test_the_same_seed_gives_the_same_scene_and_another_does_not():
    assert same(scene(0, 5), scene(0, 5))
    assert not same(scene(0, 5), scene(1, 5)) and not same(scene(0, 5), scene(0, 6))


def test_scenes_are_those_of_any_machine():
    areas = [np.sort(scene(0, i)[2].sum((1, 2))).tolist() for i in range(4)]
    means = [scene(0, i)[0].mean() for i in range(4)]
    expected = dict(areas=[[255, 518, 737, 1317, 2125, 2932], [436, 1055, 2676, 4379, 5125],
                           [157, 396, 564, 809, 1130, 1574, 2201, 2929], [194, 1035, 2297, 6494, 8448]],
                    means=[193.43, 119.37, 92.99, 155.92])
    for ours, theirs in zip(areas, expected["areas"], strict=True):
        assert ours == pytest.approx(theirs, abs=3)
    assert means == pytest.approx(expected["means"], abs=.2)


def test_what_is_written_is_what_was_made(tmp_path):
    path = write_scenes(tmp_path / "s.h5", n=12, val=4, seed=9, size=(96, 128))
    everything = InstanceDataset(path)
    assert everything.classes == CLASSES
    assert [len(InstanceDataset(path, s)) for s in ("train", "val")] == [8, 4]
    for i in range(12):
        image, target = everything[i]
        drawn, labels, masks = scene(9, i, size=(96, 128), held_out=i >= 8)
        assert target["labels"].tolist() == labels.tolist() and np.array_equal(target["masks"].numpy(), masks)
        assert np.abs(image.permute(1, 2, 0).numpy() * 255 - drawn).mean() < 8
        for (x1, y1, x2, y2), mask in zip(target["boxes"].long().tolist(), masks):
            inside = mask[y1:y2, x1:x2]
            assert inside.sum() == mask.sum()
            assert all(e.any() for e in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
        assert target["area"].tolist() == masks.sum((1, 2)).tolist() and not target["iscrowd"].any()


def test_workers_and_length_do_not_change_a_scene(tmp_path):
    kwargs = dict(size=(64, 96), seed=4)
    one = InstanceDataset(write_scenes(tmp_path / "one.h5", n=20, val=4, **kwargs))
    two = InstanceDataset(write_scenes(tmp_path / "two.h5", n=20, val=4, workers=2, **kwargs))
    short = InstanceDataset(write_scenes(tmp_path / "short.h5", n=6, val=0, **kwargs))
    for i in range(20):
        assert all(np.array_equal(one[i][1][k], two[i][1][k]) for k in ("labels", "boxes", "masks"))
        assert np.array_equal(one[i][0], two[i][0]) and one.info(i) == two.info(i)
    assert all(np.array_equal(short[i][0], one[i][0]) for i in range(6))


def test_the_file_gives_credit_and_stays_small(tmp_path):
    path = write_scenes(tmp_path / "s.h5", n=30, val=10)
    with h5py.File(path) as f:
        assert "Twemoji" in f.attrs["made_by"] and "CC-BY" in f.attrs["made_by"]
        assert len(f["image_bytes"]) / 30 < 17_000
    assert "Twemoji" in InstanceDataset(path).info(0)["license"]


def test_classes_and_sizes_are_balanced():
    drawn = [scene(6, i) for i in range(60)]
    labels = np.concatenate([labels for _, labels, _ in drawn])
    areas = np.concatenate([masks.sum((1, 2)) for *_, masks in drawn])
    assert np.bincount(labels, minlength=4)[1:].min() / len(labels) > .25
    assert .2 < (areas < 32**2).mean() < .7 and (areas > 64**2).mean() > .04


def test_wrong_requests_are_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "s.h5"
    wrong = [
        (dict(n=5, val=6), "val=6 of n=5 scenes: it must lie in 0…5"),
        (dict(n=5, val=-1), "val=-1 of n=5 scenes: it must lie in 0…5"),
        (dict(instances=(0, 2)), "instances=\\(0, 2\\): give the fewest, at least 1, and the most"),
        (dict(instances=(4, 2)), "instances=\\(4, 2\\): give the fewest, at least 1, and the most"),
        (dict(size=(16, 256)), "size=\\(16, 256\\): height and width must be at least 32"),
    ]
    for kwargs, message in wrong:
        with pytest.raises(ValueError, match=message): write_scenes(path, **kwargs)
    with pytest.raises(ValueError, match="60 instances find no room in 32 × 32"):
        scene(0, size=(32, 32), instances=(60, 60))
    assert not list(tmp_path.iterdir())


def test_a_file_that_exists_is_kept(tmp_path):
    path = write_scenes(tmp_path / "s.h5", n=2, val=0, size=(64, 64))
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"): write_scenes(path, n=3, val=0, size=(64, 64))
    assert path.read_bytes() == before
    assert len(InstanceDataset(write_scenes(path, n=3, val=0, size=(64, 64), overwrite=True))) == 3


def test_a_run_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    import maskrcnn_course.scenes as scenes
    made = scenes._example
    monkeypatch.setattr(scenes, "_example", lambda index, **kw: made(index, **kw) if index < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError): write_scenes(tmp_path / "s.h5", n=5, val=0, size=(64, 64))
    assert not list(tmp_path.iterdir())


def test_over_and_lay_and_place():
    rng = np.random.default_rng(0)
    picture, layer = rng.random((5, 7, 3), np.float32), rng.random((5, 7, 4), np.float32)
    layer[0, :, 3], layer[1, :, 3] = 0, 1
    result = over(picture, layer)
    assert np.array_equal(result[0], picture[0]) and np.allclose(result[1], layer[1, :, :3], atol=1e-6)
    piece = rng.random((4, 3, 2), np.float32)
    for x, y in ((0, 0), (-2, -3), (6, 4), (-9, 0), (0, 99)):
        canvas = np.pad(np.zeros((5, 7, 2), np.float32), ((200, 200), (200, 200), (0, 0)))
        canvas[200 + y:204 + y, 200 + x:203 + x] = piece
        assert np.array_equal(lay(piece, x, y, (5, 7)), canvas[200:205, 200:207])
    whole = np.ones((20, 30, 4), np.float32)
    assert place(rng, whole, 0, [np.ones((20, 20), bool)], [400], (20, 20)) is None
