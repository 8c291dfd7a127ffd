"""Values of train.py's flags that cannot work: found before a model is loaded, and said in one line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.integrations import get_available_reporting_integrations

from .checkpoints.base_models import num_projector_layers
from .checkpoints.checkpoint import Checkpoint, CheckpointError
from .lora import LoraSettings

if TYPE_CHECKING:
    from .arguments import DataArguments, ModelArguments, VLMTrainingArguments

_NOT_SUPPORTED = {
    # Trainer shifts the labels of language models in its own list only; here it would smooth the wrong tokens.
    "label_smoothing_factor": "leave it out",
    "dataloader_drop_last": "no sample of an epoch is left out; leave the flag out",
    "ignore_data_skip": "a run resumes after the last sample it was given, at no cost; leave the flag out",
    "auto_find_batch_size": "give a smaller --per_device_train_batch_size, with --gradient_accumulation_steps",
    "fsdp": "every GPU holds the whole model; leave it out",
    "deepspeed": "every GPU holds the whole model; leave it out",
    "push_to_hub": "leave it out, and upload the finished checkpoint folder yourself",
}

_Range = tuple[Callable[[Any], bool], str]
_AT_LEAST_1: _Range = (lambda value: value >= 1, "at least 1")
_NOT_NEGATIVE: _Range = (lambda value: 0 <= value < math.inf, "0 or more")
_RANGES: dict[str, _Range] = {
    "lora_rank": _AT_LEAST_1,
    "lora_alpha": _AT_LEAST_1,
    "lora_dropout": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
    "projector_layers": (lambda value: value in (1, 2), "1 or 2"),
    "max_train_samples": _AT_LEAST_1,
    "max_length": _AT_LEAST_1,
    "max_bad_fraction": (lambda value: 0 <= value <= 1, "0 to 1"),
    "learning_rate": _NOT_NEGATIVE,
    "feature_proj_lr": _NOT_NEGATIVE,
    "per_device_train_batch_size": _AT_LEAST_1,
    "per_device_eval_batch_size": _AT_LEAST_1,
    "gradient_accumulation_steps": _AT_LEAST_1,
    "global_batch_size": _AT_LEAST_1,
    "max_steps": (lambda value: value == -1 or value >= 1, "at least 1, or -1 to count by epochs"),
    "max_grad_norm": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "num_train_epochs": (lambda value: 0 < value < math.inf, "above 0"),
}


def check_supported(args: VLMTrainingArguments) -> None:
    """Refuse flags that Trainer accepts, but that would train something else than they say.

    Raises:
        ValueError: naming all of them, with what to do instead.
    """
    given = [
        f"--{name} {getattr(args, name)} is not supported: {why}"
        for name, why in _NOT_SUPPORTED.items()
        if getattr(args, name)
    ]
    if given:
        raise ValueError("; ".join(given))


def check_optimizer(args: VLMTrainingArguments) -> None:
    """Refuse settings that Trainer has parsed by now and that do not fit this model.

    Raises:
        ValueError: for optimizers that need the model itself, and for batches that one process splits for all.
    """
    accelerator: Any = args.accelerator_config
    if accelerator.dispatch_batches:
        raise ValueError(
            '--accelerator_config {"dispatch_batches": true} is not supported: images would be split like rows, and '
            "arrive in other rows; leave it out"
        )
    kind = _word(args.optim)
    if kind.startswith(("galore", "apollo", "lomo", "adalomo")):
        raise ValueError(
            f"--optim {kind} is not supported: it groups the model's parameters itself, and LoRA and projector need "
            "two learning rates; leave it out for AdamW, or take adafactor or sgd"
        )


def check_arguments(model_args: ModelArguments, data_args: DataArguments, args: VLMTrainingArguments) -> None:
    """Check ranges, files, and flags that belong together.

    Raises:
        ValueError: for what is wrong, with what is expected.
    """
    check_ranges(model_args, data_args, args)
    if (data_args.eval_image_map is None) != (data_args.eval_captions_file is None):
        raise ValueError("--eval_image_map and --eval_captions_file belong together; one of them is missing")
    if args.eval_strategy != "no" and data_args.eval_image_map is None:
        raise ValueError(
            f"--eval_strategy {_word(args.eval_strategy)} needs --eval_image_map and --eval_captions_file; "
            "give both, or leave it out"
        )
    if args.remove_unused_columns:
        raise ValueError("--remove_unused_columns must be false: the data set returns exactly what the model takes")
    for name in ("image_map", "captions_file", "eval_image_map", "eval_captions_file"):
        path = getattr(data_args, name)
        if path is not None and not Path(path).is_file():
            raise ValueError(f"--{name} {path}: there is no such file; dataprocess/process_image.py writes it")
    missing = set(args.report_to or ()) - set(get_available_reporting_integrations())
    if missing:
        raise ValueError(f"--report_to {' '.join(sorted(missing))}: not installed; install it, or give none")
    for name, folder in (("output_dir", args.output_dir), ("feature_cache", data_args.feature_cache)):
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise ValueError(f"--{name} {folder} is a file; give a folder, which is made if need be")


def check_ranges(*arguments: object) -> None:
    """Check numbers that would otherwise fail deep inside a library, or not at all.

    Raises:
        ValueError: with every value that is out of its range.
    """
    values = {name: value for group in arguments for name, value in vars(group).items()}
    wrong = [
        f"--{name} {values[name]}: must be {expected}"
        for name, (is_valid, expected) in _RANGES.items()
        if values[name] is not None and not is_valid(values[name])
    ]
    if wrong:
        raise ValueError("; ".join(wrong))


def check_previous(asked: ModelArguments, checkpoint: Checkpoint) -> None:
    """Compare explicit flags with the checkpoint that training starts from; no base model is needed for that.

    Args:
        asked: the flags.
        checkpoint: the one that `--previous_lora_weights` names.

    Raises:
        CheckpointError: if they disagree.
    """
    config, targets = checkpoint.lora_config, asked.target_modules
    flags = {
        "lora_rank": (asked.lora_rank, config.r),
        "lora_alpha": (asked.lora_alpha, config.lora_alpha),
        "target_modules": (
            None if targets is None else _with_bars(LoraSettings.parse_targets(targets)),
            _with_bars(name.rsplit(".", 1)[-1] for name in config.target_modules or ()),
        ),
        "projector_layers": (asked.projector_layers, num_projector_layers(checkpoint)),
    }
    for name, (wanted, trained) in flags.items():
        if wanted is not None and wanted != trained:
            raise CheckpointError(
                f"--{name} {wanted} disagrees with --previous_lora_weights {asked.previous_lora_weights}, which was "
                f"trained with {trained}; leave the flag out or give {trained}"
            )


def _with_bars(names: Iterable[str]) -> str:
    return "|".join(sorted(set(names)))


def _word(choice: Any) -> str:
    """Return what the user typed for a flag that transformers turns into an enumeration."""
    return str(getattr(choice, "value", choice))
