"""Processes of tests/model/scaling/test_sharded_runs.py: `torchrun --nproc_per_node=2 … several_runs.py FILE`.

FILE is a JSON object: `runs` are command lines of train.py, one after another; `count` are runs whose messages are
counted, in `sent-RANK.json` next to FILE; `break` is a rank whose fifth batch fails, `break answering` one that fails
in the middle of its second call of the model while it answers, `full` one whose disk is full at every checkpoint of
`full run`. `measure` names two base models; how much memory loading them takes, whole and in 4 bits, goes to
`loading-RANK.json`. `small` ones are loaded first, so that imports do not count.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_run import build_trainer
from transformers.modeling_layers import GradientCheckpointingLayer

import train
from model import LoraSettings, VisionLanguageModel, VLMTrainer
from model.evaluation.answering_samples import AnswerSamples
from model.scaling.sharding import shard


def memory() -> dict[str, int]:
    """Bytes of this process: now, the most so far, and what no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {name: int(values[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM", "RssAnon")}


def measure(bases: list[str], quantisation: str | None) -> dict[str, int]:
    """Load a model in shares; return what the process holds more, and held more at the most."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = memory()
    how = {"device": "cpu", "trainable": True, "hollow": True, "quantisation": quantisation}
    model = VisionLanguageModel.from_pretrained(*bases, **how)
    model.add_lora(LoraSettings(rank=4))
    shard(model, torch.device("cpu"))
    after = memory()
    return {"kept": after["RssAnon"] - before["RssAnon"], "most": after["VmHWM"] - before["VmRSS"]}


def count_sent(runs: list[list[str]]) -> list[int]:
    """Train one step of split models; return the bytes that FSDP gathered and reduced of each, over all processes."""
    sent: list[int] = []

    def counting(name: str) -> None:
        real = getattr(dist, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            sent.append(max(tensor.nbytes for tensor in tensors))  # the whole, not the share
            return real(*args, **kwargs)

        setattr(dist, name, count)

    counting("all_gather_single")
    counting("reduce_scatter_single")
    found = []
    for words in runs:
        trainer = build_trainer(words)
        sent.clear()
        trainer.train()
        found.append(sum(sent))
    return found


def break_at_fifth_batch(rank: int) -> None:
    own, calls = VLMTrainer.training_step, []

    def step(self: VLMTrainer, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if int(os.environ["RANK"]) == rank and len(calls) == 5:
            raise OSError(5, "Input/output error", "image.png")
        return own(self, *args, **kwargs)

    VLMTrainer.training_step = step  # type: ignore[method-assign]


def break_while_answering(rank: int) -> None:
    own, calls = AnswerSamples.__call__, []

    def fail(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(5, "Input/output error", "block")

    def answer(self: AnswerSamples) -> Any:
        if int(os.environ["RANK"]) == rank:
            blocks = [
                module for module in self.trainer.model.qwen.modules() if isinstance(module, GradientCheckpointingLayer)
            ]
            blocks[-1].register_forward_pre_hook(fail, prepend=True)  # before it is gathered
        return own(self)

    AnswerSamples.__call__ = answer  # type: ignore[method-assign]


measure_answers = AnswerSamples._measure


def note_answers(self: AnswerSamples, answers: dict[int, str]) -> dict[str, float]:
    """Measure answers, and write them to `answers-STEP.json` in the run's folder."""
    folder, step = Path(self.trainer.args.output_dir), self.trainer.state.global_step
    (folder / f"answers-{step}.json").write_text(json.dumps(answers))
    return measure_answers(self, answers)


def fill_disk(rank: int) -> None:
    from model.checkpoints import saving

    def write(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    if int(os.environ["RANK"]) == rank:
        saving._save_tensors = write


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    own_rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    AnswerSamples._measure = note_answers  # type: ignore[method-assign]
    if "break answering" in asked:
        break_while_answering(asked["break answering"])
    if "break" in asked:
        break_at_fifth_batch(asked["break"])
    statuses = [train.main(words) for words in asked["runs"]]
    if "count" in asked:
        (Path(sys.argv[1]).parent / f"sent-{own_rank}.json").write_text(json.dumps(count_sent(asked["count"])))
    if "full" in asked:
        fill_disk(asked["full"])
        statuses.append(int(train.main(asked["full run"]) != 1))
    if "measure" in asked:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        measure(asked["small"], "4bit")  # what is imported and allocated once
        found = {str(kind): measure(asked["measure"], kind) for kind in (None, "4bit")}
        (Path(sys.argv[1]).parent / f"loading-{own_rank}.json").write_text(json.dumps(found))
    sys.exit(max(statuses, default=0))
