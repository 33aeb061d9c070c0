"""Draw what trained models find on images that they were not trained on, for the README.

    python benchmarks/pictures.py scenes runs/scenes data/scenes.h5
    python benchmarks/pictures.py photos runs/photos coco/instances_val.json coco/images

Of photos, only those whose licence is plain CC BY are shown: the first eight of them that show something. Their credits are written beside the picture.
"""
import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.v2.functional import InterpolationMode, resize, to_pil_image
from torchvision.utils import make_grid

from maskrcnn_course.data import InstanceDataset
from maskrcnn_course.mask_rcnn import load_model
from maskrcnn_course.predict import draw, predict, read_photo

IMAGES = Path(__file__).resolve().parent.parent / "nbs/images"
CC_BY = "http://creativecommons.org/licenses/by/2.0/"


def scenes(args):
    "Eight scenes of the validation part, the first."
    dataset = InstanceDataset(args.data, "val")
    return [resize((dataset[i][0] * 255).round().to(torch.uint8), [384, 512], InterpolationMode.BICUBIC) for i in range(8)], None


def photos(args):
    "Eight photos that may be shown, and whom to thank for them."
    about = json.loads(Path(args.data).read_text())
    licenses = {license["id"]: license["url"] for license in about["licenses"]}
    shown = {annotation["image_id"] for annotation in about["annotations"]}
    chosen = [image for image in about["images"] if licenses[image["license"]] == CC_BY and image["id"] in shown][:8]
    credits = [f"| {i} | COCO {image['id']} | <{image['flickr_url']}> | [CC BY 2.0]({CC_BY}) |" for i, image in enumerate(chosen, 1)]
    return [read_photo(Path(args.images) / image["file_name"]) for image in chosen], credits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["scenes", "photos"])
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("data", help="an HDF5 file of scenes; of photos their annotations")
    parser.add_argument("images", nargs="?", help="folder of the photos")
    args = parser.parse_args()
    model, classes, _ = load_model(Path(args.run) / "model.safetensors")
    images, credits = scenes(args) if args.kind == "scenes" else photos(args)
    drawn = [draw(image, predict(model, [image])[0], classes, 0.5) for image in images]
    size = [min(image.shape[i] for image in drawn) for i in (1, 2)]
    grid = make_grid([image[:, :size[0], :size[1]] for image in drawn], nrow=4, padding=6, pad_value=255)
    picture = to_pil_image(grid)
    picture.resize((1200, round(1200 * picture.height / picture.width)), Image.LANCZOS).save(IMAGES / f"{args.kind}_masks.jpg", quality=85)
    if credits:
        text = ["# Credits", "", "The photos of `photos_masks.jpg`, row by row: cropped and scaled, with masks and boxes drawn over them.", "",
                "| | photo | from | licence |", "|---|---|---|---|", *credits, ""]
        (IMAGES / "CREDITS.md").write_text("\n".join(text))


if __name__ == "__main__": main()
