"""Earlier weights: a run may start from those of a checkpoint, and a model may return to them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from ..arguments import BASE_LANGUAGE_MODEL, ModelArguments
from ..lora import LoraSettings
from .base_models import load_language_model
from .checkpoint import base_models, check_bases, check_weights, load_projector, read_adapter, read_checkpoint
from .folder import LANGUAGE_MODEL, CheckpointError
from .readers import Checkpoint


def read_previous(asked: ModelArguments) -> Checkpoint | None:
    """Read the checkpoint that `--previous_lora_weights` names, if any, and compare explicit flags with it.

    `asked` names a language model from now on: the one given, else the checkpoint's, else the default. Base models are
    read only to see whether one that is given is the one that a checkpoint's own language model was trained from.

    Raises:
        CheckpointError: if they disagree.
        ValueError: for flags that do not go with `--from_llava`.
    """
    for name, only in {"previous_lora_weights": None, "projector_layers": 2, "pixel_shuffle": 1}.items():
        if asked.from_llava is not None and (value := getattr(asked, name)) not in (None, only):
            raise ValueError(
                f"--from_llava and --{name} {value} do not go together: there is one projector, and a LLaVA's has two "
                "layers and takes single patches; leave one of them out"
            )
    checkpoint = read_checkpoint(asked.previous_lora_weights) if asked.previous_lora_weights is not None else None
    if checkpoint is not None:
        _compare(asked, checkpoint)
    if checkpoint is None or checkpoint.config is None:
        asked.base_language_model = asked.base_language_model or BASE_LANGUAGE_MODEL
    elif asked.base_language_model is None or checkpoint.train_only == "all":
        asked.base_language_model = base_models(asked.base_language_model, asked.base_value_model, checkpoint)[0]
    return checkpoint


def _compare(asked: ModelArguments, checkpoint: Checkpoint) -> None:
    flags: dict[str, tuple[Any, Any]] = {
        "projector_layers": (asked.projector_layers, checkpoint.projector_layers),
        "pixel_shuffle": (asked.pixel_shuffle, checkpoint.pixel_shuffle),
    }
    if (config := checkpoint.lora_config) is not None:
        if asked.train_only is not None:
            raise CheckpointError(
                f"--train_only {asked.train_only}: --previous_lora_weights {asked.previous_lora_weights} holds LoRA, "
                "which can only be trained further; give a checkpoint of --train_only, or leave --train_only out"
            )
        targets = asked.target_modules
        flags |= {
            "lora_rank": (asked.lora_rank, config.r),
            "lora_alpha": (asked.lora_alpha, config.lora_alpha),
            "target_modules": (
                None if targets in (None, "auto") else _with_bars(LoraSettings.parse_targets(targets)),
                _with_bars(name.rsplit(".", 1)[-1] for name in config.target_modules or ()),
            ),
        }
    for name, (wanted, trained) in flags.items():
        if wanted is not None and wanted != trained:
            raise CheckpointError(
                f"--{name} {wanted} disagrees with --previous_lora_weights {asked.previous_lora_weights}, which was "
                f"trained with {trained}; leave the flag out or give {trained}"
            )


def _with_bars(names: Iterable[str]) -> str:
    return "|".join(sorted(set(names)))


def restore_weights(model: Any, folder: str | os.PathLike[str]) -> None:
    """Replace the weights that a `VisionLanguageModel` trains by a checkpoint's.

    Raises:
        CheckpointError: if names or shapes differ, or what was trained, or LoRA's scale, or the base models.
    """
    checkpoint = read_checkpoint(folder)
    settings = {name: (getattr(checkpoint, name), getattr(model, name)) for name in ("train_only", "pixel_shuffle")}
    if checkpoint.lora_config is not None and model.has_lora:
        here = model.language_model.peft_config["default"]
        settings["lora_alpha"] = checkpoint.lora_config.lora_alpha, here.lora_alpha
    for name, (trained, own) in settings.items():
        if trained != own:
            raise CheckpointError(
                f"checkpoint {checkpoint.folder} was trained with {name} {trained}, the model has {own}; give the same "
                f"--{name}"
            )
    check_bases(checkpoint, model.vision_tower, model.qwen, model.fingerprints)
    weights = {}  # of LoRA or of the language model
    if hasattr(model.qwen, "reshard") and checkpoint.train_only == "all":  # split over the processes
        from ..scaling.sharding import fill

        fill(model.qwen, checkpoint.language_model)
    elif checkpoint.train_only == "lora":
        weights = read_adapter(model.language_model, checkpoint.folder)
    elif checkpoint.train_only == "all":
        weights = load_language_model(checkpoint.language_model, model.dtype).state_dict()
        where = f"{checkpoint.folder / LANGUAGE_MODEL}"
        check_weights(model.language_model.state_dict(), weights, where, "another base language model")
    load_projector(model.projector, checkpoint.folder)
    model.language_model.load_state_dict(weights, strict=False)  # both fit: nothing changes before that is known
