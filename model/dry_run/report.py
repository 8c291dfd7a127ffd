"""What `train.py --dry_run` prints: parameters, tokens, steps, evaluations, the feature cache, and memory."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from dataprocess.messages import format_count
from dataset.annotations import Annotations
from dataset.bad_samples import BadSamples
from dataset.sample_sizes import DataSizes, data_sizes
from visual.feature_cache import DTYPES, FeatureCache, pictures_stored

from ..arguments import DataArguments, ModelArguments, VLMTrainingArguments
from ..console import set_up_logging
from ..feature_caching.fill import in_gb
from ..language_model import load_tokenizer
from .memory_estimate import BatchShape, ModelShape, Setting, estimate_evaluation, estimate_memory
from .planned_model import largest, planned_model, settings_to_show
from .run_length import EvaluationPlan, Plan

_MEMORY_ROWS = {
    "frozen_weights": "frozen weights",
    "trained_weights": "trained weights",
    "gradients": "gradients",
    "optimizer": "optimizer (AdamW)",
    "activations": "activations",
    "language_head": "language head and loss",
    "other": "the process beside its tensors",
    "peak": "most at one moment",
}


class SizeOfTokens(Protocol):
    """What is known of a sample or a batch, as `dataset` counts it."""

    @property
    def tokens(self) -> int:
        """Of the sample, or of a batch's longest one."""

    @property
    def supervised(self) -> int:
        """Tokens with a label."""

    @property
    def images(self) -> int:
        """Images."""


class SizesOfData(Protocol):
    """What is known of a data set, as `dataset` counts it."""

    @property
    def samples(self) -> Sequence[SizeOfTokens]:
        """Samples that were looked at."""

    @property
    def batches(self) -> Sequence[SizeOfTokens]:
        """The longest batches of an epoch."""

    @property
    def rows(self) -> int:
        """Samples of a batch, as far as there are so many."""

    @property
    def lengths(self) -> Sized:
        """Estimated tokens of every sample."""

    @property
    def padding(self) -> tuple[float, float]:
        """Shares of padding in batches, 0 to 1: grouped by length, and in random order."""

    @property
    def images(self) -> Collection[tuple[str, str]]:
        """Folder and name of every image, once."""

    @property
    def num_bad(self) -> int:
        """Samples that the two files show to be bad; they are left out."""


def dry_run(model_args: ModelArguments, data_args: DataArguments, args: VLMTrainingArguments) -> int:
    """Print to stdout what a run would be and take, from configurations and texts; nothing is loaded or written.

    What the run would refuse, as far as these files tell, is refused in the same words. Returns the exit status.

    Raises:
        ValueError: for whatever the user can fix.
        OSError: for files that are missing or can't be read.
    """
    set_up_logging(args.process_index, args.world_size)
    shape, lora = planned_model(model_args)
    tokenizer = load_tokenizer(model_args.base_language_model)
    order_seed = args.seed if args.data_seed is None else args.data_seed

    def look(files: tuple[str, str], most: int | None, rows: int, strategy: str) -> DataSizes:
        samples = Annotations(*files, most, skip_bad=data_args.on_bad_sample == "skip", need_folders=False)
        BadSamples(len(samples), samples.errors, data_args.max_bad_fraction).check(None)
        how: dict[str, Any] = {"seed": args.seed, "order_seed": order_seed, "strategy": strategy}
        return data_sizes(samples, tokenizer, shape.image_tokens, max_length=data_args.max_length, rows=rows, **how)

    rows, strategy = args.per_device_train_batch_size, str(args.train_sampling_strategy)
    data = look((data_args.image_map, data_args.captions_file), data_args.max_train_samples, rows, strategy)
    evaluation = None
    if data_args.eval_image_map is not None and data_args.eval_captions_file is not None:
        eval_files = data_args.eval_image_map, data_args.eval_captions_file
        evaluation = look(eval_files, None, args.per_device_eval_batch_size, "sequential")
    if args.process_index == 0:
        settings = settings_to_show(lora, args, args.frozen_dtype)
        sys.stdout.write(report((model_args, data_args, args), shape, settings, data, evaluation))
    return 0


def parameter_table(shape: ModelShape) -> str:
    """Parameters of each part, all, trainable and frozen."""
    parts = {
        "vision tower": (shape.tower_parameters, 0),
        "projector": (shape.projector_parameters, shape.projector_parameters),
        "language model": (shape.language_parameters, 0),
        "LoRA": (shape.lora_parameters, shape.lora_parameters),
        "all": (shape.frozen + shape.trained, shape.trained),
    }
    rows = [[name, f"{total:,}", f"{trained:,}", f"{total - trained:,}"] for name, (total, trained) in parts.items()]
    return _table([["parameters", "all", "trainable", "frozen"], *rows])


def length_table(num_samples: int, data: SizesOfData, image_tokens: int, what: str = "") -> str:
    """Tokens per sample, least, mean and most.

    Args:
        num_samples: of the data set.
        data: its sizes.
        image_tokens: features of an image.
        what: the data set's name, in front of the table's head.
    """
    samples = data.samples
    counts = {
        "all": [size.tokens for size in samples],
        "of images": [size.images * image_tokens for size in samples],
        "of answers, supervised": [size.supervised for size in samples],
    }
    rows = [
        [name, f"{min(values):,}", f"{sum(values) / len(values):,.1f}", f"{max(values):,}"]
        for name, values in counts.items()
    ]
    looked = f"looked at: {len(samples):,} of {format_count(num_samples, 'sample')}"
    if data.num_bad:
        looked += f"; {format_count(data.num_bad, 'bad one')} left out"
    return "\n".join([_table([[f"{what}tokens per sample", "least", "mean", "most"], *rows]), looked])


def steps_line(plan: Plan) -> str:
    """The steps that the data make."""
    batches = format_count(plan.accumulation, "batch", "batches")
    processes = format_count(plan.processes, "process", "processes")
    per_step = f"{format_count(plan.rows, 'sample')} × {batches} × {processes}"
    return f"{format_count(plan.steps_per_epoch, 'step')} per epoch, {plan.steps:,} in all; {per_step} a step"


def padding_line(grouped: float, ungrouped: float) -> str:
    """How much of a batch is padding, shares from 0 to 1."""
    return f"padding, about: {ungrouped:.1%} of a batch's tokens; {grouped:.1%} with samples grouped by length"


def evaluation_line(plan: EvaluationPlan) -> str:
    """How long an evaluation is, and how many there will be."""
    per_step = f"{format_count(plan.rows, 'sample')} × {format_count(plan.processes, 'process', 'processes')}"
    return f"{format_count(plan.steps, 'step')} in an evaluation, {format_count(plan.times, 'time')}; {per_step} a step"


def cache_lines(asked: DataArguments, tower: str, shape: ModelShape, images: Collection[tuple[str, str]]) -> str:
    """What the features of all images take on the disk, and what may be there; empty without `--feature_cache`.

    Which files are this tower's only its weights tell, so those of the same name and shape are counted.

    Args:
        asked: the flags.
        tower: name of the tower.
        shape: of the model.
        images: folder and name of each.
    """
    if asked.feature_cache is None:
        return ""
    dtype = asked.feature_cache_dtype
    size = (shape.image_tokens, shape.tower_width)
    space = FeatureCache(Path(asked.feature_cache).absolute() / "tower", size, DTYPES[dtype]).disk_space()
    lines = [
        f"feature cache: {format_count(len(images), 'distinct image')}, {size[0]:,} × {size[1]:,} {dtype} each: "
        f"at most {in_gb(len(images) * space.per_image)} on the disk; {in_gb(space.free)} free in {space.folder}"
    ]
    there = pictures_stored(asked.feature_cache, tower, size, dtype)
    lines += [f"there already, of a tower called {tower}: {number:,} in {name}" for name, number in there.items()]
    lines.append("The tower is loaded all the same, but sees no image that is stored.")
    return "\n".join(lines)


def memory_table(
    shape: ModelShape,
    settings: Mapping[str, Setting],
    data: SizesOfData,
    plan: Plan,
    evaluation: SizesOfData | None = None,
) -> str:
    """Memory of one process in GB, for each setting.

    Args:
        shape: of the model.
        settings: by the name of their columns; those without gradient checkpointing are shown with it too.
        data: the training set; the batch that takes most counts.
        plan: says the longest batch that could be.
        evaluation: the evaluation set, or None.
    """
    columns: dict[str, Setting] = {}
    for name, setting in settings.items():
        if not setting.checkpointing:
            columns[name] = setting
        columns[f"{name}, checkpointing"] = replace(setting, checkpointing=True)
    batches = _shapes(data)
    found = [largest(shape, setting, batches) for setting in columns.values()]
    full = [estimate_memory(shape, setting, _longest(batches, plan)) for setting in columns.values()]
    rows = [["memory per process, GB", *columns]]
    rows += [[text, *(_gb(getattr(one, name)) for one in found)] for name, text in _MEMORY_ROWS.items()]
    if evaluation is not None:
        peaks = [
            max(estimate_evaluation(shape, setting, batch) for batch in _shapes(evaluation))
            for setting in columns.values()
        ]
        rows.append(["most in an evaluation", *map(_gb, peaks)])
    rows.append([f"if every sample had {plan.max_length:,} tokens", *(_gb(one.peak) for one in full)])
    return _table(rows)


def _shapes(data: SizesOfData) -> list[BatchShape]:
    return [BatchShape(data.rows, batch.tokens, batch.supervised, batch.images) for batch in data.batches]


def report(
    asked: tuple[ModelArguments, DataArguments, VLMTrainingArguments],
    shape: ModelShape,
    settings: Mapping[str, Setting],
    data: SizesOfData,
    evaluation: SizesOfData | None = None,
) -> str:
    """All that a dry run prints.

    Args:
        asked: the flags.
        shape: of the model.
        settings: by the name of their columns.
        data: the training set.
        evaluation: the evaluation set, or None.
    """
    model_args, data_args, args = asked
    plan = Plan.of(args, len(data.lengths), data_args.max_length)
    lines = [length_table(plan.num_samples, data, shape.image_tokens), steps_line(plan), padding_line(*data.padding)]
    parts = [parameter_table(shape), "\n".join(lines)]
    images = set(data.images)
    if evaluation is not None:
        eval_plan = EvaluationPlan.of(args, len(evaluation.lengths), plan)
        table = length_table(eval_plan.num_samples, evaluation, shape.image_tokens, "evaluation: ")
        parts.append(f"{table}\n{evaluation_line(eval_plan)}")
        images |= set(evaluation.images)
    parts.append(cache_lines(data_args, model_args.base_value_model, shape, images))
    parts.append(memory_table(shape, settings, data, plan, evaluation))
    parts.append(
        "Estimated from shapes (model/dry_run/memory_estimate.py) for the batch of the first epoch that takes most.\n"
        "Gradients come as activations go, so that not all parts are there at one moment."
    )
    return "\n\n".join(filter(None, parts)) + "\n"


def _longest(batches: Sequence[BatchShape], plan: Plan) -> BatchShape:
    images = max(batch.images for batch in batches)
    rows = max(batch.rows for batch in batches)
    share = max(batch.supervised / (batch.rows * batch.tokens) for batch in batches)
    return BatchShape(rows, plan.max_length, round(share * rows * plan.max_length), images)


def _gb(number: int) -> str:
    return f"{number / 1e9:.2f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
