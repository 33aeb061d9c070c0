"Photos and videos as they come from outside, and what is drawn and written of them."
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvf

from maskrcnn_course.data import InstanceDataset
from maskrcnn_course.presets import build_model
from maskrcnn_course.prediction import (COLOURS, draw, find_photos, look, predict, predict_images,
                                        predict_video, read_photo, write_results)
from maskrcnn_course.report import metrics_table, write_report
from maskrcnn_course.scenes import make_scene, write_scenes
from maskrcnn_course.training import evaluate_model

av = pytest.importorskip("av")
CLASSES = ["vehicle", "person", "animal"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model("tiny", 4, pretrained=False).eval()


@pytest.fixture(scope="module")
def picture():
    return make_scene(np.random.default_rng(0), (64, 96))[0]


@pytest.mark.parametrize("turn, there", [
    (1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (4, np.flipud),
    (5, lambda a: a.transpose(1, 0, 2)), (6, lambda a: np.rot90(a, 1)),
    (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)), (8, lambda a: np.rot90(a, -1))])
def test_every_exif_orientation_comes_out_upright(tmp_path, picture, turn, there):
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(np.ascontiguousarray(there(picture))).save(tmp_path / "p.png", exif=exif)
    assert np.array_equal(read_photo(tmp_path / "p.png").permute(1, 2, 0).numpy(), picture)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_is_read_as_rgb(tmp_path, picture, mode):
    grey = Image.fromarray(picture).convert("L")
    if mode == "I;16": image = Image.fromarray(np.asarray(grey, np.uint16) * 257)
    elif mode == "I": image = Image.fromarray(np.asarray(grey, np.int32) * 257)
    elif mode == "F": image = Image.fromarray(np.asarray(grey, np.float32) / 255)
    else: image = Image.fromarray(picture).convert(mode)
    assert image.mode == mode
    image.save(tmp_path / "p.tif")
    read = read_photo(tmp_path / "p.tif")
    assert read.dtype == torch.uint8 and read.shape == (3, 64, 96)
    wanted = np.asarray(grey.convert("RGB") if mode in ("L", "LA", "I;16", "I", "F")
                        else image.convert("RGB"))
    assert np.abs(read.permute(1, 2, 0).numpy().astype(int) - wanted).max() <= 1


def test_a_16_bit_png_is_not_white(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / "p.png")
    assert (read_photo(tmp_path / "p.png")[0, 0] - torch.arange(256)).abs().max() <= 1


def test_a_float_picture_with_nan_or_of_one_value_is_read(tmp_path):
    for value in (0.0, float("nan"), -1.0):
        Image.fromarray(np.full((4, 5), value, np.float32)).save(tmp_path / "p.tif")
        assert read_photo(tmp_path / "p.tif").shape == (3, 4, 5)


def test_what_is_transparent_is_white(tmp_path):
    for mode in ("RGBA", "LA"):
        Image.new(mode, (5, 4)).save(tmp_path / "p.png")
        assert (read_photo(tmp_path / "p.png") == 255).all()
    image = Image.new("P", (5, 4))
    image.save(tmp_path / "p.gif", transparency=0)
    assert (read_photo(tmp_path / "p.gif") == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
@pytest.mark.parametrize("part", [0, 0.1, 0.6])
def test_a_cut_photo_is_named(tmp_path, picture, kind, part):
    path = tmp_path / f"p.{kind.lower()}"
    Image.fromarray(picture).save(path)
    path.write_bytes(path.read_bytes()[:int(part * path.stat().st_size)])
    with pytest.raises(ValueError, match=re.escape(str(path))): read_photo(path)


def test_a_decompression_bomb_is_named_and_not_opened(tmp_path, monkeypatch, picture):
    Image.fromarray(picture).save(tmp_path / "p.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="p.png.*bomb"): read_photo(tmp_path / "p.png")


def test_folders_give_their_photos_by_name_and_leave_out_the_rest(tmp_path):
    for name in ("b.JPG", "a.png", ".c.png", "notes.txt"): (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    assert [p.name for p in find_photos([tmp_path, tmp_path / "notes.txt"])] == [
        "a.png", "b.JPG", "notes.txt"]
    with pytest.raises(FileNotFoundError, match="no photos"): find_photos([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="gone"): find_photos([tmp_path / "gone"])


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (1, 300), (300, 1), (2, 5000), (5000, 3),
                                  (37, 91), (700, 900), (3000, 4000)])
def test_photos_of_any_size(model, size):
    photo = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    [prediction] = predict(model, [photo], threshold=0.1)
    n = len(prediction["labels"])
    assert prediction["masks"].shape == (n, 1, *size) and prediction["masks"].dtype == torch.bool
    boxes = prediction["boxes"]
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= size[1] + 1e-2).all() and (boxes[:, 3] <= size[0] + 1e-2).all()
    assert draw(photo, prediction, CLASSES, 0.1).shape == photo.shape


def test_predict_gives_what_the_model_gives(model):
    images = [torch.rand(3, 64, 64), torch.rand(3, 50, 64), torch.rand(3, 100, 70)]
    with torch.no_grad(): expected = model(images)
    for threshold in (0.0, 0.3):
        for got, full in zip(predict(model, images, threshold), expected):
            keep = full["scores"] >= threshold
            for k in ("boxes", "labels", "scores"): torch.testing.assert_close(got[k], full[k][keep])
            assert ((got["masks"] == (full["masks"][keep] > 0.5)).float().mean() if keep.any() else 1) > 0.999


def test_a_large_photo_is_seen_as_its_small_version(model):
    small = tvf.resize(tvf.to_image(Image.fromarray(make_scene(np.random.default_rng(1), (64, 64))[0])),
                       [64, 64])
    large = small.repeat_interleave(9, 1).repeat_interleave(9, 2)
    # one pixel in two is dark: a single sample would take one of them
    noise = torch.tensor([0, 80])[torch.arange(576) % 2].expand(576, 576)
    photo = (large.int() - noise.int()).clamp(0, 255).to(torch.uint8)
    seen, expected = (
        predict(model, [x], 0.0)[0]["scores"]
        for x in (photo, photo.float().unfold(1, 9, 9).unfold(2, 9, 9).mean((3, 4)) / 255))
    torch.testing.assert_close(seen[:5], expected[:5], atol=0.02, rtol=0)


def test_batches_of_any_size_agree(model, tmp_path, picture):
    for i, size in enumerate([(64, 96), (30, 20), (200, 300)]):
        Image.fromarray(picture).resize(size[::-1]).save(tmp_path / f"{i}.png")
    one, three = (list(predict_images(model, [tmp_path], batch_size=b, threshold=0.1)) for b in (1, 3))
    assert [p.name for p, *_ in one] == [p.name for p, *_ in three] == ["0.png", "1.png", "2.png"]
    for (_, a, x), (_, b, y) in zip(one, three):
        assert torch.equal(a, b)
        torch.testing.assert_close(x["boxes"], y["boxes"], atol=0.05, rtol=1e-3)


def test_damaged_photos_are_named_and_passed_over(model, tmp_path, picture, capsys):
    Image.fromarray(picture).save(tmp_path / "b.png")
    for name in ("a.png", "c.jpg"): (tmp_path / name).write_bytes(b"no")
    assert [p.name for p, *_ in predict_images(model, [tmp_path])] == ["b.png"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "a.png" in said[0] and "c.jpg" in said[1]
    with pytest.raises(ValueError, match="none of the 2 photos"):
        list(predict_images(model, [tmp_path / "a.png", tmp_path / "c.jpg"]))


def test_draw_colours_by_class_and_leaves_the_rest(picture):
    image, mask = torch.from_numpy(picture).permute(2, 0, 1), torch.zeros(1, 64, 96, dtype=torch.uint8)
    mask[:, 20:60, 30:80] = 1
    target = dict(boxes=torch.tensor([[30., 20, 80, 60]]), labels=torch.tensor([2]), masks=mask)
    before = image.clone()
    drawn = draw(image, target, CLASSES)
    assert torch.equal(image, before) and torch.equal(drawn[:, :18], image[:, :18])
    purple = torch.tensor([int(COLOURS[1][i:i + 2], 16) for i in (1, 3, 5)])
    assert torch.equal(drawn[:, 60, 50], purple.to(torch.uint8))                       # the box's lower edge
    assert (drawn[:, 55, 50] - (image[:, 55, 50] + purple) / 2).abs().max() <= 1       # half mask, half photo
    weak = dict(target, scores=torch.tensor([0.4]), masks=mask[:, None].float())
    assert torch.equal(draw(image, weak, CLASSES), image)
    assert not torch.equal(draw(image, weak, CLASSES, 0.4), image)
    assert torch.equal(draw(image / 255, target, CLASSES), drawn)


def test_write_results_replaces_in_one_step(tmp_path):
    path = write_results(tmp_path / "new" / "r.json", [1])
    with pytest.raises(TypeError): write_results(path, [object()])
    assert json.loads(path.read_text()) == [1] and [p.name for p in path.parent.iterdir()] == ["r.json"]


def film(path, frames, rate=10, times=None):
    "Write frames [3, height, width] as a video."
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "10"})
        stream.height, stream.width, stream.pix_fmt = frames[0].shape[0], frames[0].shape[1], "yuv420p"
        for i, frame in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))
            if times: frame.pts = times[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def watch(path):
    "Times and frames of a video, as a player that turns it shows them."
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.format.name.startswith("mov")
        return ([f.time for f in frames],
                [np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90) for f in frames])


def test_a_video_keeps_its_times_and_pictures(model, picture, tmp_path):
    source = film(tmp_path / "in.mp4", [np.roll(picture, i, 1) for i in range(9)],
                  times=[0, 1, 2, 4, 5, 9, 10, 11, 20])
    out = predict_video(model, source, tmp_path / "out" / "o.mp4", CLASSES, threshold=0.99)
    (times, frames), (new_times, new) = watch(source), watch(out)
    assert new_times == pytest.approx(times, abs=1e-3) and len(new) == 9
    assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(frames, new)) < 6
    assert [p.name for p in out.parent.iterdir()] == ["o.mp4"]


def test_a_video_with_odd_sides_loses_a_row(model, tmp_path):
    frames = [make_scene(np.random.default_rng(0), (63, 65))[0]] * 2
    with av.open(str(tmp_path / "in.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.height, stream.width, stream.pix_fmt = 63, 65, "yuv444p"
        for frame in frames: container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    assert watch(predict_video(model, tmp_path / "in.mkv", tmp_path / "o.mp4", CLASSES))[1][0].shape == (
        62, 64, 3)


def test_a_video_held_upright_stays_upright(model, picture, tmp_path):
    data = film(tmp_path / "in.mp4", [picture] * 3).read_bytes()
    one, identity = 0x10000, np.array([0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000], ">i4").tobytes()
    quarter = np.array([0, one, 0, -one, 0, 0, 64 * one, 0, 0x40000000], ">i4").tobytes()
    header = data.index(b"tkhd")
    at = data.index(identity, header)
    (tmp_path / "turned.mp4").write_bytes(data[:at] + quarter + data[at + 36:])
    _, frames = watch(predict_video(model, tmp_path / "turned.mp4", tmp_path / "o.mp4", CLASSES,
                                    threshold=0.99))
    assert frames[0].shape == (96, 64, 3)
    # a quarter turn clockwise, as players show it
    assert np.abs(frames[0].astype(int) - np.rot90(picture, -1)).mean() < 12


@pytest.mark.parametrize("content", [b"", b"no video", "cut", "photo"])
def test_a_damaged_video_is_named_and_nothing_is_left(model, picture, tmp_path, content):
    source = tmp_path / "in.mp4"
    film(source, [picture] * 5)
    if content == "cut": source.write_bytes(source.read_bytes()[:-400])
    elif content == "photo": (tmp_path / "in.mp4").write_bytes(b"RIFF0000AVI LIST")
    else: source.write_bytes(content)
    with pytest.raises(ValueError, match="in.mp4"): predict_video(model, source, tmp_path / "o.mp4", CLASSES)
    assert [p.name for p in tmp_path.iterdir()] == ["in.mp4"]


def test_look_is_in_the_coordinates_of_the_photo(model):
    image, labels, masks = make_scene(np.random.default_rng(5), (96, 128), instances=(2, 3))
    n = len(labels)
    boxes = torch.tensor([[np.nonzero(m.any(0))[0].min(), np.nonzero(m.any(1))[0].min(),
                           np.nonzero(m.any(0))[0].max() + 1, np.nonzero(m.any(1))[0].max() + 1]
                          for m in masks], dtype=torch.float32)
    target = dict(boxes=boxes, labels=torch.from_numpy(labels),
                  masks=torch.from_numpy(masks).to(torch.uint8), image_id=1,
                  area=torch.ones(n), iscrowd=torch.zeros(n, dtype=torch.int64))
    seen = look(model, tvf.to_dtype(torch.from_numpy(image).permute(2, 0, 1), torch.float32, scale=True),
                target)
    # the model itself sees 64 pixels
    assert seen["proposals"][:, 2].max() > 64 and (seen["proposals"][:, 2] <= 128.01).all()
    assert len(seen["anchors"]) >= n and len(seen["before"]["boxes"]) == 20
    assert ((seen["iou"] >= 0) & (seen["iou"] <= 1)).all()
    assert set(seen["after"]) == {"boxes", "labels", "scores", "masks"}


@pytest.fixture(scope="module")
def report(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run <b>")
    write_scenes(folder / "s.h5", n=8, val=4, size=(64, 64), instances=(1, 2))
    dataset = InstanceDataset(folder / "s.h5", "val")
    metrics, _ = evaluate_model(model, dataset)
    history = [dict(stage="rpn", epoch=e, seconds=1.0,
                    train={"loss_objectness": 1 / e}, val={"loss_objectness": 1.0}) for e in (1, 2)]
    return folder, write_report(folder, model, dataset, CLASSES, history, metrics, n=3), metrics, dataset


def test_the_report_needs_no_other_file_and_is_escaped(report):
    folder, path, metrics, _ = report
    page = path.read_text(encoding="utf-8")
    assert path == folder / "report.html" and not list(folder.glob(".*.tmp"))
    assert not re.search(r'(src|href)="(?!data:|#)|url\((?!data:|#)|@import|<script|<b>/',
                         page.replace('xlink:href="#', 'href="#'))
    assert page.count("<figure>") == 3 * 6 and page.count("data:image/jpeg") == 3 * 3
    assert "run &lt;b&gt;" in page
    assert f"{metrics['rpn']['accuracy']:.3f}" in page and "rpn: objectness" in page


def test_a_report_of_images_without_objects_and_without_curves(model, report, tmp_path):
    _, _, metrics, dataset = report

    class Empty(InstanceDataset):
        def __getitem__(self, i):
            image, target = super().__getitem__(i)
            return image, {k: v if k == "image_id" else v[:0] for k, v in target.items()}

    assert write_report(tmp_path, model, Empty(dataset.path, "val"), CLASSES, [], metrics, n=99).is_file()


def test_the_table_shows_what_there_is_nothing_of_as_a_dash():
    row = {"AP": 0.5, "AP50": 0.75, "AP75": -1.0}
    assert metrics_table({"bbox": row | {"per_class": {"cat": row}}}) == [
        ["", "box AP", "box AP50", "box AP75"],
        ["all", "0.500", "0.750", "–"],
        ["cat", "0.500", "0.750", "–"]]
