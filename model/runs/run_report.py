"""At each checkpoint and at the end of a run, write `loss.png` and `MODEL_CARD.md` into its folder.

Nothing reads them, so a failure to write them is a warning.
"""

from __future__ import annotations

import datetime
import io
import json
import logging
import math
import os
import re
import shlex
import sys
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dataprocess.file_lock import replace_file

from ..errors import in_one_line
from .callbacks import CARD_MARK, LOSS_FIGURE, MODEL_CARD, parameter_counts

logger = logging.getLogger(__name__)

Curves = dict[str, list[tuple[int, float]]]

_PANELS = {
    "loss (nats per token)": "(eval_)?loss",
    "learning rate": "learning_rate|feature_proj_lr",
    "metric (0 to 1)": r"eval_(?!loss|(char_)?cider_d|mem_|.*(_time|runtime|_per_second)$).+",
    "CIDEr-D (0 to 10)": "eval_(char_)?cider_d",
}
"""The panels of the figure, and the names that the log gives to what they show."""


class ReportRun(TrainerCallback):
    """Writes both files for the run of a `VLMTrainer`, on the first process."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.begin = trainer, time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write them; a card that was edited, or whose run had finished before it was resumed, stays as it is."""
        curves, card = read_curves(state.log_history), self.trainer.run_folder / MODEL_CARD
        if args.process_index > 0 or (self.trainer.last_log is None and card.exists()):
            return
        try:
            if not card.exists() or CARD_MARK.encode() in card.read_bytes():
                text = model_card(self.trainer, curves, int(time.monotonic() - self.begin))
                replace_file(card, text.encode("utf-8", "backslashreplace"))
            if curves:
                replace_file(card.with_name(LOSS_FIGURE), draw(curves))
        except Exception as error:  # a full disk, a font that is missing, …: no reason to lose a run
            told = "%s or %s could not be written: %s; training continues"
            logger.warning(told, card, LOSS_FIGURE, in_one_line(error) or type(error).__name__)

    on_train_end = on_save


def read_curves(log_history: list[dict[str, float]]) -> Curves:
    """Return (step, value) of each loss, learning rate and metric that was logged."""
    curves: Curves = {}
    for entry in log_history:
        for name, value in entry.items():
            if any(re.fullmatch(names, name) for names in _PANELS.values()):
                curves.setdefault(name, []).append((int(entry["step"]), value))
    return curves


def draw(curves: Curves) -> bytes:
    """Draw losses, learning rates and, if there are any, metrics below each other; return a PNG."""
    from matplotlib.figure import Figure  # not before: it takes half a second
    from matplotlib.ticker import MaxNLocator

    shown = {unit: [name for name in curves if re.fullmatch(names, name)] for unit, names in _PANELS.items()}
    panels = [(unit, names) for unit, names in shown.items() if names]
    figure = Figure(figsize=(8, 2.8 * len(panels)), layout="constrained")
    all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (unit, names) in zip(all_axes, panels, strict=True):
        for name in names:
            marker = "o" if len(curves[name]) < 30 else ""  # a single point has no line
            axes.plot(*zip(*curves[name], strict=True), label=name, marker=marker, markersize=3)
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    all_axes[-1].set_xlabel("optimizer step")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def model_card(trainer: Any, curves: Curves, seconds: int) -> str:
    """Describe the run of a `VLMTrainer`, so many seconds after it was started or resumed."""
    model, args, state, config = trainer.model, trainer.args, trainer.state, trainer.run_config
    tower, language, data = model.vision_tower, model.base_language_model, config["data"]
    train_set, eval_set = trainer.train_dataset.dataset, trainer.eval_dataset
    files = f"{data['image_map']}, {data['captions_file']}: {len(train_set):,} samples"
    if eval_set is not None:
        files += f"; evaluated on {data['eval_image_map']}, {data['eval_captions_file']}: {len(eval_set):,} samples"
    answers = " ".join(train_set.annotations[at].turns[0][1][0] for at in range(min(len(train_set), 500)))
    codes = [code for code, script in (("zh", "[\u4e00-\u9fff]"), ("en", "[A-Za-z]{3}")) if re.search(script, answers)]
    adapter = "library_name: peft\nbase_model_relation: adapter\n" if model.has_lora else ""
    parts = [f"| {part} | {total:,} | {own:,} |" for part, (total, own) in parameter_counts(model).items() if total]
    settings = {**trainer.identity, "learning_rate": args.learning_rate, "feature_proj_lr": args.feature_proj_lr}
    settings |= {name: getattr(args, name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")}
    settings |= {"processes": args.world_size, "epochs": f"{state.epoch or 0:.3g}"}
    results = ["", "| | Last | Best |", "|---|---:|---:|"] if curves else []
    for name in (name for name in curves if not re.fullmatch(_PANELS["learning rate"], name)):
        (last, value), best = curves[name][-1], min if name.endswith("loss") else max
        known = [point for point in curves[name] if not math.isnan(point[1])] or curves[name]
        step, top = best(known, key=lambda point: point[1])
        chosen = "" if name.endswith("yes_share") else f"{top:.5g} (step {step:,})"  # neither end of it is the good one
        results.append(f"| {name} | {value:.5g} (step {last:,}) | {chosen} |")
    return f"""\
---
{CARD_MARK}
language: [{", ".join(codes)}]  # guessed by the script of the first answers
base_model: {json.dumps([language, tower.name_or_path], ensure_ascii=False)}
pipeline_tag: image-text-to-text
{adapter}---

# {trainer.run_folder.absolute().name}

A vision-language model: a projector turns what a vision tower sees into tokens for a language model.

- Vision tower: {tower.name_or_path} ({tower.kind}, {tower.image_size} px, {model.num_image_tokens} tokens per picture)
- Language model: {language} ({model.qwen.config.model_type})
- Data: {files}

| Part | Parameters | Trained |
|---|---:|---:|
{chr(10).join(parts)}

## Command

```sh
{command_line(args.world_size)}
```

- Run: {", ".join(f"{name} {value}" for name, value in settings.items())}
- Versions: {", ".join(f"{name} {number}" for name, number in config["package_versions"].items())}

## Results

Step {state.global_step:,} of {state.max_steps:,}, {datetime.timedelta(seconds=seconds)} after starting or resuming.
{chr(10).join(results)}
{getattr(trainer.answer_samples, "notes", "")}
## How to ask it

```sh
python test.py --model_weights {folder_to_ask(trainer)} --image_path picture.jpg --prompt "What is in the picture?"
```

It needs both base models. Their licences, and that of the data, apply to this model too.
"""


def folder_to_ask(trainer: Any) -> str:
    """Return the checkpoint that a run chose as the best, or else its folder, quoted for a shell."""
    best = trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint
    return shlex.quote(best or str(trainer.args.output_dir))  # the folder means its newest checkpoint


def command_line(num_processes: int) -> str:
    """Return the command that started this program, without tokens of a hub."""
    words = list(sys.argv)
    for at in [at for at, word in enumerate(words) if re.match(r"--[\w-]*token(=|$)", word)][::-1]:
        del words[at : at + 1 + ("=" not in words[at])]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    launcher = ["torchrun", f"--nnodes={num_processes // local}", f"--nproc_per_node={local}"]
    return shlex.join([*(launcher if num_processes > 1 else ["python"]), *words])
