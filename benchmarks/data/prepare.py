"""Preparing and opening data of the real size: time and memory, and how both grow.

    python -m benchmarks.data.prepare [--scale 1.0] [--output OUTPUT]

Synthetic annotations are as large as the real ones: 210,000 AI Challenger photos of five Chinese sentences, 77,000
LLaVA records of complex reasoning and 23,000 of detailed description (each of one question and one answer, as the
published files have it); and for comparison a tenth of each. `dataprocess/process_image.py` prepares them, and the data
set of training opens the result. Of the photos only a few hundred exist. Seconds are the clock's, and in brackets the
processor's, which other work on the machine does not change.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from ..inputs import SEED
from ..measure import ROOT, itself, parser, publish, run_once, text_table

PHOTOS, REASONING, DETAIL = 210_000, 77_000, 23_000
PICTURES = 400
RUNS = itself(str(Path(__file__).with_name("prepare_run.py")))
_CHINESE = "一个穿着白色上衣的男人站在绿草如茵球场前面拿话筒舞台女孩双手两人走道路旁边戴墨镜坐椅子孩"
_ENGLISH = (
    "the a person image with of in street people standing near table while holding which might be enjoying their "
    "time together several cars background suggests that they are likely to consider various factors such as weather"
)


@dataclass(frozen=True)
class Goal:
    """The limit of one figure."""

    name: str
    """Of the figure, with its unit."""
    value: float
    """As it was measured, in that unit."""
    limit: float
    """The most that it may be."""
    note: str = ""
    """Printed after it."""


def sentences(rng: random.Random, number: int) -> tuple[list[str], list[str]]:
    """Return pools of Chinese captions of 14 to 30 characters, and of English sentences of 8 to 26 words."""
    words = _ENGLISH.split()
    chinese = ["".join(rng.choices(_CHINESE, k=rng.randint(14, 30))) for _ in range(number)]
    english = [" ".join(rng.choices(words, k=rng.randint(8, 26))).capitalize() + "." for _ in range(number)]
    return chinese, english


def write_annotations(folder: Path, scale: float, pictures: int = PICTURES) -> None:
    """Write three annotation files, the pictures that exist, and the configuration that names them."""
    rng = random.Random(SEED)
    chinese, english = sentences(rng, 20_000)
    photos = [
        {"url": f"http://n.sinaimg.cn/{i}", "image_id": f"{i:040x}.jpg", "caption": rng.choices(chinese, k=5)}
        for i in range(int(PHOTOS * scale))
    ]
    files: dict[str, list[dict[str, Any]]] = {"ai_challenger": photos}
    for name, number, fewest, most in (("reasoning", REASONING, 5, 11), ("detail", DETAIL, 4, 8)):
        files[name] = [
            {
                "id": f"{i:012d}",
                "image": f"{name}_{i:012d}.jpg",
                "conversations": [
                    {"from": "human", "value": rng.choice(english) + "\n<image>"},
                    {"from": "gpt", "value": " ".join(rng.choices(english, k=rng.randint(fewest, most)))},
                ],
            }
            for i in range(int(number * scale))
        ]
    for name, records in files.items():
        (folder / f"{name}.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    (folder / "photos").mkdir()
    present = rng.sample(range(len(photos)), min(pictures, len(photos)))
    for i in present:
        small = Image.frombytes("RGB", (16, 12), rng.randbytes(16 * 12 * 3))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(folder / "photos" / photos[i]["image_id"], quality=90)
    (folder / "with_picture.json").write_text(json.dumps(present))
    config = {
        "ali_image_path": "photos",
        "ali_image_path_label_file": "ai_challenger.json",
        "coco_image_path": "photos",
        "coco_image_path_label_file1": "reasoning.json",
        "coco_image_path_label_file2": "detail.json",
        "output_image_map": "image_map.json",
        "output_captions": "captions.json",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def measure(folder: Path, *, whole: bool) -> dict[str, float]:
    """Prepare and open what is in a folder; data workers and pictures only for the whole size."""
    script = ROOT / "dataprocess" / "process_image.py"
    run = run_once([sys.executable, str(script), "--config", str(folder / "config.yaml")])
    figures = {
        "process_seconds": run.seconds,
        "process_processor_seconds": run.cpu_seconds,
        "process_bytes": float(run.peak_bytes),
    }
    for what in ("ready", "workers", "images") if whole else ("ready",):
        figures |= run_once([*RUNS, what, "--folder", str(folder)]).values
    return figures


def goals(tenth: dict[str, float], whole: dict[str, float]) -> list[Goal]:
    """Return the figures with their limits."""
    ratio = whole["process_processor_seconds"] / tenth["process_processor_seconds"]
    opened = whole["ready_processor_seconds"] / tenth["ready_processor_seconds"]
    anywhere = whole["sample_seconds"] / tenth["sample_seconds"]
    megabyte = 1e6
    return [
        Goal("process_image.py, s", whole["process_seconds"], 40, f"({whole['process_processor_seconds']:.1f})"),
        Goal("process_image.py, MB", whole["process_bytes"] / megabyte, 2000),
        Goal("process_image.py, ten times the data, times the time", ratio, 10),
        Goal("data set ready, s", whole["ready_seconds"], 10, f"({whole['ready_processor_seconds']:.1f})"),
        Goal("data set ready, MB more at most", whole["ready_bytes"] / megabyte, 1500),
        Goal("data set, MB that stay", whole["kept_bytes"] / megabyte, 1500),
        Goal("data set ready, ten times the data, times the time", opened, 10),
        Goal("one sample's texts, µs", 1e6 * whole["sample_seconds"], 1000),
        Goal("one sample of ten times the data, times the time", anywhere, 1.5),
        Goal("worker of its own, MB", whole["worker_bytes"] / megabyte, 100),
        Goal(
            "one picture of 640 × 480, decoded and resized, ms",
            1e3 * whole["image_processor_seconds"],
            1000,
            f"{whole['images_per_second']:.0f} a second with 2 workers",
        ),
    ]


def main() -> None:
    """Measure, print the table, and write it."""
    parse = parser(__doc__)
    parse.add_argument("--scale", type=float, default=1.0, help="share of the real size (%(default)s)")
    parse.add_argument("--pictures", type=int, default=PICTURES, help="photos that exist (%(default)s)")
    given = parse.parse_args()
    found = {}
    for name, scale in (("a tenth", given.scale / 10), ("whole", given.scale)):
        with tempfile.TemporaryDirectory() as temporary:
            write_annotations(Path(temporary), scale, given.pictures)
            found[name] = measure(Path(temporary), whole=name == "whole")
    rows = goals(found["a tenth"], found["whole"])
    print(f"{found['whole']['samples']:,.0f} samples; seconds in brackets are the processor's")
    cells = [[goal.name, f"{goal.value:,.2f}", f"{goal.limit:,.1f}", goal.note] for goal in rows]
    print(text_table(["", "found", "at most", ""], cells))
    panels = {
        "processor seconds": {
            name: {
                "process_image.py": one["process_processor_seconds"],
                "data set ready": one["ready_processor_seconds"],
            }
            for name, one in found.items()
        },
        "MB": {
            name: {"process_image.py": one["process_bytes"] / 1e6, "data set ready": one["ready_bytes"] / 1e6}
            for name, one in found.items()
        },
    }
    results = {"scale": given.scale, "figures": found}
    publish(given.output, "prepare", results, "Annotations of the real size, and a tenth of them", panels)


if __name__ == "__main__":
    main()
