"""Training runs over data with bad samples in it, through train.py's command line."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tiny_run import losses, make_pictures, one_line_error, trained_weights, write_data

import train
from dataset.bad_samples import BadSamples
from model.runs import callbacks
from model.runs.callbacks import WatchBadSamples
from model.runs.deleting import overwriting

QUICK = shlex.split(
    "--lora_rank 4 --lora_dropout 0 --logging_steps 1 --save_steps 100 --num_train_epochs 1 --use_cpu true "
    "--report_to none --disable_tqdm true --learning_rate 1e-2"
)


@pytest.fixture
def data(tmp_path) -> list[str]:
    """Twelve samples: three whose picture is bad, one whose question has no placeholder, eight good ones."""
    pictures = make_pictures(tmp_path / "pictures")
    folder = pictures["red"].parent
    Image.effect_noise((40, 30), 50).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:500])
    (folder / "text.png").write_text("no picture")
    question = ("<|extra_0|>What?", "It is.")
    bad = [(name, question) for name in ("cut.png", "text.png", "missing.png")]
    samples = [*bad, ("red.png", ("What?", "It is.")), *[("blue.png", question), (None, ("1 + 1?", "2"))] * 4]
    return write_data(tmp_path / "data", samples, folder)


def run(output: Path, base_flags: list[str], data: list[str], *flags: object) -> int:
    return train.main([*QUICK, *base_flags, *data, "--output_dir", str(output), *map(str, flags)])


def listed(output: Path) -> list[str]:
    lines = (output / "bad_samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["reason"] for line in lines]


def test_a_link_that_takes_the_place_of_the_list_is_not_followed(tmp_path, caplog):
    dataset = SimpleNamespace(bad=BadSamples(2, [], 1.0))
    args: Any = SimpleNamespace(process_index=0, world_size=1, output_dir=str(tmp_path / "run"))
    watch = WatchBadSamples(dataset)
    watch.on_train_begin(args)
    (tmp_path / "run").mkdir()
    (tmp_path / "note").write_text("theirs")
    (tmp_path / "run/bad_samples.jsonl").symlink_to(tmp_path / "note")
    dataset.bad.mark(1, "sample 1: bad")
    watch.on_step_end(args)
    assert (tmp_path / "note").read_text() == "theirs"
    assert "bad_samples.jsonl could not be written" in caplog.text


@pytest.mark.parametrize(("process", "reason"), [(0, "File exists"), (1, "said by the first process")])
def test_every_process_hears_why_an_old_run_could_not_be_set_aside(tmp_path, monkeypatch, process, reason):
    (tmp_path / "tmp-overwritten").write_text("a file where a folder is to be")
    if process:
        monkeypatch.setattr(callbacks, "gather_object", lambda problems: ["said by the first process", *problems])
    args = SimpleNamespace(process_index=process, overwrite_output_dir=True)
    trainer = SimpleNamespace(args=args, run_folder=tmp_path, add_callback=lambda callback: None)
    trainer.model = SimpleNamespace(base_language_model="Qwen/Qwen-7B-Chat")
    with pytest.raises(OSError, match=reason), overwriting(trainer):
        pass


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch", [1, 5])
def test_bad_samples_are_skipped_counted_and_listed(base_flags, data, tmp_path, capsys, workers, batch):
    """With one sample a batch, whole steps consist of bad samples: their loss is 0, and nothing breaks."""
    out = tmp_path / "run"
    flags = ["--max_bad_fraction", 0.5, "--dataloader_num_workers", workers, "--per_device_train_batch_size", batch]
    assert run(out, base_flags, data, *flags) == 0
    messages = listed(out)
    assert messages[0].startswith("sample 3:")  # known from the files; the others as they are found
    messages[1:] = sorted(messages[1:])
    assert [message.split(":")[0] for message in messages] == ["sample 3", "sample 0", "sample 1", "sample 2"]
    for message, reason in zip(messages, ("0 image placeholders", "cut short", "not an image", "missing"), strict=True):
        assert reason in message
    assert "4 bad samples were left out so far" in capsys.readouterr().err
    assert all(tensor.isfinite().all() for tensor in trained_weights(out).values())
    steps = losses(next(out.glob("checkpoint-*")))
    assert len(steps) == math.ceil(11 / batch)
    assert all(math.isfinite(loss) for loss in steps)
    assert steps.count(0) == (3 if batch == 1 else 1)  # of 5, 5 and 1


def test_bad_samples_found_before_a_stop_stay_on_the_list_and_in_the_count(base_flags, data, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--max_bad_fraction", 0.5, "--per_device_train_batch_size", 1, "--save_steps", 8]
    assert run(out, base_flags, data, *flags) == 0
    for later in [path for path in out.glob("checkpoint-*") if path.name != "checkpoint-8"]:
        shutil.rmtree(later)
    found = json.loads((out / "checkpoint-8/run_state.json").read_text())["bad"]
    assert 0 < len(found) < 3
    (out / "bad_samples.jsonl").unlink()
    on = ["--resume_from_checkpoint", "auto"]
    assert run(out, base_flags, data, *flags, *on) == 0
    assert len(listed(out)) == 4
    shutil.rmtree(out / "checkpoint-11")
    fewer = ["--max_bad_fraction", (1.5 + len(found)) / 12]  # the first half has few enough, both have not
    assert run(out, base_flags, data, *flags, *on, *fewer) == 2
    assert "4 of 12 samples are bad" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_ends_the_run_where_it_is_to_be_an_error(base_flags, data, tmp_path, capsys, workers):
    captions = json.loads(Path(data[3]).read_text())
    captions["3"]["q"] += "<|extra_0|>"  # now only the pictures are bad
    Path(data[3]).write_text(json.dumps(captions))
    out = tmp_path / "run"
    assert run(out, base_flags, data, "--on_bad_sample", "error", "--dataloader_num_workers", workers) == 2
    said = one_line_error(capsys.readouterr().err, "train.py")
    assert any(f"sample {number}: " in said for number in (0, 1, 2))
    assert not list(out.glob("checkpoint-*"))


def test_more_bad_samples_than_allowed_are_an_error_that_says_where_they_are_listed(base_flags, data, tmp_path, capsys):
    for fraction, flags in ((0.01, []), (0.2, ["--max_bad_fraction", 0.2])):
        out = tmp_path / f"run {fraction}"
        assert run(out, base_flags, data, *flags) == 2
        said = one_line_error(capsys.readouterr().err, "train.py")
        assert re.search(r"1 of 12 samples is bad|[2-9] of 12 samples are bad", said)
        assert f" bad, more than --max_bad_fraction {fraction}" in said
        assert str(out / "bad_samples.jsonl") in said
        assert "sample 3" in listed(out)[0]
        assert not list(out.glob("checkpoint-*"))
