"""--eval_generate: metrics while training are those of evaluate.py, and training does not notice."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stopped_runs import KillAt, Killed
from tiny_run import (
    build_trainer,
    losses,
    make_language_model,
    one_line_error,
    start,
    trained_weights,
    write_data,
)
from tiny_towers import make_clip_checkpoint

import evaluate
import train
from dataprocess.image_io import ImageError
from dataset.annotations import Annotations
from model.evaluation import answering_samples
from model.evaluation.answering_samples import AnswerSamples, choose_samples
from model.evaluation.metrics import VARIANTS

SAMPLES = [
    ("red.png", ("Which?<|extra_0|>", ["red", "Red"])),
    ("blue.png", ("Which?<|extra_0|>", "blue")),
    (["green.png", "yellow.png"], ("Both <|extra_0|> and <|extra_0|>?", "grass")),
    ("black.png", {"turns": [{"q": "<|extra_0|>Dark?", "a": "yes"}, {"q": "Why?", "a": "ink"}]}),
    (None, ("1 + 1?", "2")),
    ("white.png", {"turns": [{"q": "Hello", "a": "Hi"}, {"q": "<|extra_0|>Dark?", "a": "no"}]}),
]
"""All kinds; the last one brings its picture in a later question."""
ANSWERING = ["--eval_generate", "5", "--eval_max_new_tokens", "6"]
QUICK = [
    *("--use_cpu", "true", "--disable_tqdm", "true", "--logging_steps", "1", "--per_device_train_batch_size", "3"),
    *("--eval_strategy", "steps", "--learning_rate", "1e-2", "--feature_proj_lr", "2e-2"),
]
LORA = ["--lora_rank", "16", "--lora_alpha", "32", "--lora_dropout", "0.05", "--target_modules", "c_attn|w1|w2|c_proj"]
LONG = [
    *QUICK,
    *LORA,
    *("--max_steps", "18", "--eval_steps", "6", "--save_steps", "6", "--per_device_eval_batch_size", "2"),
    *("--metric_for_best_model", "exact_match", "--load_best_model_at_end", "true"),
]
SHORT = ["--max_steps", "2", "--eval_steps", "1", "--save_steps", "1", "--report_to", "none"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory, qwen_tiktoken) -> list[str]:
    """A language model whose head is loud enough to learn short answers in a few steps."""
    folder = tmp_path_factory.mktemp("bases")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "kv_channels": 16, "intermediate_size": 256}
    language = make_language_model(folder / "qwen", qwen_tiktoken, head_scale=2.0, **sizes)
    return ["--base_language_model", language, "--base_value_model", make_clip_checkpoint(folder / "clip")]


@pytest.fixture(scope="module")
def data(tmp_path_factory, pictures) -> list[str]:
    flags = write_data(tmp_path_factory.mktemp("data"), SAMPLES, pictures["red"].parent)
    return [*flags, "--eval_image_map", flags[1], "--eval_captions_file", flags[3]]


def states() -> list[object]:
    """All random generators."""
    return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]  # noqa: NPY002


@pytest.fixture(scope="module")
def answered(bases, data, tmp_path_factory):
    """A run that answers: its folder, and what was answered at each evaluation. All else stays as it is meanwhile."""
    folder, seen = tmp_path_factory.mktemp("run"), []
    call = AnswerSamples.__call__

    def watched(self):
        model = self.trainer.model
        before = states(), [part.training for part in model.modules()], [p.requires_grad for p in model.parameters()]
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        found = call(self)
        assert before == (
            states(),
            [part.training for part in model.modules()],
            [p.requires_grad for p in model.parameters()],
        )
        assert all(torch.equal(*pair) for pair in zip(weights, model.parameters(), strict=True))
        return found

    def show(self, answers):
        seen.append({self.items[at].question.id: answer for at, answer in answers.items()})
        return shown(self, answers)

    shown = AnswerSamples._show
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnswerSamples, "__call__", watched)
        patch.setattr(AnswerSamples, "_show", show)
        flags = [*bases, *data, *LONG, *ANSWERING, "--report_to", "tensorboard"]
        assert train.main([*flags, "--output_dir", str(folder)]) == 0
    return folder, seen


def evaluations(state: dict) -> list[dict]:
    """What each evaluation logged, but for its speed."""
    kept = [entry for entry in state["log_history"] if "eval_loss" in entry]
    return [{key: value for key, value in one.items() if not re.search("runtime|per_second", key)} for one in kept]


def state_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer_state.json").read_text())


# ---- The metrics


def test_metrics_and_answers_are_those_of_evaluate_py(answered, data, tmp_path):
    folder, seen = answered
    logged = evaluations(state_of(folder / "checkpoint-18"))
    assert [entry["step"] for entry in logged] == [6, 12, 18]
    assert logged[0]["eval_exact_match"] < logged[-1]["eval_exact_match"], "something was learnt"
    for at, checkpoint in ((0, folder / "checkpoint-6"), (2, folder / "checkpoint-18")):
        output = tmp_path / checkpoint.name
        flags = ["--model_weights", str(checkpoint), "--image_map", data[1], "--captions_file", data[3]]
        assert evaluate.main([*flags, "--output", str(output), "--device", "cpu", "--max_new_tokens", "6"]) == 0
        wanted = json.loads((output / "results.json").read_text())["metrics"]
        assert {name: logged[at][f"eval_{name}"] for name in wanted} == wanted
        lines = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
        assert {line["id"]: line["answer"] for line in lines} == seen[at]


def test_the_best_checkpoint_is_the_one_with_most_right_answers(answered):
    folder, _ = answered
    state = state_of(folder / "checkpoint-18")
    scores = {entry["step"]: entry["eval_exact_match"] for entry in evaluations(state)}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert state["best_metric"] == scores[best]
    assert Path(state["best_model_checkpoint"]).name == f"checkpoint-{best}"
    ours, theirs = trained_weights(folder), trained_weights(folder / f"checkpoint-{best}")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    card = (folder / "MODEL_CARD.md").read_text()
    assert f"| eval_exact_match | {scores[18]:.5g} (step 18) | {scores[best]:.5g} (step {best}) |" in card
    assert "5 of 5 samples answered" in card
    assert f"\n- exact_match: {VARIANTS['exact_match']}\n" in card


def test_tensorboard_shows_metrics_pictures_and_texts(answered):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (answered[0] / "runs").rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events), size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()
    assert len(found.Scalars("eval/exact_match")) == 3
    assert set(found.Tags()["images"]) == {f"answers/{name}" for name in ("0/1", "1/1", "2/1", "2/2", "3/1")}
    (picture,) = found.Images("answers/2/2")  # yellow, once
    assert (picture.width, picture.height) == (40, 30)
    texts = [one.tensor_proto.string_val[0].decode() for one in found.Tensors("answers/0/text_summary")]
    assert len(texts) == 3
    assert "    Which?<|extra_0|>" in texts[0]
    assert "    red\n    Red" in texts[0]
    assert f"    {answered[1][-1][0]}" in texts[-1]


# ---- Training does not notice


@pytest.mark.slow
def test_a_run_without_the_flag_is_the_same_to_the_last_bit(answered, bases, data, tmp_path):
    flags = [*bases, *data, *LONG, "--output_dir", str(tmp_path), "--report_to", "none"]
    assert train.main([*flags, "--metric_for_best_model", "loss"]) == 0
    one, other = (folder / "checkpoint-18" for folder in (tmp_path, answered[0]))
    ours, theirs = trained_weights(one), trained_weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(one) == losses(other)
    generators = [torch.load(path / "rng_state.pth", weights_only=False) for path in (one, other)]
    assert str(generators[0]) == str(generators[1])
    assert torch.equal(generators[0]["cpu"], generators[1]["cpu"])
    found = [[entry["eval_loss"] for entry in evaluations(state_of(path))] for path in (one, other)]
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_resumed_run_answers_and_chooses_as_one_that_was_not_stopped(answered, bases, data, tmp_path):
    flags = [*bases, *data, *LONG, *ANSWERING, "--output_dir", str(tmp_path), "--report_to", "none"]
    trainer = build_trainer(flags)
    trainer.add_callback(KillAt("on_step_end", 9))
    with pytest.raises(Killed):
        trainer.train()
    assert train.main([*flags, "--resume_from_checkpoint", "auto"]) == 0
    one, other = (state_of(run / "checkpoint-18") for run in (tmp_path, answered[0]))
    assert evaluations(one) == evaluations(other)
    assert (one["best_metric"], one["best_global_step"]) == (other["best_metric"], other["best_global_step"])


CHANGES = {
    "projector, checkpointing": ["--train_only", "projector", "--gradient_checkpointing", "true"],
    "all": ["--train_only", "all"],
    "bf16, checkpointing, noise, a data worker": [
        *(*LORA, "--bf16", "true", "--gradient_checkpointing", "true"),
        *("--neftune_noise_alpha", "5", "--dataloader_num_workers", "1"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_it_makes_no_difference_whatever_is_trained(bases, data, tmp_path, change):
    kept = {}
    for name, more in (("with", ANSWERING), ("without", [])):
        flags = [*bases, *data, *QUICK, *SHORT, *CHANGES[change], *more, "--output_dir", str(tmp_path / name)]
        assert train.main(flags) == 0
        kept[name] = [
            state_of(tmp_path / name / "checkpoint-2"),
            tmp_path / name / "checkpoint-2/projector.safetensors",
        ]
    assert kept["with"][1].read_bytes() == kept["without"][1].read_bytes()
    one, other = (evaluations(kept[name][0]) for name in ("with", "without"))
    assert [entry.pop("eval_exact_match") is not None for entry in one] == [True, True]
    assert one == other


def test_pictures_are_answered_with_a_feature_cache_too(bases, data, tmp_path):
    found = []
    for more in ([], ["--feature_cache", str(tmp_path / "cache"), "--feature_cache_dtype", "float32"]):
        trainer = build_trainer(
            [*bases, *data, *QUICK, *SHORT, *LORA, *ANSWERING, *more, "--output_dir", str(tmp_path / "r")]
        )
        found.append(trainer.answer_samples())
        found.append([line["answer"] for line in answers_of(trainer)])
    assert found[:2] == found[2:]


def answers_of(trainer) -> list[dict]:
    asked = trainer.answer_samples
    questions = [item.question for item in asked.items]
    return list(answering_samples.answer_all(asked.assistant, questions, 8, 0))


# ---- Other language models, and several processes


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_other_language_models_answer_as_evaluate_py_asks_them(bases, data, tmp_path, family):
    from tiny_families import make_family

    language = ["--base_language_model", make_family(tmp_path / "language", family), *bases[2:]]
    flags = [*language, *data, *QUICK, *SHORT, "--output_dir", str(tmp_path / "run")]
    trainer = build_trainer([*flags, *ANSWERING])
    trainer.train()
    said = {line["id"]: line["answer"] for line in answers_of(trainer)}
    trainer.save_model()
    asked = ["--image_map", data[1], "--captions_file", data[3], "--device", "cpu", "--max_new_tokens", "6"]
    assert evaluate.main(["--model_weights", str(tmp_path / "run"), *asked, "--output", str(tmp_path / "out")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert {line["id"]: line["answer"] for line in lines} == said


TELL = """
import os, sys, train
from model.evaluation.answering_samples import AnswerSamples
call, measure = AnswerSamples.__call__, AnswerSamples._measure
def told(self):
    found = call(self)
    open(os.path.join(sys.argv[1], "rank-" + os.environ["RANK"]), "a").write(repr(found) + chr(10))
    return found
AnswerSamples.__call__ = told
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_two_processes_measure_what_one_does(answered, bases, data, tmp_path):
    """The same weights, for the rates are 0; each process gets the metrics of all answers."""
    weights = ["--previous_lora_weights", str(answered[0] / "checkpoint-12"), "--max_steps", "1", "--eval_steps", "1"]
    rates = ["--learning_rate", "0", "--feature_proj_lr", "0", "--report_to", "none", "--save_strategy", "no"]
    flags = [*bases, *data, *QUICK, *weights, *rates, *ANSWERING]
    script = tmp_path / "tell.py"
    script.write_text(TELL)
    two = ["torchrun", "--standalone", "--nproc_per_node=2", script, tmp_path]
    done = start(*two, *flags, "--output_dir", tmp_path / "two", PYTHONPATH=str(Path(train.__file__).parent))
    assert done.returncode == 0, done.stderr
    one = repr(build_trainer([*flags, "--output_dir", str(tmp_path / "one")]).answer_samples()) + "\n"
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == [one, one]
    assert "exact_match" in one


# ---- Which samples


@pytest.fixture
def mapped(data) -> SimpleNamespace:
    """The evaluation set, as far as it is looked at."""
    return SimpleNamespace(annotations=Annotations(data[1], data[3]), allow_links=False, skips_bad=True)


def test_samples_are_spread_over_the_set_and_the_same_each_time(mapped, caplog):
    caplog.set_level(logging.INFO)
    assert [item.question.id for item in choose_samples(mapped, 2)] == [0, 2]
    assert [item.question.id for item in choose_samples(mapped, 3)] == [0, 1, 3]
    assert not caplog.records
    assert [item.question.id for item in choose_samples(mapped, 9)] == [0, 1, 2, 3, 4]
    assert "there are 5 samples" in caplog.text
    chosen = choose_samples(mapped, 5)
    assert chosen[0].references == ("red", "Red")
    assert chosen[3].question.prompt == "<|extra_0|>Dark?"
    assert [len(item.question.images) for item in chosen] == [1, 1, 2, 1, 0]


@pytest.fixture
def holed(pictures, tmp_path) -> list[str]:
    """Four samples in the folder of the test: of the first, the picture is damaged, of the third, it is missing."""
    (tmp_path / "damaged.png").write_bytes(pictures["red"].read_bytes()[:40])
    for name in ("red", "blue"):
        shutil.copy(pictures[name], tmp_path)
    asked = SAMPLES[0][1]
    return write_data(tmp_path, [(f"{name}.png", asked) for name in ("damaged", "red", "lost", "blue")], tmp_path)


def test_samples_whose_pictures_can_not_be_read_are_passed_over(holed, caplog):
    caplog.set_level(logging.INFO)
    mapped = SimpleNamespace(annotations=Annotations(holed[1], holed[3]), allow_links=False, skips_bad=True)
    for number, ids in ((1, [1]), (2, [1, 3]), (3, [1, 3]), (4, [1, 3])):
        assert [item.question.id for item in choose_samples(mapped, number)] == ids
    assert "damaged.png" in caplog.text
    mapped.skips_bad = False
    with pytest.raises(ImageError, match=r"sample 0: .*damaged"):
        choose_samples(mapped, 1)


def test_a_run_goes_on_without_the_pictures_that_it_skips(bases, holed, tmp_path, capsys):
    """Neither one that is missing from the beginning nor all of them, later, ends the run: the metrics are NaN then."""
    flags = [*bases, *holed, "--eval_image_map", holed[1], "--eval_captions_file", holed[3], *QUICK, *SHORT]
    flags += [*LORA, "--output_dir", str(tmp_path / "run"), "--max_bad_fraction", "1"]
    trainer = build_trainer([*flags, *ANSWERING[2:], "--eval_generate", "1", "--metric_for_best_model", "exact_match"])
    asked = trainer.answer_samples.items
    said = answers_of(trainer)
    asked[0] = dataclasses.replace(asked[0], references=(said[0]["answer"],))
    assert trainer.answer_samples() == trainer.answer_samples() == {"exact_match": 1.0}
    assert capsys.readouterr().err.count(VARIANTS["exact_match"]) == 1
    (tmp_path / "red.png").unlink()
    trainer.train()
    found = [entry["eval_exact_match"] for entry in evaluations(state_of(tmp_path / "run/checkpoint-2"))]
    assert len(found) == 2
    assert np.isnan(found).all()
    assert "red.png" in capsys.readouterr().err
    trainer.answer_samples.skips_bad = False
    with pytest.raises(ImageError, match="no sample can be answered"):
        trainer.answer_samples()


# ---- What is refused before training starts


REFUSED = {
    "no set": (["--eval_generate", "4"], "--eval_generate needs --eval_image_map"),
    "none": (["DATA", "--eval_generate", "0"], "--eval_generate 0: must be at least 1"),
    "no room": (["DATA", *ANSWERING[:2], "--eval_max_new_tokens", "0"], "--eval_max_new_tokens 0: must be at least 1"),
    "no evaluation": (["DATA", *ANSWERING, "--eval_strategy", "no"], "--eval_generate needs"),
    "another metric": (["DATA", *ANSWERING, "--metric_for_best_model", "bleu_4"], "loss, exact_match"),
    "plateau": (
        ["DATA", *ANSWERING, "--metric_for_best_model", "exact_match", "--lr_scheduler_type", "reduce_lr_on_plateau"],
        """--lr_scheduler_kwargs '{"mode": "max"}'""",
    ),
    "plateau of the loss": (
        ["DATA", "--lr_scheduler_type", "reduce_lr_on_plateau", "--lr_scheduler_kwargs", '{"mode": "max"}'],
        """--lr_scheduler_kwargs '{"mode": "min"}'""",
    ),
    "no object": (["--lr_scheduler_kwargs", "[1]"], "--lr_scheduler_kwargs [1]: must be a JSON object"),
    "no least rate": (["--lr_scheduler_type", "cosine_with_min_lr"], "min_lr"),
    "no option": (["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"power": 2}'], "'power'"),
    "no answers": (["DATA", "--eval_max_new_tokens", "6"], "--eval_max_new_tokens 6: "),
    "no answers and no set": (["--eval_max_new_tokens", "6"], "without --eval_generate"),
    "no flag": (["DATA", "--metric_for_best_model", "exact_match"], "without --eval_generate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_found_before_training(bases, data, tmp_path, capsys, monkeypatch, case):
    """All but one before a model is loaded; which metrics there are depends on the data."""
    if case != "another metric":
        monkeypatch.setattr(train, "build_model", None)
    words, said = REFUSED[case]
    given = [word for flag in words for word in (data[4:] if flag == "DATA" else [flag])]
    quick = ["--use_cpu", "true", "--report_to", "none", "--output_dir", str(tmp_path / "run")]
    assert train.main([*bases, *data[:4], *quick, *given]) == 2
    assert said in one_line_error(capsys.readouterr().err, "train.py")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_captions_without_their_package_are_one_line(bases, pictures, tmp_path, capsys, monkeypatch):
    told = ("<|extra_0|>What?", "A red field without anything else in it.")
    data = write_data(tmp_path, [("red.png", told)], pictures["red"].parent)
    flags = [*bases, *data, "--eval_image_map", data[1], "--eval_captions_file", data[3], *QUICK, *SHORT, *ANSWERING]
    flags += ["--output_dir", str(tmp_path / "run")]
    assert train.main([*flags, "--max_steps", "1"]) == 0
    logged = evaluations(state_of(tmp_path / "run/checkpoint-1"))[0]
    assert {"eval_bleu_1", "eval_bleu_4", "eval_rouge_l", "eval_cider_d"} <= logged.keys()
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu_scorer", None)
    assert train.main([*flags, "--overwrite_output_dir", "true"]) == 2
    said = one_line_error(capsys.readouterr().err, "train.py")
    assert said.startswith("train.py: --eval_generate: captions need the package pycocoevalcap")
    assert (tmp_path / "run/checkpoint-1").is_dir(), "the old run is not touched"
