"""Measure a trained model on all 9,673 official test questions of easy-vqa.

    python -m benchmarks.easy_vqa.evaluate --model_weights demo_output/vlm --output demo_output/results

Answers count if they are exactly the right word. The table compares the model with itself blind (each question is about
another test picture), and with the answer that is most frequent in training for the question's kind. Writes
results.json, answers.jsonl and table.txt.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from dataset import encode_prompt, load_image
from model import VisionLanguageModel
from model.checkpoints.base_models import load_tokenizer
from qwen import IMAGE_TOKEN, QWenTokenizer
from qwen.answering import answer_text

from .fitting import written_whole
from .questions import KINDS, Question, image_path, load_questions

PUBLISHED_ACCURACY = 0.876
"""A CNN and an LSTM on the same split (https://github.com/vzhou842/easy-VQA-keras)."""
MAX_NEW_TOKENS = 8  # answers have up to three
BATCH = 128


class Respondent:
    """Answers questions about test pictures in batches, greedily.

    Args:
        model: with LoRA merged.
        tokenizer: QWen's.
    """

    def __init__(self, model: VisionLanguageModel, tokenizer: QWenTokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._pixels: dict[int, torch.Tensor] = {}

    def answer_all(self, questions: Sequence[Question], images: Sequence[int], title: str) -> list[str]:
        """Return one answer for each question about the test picture of the same position."""
        prompts = [
            encode_prompt(self.tokenizer, IMAGE_TOKEN + question.text, self.model.num_image_tokens)[0]
            for question in questions
        ]
        answers = [""] * len(questions)
        by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        with tqdm(total=len(prompts), desc=title, unit="question") as bar:
            for start in range(0, len(by_length), BATCH):
                numbers = by_length[start : start + BATCH]
                batch = self._answer([prompts[n] for n in numbers], [images[n] for n in numbers])
                for number, answer in zip(numbers, batch, strict=True):
                    answers[number] = answer
                bar.update(len(numbers))
        return answers

    def _answer(self, prompts: list[list[int]], images: list[int]) -> list[str]:
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        rows = [[self.tokenizer.eod_id] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
        device = self.model.device
        output = self.model.generate(
            torch.tensor(rows, device=device),
            torch.tensor(mask, device=device),
            torch.stack([self._pixels_of(image) for image in images]).to(device),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        return [answer_text(self.tokenizer, row, self.tokenizer.stop_ids) for row in output[:, longest:].tolist()]

    def _pixels_of(self, image_id: int) -> torch.Tensor:
        if image_id not in self._pixels:
            image = load_image(image_path("test", image_id))
            self._pixels[image_id] = self.model.vision_tower.image_transform(image)
        return self._pixels[image_id]


def wrong_images(questions: Sequence[Question]) -> list[int]:
    """Return another test picture for each question: the one half the pictures away."""
    images = sorted({question.image_id for question in questions})
    place = {image: number for number, image in enumerate(images)}
    return [images[(place[question.image_id] + len(images) // 2) % len(images)] for question in questions]


def majority_answers(training: Sequence[Question], questions: Sequence[Question]) -> list[str]:
    """Return for each question the answer that is most frequent for its kind in training."""
    counts: dict[str, Counter[str]] = {}
    for question in training:
        counts.setdefault(question.kind, Counter())[question.answer] += 1
    return [counts[question.kind].most_common(1)[0][0] for question in questions]


def accuracies(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Return the share of exactly right answers, 0 to 1, for each kind of question and for all."""
    right = [question.answer == answer for question, answer in zip(questions, answers, strict=True)]
    result = {}
    for kind in KINDS:
        of_kind = [hit for question, hit in zip(questions, right, strict=True) if question.kind == kind]
        if of_kind:
            result[kind] = sum(of_kind) / len(of_kind)
    result["all"] = sum(right) / len(right)
    return result


def table(questions: Sequence[Question], results: dict[str, dict[str, float]]) -> str:
    """Return accuracies in percent, one line for each kind of question, one column for each way of answering."""
    counts = Counter(question.kind for question in questions)
    counts["all"] = len(questions)
    lines = [f"{'question':<12}{'number':>8}" + "".join(f"{name:>12}" for name in results)]
    for kind in next(iter(results.values())):
        cells = "".join(f"{100 * column[kind]:>11.1f}%" for column in results.values())
        lines.append(f"{kind:<12}{counts[kind]:>8,}{cells}")
    lines.append(f"(A public CNN+LSTM reports {100 * PUBLISHED_ACCURACY:.1f}% on all.)")
    return "\n".join(lines)


def measure(answer_all: Callable[[Sequence[Question], Sequence[int], str], list[str]], output: Path) -> str:
    """Ask everything, seeing and blind; write the results into a folder, and return the table."""
    questions = load_questions("test")
    images, others = [question.image_id for question in questions], wrong_images(questions)
    answers = {
        "model": answer_all(questions, images, "test questions"),
        "blind": answer_all(questions, others, "the same, blind"),
        "majority": majority_answers(load_questions("train"), questions),
    }
    results = {name: accuracies(questions, given) for name, given in answers.items()}
    with written_whole(output) as folder:
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
            for number, question in enumerate(questions):
                record = {"image": question.image_id, "kind": question.kind, "q": question.text, "a": question.answer}
                record |= {name: given[number] for name, given in answers.items()}
                file.write(json.dumps(record) + "\n")
        shown = table(questions, results)
        (folder / "table.txt").write_text(shown + "\n", encoding="utf-8")
    return shown


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_weights", type=Path, required=True, help="checkpoint or run folder")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    args = parser.parse_args()
    model = VisionLanguageModel.from_pretrained(model_weights=args.model_weights)
    model.merge_lora()
    model.eval()
    respondent = Respondent(model, load_tokenizer(model.base_language_model))
    print(measure(respondent.answer_all, args.output))


if __name__ == "__main__":
    main()
