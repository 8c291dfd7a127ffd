"""Load checkpoint folders, as `saving.py` writes them and as the original project wrote them.

Folders of the original project hold `adapter_model.bin` (or `.safetensors`) and `other_params.bin`, and neither
`multimodal_config.json` nor checksums. No pickle is executed, and whatever does not fit is one `CheckpointError`.
"""

from __future__ import annotations

import logging
import os
import re
from copy import copy
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwen import MultimodalQWenLMHeadModel
from visual import tower_class_of
from visual.base import VisionTower

from ..lora import make_lean
from .base_models import comparable, language_fingerprint, read_language_config
from .folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MULTIMODAL_CONFIG,
    PROJECTOR_WEIGHTS,
    CheckpointError,
    numbered_checkpoints,
)
from .readers import (
    Checkpoint,
    check_checksums,
    read_lora_config,
    read_multimodal_config,
    read_tensors,
    weights_in,
)

logger = logging.getLogger(__name__)

ORIGINAL_ADAPTER_WEIGHTS = "adapter_model.bin"
ORIGINAL_PROJECTOR_WEIGHTS = "other_params.bin"
_NEEDED: tuple[tuple[str, ...], ...] = (
    (ADAPTER_CONFIG,),
    (ADAPTER_WEIGHTS, ORIGINAL_ADAPTER_WEIGHTS),
    (PROJECTOR_WEIGHTS, ORIGINAL_PROJECTOR_WEIGHTS),
)


# ---- Find and read


def resolve_checkpoint(folder: str | os.PathLike[str]) -> Path:
    """Find the checkpoint that a path means: the folder itself, or the newest complete one of a run folder."""
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path}: no such folder; give a checkpoint or a run folder")
    numbered = numbered_checkpoints(path)
    for candidate in (*numbered, path):
        is_ours = any((candidate / name).exists() for name in (PROJECTOR_WEIGHTS, MULTIMODAL_CONFIG))
        needed = tuple((name,) for name in weights_in(candidate)) if is_ours else _NEEDED
        missing = [" or ".join(names) for names in needed if not any((candidate / name).exists() for name in names)]
        if not missing:
            return candidate
    inside = f" and none of its {len(numbered)} checkpoint-* folders is complete" if numbered else ""
    raise CheckpointError(f"checkpoint {path}: {' and '.join(missing)} missing{inside}")


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Check a checkpoint's files and read its configuration; a run folder means its newest complete checkpoint."""
    path = resolve_checkpoint(folder)
    if not (path / MULTIMODAL_CONFIG).exists():  # of the original project: only the weights show the number of layers
        layers = 2 if any(name.startswith("2.") for name in read_projector(path)) else 1
        return Checkpoint(path, None, read_lora_config(path), layers)
    names = weights_in(path)
    check_checksums(path, names)
    config = read_multimodal_config(path)
    lora = read_lora_config(path) if ADAPTER_CONFIG in names else None
    return Checkpoint(path, config, lora, config.projector_layers, config.pixel_shuffle, config.train_only)


# ---- Does it fit the base models?


def base_models(language: str | None, vision: str | None, checkpoint: Checkpoint) -> tuple[str, str]:
    """Return the names of the base models: those given, else those that the checkpoint was trained on.

    A checkpoint of `--train_only all` brings its language model; one that is given as well must be the same, or the one
    that its training started from.
    """
    if checkpoint.config is not None:
        if checkpoint.train_only == "all":
            if language is not None:
                _check_same_origin(language, checkpoint)
            language = checkpoint.language_model
        language = language or checkpoint.config.base_language_model
        vision = vision or checkpoint.config.base_value_model
    if language is None or vision is None:
        flags = {"--base_language_model": language, "--base_value_model": vision}
        missing = " and ".join(flag for flag, name in flags.items() if name is None)
        raise CheckpointError(f"give {missing}: checkpoint {checkpoint.folder} has no {MULTIMODAL_CONFIG} to name it")
    return language, vision


def _check_same_origin(name: str, checkpoint: Checkpoint) -> None:
    """Check that a language model is the one in a checkpoint, or the one that its training started from."""
    config: Any = checkpoint.config
    known = {config.base_language_model, str(Path(checkpoint.language_model).resolve())}
    if name in known or str(Path(name).absolute()) in known or str(Path(name).resolve()) in known:
        return
    found = language_fingerprint(name, read_language_config(name))
    if found != config.language_model_fingerprint or not comparable(found, found):
        raise CheckpointError(
            f"--base_language_model {name}: checkpoint {checkpoint.folder} brings its own language model, which was "
            f"trained from {config.base_language_model}; give {checkpoint.language_model} or that"
        )


def tower_settings(checkpoint: Checkpoint, vision_name: str) -> dict[str, Any]:
    """Return how `build_vision_tower` reads the tower for a checkpoint.

    SigLIP's first patch is left out in the original project's checkpoints and what came of them. What came of a LLaVA
    folder may read an earlier hidden state.
    """
    config, may_drop = checkpoint.config, tower_class_of(vision_name).may_drop_first_patch
    return {
        "drop_first_patch": may_drop and (config is None or config.drop_first_patch),
        "feature_layer": -1 if config is None else config.vision_feature_layer,
    }


def check_bases(
    checkpoint: Checkpoint,
    tower: VisionTower,
    language_model: MultimodalQWenLMHeadModel,
    fingerprints: dict[str, str],
) -> None:
    """Check that the base models at hand match the checkpoint; the original project's checkpoints record nothing."""
    config = checkpoint.config
    if config is None:
        return
    found = {
        "vision_tower": tower.kind,
        "num_image_tokens": tower.num_image_tokens // config.pixel_shuffle**2,
        "vision_feature_layer": tower.feature_layer,
        "vision_hidden_size": tower.hidden_size,
        "language_hidden_size": language_model.config.hidden_size,
        "vocab_size": language_model.config.vocab_size,
    }
    differences = [
        f"{name} is {value}, the checkpoint was trained with {getattr(config, name)}"
        for name, value in found.items()
        if value != getattr(config, name)
    ]
    for name, value in fingerprints.items() if not differences else ():
        recorded = getattr(config, name)
        base = "base_value_model" if name.startswith("vision") else "base_language_model"
        if base == "base_language_model" and language_model.name_or_path == checkpoint.language_model:
            continue  # its own, not the one that training started from; its checksums are right
        if recorded and not comparable(value, recorded):
            logger.warning("%s: its %s is of an older kind and is not compared", checkpoint.folder, name)
        elif recorded and value != recorded:
            differences.append(
                f"the weights or settings of --{base} differ from those of {getattr(config, base)}, which it was "
                "trained on"
            )
    if differences:
        raise CheckpointError(f"checkpoint {checkpoint.folder} does not fit the base models: {'; '.join(differences)}")


# ---- Load


def load_lora(
    language_model: PreTrainedModel, checkpoint: Checkpoint, *, trainable: bool, dropout: float | None = None
) -> Any:
    """Wrap the language model with a checkpoint's LoRA layers, if it has any, in fp32; `dropout` replaces its own."""
    if checkpoint.lora_config is None:
        return language_model
    config = copy(checkpoint.lora_config)
    config.inference_mode = not trainable
    config.base_model_name_or_path = language_model.name_or_path  # or PEFT warns that it is another
    if dropout is not None:
        config.lora_dropout = dropout
    try:
        wrapped = get_peft_model(language_model, config, low_cpu_mem_usage=True)  # layers of shapes, without values
        make_lean(wrapped)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder / ADAPTER_CONFIG}: {error}") from error
    weights = read_adapter(wrapped, checkpoint.folder)
    if trainable:  # a copy: what is trained must not depend on a mapped file, which may be overwritten
        weights = {name: tensor.clone() for name, tensor in weights.items()}
    wrapped.load_state_dict(weights, strict=False, assign=True)
    return wrapped


def read_adapter(wrapped: PeftModel, folder: Path) -> dict[str, Tensor]:
    """Read a checkpoint's LoRA weights for a model with such layers: in fp32, under the names of its parameters.

    torch can load them as they are. PEFT would round them to the base model's dtype.
    """
    name = ADAPTER_WEIGHTS if (folder / ADAPTER_WEIGHTS).exists() else ORIGINAL_ADAPTER_WEIGHTS
    # Names as PEFT writes them: without the adapter's own name, from the language model on.
    weights = {
        re.sub(r"^.*?(?=base_model\.model\.)", "", re.sub(r"(lora_[AB])\.default\.", r"\1.", name)): tensor
        for name, tensor in read_tensors(folder / name).items()
    }
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    check_weights(expected, weights, f"adapter in {folder}", "another base language model or rank")
    return {re.sub(r"(lora_[AB])\.", r"\1.default.", name): tensor.float() for name, tensor in weights.items()}


def load_projector(projector: nn.Module, folder: Path) -> None:
    """Load a checkpoint's weights into the projector."""
    weights = read_projector(folder)
    check_weights(projector.state_dict(), weights, f"projector in {folder}", "another vision tower or language model")
    projector.load_state_dict(weights)


def read_projector(folder: Path) -> dict[str, Tensor]:
    """Read a checkpoint's projector weights, the original project's `other_params.bin` included."""
    if (folder / PROJECTOR_WEIGHTS).exists():
        return read_tensors(folder / PROJECTOR_WEIGHTS)
    weights = read_tensors(folder / ORIGINAL_PROJECTOR_WEIGHTS)
    # Some of the original's files name the tensors from the whole model's root, as in `feature_proj.0.weight`.
    return {re.sub(r"^.*?(\d+\.(?:weight|bias))$", r"\1", name): tensor for name, tensor in weights.items()}


def check_weights(expected: dict[str, Tensor], found: dict[str, Tensor], what: str, likely: str) -> None:
    """Compare the tensors found in a file with a model's own: the same names and shapes, and finite numbers.

    The message names them by `what`, and by `likely` the cause that is most likely.
    """
    problems = [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected {name}" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        if expected[name].shape != found[name].shape:
            problems.append(f"{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}")
        elif not found[name].is_floating_point():
            problems.append(f"{name} is {found[name].dtype}, expected floating point")
        elif not found[name].isfinite().all():
            problems.append(f"{name} holds values that are not finite")
    if problems:
        shown = "; ".join(sorted(problems)[:4])
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(f"{what} does not fit (was it trained for {likely}?): {shown}{more}")
