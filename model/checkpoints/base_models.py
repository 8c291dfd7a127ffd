"""Name the base models, load the language model, and take fingerprints that tell whether two models are the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file

from dataprocess.messages import shorten
from dataset.prompt import Tokenizer
from qwen import MultimodalQWenLMHeadModel, QWenConfig, QWenTokenizer
from visual.base import VisionTower

from ..errors import is_out_of_memory
from ..language_models.causal_lm import (
    fingerprinted_settings,
    load_causal_lm,
    load_chat_tokenizer,
    multimodal_class,
)
from .folder import reading

logger = logging.getLogger(__name__)

FINGERPRINT = "v2-"
"""How fingerprints begin that can be compared; those of older checkpoints depend on the version of transformers."""
_VALUES_PER_TENSOR = 64
_LANGUAGE_SETTINGS = (
    *("num_attention_heads", "kv_channels", "layer_norm_epsilon", "rotary_pct", "rotary_emb_base"),
    *("seq_length", "use_dynamic_ntk", "use_logn_attn", "scale_attn_weights"),
)
_IMAGE_SETTINGS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std"),
)


# ---- The language model: what is wrong with one is a ValueError in one line


def load_language_model(
    name_or_path: str,
    dtype: torch.dtype,
    hollow: bool = False,
    quantisation: str | None = None,
    device: torch.device | None = None,
) -> Any:
    """Load QWen, or another language model, its weights in this dtype.

    Args:
        name_or_path: hub name or folder.
        dtype: of the weights, or that quantised ones are computed in.
        hollow: leave the weights away, see `--shard_model`.
        quantisation: 4bit, 8bit, or None.
        device: where quantised weights go.
    """
    config = read_language_config(name_or_path)  # a wrong name is an error before weights are downloaded
    logger.info("language model %s (%s), %s", name_or_path, config.model_type, dtype)
    load: Any = None
    if quantisation is not None:
        from ..scaling.quantised import quantised_loader

        load = quantised_loader(quantisation, device)
    with _named_errors(name_or_path):
        if hollow:
            from ..scaling.hollow import hollow_language_model

            return hollow_language_model(name_or_path, config, dtype, quantisation)
        if not isinstance(config, QWenConfig):
            return load_causal_lm(name_or_path, dtype, load)
        model_class = MultimodalQWenLMHeadModel
        return (load(model_class) if load else model_class.from_pretrained)(name_or_path, dtype=dtype)


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """Load the language model's tokenizer; that of another than QWen with its chat template."""
    config = read_language_config(name_or_path)  # a wrong name is another mistake than a missing vocabulary
    with _named_errors(name_or_path):
        if isinstance(config, QWenConfig):
            return QWenTokenizer.from_pretrained(name_or_path)
        return load_chat_tokenizer(name_or_path, config.vocab_size)


def read_language_config(name_or_path: str) -> PreTrainedConfig:
    """Read a language model's configuration; no other file is needed."""
    with _named_errors(name_or_path):
        values = PreTrainedConfig.get_config_dict(name_or_path)[0]
        if not values:
            raise ValueError("no config.json in this folder; give a language model's, or a hub name")
        if how := values.get("quantization_config"):
            raise ValueError(
                f"its files are quantised already ({shorten(how)}); give the model that they were made from, with "
                "--load_in_4bit or --load_in_8bit to quantise it while it is loaded"
            )
        kind = values.get("model_type")
        if kind != QWenConfig.model_type and kind not in CONFIG_MAPPING:
            raise ValueError(
                f"transformers {transformers.__version__} knows no model_type {kind!r}; give a language model that it "
                "knows, or install a newer one"
            )
        try:
            if kind == QWenConfig.model_type:
                return QWenConfig.from_dict(values)
            config = AutoConfig.for_model(**values)
        except Exception as error:  # a file's values may be of any type
            raise ValueError(f"its config.json can't be used: {' '.join(str(error).split())}") from error
        multimodal_class(config)
        return config


@contextlib.contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Raise whatever is wrong with a language model as a ValueError that names it."""
    try:
        yield
    except OSError as error:
        reason = str(error).rstrip(".")
        if not Path(name).is_dir():
            reason = (
                f"no local folder, and the hub does not give it: {reason}. Give a folder (config.json, weights and "
            )
            reason += "tokenizer), or a name that can be downloaded or is in the cache"
        raise ValueError(f"base language model {name!r}: {reason}") from error
    except ValueError as error:
        raise ValueError(f"base language model {name!r}: {error}") from error
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # damaged, or of other shapes
        if is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"base language model {name!r}: its weights can't be loaded: {reason}") from error


# ---- Fingerprints


def base_fingerprints(tower: VisionTower, language_model: PreTrainedModel) -> dict[str, str]:
    """Return the fingerprints of both base models, as `multimodal_config.json` keeps them.

    They come from the published files and not from the modules that transformers makes of them, so that no upgrade
    changes them. How the tower prepares images counts too.
    """
    processor = published_file(tower.name_or_path, "preprocessor_config.json")
    images = json.loads(processor.read_text(encoding="utf-8")) if processor is not None else {}
    prepared = {name: images.get(name) for name in _IMAGE_SETTINGS}
    vision = each_weight(tower.name_or_path)
    return {
        "vision_tower_fingerprint": fingerprint(vision, {"kind": tower.kind}, prepared),
        "language_model_fingerprint": language_fingerprint(str(language_model.name_or_path), language_model.config),
    }


def language_fingerprint(name: str, config: PreTrainedConfig) -> str:
    """Return the fingerprint of a language model; empty if its weights are not here."""
    if isinstance(config, QWenConfig):
        return fingerprint(each_weight(name), {key: getattr(config, key) for key in _LANGUAGE_SETTINGS})
    return fingerprint(each_weight(name), fingerprinted_settings(config))


def fingerprint(weights: dict[str, Tensor] | Iterator[tuple[str, Tensor]], *settings: dict[str, Any]) -> str:
    """Hash names, shapes and evenly spread values of all weights, and what settings say; empty without weights.

    Values are taken as bfloat16, so that a copy in bf16 has the fingerprint of the fp32 original. Of a CLIP-like model
    the vision half counts alone; what is computed (positions, frequencies) does not.
    """
    samples: dict[str, bytes] = {}
    for name, value in weights.items() if isinstance(weights, dict) else weights:
        samples[name] = b""
        if value.is_floating_point() and not name.endswith("inv_freq"):
            values = value.detach().flatten()
            number = min(_VALUES_PER_TENSOR, values.numel())
            spread = torch.arange(number) * (values.numel() - 1) // max(number - 1, 1)  # whole numbers: exact
            kept = values[spread].to(torch.bfloat16).view(torch.int16).numpy().tobytes()
            samples[name] = str(tuple(value.shape)).encode() + kept
    if not samples:
        return ""
    prefix = "vision_model."
    vision_half = {name.removeprefix(prefix): sample for name, sample in samples.items() if name.startswith(prefix)}
    digest = hashlib.sha256()
    for name, sample in sorted((vision_half or samples).items()):
        if sample:
            digest.update(name.encode() + sample)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return FINGERPRINT + digest.hexdigest()[:16]


def comparable(one: object, other: object) -> bool:
    """Return whether two fingerprints can tell models apart: both are of the kind that this version makes."""
    return all(isinstance(value, str) and value.startswith(FINGERPRINT) for value in (one, other))


def published_file(name: str, file: str) -> Path | None:
    """Return the path of a base model's file, or None. The model was loaded, so it is here or in the hub's cache."""
    try:
        return Path(str(cached_file(name, file, local_files_only=True)))
    except OSError:
        return None


def published_weights(name: str) -> dict[str, Tensor]:
    """Return a base model's tensors by their published names, mapped from its files; none if they are not found."""
    return dict(each_weight(name))


def each_weight(name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield what `published_weights` returns; at any moment, no more than one file is mapped."""
    for file in ("model.safetensors", "pytorch_model.bin"):
        parts = [file]
        if published_file(name, file) is None and (index := published_file(name, f"{file}.index.json")) is not None:
            parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [path for part in parts if (path := published_file(name, part)) is not None]
        for path in paths:
            with reading(path):
                weights = load_state_dict(path, weights_only=True)
            yield from weights.items()
            del weights
        if paths:
            return
