"""What `train.py --dry_run` prints: parameters, tokens, steps, the feature cache, and the memory to expect."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from dataprocess.messages import format_count
from dataset import ImageCaptionDataset
from dataset.prompt import SampleError, Tokenizer
from visual.feature_cache import DTYPES, FeatureCache

from ..arguments import DataArguments, ModelArguments, VLMTrainingArguments
from ..checkpoints.base_models import load_tokenizer
from ..console import set_up_logging
from ..feature_caching.disk import disk_space, in_gb, pictures_stored
from ..feature_caching.image_list import images_of
from ..runs.failures import check_bad_samples
from .data_sizes import DataSizes, data_sizes
from .memory_estimate import BatchShape, MemoryEstimate, ModelShape, Setting, estimate_memory
from .planned_model import planned_model, settings_to_show
from .run_length import run_length

_MEMORY_ROWS = {
    "frozen_weights": "frozen weights",
    "trained_weights": "trained weights",
    "gradients": "gradients",
    "optimizer": "optimizer (AdamW)",
    "activations": "activations",
    "language_head": "language head and loss",
    "other": "the process itself",
    "peak": "most at one moment",
}
_EXPLANATION = """\
Estimated from shapes (model/dry_run/memory_estimate.py) for the batch of the first epoch that takes most.
Gradients come as activations go, so that not all parts are there at one moment."""


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
    data = _measure(tokenizer, shape.image_tokens, data_args, args, training=True)
    evaluation = None
    if data_args.eval_image_map is not None:
        evaluation = _measure(tokenizer, shape.image_tokens, data_args, args, training=False)
    if args.process_index != 0:
        return 0
    length = run_length(args, data.num_samples, 0 if evaluation is None else evaluation.num_samples)
    processes = format_count(args.world_size, "process", "processes")
    grouped, ungrouped = data.padding
    parts = [
        parameter_table(shape),
        f"{length_table(data, shape.image_tokens)}\n"
        f"{format_count(length.steps_per_epoch, 'step')} per epoch, {length.steps:,} in all; "
        f"{format_count(args.per_device_train_batch_size, 'sample')} × "
        f"{format_count(args.gradient_accumulation_steps, 'batch', 'batches')} × {processes} a step\n"
        f"padding, about: {ungrouped:.1%} of a batch's tokens; {grouped:.1%} with samples grouped by length",
    ]
    if evaluation is not None:
        parts.append(
            f"{length_table(evaluation, shape.image_tokens, 'evaluation: ')}\n"
            f"{format_count(length.eval_batches, 'step')} in an evaluation, "
            f"{format_count(length.num_evaluations, 'time')}; "
            f"{format_count(args.per_device_eval_batch_size, 'sample')} × {processes} a step"
        )
    if data_args.feature_cache is not None:
        images = images_of([data.dataset, *([] if evaluation is None else [evaluation.dataset])])
        parts.append(cache_lines(data_args, model_args.base_value_model, shape, len(images)))
    settings = settings_to_show(lora, args)
    parts.append(memory_table(shape, settings, data, data_args.max_length))
    if args.shard_model:
        from ..scaling.split_memory import split_rows

        parts.append(_table(split_rows(shape, settings, data.batches, args.world_size)))
    if shape.image_tokens != shape.patches:
        unshuffled = None
        with contextlib.suppress(SampleError):  # without it, no sample may fit
            unshuffled = _measure(tokenizer, shape.patches, data_args, args, training=True)
        parts.append(shuffle_lines(shape, settings, data, unshuffled))
    sys.stdout.write("\n\n".join([*parts, _EXPLANATION]) + "\n")
    return 0


def _measure(
    tokenizer: Tokenizer, image_tokens: int, asked: DataArguments, args: VLMTrainingArguments, *, training: bool
) -> DataSizes:
    """Measure the training set or the evaluation set."""
    files = (asked.image_map, asked.captions_file) if training else (asked.eval_image_map, asked.eval_captions_file)
    dataset = ImageCaptionDataset(
        *(str(files[0]), str(files[1]), tokenizer, _open_no_image, image_tokens),
        max_length=asked.max_length,
        seed=args.seed,
        system=tokenizer.default_system,
        training=training,
        max_samples=asked.max_train_samples if training else None,
        on_bad_sample=asked.on_bad_sample,
        max_bad_fraction=asked.max_bad_fraction,
        need_folders=False,
    )
    check_bad_samples(dataset.bad)
    return data_sizes(
        dataset,
        rows=args.per_device_train_batch_size if training else args.per_device_eval_batch_size,
        strategy=str(args.train_sampling_strategy) if training else "sequential",
        order_seed=args.seed if args.data_seed is None else args.data_seed,
    )


def _open_no_image(image: Image.Image) -> Tensor:
    raise AssertionError("a dry run opens no image")


def parameter_table(shape: ModelShape) -> str:
    """List the parameters of each part: all, trainable and frozen."""
    parts = {
        "vision tower": (shape.tower_parameters, 0),
        "projector": (shape.projector_parameters, shape.projector_parameters),
        "language model": (shape.language_parameters, shape.language_parameters * shape.trains_language),
        "LoRA": (shape.lora_parameters, shape.lora_parameters),
        "all": (shape.frozen + shape.trained, shape.trained),
    }
    rows = [[name, f"{total:,}", f"{trained:,}", f"{total - trained:,}"] for name, (total, trained) in parts.items()]
    return _table([["parameters", "all", "trainable", "frozen"], *rows])


def length_table(data: DataSizes, image_tokens: int, name: str = "") -> str:
    """List the tokens per sample over all alternative answers: least, mean and most."""
    counts = {
        "all": [[size.tokens for size in sizes] for sizes in data.samples],
        "of images": [[size.images * image_tokens for size in sizes] for sizes in data.samples],
        "of answers, supervised": [[size.supervised for size in sizes] for sizes in data.samples],
    }
    rows = [[f"{name}tokens per sample", "least", "mean", "most"]]
    for row, samples in counts.items():
        mean = sum(sum(sizes) / len(sizes) for sizes in samples) / len(samples)  # every alternative is as likely
        rows.append([row, f"{min(map(min, samples)):,}", f"{mean:,.1f}", f"{max(map(max, samples)):,}"])
    looked = f"looked at: {len(data.samples):,} of {format_count(data.num_samples, 'sample')}"
    if data.num_bad:
        looked += f"; {format_count(data.num_bad, 'bad sample')} left out"
    return f"{_table(rows)}\n{looked}"


def cache_lines(asked: DataArguments, tower: str, shape: ModelShape, num_images: int) -> str:
    """Say what the features of all images take on the disk, and what may be stored already.

    Only the tower's weights tell which files are its own, so those of the same name and shape are counted.
    """
    folder, dtype = Path(str(asked.feature_cache)).absolute(), asked.feature_cache_dtype
    size = (shape.patches, shape.tower_width)
    per_image, free, disk = disk_space(FeatureCache(folder / "tower", size, DTYPES[dtype]))
    lines = [
        f"feature cache: {format_count(num_images, 'distinct image')}, {size[0]:,} × {size[1]:,} {dtype} each: at most "
        f"{in_gb(num_images * per_image)} on the disk; {in_gb(free)} free in {disk}"
    ]
    stored = pictures_stored(folder, tower, size, dtype)
    lines += [f"stored already, of a tower called {tower}: {count:,} in {name}" for name, count in stored.items()]
    return "\n".join([*lines, "The others go through the tower before the first step."])


def memory_table(shape: ModelShape, settings: Mapping[str, Setting], data: DataSizes, max_length: int) -> str:
    """List the memory of one process in GB for the batch that takes most, without and with gradient checkpointing."""
    columns: dict[str, Setting] = {}
    for name, setting in settings.items():
        if not setting.checkpointing:
            columns[name] = setting
        columns[f"{name}, checkpointing"] = replace(setting, checkpointing=True)
    rows = data.batches[0].rows
    share = max(batch.supervised / (rows * batch.tokens) for batch in data.batches)
    most_images = max(batch.images for batch in data.batches)
    longest = BatchShape(rows, max_length, round(share * rows * max_length), most_images)
    found = [_most_memory(shape, setting, data) for setting in columns.values()]
    full = [estimate_memory(shape, setting, longest).peak for setting in columns.values()]
    table = [["memory per process, GB", *columns]]
    table += [[text, *(f"{getattr(one, name) / 1e9:.2f}" for one in found)] for name, text in _MEMORY_ROWS.items()]
    table.append([f"if every sample had {max_length:,} tokens", *(f"{peak / 1e9:.2f}" for peak in full)])
    return _table(table)


def _most_memory(shape: ModelShape, setting: Setting, data: DataSizes) -> MemoryEstimate:
    """Return the memory of the batch that takes most."""
    return max((estimate_memory(shape, setting, batch) for batch in set(data.batches)), key=lambda one: one.peak)


def shuffle_lines(
    shape: ModelShape, settings: Mapping[str, Setting], data: DataSizes, unshuffled: DataSizes | None
) -> str:
    """Say what pixel shuffle saves; `unshuffled` are the same samples with every patch as a token, if any fits."""
    side = math.isqrt(shape.patches // shape.image_tokens)
    extra = (side**2 - 1) * shape.tower_width * shape.width  # of the projector's first layer
    plain = replace(shape, image_tokens=shape.patches, projector_parameters=shape.projector_parameters - extra)
    lines = [f"pixel shuffle {side}: an image takes {shape.image_tokens:,} tokens, without it {shape.patches:,}"]
    if unshuffled is None:
        return f"{lines[0]}, and no sample would fit"
    for name, setting in settings.items():
        peaks = [_most_memory(one, setting, sizes).peak / 1e9 for one, sizes in ((shape, data), (plain, unshuffled))]
        lines.append(f"{name}: {peaks[0]:.2f} GB at the most, without it {peaks[1]:.2f} GB")
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
