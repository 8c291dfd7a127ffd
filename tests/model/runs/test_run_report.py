"""loss.png and MODEL_CARD.md: they say what the log says, and nothing that goes wrong with them ends a run."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image
from stopped_runs import Killed
from tiny_run import build_trainer

import train
from dataprocess.file_lock import replace_file
from model.arguments import parse_arguments
from model.runs import run_report
from model.runs.callbacks import CARD_MARK
from model.runs.run_folder import clear_leftovers
from model.runs.run_report import ReportRun, draw, read_curves

QUICK = [
    *("--lora_rank", "4", "--learning_rate", "1e-2", "--use_cpu", "true", "--report_to", "none"),
    *("--disable_tqdm", "true", "--logging_steps", "1", "--per_device_train_batch_size", "4", "--save_steps", "2"),
    *("--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "2"),
]


@pytest.fixture(scope="module")
def command(base_flags, mixed_data) -> list[str]:
    """Two steps, with a checkpoint after the second; all flags but the output folder."""
    evaluation = ["--eval_image_map", mixed_data[1], "--eval_captions_file", mixed_data[3]]
    return [*base_flags, *mixed_data, *evaluation, *QUICK]


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """A trainer at the end of its run, as train.py builds it; the command line holds tokens."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    typed = [*command, "--output_dir", str(folder), "--run_name", "it's two"]
    with pytest.MonkeyPatch.context() as patch:
        secrets = ["--hub_token", "hf_secret1", "--hub_token=hf_secret2", "--hub-token", "hf_secret3"]
        patch.setattr(sys, "argv", ["train.py", *secrets[:2], *typed, *secrets[2:]])
        trainer = build_trainer(typed)
        trainer.train()
    return trainer, typed


@pytest.fixture
def report(finished, tmp_path, monkeypatch):
    """Writes both files again, into an empty folder."""
    trainer, _ = finished
    monkeypatch.setattr(trainer, "run_folder", tmp_path)
    return lambda: ReportRun(trainer).on_save(trainer.args, trainer.state, trainer.control)


def is_picture(path: Path) -> bool:
    with Image.open(path) as image:
        image.load()
        return image.format == "PNG" and min(image.size) > 300


# ---- The figure


LOG = [
    {"loss": 3.0, "learning_rate": 1e-3, "feature_proj_lr": 2e-3, "grad_norm": 1.0, "epoch": 0.5, "step": 1},
    {
        **{
            "eval_loss": 2.5,
            "eval_exact_match": 0.5,
            "eval_cider_d": 2.0,
            "eval_char_bleu_4": 0.1,
            "eval_runtime": 1.0,
        },
        **{"eval_samples_per_second": 3.0, "eval_model_preparation_time": 0.1, "epoch": 0.5, "step": 1},
    },
    {"loss": math.nan, "learning_rate": 0.0, "feature_proj_lr": 0.0, "epoch": 1.0, "step": 2},
    {"train_runtime": 3.0, "train_loss": 2.0, "step": 2},
]


def test_curves_hold_what_was_learnt_and_not_how_fast():
    curves = read_curves(LOG)
    assert curves.keys() == {
        "loss",
        "learning_rate",
        "feature_proj_lr",
        "eval_loss",
        "eval_exact_match",
        "eval_cider_d",
        "eval_char_bleu_4",
    }
    assert curves["learning_rate"] == [(1, 1e-3), (2, 0.0)]
    assert curves["eval_exact_match"] == [(1, 0.5)]


@pytest.mark.parametrize("log", [LOG, LOG[:1], [{"loss": 1.0, "step": 7}], [*LOG, *({"loss": 1, "step": 9},) * 40]])
def test_the_figure_is_a_picture_whatever_was_logged(log, tmp_path):
    before = "matplotlib.pyplot" in sys.modules  # another test's
    (tmp_path / "loss.png").write_bytes(draw(read_curves(log)))
    assert is_picture(tmp_path / "loss.png")
    assert before or "matplotlib.pyplot" not in sys.modules, "pyplot keeps figures, and asks for a display"


# ---- The model card


def test_the_card_says_what_the_run_was_and_its_commands_are_right(finished):
    trainer, typed = finished
    run = trainer.run_folder
    text = (run / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "secret" not in text

    _, front, body = text.split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["language"] == ["zh", "en"]
    assert head["base_model"] == [typed[1], typed[3]]
    assert head["pipeline_tag"] == "image-text-to-text"
    assert head["base_model_relation"] == "adapter"

    trained, asked = re.findall(r"```sh\n(.*?)\n```", body, re.S)
    program, *flags = shlex.split(trained)[1:]
    assert program == "train.py"
    assert flags == typed
    assert parse_arguments(flags)[2].run_name == "it's two"
    assert shlex.split(asked)[1:4] == ["test.py", "--model_weights", str(run)]

    rows = dict(re.findall(r"^\| (\w+) \| (.+) \|$", body, re.M))
    size, trainable = (int(number.replace(",", "")) for number in rows["projector"].split(" | "))
    assert size == trainable > 0
    assert rows["language_model"].endswith(" | 0")
    log = read_curves(json.loads((run / "checkpoint-2/trainer_state.json").read_text())["log_history"])
    for name in ("loss", "eval_loss"):
        last, best = (float(cell.split()[0]) for cell in rows[name].split(" | "))
        values = [value for _, value in log[name]]
        assert (last, best) == (pytest.approx(values[-1], rel=1e-4), pytest.approx(min(values), rel=1e-4))
    for said in (
        "12 samples",
        "lora_rank 4",
        "learning_rate 0.01",
        "per_device_train_batch_size 4",
        "epochs 0.667",
        "torch 2.",
        typed[5],
        "Step 2 of 2",
    ):
        assert said in body
    assert is_picture(run / "loss.png")


def test_the_checkpoint_that_was_chosen_is_the_one_to_ask(finished, report, tmp_path, monkeypatch):
    trainer, _ = finished
    monkeypatch.setattr(trainer.args, "load_best_model_at_end", True)
    monkeypatch.setattr(trainer.state, "best_model_checkpoint", "weights/a run/checkpoint-1")
    report()
    assert "--model_weights 'weights/a run/checkpoint-1' " in (tmp_path / "MODEL_CARD.md").read_text()


def test_a_run_on_several_processes_is_started_by_torchrun(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--image_map", "a b.json"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert run_report.command_line(8) == "torchrun --nnodes=2 --nproc_per_node=4 train.py --image_map 'a b.json'"


def test_an_edited_card_is_kept_and_others_are_replaced(report, tmp_path):
    card = tmp_path / "MODEL_CARD.md"
    card.write_text(f"---\n{CARD_MARK}\n---\nof an older step")
    report()
    made = card.read_text()
    assert "of an older step" not in made
    card.write_text(made.replace(CARD_MARK, "license: mit"))
    edited = card.read_bytes()
    report()
    assert card.read_bytes() == edited


def test_the_share_of_yes_has_no_best_and_nan_is_not_the_best(finished, report, tmp_path, monkeypatch):
    trainer, _ = finished
    values = [(1, 0.25, math.nan), (2, 0.75, 0.5), (3, 0.5, math.nan)]
    log = [{"step": at, "eval_pope_yes_share": share, "eval_pope_f1": f1} for at, share, f1 in values]
    monkeypatch.setattr(trainer.state, "log_history", log)
    monkeypatch.setattr(trainer, "answer_samples", SimpleNamespace(notes="\n- pope: as it is read\n"))
    report()
    text = (tmp_path / "MODEL_CARD.md").read_text()
    assert "| eval_pope_yes_share | 0.5 (step 3) |  |" in text
    assert "| eval_pope_f1 | nan (step 3) | 0.5 (step 2) |" in text
    assert "|\n\n- pope: as it is read\n\n## How" in text


def test_without_numbers_there_is_no_table(finished, report, tmp_path, monkeypatch):
    monkeypatch.setattr(finished[0].state, "log_history", [])
    report()
    assert "| Last |" not in (tmp_path / "MODEL_CARD.md").read_text()
    assert not (tmp_path / "loss.png").exists()


# ---- Along a run


def test_they_come_with_each_checkpoint_and_are_complete_after_resuming(command, tmp_path, monkeypatch):
    drawn = []

    def remember(curves):
        drawn.append([step for step, _ in curves["loss"]])
        return draw(curves)

    monkeypatch.setattr(run_report, "draw", remember)
    flags = [*command, "--output_dir", str(tmp_path)]
    assert train.main(flags) == 0
    assert drawn == [[1, 2], [1, 2]]
    assert train.main([*flags, "--max_steps", "5", "--resume_from_checkpoint", "auto"]) == 0
    assert drawn[2:] == [[1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]
    assert "Step 5 of 5" in (tmp_path / "MODEL_CARD.md").read_text()


STRATEGIES = {
    "steps": (["--max_steps", "2", "--save_steps", "1"], [1, 2]),
    "epochs": (["--num_train_epochs", "2", "--save_strategy", "epoch"], [3, 6]),
    "none": (["--max_steps", "2", "--save_strategy", "no"], [2]),
    "no log": (["--max_steps", "2", "--logging_strategy", "no"], []),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_short_run_has_its_figure_as_soon_as_something_is_saved(command, tmp_path, strategy):
    """Far fewer steps than between two lines of the log; the loss is that of all steps."""
    flags, steps = STRATEGIES[strategy]
    plain = command[: command.index("--eval_image_map")]
    quick = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--per_device_train_batch_size", "4"]
    trainer = build_trainer([*plain, *quick, "--lora_rank", "4", *flags, "--output_dir", str(tmp_path)])
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == steps
    assert ("| loss | " in (tmp_path / "MODEL_CARD.md").read_text()) == bool(steps)
    assert (tmp_path / "loss.png").exists() == bool(steps)


def test_a_finished_run_that_is_resumed_keeps_its_card(command, tmp_path):
    flags = [*command, "--output_dir", str(tmp_path)]
    assert train.main(flags) == 0
    card = tmp_path / "MODEL_CARD.md"
    card.write_text(card.read_text().replace("Step 2 of 2, 0:", "Step 2 of 2, 7:"))
    before = card.read_bytes()
    assert train.main([*flags, "--resume_from_checkpoint", "auto"]) == 0
    assert card.read_bytes() == before


@pytest.mark.parametrize("trouble", ["no font", "no memory", "a folder in its place", "no room"])
def test_a_failure_is_a_warning(report, tmp_path, monkeypatch, caplog, trouble):
    def fail(*_):
        errors = {"no font": RuntimeError("findfont"), "no memory": MemoryError(), "no room": OSError(28, "No space")}
        raise errors[trouble]

    if trouble == "a folder in its place":
        (tmp_path / "loss.png").mkdir()
    else:
        monkeypatch.setattr(run_report, "replace_file" if trouble == "no room" else "draw", fail)
    report()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "could not be written" in record.getMessage()


@pytest.mark.parametrize("name", ["loss.png", "MODEL_CARD.md", "train_config.json"])
@pytest.mark.parametrize("moment", ["replace", "open"])
def test_a_kill_while_they_are_written_leaves_the_old_ones(tmp_path, monkeypatch, name, moment):
    def kill(*_):
        raise Killed

    replace_file(tmp_path / name, b"old")
    with monkeypatch.context() as patch:
        if moment == "replace":
            patch.setattr(Path, "replace", kill)
        else:
            patch.setattr(Path, "open", lambda path, mode: path.touch() or kill())
        with pytest.raises(Killed):
            replace_file(tmp_path / name, b"new")
    assert (tmp_path / name).read_bytes() == b"old"
    assert len(list(tmp_path.glob("tmp-*"))) == 1
    clear_leftovers(tmp_path)
    assert list(tmp_path.glob("*")) == [tmp_path / name]
