"""Turn easy-vqa's training split into the annotation files that process_image.py reads.

    python -m benchmarks.easy_vqa.prepare_data --output demo_output/annotations
    python dataprocess/process_image.py --config demo_output/annotations/config.yaml

Questions become conversations in LLaVA's format; what the pictures show becomes five Chinese captions each in AI
Challenger's format. Pictures stay in the installed package.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import yaml

from .fitting import written_whole
from .questions import Question, image_folder, load_questions, questions_by_image, scenes_told
from .shapes import Scene
from .texts import split_into_conversations

TURNS = 3  # questions of one conversation: the picture, most of the tokens, is read once for all of them
SEED = 42


def llava_records(questions: list[Question], num_turns: int = TURNS) -> list[dict[str, Any]]:
    """Return conversations of `num_turns` questions about one picture, in a seeded random order, in LLaVA's format."""
    rng = random.Random(SEED)
    records = []
    for image_id, group in questions_by_image(questions).items():
        rng.shuffle(group)
        for number, part in enumerate(split_into_conversations(group, num_turns)):
            turns: list[dict[str, str]] = []
            for question in part:
                before = "" if turns else "<image>\n"
                turns.append({"from": "human", "value": before + question.text})
                turns.append({"from": "gpt", "value": question.answer})
            records.append({"id": f"{image_id}-{number}", "image": f"{image_id}.png", "conversations": turns})
    return records


def ai_challenger_records(scenes: dict[int, Scene]) -> list[dict[str, Any]]:
    """Return five Chinese captions of every picture, in AI Challenger's format."""
    return [
        {"url": "", "image_id": f"{image_id}.png", "caption": scene.chinese_captions}
        for image_id, scene in scenes.items()
    ]


def write_annotations(folder: Path) -> None:
    """Write both label files and the config.yaml that names them into a folder."""
    questions = load_questions("train")
    records = {
        "llava.json": llava_records(questions),
        "ai_challenger.json": ai_challenger_records(scenes_told(questions)),
    }
    config = {
        "ali_image_path": str(image_folder("train")),
        "ali_image_path_label_file": "ai_challenger.json",
        "coco_image_path": str(image_folder("train")),
        "coco_image_path_label_file1": "llava.json",
        "output_image_map": "../image_map.json",
        "output_captions": "../captions.json",
        "seed": SEED,
    }
    with written_whole(folder) as temporary:
        for name, content in records.items():
            text = json.dumps(content, ensure_ascii=False, indent=1)
            (temporary / name).write_text(text + "\n", encoding="utf-8")
            print(f"{folder / name}: {len(content):,} records")
        text = yaml.safe_dump(config, allow_unicode=True, sort_keys=False)
        (temporary / "config.yaml").write_text(text, encoding="utf-8")


def main() -> None:
    """Write the annotations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the annotations to")
    write_annotations(parser.parse_args().output)


if __name__ == "__main__":
    main()
