"""Preparing and opening data of the real size: time and memory, and how both grow.

    python -m benchmarks.data.prepare [--scale 1.0] [--output OUTPUT]

Annotations as large as the real ones are made up: 210,000 AI Challenger photos of five Chinese sentences, 77,000 LLaVA
records of complex reasoning and 23,000 of detailed description (each of one question and one answer, as the published
files have it), and for comparison a tenth of each. `dataprocess/process_image.py` prepares them, and the data set of
training opens what it wrote. Of the photos only a few hundred exist. Seconds are the clock's, and in brackets the
processor's, which other work on the machine does not change.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from ..measure import RESULTS, draw_bars, machine, run_once, text_table, write_results

SEED = 42
PHOTOS, REASONING, DETAIL = 210_000, 77_000, 23_000
PICTURES = 400
_CHINESE = "一个穿着白色上衣的男人站在绿草如茵球场前面拿话筒舞台女孩双手两人走道路旁边戴墨镜坐椅子孩"
_ENGLISH = (
    "the a person image with of in street people standing near table while holding which might be enjoying their "
    "time together several cars background suggests that they are likely to consider various factors such as weather"
)


@dataclass(frozen=True)
class Goal:
    """What is asked of one figure."""

    name: str
    """What was measured, with its unit."""
    value: float
    """What was found, in that unit."""
    limit: float
    """The most that it may be."""
    note: str = ""
    """What else is to be said of it."""


def sentences(rng: random.Random, number: int) -> tuple[list[str], list[str]]:
    """Pools of Chinese captions of 14 to 30 characters, and of English sentences of 8 to 26 words."""
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
    """Prepare and open what lies in a folder; workers and pictures only where the whole of it is asked for."""
    before = _processor_seconds()
    script = Path(__file__).resolve().parents[2] / "dataprocess" / "process_image.py"
    run = run_once([sys.executable, str(script), "--config", str(folder / "config.yaml")])
    figures = {
        "process_seconds": run.seconds,
        "process_processor_seconds": _processor_seconds() - before,
        "process_bytes": float(run.peak_bytes),
    }
    for what in ("ready", "workers", "images") if whole else ("ready",):
        command = [sys.executable, "-m", "benchmarks.data.prepare_run", what, "--folder", str(folder)]
        figures |= run_once(command).values
    return figures


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def goals(tenth: dict[str, float], whole: dict[str, float]) -> list[Goal]:
    """What was asked, beside what was found."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the real size")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="photos that exist")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of JSON and PNG (%(default)s)")
    given = parser.parse_args()
    found = {}
    for name, scale in (("a tenth", given.scale / 10), ("whole", given.scale)):
        with tempfile.TemporaryDirectory() as temporary:
            write_annotations(Path(temporary), scale, given.pictures)
            found[name] = measure(Path(temporary), whole=name == "whole")
    rows = goals(found["a tenth"], found["whole"])
    print(f"{found['whole']['samples']:,.0f} samples; seconds in brackets are the processor's")
    cells = [[g.name, f"{g.value:,.2f}", f"{g.limit:,.1f}", g.note or ""] for g in rows]
    print(text_table(["", "found", "at most", ""], cells))
    write_results(given.output / "prepare.json", {"machine": machine(), "scale": given.scale, "figures": found})
    seconds = {
        name: {
            "process_image.py": one["process_processor_seconds"],
            "data set ready": one["ready_processor_seconds"],
        }
        for name, one in found.items()
    }
    memory = {
        name: {"process_image.py": one["process_bytes"] / 1e6, "data set ready": one["ready_bytes"] / 1e6}
        for name, one in found.items()
    }
    draw_bars(
        given.output / "prepare.png",
        "Annotations of the real size, and a tenth of them",
        {"processor seconds": seconds, "MB": memory},
    )


if __name__ == "__main__":
    main()
