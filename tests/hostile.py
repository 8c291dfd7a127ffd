"""The ways that data comes in (preparation, training, answering), for one hostile input after the other."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import load_test_py, one_line_error

from dataprocess import process_image
from dataset import ImageCaptionDataset, ImageError, SampleError, VLMCollator
from dataset.prompt import encode_prompt
from model.asking.answer_file import AnswerFile
from model.asking.batch_answers import answer_all
from model.asking.question_file import read_questions

GOOD = "good.png"
ask = load_test_py()


def whole_picture(image: Image.Image) -> torch.Tensor:
    """In place of a tower's transform: all pixels, (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def llava(image: object, question: object, answer: object) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "1", "image": image, "conversations": turns}


def prepare(folder: Path, label: bytes, *flags: str) -> tuple[int, list[dict], list[dict]]:
    """Run process_image.py over a label file, with pictures in `images`; returns exit status, captions and rejects."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "images").mkdir(exist_ok=True)
    (folder / "label.json").write_bytes(label)
    outputs = {"output_image_map": "image_map.json", "output_captions": "captions.json"}
    source = {"image_path": "images", "label_file": "label.json"}
    (folder / "config.yaml").write_text(json.dumps({"llava_sources": [source], **outputs}))
    for name in ("captions.json", "captions_rejects.jsonl"):
        (folder / name).unlink(missing_ok=True)
    status = process_image.main(["--config", str(folder / "config.yaml"), *flags])
    if status:
        return status, [], []
    captions = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    rejects = (folder / "captions_rejects.jsonl").read_text(encoding="utf-8").splitlines()
    return status, list(captions.values()), [json.loads(line) for line in rejects]


def open_dataset(folder: Path, tokenizer: Any, how: str) -> ImageCaptionDataset:
    """Open the files in a folder as train.py does, with any share of bad samples allowed."""
    return ImageCaptionDataset(
        *(folder / "image_map.json", folder / "captions.json", tokenizer, whole_picture),
        num_image_tokens=2,
        on_bad_sample=how,
        max_bad_fraction=1.0,
    )


def train_on_all(folder: Path, tokenizer: Any) -> tuple[str, list[dict[str, Any]]]:
    """Read every sample, with `error` and with `skip`, and see that both agree.

    Returns:
        The problem ("" if there is none), and the samples that can be trained on.
    """
    try:
        strict = open_dataset(folder, tokenizer, "error")
        for index in range(len(strict)):
            strict[index]
        problem = ""
    except (SampleError, ImageError, ValueError) as error:
        problem = str(error)
    try:
        lenient = open_dataset(folder, tokenizer, "skip")
    except ValueError:
        return problem, []
    samples = [lenient[index] for index in range(len(lenient))]
    bad = set(lenient.bad.indices)
    for index in bad:
        assert samples[index]["input_ids"].tolist() == [tokenizer.eod_id]
        assert (samples[index]["labels"] == -100).all()
    messages = lenient.bad.all_messages(lenient)
    assert len(messages) == len(lenient.bad)
    assert bool(messages) == bool(problem)
    assert all(message in problem or problem in message or "bad sample" in problem for message in messages)
    VLMCollator(tokenizer.pad_token_id)([{**sample, "pixel_values": torch.zeros(1, 3, 1, 1)} for sample in samples])
    return problem, [sample for index, sample in enumerate(samples) if index not in bad]


class RecordingAssistant:
    """Takes the place of the model in test.py: keeps the pictures and the prompts it is asked about."""

    def __init__(self, tokenizer: Any, answer: str = "an answer") -> None:
        self.tokenizer = tokenizer
        self.images: list[torch.Tensor] = []
        self.ids: list[list[int]] = []
        self.text = answer

    def features(self, images: Sequence[Image.Image]) -> torch.Tensor | None:
        self.images += [whole_picture(image) for image in images]
        return torch.zeros(len(images), 2, 4) if images else None

    def prompt_ids(self, prompt: str, name: str) -> list[int]:
        return encode_prompt(self.tokenizer, prompt, 2)[0]

    def answer_rows(self, prompts: Sequence[list[int]], features: Sequence[object], seed: int) -> list[str]:
        self.ids += prompts
        return [self.text] * len(prompts)

    def answer(self, prompt: str, features: object, name: str = "") -> str:
        self.ids.append(encode_prompt(self.tokenizer, prompt, 2)[0])
        return self.text


def answer(path: Path | str | None, prompt: str, tokenizer: Any, capsys: Any) -> tuple[str, RecordingAssistant]:
    """Run test.py over a picture, the model apart; returns what it says is wrong ("" if nothing), and what it saw."""
    assistant = RecordingAssistant(tokenizer)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ask, "load_assistant", lambda args: assistant)
        flags = ["--model_weights", "none", "--prompt", prompt] + (
            [] if path is None else ["--image_path", os.fspath(path)]
        )
        status = ask.main(flags)
    out, err = capsys.readouterr()
    if status == 0:
        assert out == "an answer\n"
        return "", assistant
    assert (status, out) == (2, "")
    return one_line_error(err, "test.py"), assistant


def answer_batch(folder: Path, path: str, tokenizer: Any) -> tuple[str, RecordingAssistant]:
    """Ask `test.py --batch` about a picture and a good one, the model apart.

    Returns:
        The problem with the picture or with the whole file ("" if there is none), and what the model saw, the good
        picture apart.
    """
    good = folder / "images" / GOOD
    lines = [{"id": "hostile", "image": path, "prompt": "What?"}, {"id": "good", "image": str(good), "prompt": "What?"}]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        questions = read_questions(folder / "questions.jsonl")
    except ValueError as error:
        return str(error), RecordingAssistant(tokenizer)
    assistant = RecordingAssistant(tokenizer)
    answers = AnswerFile(folder / "answers.jsonl", [question.id for question in questions], {})
    for line in answer_all(assistant, questions, 2, 0):
        answers.add(line)
    hostile, fine = (json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines())
    assert fine == {"id": "good", "answer": "an answer"}, "the good one is answered whatever comes with it"
    assert "\n" not in hostile.get("error", "")
    assistant.images.pop()  # the good one
    return hostile.get("error", ""), assistant
