"""Turn Tux Paint's stamps into pictures and the annotation file that process_image.py reads.

    python -m benchmarks.real_parts.prepare_data --pictures stamps --output demo_real_output/annotations
    python dataprocess/process_image.py --config demo_real_output/annotations/config.yaml

Each picture is put on a white square. Training pictures get altered copies: mirrored, turned a little, cut, and in
somewhat other colours. A tenth of the *pictures* is held out before any copy is made. Writes pictures/, held_out/,
llava.json and config.yaml for training, and pictures.json, which says what each picture shows.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageEnhance, ImageOps

from dataset import load_image

from ..easy_vqa.fitting import written_whole
from .questions import KIND_QUESTION, NAME_QUESTION
from .stamps import Picture, load_pictures, split

COPIES = 8  # of each training picture, the unaltered one and its mirror image included
NAMED_COPIES = 2  # of these, the first ones are asked for their name too
SIDE = 224  # pixels
SEED = 42


def on_white(file: Path) -> Image.Image:
    """Return a picture in the middle of a white square of SIDE pixels; what is transparent becomes white."""
    image = load_image(file)
    side = round(1.05 * max(image.size))
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def altered(image: Image.Image, rng: random.Random) -> Image.Image:
    """Return a copy of a square picture that shows the same thing: turned, cut, in other colours, mirrored or not."""
    side = image.width
    image = image.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor="white")
    kept = round(rng.uniform(0.8, 1.0) * side)
    left, top = rng.randint(0, side - kept), rng.randint(0, side - kept)
    image = image.crop((left, top, left + kept, top + kept)).resize((side, side), Image.Resampling.BICUBIC)
    for change in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
        image = change(image).enhance(rng.uniform(0.75, 1.25))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def copies(image: Image.Image, number: int, rng: random.Random) -> list[Image.Image]:
    """Return the picture, its mirror image, and altered copies up to this number."""
    return [image, ImageOps.mirror(image), *(altered(image, rng) for _ in range(number - 2))][:number]


def file_name(picture: Picture, copy: int) -> str:
    """Return the name of a copy's file."""
    return f"{picture.path.removesuffix('.png').replace('/', '-')}.{copy}.png"


def llava_records(pictures: list[Picture], number: int) -> list[dict[str, Any]]:
    """Return samples in LLaVA's format: the kind for every copy, and for the first copies the name too."""
    records = []
    for picture in pictures:
        for copy in range(number):
            asked = [("kind", KIND_QUESTION, picture.kind), ("name", NAME_QUESTION, picture.caption)]
            for what, question, answer in asked if copy < NAMED_COPIES else asked[:1]:
                turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
                name = file_name(picture, copy)
                records.append({"id": f"{name}-{what}", "image": name, "conversations": turns})
    return records


def write_annotations(source: Path, folder: Path, number: int = COPIES, offset: int = 0) -> None:
    """Write pictures, annotations and the config.yaml that names them into a folder.

    Args:
        source: the folder of all stamps.
        folder: replaced if it exists.
        number: of copies of each training picture.
        offset: of the split.
    """
    training, held_out = split(load_pictures(source), offset)
    rng = random.Random(SEED)
    with written_whole(folder) as temporary:
        for name, pictures, count in (("pictures", training, number), ("held_out", held_out, 1)):
            (temporary / name).mkdir()
            for picture in pictures:
                for copy, made in enumerate(copies(on_white(source / picture.path), count, rng)):
                    made.save(temporary / name / file_name(picture, copy))
        records = llava_records(training, number)
        shown = {
            side: [{"file": file_name(p, 0), "path": p.path, "kind": p.kind, "caption": p.caption} for p in pictures]
            for side, pictures in (("training", training), ("held_out", held_out))
        }
        config = {
            "llava_sources": [{"image_path": str((folder / "pictures").resolve()), "label_file": "llava.json"}],
            "output_image_map": "../image_map.json",
            "output_captions": "../captions.json",
        }
        for name, content in (("llava.json", records), ("pictures.json", shown)):
            text = json.dumps(content, ensure_ascii=False, indent=1)
            (temporary / name).write_text(text + "\n", encoding="utf-8")
        text = yaml.safe_dump(config, allow_unicode=True, sort_keys=False)
        (temporary / "config.yaml").write_text(text, encoding="utf-8")
    print(f"{len(training)} training pictures, {len(records):,} samples; {len(held_out)} pictures held out")


def main() -> None:
    """Write the annotations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="folder of Tux Paint's stamps")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the annotations to")
    args = parser.parse_args()
    write_annotations(args.pictures, args.output)


if __name__ == "__main__":
    main()
