"""The other way: training starts from the projector of a LLaVA folder, a published one or an export.

A projector fits the features that it was trained on. So the tower at hand must be the folder's: its settings, its
weights, and the pixels that it is given. Features are then read where the folder reads them, mostly before CLIP's last
block. What can't be reproduced is refused.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaConfig

from visual import TOWERS, tower_class_of
from visual.base import ImageTransform, VisionTower
from visual.feature_layer import read_earlier
from visual.loading import load_config, load_image_processor

from ..checkpoints.base_models import published_weights
from ..checkpoints.checkpoint import check_weights
from ..checkpoints.folder import reading
from ..checkpoints.readers import read_json
from ..vision_language_model import VisionLanguageModel
from .norm_block import BLOCK_SCALE, norm_block

logger = logging.getLogger(__name__)

_TOWER_SETTINGS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "patch_size", "image_size"),
    *("hidden_act", "layer_norm_eps"),
)
_VALUES_PER_TENSOR = 64
_ROUNDING: dict[str, Any] = {"rtol": 2**-7, "atol": 1e-5}
"""Allowed distance of a weight from the same one in bfloat16 or float16."""


def start_from_llava(model: VisionLanguageModel, folder: str) -> None:
    """Give a model the projector of a LLaVA folder, and have its tower read the features that this one expects.

    Raises:
        ValueError: if it is no such folder, or its tower, its pixels, its width or its projector's form differ.
        OSError: if files are missing.
    """
    tower: Any = model.vision_tower
    layer = llava_feature_layer(folder, tower.name_or_path, model.qwen.config.hidden_size)
    _check_pixels(folder, tower)
    with reading(Path(folder)):
        weights = published_weights(folder)
    theirs, takes_norm = _part(weights, "vision_tower"), tower.kind == "siglip" and layer == -1
    if theirs or takes_norm:
        _check_tower(folder, theirs, tower, layer)
    else:
        logger.warning("%s holds no weights of its tower, so only the tower's settings were compared", folder)
    projector = {
        name.replace("linear_1", "0").replace("linear_2", "2"): value.float()
        for name, value in _part(weights, "multi_modal_projector").items()
    }
    check_weights(model.projector.state_dict(), projector, f"the projector in {folder}", "other base models")
    if takes_norm:
        projector["0.weight"] *= BLOCK_SCALE  # by which the export had divided it: no bit is lost
    model.projector.load_state_dict(projector)
    if layer != -1:
        read_earlier(tower, layer)
    logger.info("the projector is that of %s; it reads hidden state %d of %s", folder, layer, tower.name_or_path)


def llava_feature_layer(folder: str, vision_name: str, language_width: int | None = None) -> int:
    """Compare a LLaVA folder's settings with those of the base models; no weights are read.

    Args:
        folder: the LLaVA.
        vision_name: hub name or folder of the vision tower.
        language_width: channels of the language model's embedding; None: they are not compared.

    Returns:
        The tower's hidden state that the folder reads, see `visual.feature_layer`.

    Raises:
        ValueError: for what differs or can't be reproduced, with every reason.
        OSError: if the tower's configuration is missing.
    """
    file = Path(folder) / "config.json"
    values = read_json(file) if file.exists() else {}
    if values.get("model_type") != "llava" or "vision_config" not in values:
        found = f"its config.json has model_type {values.get('model_type')!r}" if values else "it has no config.json"
        raise ValueError(
            f"--from_llava {folder}: {found if Path(folder).is_dir() else 'no such folder'}; give the folder of a "
            "LlavaForConditionalGeneration in Hugging Face's layout (model_type 'llava', with a vision_config)"
        )
    with reading(Path(folder) / "config.json"):
        make: Any = LlavaConfig
        config = make.from_dict(values)
    tower_class = tower_class_of(vision_name)
    ours: Any = load_config(tower_class.model_class, vision_name, tower_class.config_overrides)
    reasons = _differing_settings(config, ours, tower_class)
    if language_width not in (None, config.text_config.hidden_size):
        width = config.text_config.hidden_size
        reasons.append(f"its language model is {width} wide, --base_language_model {language_width}")
    layer = -1
    if not reasons:
        layer, reason = _feature_layer(config, ours.num_hidden_layers, tower_class.kind)
        reasons += filter(None, [reason])
    if reasons:
        raise ValueError(f"--from_llava {folder} does not fit: {'; '.join(reasons)}")
    return layer


def _differing_settings(config: Any, ours: Any, tower_class: type[VisionTower]) -> list[str]:
    theirs, kind, strategy = config.vision_config, tower_class.kind, config.vision_feature_select_strategy
    if kind not in ("clip", "siglip") or TOWERS.get(theirs.model_type) is not tower_class:
        return [f"its tower is {theirs.model_type}, --base_value_model {kind}; both must be CLIP, or both SigLIP"]
    reasons = [
        f"its tower's {name} is {getattr(theirs, name)}, that of --base_value_model {getattr(ours, name)}"
        for name in _TOWER_SETTINGS
        if getattr(theirs, name) != getattr(ours, name)
    ]
    if strategy != (expected := "default" if kind == "clip" else "full"):
        what = "leaves SigLIP's first patch out" if strategy == "default" else "keeps CLIP's class token"
        reasons.append(f"vision_feature_select_strategy {strategy!r} {what}; expected {expected!r}")
    if not isinstance(config.vision_feature_layer, int):
        reasons.append(f"vision_feature_layer {config.vision_feature_layer} joins hidden states; expected one number")
    if getattr(theirs, "tie_last_hidden_states", None):
        reasons.append("tie_last_hidden_states changes which hidden state is the last; expected a folder without it")
    act, bias = config.projector_hidden_act, config.multimodal_projector_bias
    if act != "gelu" or not bias:
        reasons.append(f"its projector has activation {act!r} and bias {bias}; expected 'gelu' and True")
    return reasons


def _feature_layer(config: Any, num_blocks: int, kind: str) -> tuple[int, str]:
    """Return the hidden state that the folder reads, of a tower with this number of blocks, and why it can't be."""
    read, blocks = config.vision_feature_layer, config.vision_config.num_hidden_layers
    used = read if read >= 0 else blocks + 1 + read  # blocks that come before it
    if kind == "siglip" and used == num_blocks:
        return -1, "it reads SigLIP's last block before the last norm; features here have gone through the norm"
    if kind == "siglip" and used == blocks == num_blocks + 1:
        return -1, ""  # an export, whose further block is the last norm
    reason = (
        f"vision_feature_layer {read} is the output of block {used} of {blocks}; --base_value_model has {num_blocks}"
    )
    return used - num_blocks - 1, "" if 1 <= used <= min(blocks, num_blocks) else reason


def _part(weights: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Return the tensors of a part, without the prefixes that came and went with versions of transformers."""
    pattern = re.compile(rf"(?:model\.)?{part}\.(?:vision_model\.)?(.+)")
    found = ((pattern.fullmatch(name), value) for name, value in weights.items())
    return {match[1]: value for match, value in found if match is not None}


def _check_pixels(folder: str, tower: VisionTower) -> None:
    """Check that the folder's image processor makes the tower's pixels, of a wide and of a tall picture."""
    theirs = ImageTransform(load_image_processor(folder, tower.image_size)[0])
    wide = Image.merge("RGB", [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.new("L", (256, 256), 99)])
    for size in ((300, 170), (150, 260)):
        image = wide.resize(size)
        if not torch.allclose(theirs(image), tower.image_transform(image), atol=1e-4):
            raise ValueError(
                f"--from_llava {folder}: its preprocessor_config.json prepares pictures in another way than that of "
                f"{tower.name_or_path}; give the tower that it was trained with"
            )


def _check_tower(folder: str, theirs: dict[str, Tensor], tower: Any, layer: int) -> None:
    """Check that the folder's tower has the weights of the one at hand, as far as features depend on them."""
    weights, prefix = published_weights(tower.name_or_path), "vision_model."
    vision_half = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    used = tower.config.num_hidden_layers + 1 + layer
    takes_norm = tower.kind == "siglip" and layer == -1
    parts = r"embeddings\.(?!position_ids).*|pre_layrnorm\..*|encoder\.layers\.(\d+)\..*"
    for name, value in (vision_half or weights).items():
        match = re.fullmatch(parts + (r"|post_layernorm\..*" if takes_norm else ""), name)
        if match is None or (match[1] is not None and int(match[1]) >= used):
            continue
        other = theirs.get(name)
        if other is None or other.shape != value.shape or not _is_close(other, value):
            raise ValueError(
                f"--from_llava {folder}: {name} of its vision tower is not that of {tower.name_or_path}; give the "
                "tower that it was trained with"
            )
    if takes_norm:
        extra = f"encoder.layers.{used}."
        block = {name.removeprefix(extra): value for name, value in theirs.items() if name.startswith(extra)}
        weight, bias = (theirs[f"post_layernorm.{kind}"] for kind in ("weight", "bias"))
        expected = norm_block(weight, bias, tower.config.intermediate_size)
        if block.keys() != expected.keys() or not all(torch.equal(block[name], expected[name]) for name in block):
            raise ValueError(
                f"--from_llava {folder}: block {used} of its tower is not a last norm as export.py writes it, and "
                f"{tower.name_or_path} has no such block; give the tower that it was trained with"
            )


def _is_close(one: Tensor, other: Tensor) -> bool:
    """Compare evenly spread values of two tensors of one shape."""
    number = min(_VALUES_PER_TENSOR, one.numel())
    spread = torch.arange(number) * (one.numel() - 1) // max(number - 1, 1)
    a, b = (value.flatten()[spread].float() for value in (one, other))
    return torch.allclose(a, b, **_ROUNDING)
