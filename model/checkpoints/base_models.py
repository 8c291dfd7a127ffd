"""Which base models a checkpoint needs, and whether those at hand are like them."""

from __future__ import annotations

import logging

from qwen import MultimodalQWenLMHeadModel
from visual.base import VisionTower
from visual.loading import read_config

from .checkpoint import Checkpoint, CheckpointError, read_projector
from .fingerprint import comparable

logger = logging.getLogger(__name__)


def base_models(language: str | None, vision: str | None, checkpoint: Checkpoint | None) -> tuple[str, str]:
    """Names of the base models: those given, else those that the checkpoint was trained on.

    Raises:
        CheckpointError: if one is named neither here nor there.
    """
    config = checkpoint.config if checkpoint is not None else None
    if config is not None:
        language, vision = language or config.base_language_model, vision or config.base_value_model
    if language is None or vision is None:
        flags = {"--base_language_model": language, "--base_value_model": vision}
        absent = " and ".join(flag for flag, name in flags.items() if name is None)
        raise CheckpointError(f"give {absent}: there is no checkpoint whose multimodal_config.json says what it is")
    logger.info("base language model: %s; base vision model: %s", language, vision)
    return language, vision


def drops_first_patch(checkpoint: Checkpoint | None, vision_name: str) -> bool:
    """Whether SigLIP's first patch is left out: as trained by the original project, or going on from such training."""
    if checkpoint is None:
        return False
    # Of another tower nothing can be dropped; that it does not fit is found out when both are loaded.
    is_siglip = str(read_config(vision_name).get("model_type")).startswith("siglip")
    return is_siglip and (checkpoint.config is None or checkpoint.config.drop_first_patch)


def num_projector_layers(checkpoint: Checkpoint) -> int:
    """What the checkpoint says; the original project's say it by their weights only."""
    if checkpoint.config is not None:
        return checkpoint.config.projector_layers
    return 2 if any(name.startswith("2.") for name in read_projector(checkpoint.folder)) else 1


def check_bases(
    checkpoint: Checkpoint,
    tower: VisionTower,
    language_model: MultimodalQWenLMHeadModel,
    fingerprints: dict[str, str],
) -> None:
    """Hold the base models against what the checkpoint was trained on; the original project's do not say.

    Args:
        checkpoint: the checkpoint.
        tower: the vision tower at hand.
        language_model: the language model at hand.
        fingerprints: of both, as `base_fingerprints` gives them.

    Raises:
        CheckpointError: with every difference.
    """
    if checkpoint.config is None:
        return
    found = {
        "vision_tower": tower.kind,
        "num_image_tokens": tower.num_image_tokens,
        "vision_hidden_size": tower.hidden_size,
        "language_hidden_size": language_model.config.hidden_size,
        "vocab_size": language_model.config.vocab_size,
    }
    differences = [
        f"{name} is {value}, the checkpoint was trained with {getattr(checkpoint.config, name)}"
        for name, value in found.items()
        if value != getattr(checkpoint.config, name)
    ]
    if not differences:
        for name, value in fingerprints.items():
            there = getattr(checkpoint.config, name)
            if comparable(value, there) and value != there:
                base = "base_value_model" if name.startswith("vision") else "base_language_model"
                differences.append(
                    f"the weights or settings of --{base} are others than those of "
                    f"{getattr(checkpoint.config, base)}, which it was trained on"
                )
    if differences:
        raise CheckpointError(f"checkpoint {checkpoint.folder} does not fit the base models: {'; '.join(differences)}")
