r"""Measure a trained model on the held-out pictures: what kind of thing each shows, and its name.

    python -m benchmarks.real_parts.evaluate --model_weights demo_real_output/vlm \
        --annotations demo_real_output/annotations --tower demo_real_output/dinov2 --output demo_real_output/results

The model is compared with itself blind (each question is about another held-out picture), with the commonest answer of
the training pictures, and, for the kind, with the kinds of the nearest training pictures by the tower's class token,
which no language model has a part in. Three questions without a picture show what training did to the language model.
Writes results.json, answers.json, speech.json and table.txt.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dataset import encode_prompt, load_image
from dataset.prompt import Tokenizer
from model import VisionLanguageModel
from model.checkpoints.base_models import load_tokenizer
from qwen import IMAGE_TOKEN
from qwen.answering import answer_text
from visual import build_vision_tower

from ..easy_vqa.fitting import written_whole
from .questions import KIND_QUESTION, NAME_QUESTION, TEXT_QUESTIONS
from .stamps import content_words

NEIGHBOURS = 5
SEED = 42  # decides which other picture the blind model gets
MAX_NEW_TOKENS = {"kind": 8, "name": 16, "text": 60}
QUESTIONS = {"kind": KIND_QUESTION, "name": NAME_QUESTION}

Shown = dict[str, str]
"""A picture of pictures.json: `file`, `path`, `kind` and `caption`."""


class Respondent:
    """Answers one question about many pictures, or many questions about none, greedily.

    Args:
        model: in `eval()`.
        tokenizer: of its language model.
    """

    def __init__(self, model: VisionLanguageModel, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def pixels(self, files: Sequence[Path]) -> Tensor:
        """Return what the tower reads of pictures: (N, 3, S, S)."""
        transform = self.model.vision_tower.image_transform
        return torch.stack([transform(load_image(file)) for file in files])

    def answer(self, question: str, pixels: Tensor | None, max_new_tokens: int) -> list[str]:
        """Return an answer for each picture of `pixels` (N, 3, S, S); None: one answer, without a picture."""
        text = question if pixels is None else IMAGE_TOKEN + question
        count, system = self.model.num_image_tokens, self.tokenizer.default_system
        prompt = encode_prompt(self.tokenizer, text, count, system=system)[0]
        ids = torch.tensor([prompt] * (1 if pixels is None else len(pixels)), device=self.model.device)  # (N, T)
        if pixels is not None:
            pixels = pixels.to(self.model.device)
        output = self.model.generate(ids, torch.ones_like(ids), pixels, do_sample=False, max_new_tokens=max_new_tokens)
        stop_ids = self.tokenizer.stop_ids
        return [answer_text(self.tokenizer, row, stop_ids).strip() for row in output[:, len(prompt) :].tolist()]

    def speech(self) -> list[str]:
        """Return the answers to the questions without a picture."""
        return [self.answer(question, None, MAX_NEW_TOKENS["text"])[0] for question in TEXT_QUESTIONS]


def is_right(what: str, answer: str, picture: Shown) -> bool:
    """Tell whether an answer is the kind exactly, or has a content word of the caption."""
    if what == "kind":
        return answer.lower().rstrip(".") == picture["kind"]
    return not content_words(answer).isdisjoint(content_words(picture["caption"]))


def commonest(training: Sequence[Shown]) -> dict[str, str]:
    """Return the most frequent kind, and the content word that most captions have."""
    words = Counter(word for picture in training for word in sorted(content_words(picture["caption"])))
    kinds = Counter(picture["kind"] for picture in training)
    return {"kind": kinds.most_common(1)[0][0], "name": words.most_common(1)[0][0]}


def nearest_kinds(held_out: Tensor, training: Tensor, kinds: Sequence[str], number: int = NEIGHBOURS) -> list[str]:
    """Return the kind that most of the nearest training pictures have; of equals, that of the nearest.

    Args:
        held_out: (N, D).
        training: (M, D).
        kinds: M, of the training pictures.
        number: of neighbours, by the cosine.
    """
    similarity = functional.normalize(held_out, dim=-1) @ functional.normalize(training, dim=-1).T  # (N, M)
    votes = [[kinds[index] for index in row] for row in similarity.topk(min(number, len(kinds))).indices.tolist()]
    return [Counter(row).most_common(1)[0][0] for row in votes]  # Counter keeps the order of first votes


def class_tokens(tower_folder: Path, files: Sequence[Path]) -> Tensor:
    """Return the class tokens (N, D) of pictures, which the language model does not get to see."""
    tower = build_vision_tower(str(tower_folder))
    with torch.inference_mode():
        parts = [
            tower.model(pixel_values=tower.image_transform(load_image(file))[None]).last_hidden_state[:, 0]
            for file in files
        ]
    return torch.cat(parts)


def table(held_out: Sequence[Shown], answers: dict[str, dict[str, list[str]]]) -> str:
    """Return the share of right answers in percent, one line for each question, one column for each way of answering.

    Args:
        held_out: pictures.
        answers: by way of answering and question, in the order of the pictures.
    """
    lines = [f"{len(held_out)} held-out pictures" + "".join(f"{name:>12}" for name in answers)]
    width = len(lines[0]) - 12 * len(answers)
    for what in QUESTIONS:
        cells = [f"{'':>12}"] * len(answers)
        for column, given in enumerate(answers.values()):
            if what in given:
                cells[column] = f"{100 * share(what, given[what], held_out):>11.1f}%"
        lines.append(f"{what:<{width}}" + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def share(what: str, given: Sequence[str], held_out: Sequence[Shown]) -> float:
    """Return the share of right answers, 0 to 1."""
    return sum(is_right(what, answer, picture) for answer, picture in zip(given, held_out, strict=True)) / len(given)


def other_pictures(pixels: Tensor) -> Tensor:
    """Return for each picture (N, 3, S, S) another one, at random: the next one in a seeded order."""
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(SEED))
    others = torch.empty_like(pixels)
    others[order] = pixels[order.roll(-1)]
    return others


def answer_all(
    answer: Callable[[str, Tensor, int], list[str]],
    pixels: Tensor,
    shown: dict[str, list[Shown]],
    neighbours: list[str],
) -> dict[str, dict[str, list[str]]]:
    """Return all answers by way of answering and question; `table` explains the result."""
    most = commonest(shown["training"])
    ways = {"model": pixels, "blind": other_pictures(pixels)}
    answers = {
        name: {what: answer(question, seen, MAX_NEW_TOKENS[what]) for what, question in QUESTIONS.items()}
        for name, seen in ways.items()
    }
    answers["commonest"] = {what: [most[what]] * len(pixels) for what in QUESTIONS}
    answers["neighbours"] = {"kind": neighbours}
    return answers


def write_results(
    folder: Path, shown: dict[str, list[Shown]], answers: dict[str, dict[str, list[str]]], speech: list[dict[str, str]]
) -> str:
    """Write everything into a folder, and return the table."""
    held_out = shown["held_out"]
    shares = {name: {what: share(what, given[what], held_out) for what in given} for name, given in answers.items()}
    records = [
        picture | {f"{name} {what}": given[what][number] for name, given in answers.items() for what in given}
        for number, picture in enumerate(held_out)
    ]
    text = table(held_out, answers)
    contents: dict[str, Any] = {"results": shares, "answers": records, "speech": speech}
    with written_whole(folder) as temporary:
        for name, content in contents.items():
            written = json.dumps(content, ensure_ascii=False, indent=1)
            (temporary / f"{name}.json").write_text(written + "\n", encoding="utf-8")
        (temporary / "table.txt").write_text(text + "\n", encoding="utf-8")
    return text


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_weights", type=Path, required=True, help="checkpoint or run folder")
    parser.add_argument("--annotations", type=Path, required=True, help="folder that prepare_data.py wrote")
    parser.add_argument("--tower", type=Path, required=True, help="folder of the tower whose class tokens are compared")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    args = parser.parse_args()
    shown = json.loads((args.annotations / "pictures.json").read_text(encoding="utf-8"))
    files = {
        side: [args.annotations / folder / picture["file"] for picture in shown[side]]
        for side, folder in (("training", "pictures"), ("held_out", "held_out"))
    }
    tokens = {side: class_tokens(args.tower, files[side]) for side in files}
    kinds = [picture["kind"] for picture in shown["training"]]
    neighbours = nearest_kinds(tokens["held_out"], tokens["training"], kinds)

    model = VisionLanguageModel.from_pretrained(model_weights=args.model_weights).eval()
    tokenizer = load_tokenizer(model.base_language_model)
    after = Respondent(model, tokenizer)
    untrained = VisionLanguageModel.from_pretrained(model.base_language_model, model.vision_tower.name_or_path).eval()
    before = Respondent(untrained, tokenizer).speech()
    answers = answer_all(after.answer, after.pixels(files["held_out"]), shown, neighbours)
    speech = [
        {"question": question, "before": old, "after": new}
        for question, old, new in zip(TEXT_QUESTIONS, before, after.speech(), strict=True)
    ]
    print(write_results(args.output, shown, answers, speech))


if __name__ == "__main__":
    main()
