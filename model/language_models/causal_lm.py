"""Decoder language models that run on transformers' own code and take image features as QWen does.

`multimodal_class` makes a subclass of the model's class. It embeds the ids, puts image features in the place of image
tokens, and runs the model on `inputs_embeds`. The image token's id is beyond the vocabulary, so nobody can type it and
the embedding does not grow.

Shape legend: B rows, T tokens, D `hidden_size`, V vocabulary, F features of all images of the batch, S positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from dataset.chat_template import ChatTemplateError, ChatTokenizer
from qwen.cache import GrowingCache
from qwen.multimodal_generation import GeneratesWithImages, check_counts

from ..pixel_shuffle import check_pixel_shuffle

_SETTINGS = (
    *("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act"),
    *("sliding_window", "tie_word_embeddings"),
)
_OTHER = "give a decoder language model, as Qwen/Qwen3-4B-Instruct-2507"
_UNSUPPORTED = f"models that change their logits after the language head are not supported; {_OTHER}"


class UnsuitableModelError(ValueError):
    """A language model that cannot be used here; the message says why."""


class MultimodalCausalLM(GeneratesWithImages):
    """Adds `image_features` to `forward` and `generate` of a causal language model of transformers."""

    image_token_id: int
    config: PreTrainedConfig

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        *,
        image_features: Tensor | None = None,
        already_checked: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Embed `input_ids`, put `image_features` (..., D) at the image tokens, and run the model.

        Raises:
            ValueError: if features and image tokens differ in number, with both numbers.
        """
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds = self._embed(input_ids, image_features, already_checked)  # (B, T, D)
        position_ids = self._positions(inputs_embeds, attention_mask, position_ids)
        kwargs |= {"position_ids": position_ids, "past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        run: Any = super().forward  # type: ignore[misc]
        return run(attention_mask=attention_mask, **kwargs)

    def generate(self, inputs: Tensor | None = None, *args: Any, image_features: Any = None, **kwargs: Any) -> Any:
        """Generate as transformers' `generate` does, from a prompt with images; see `GeneratesWithImages.generate`.

        The image token has no logit, so settings that read the prompt (`repetition_penalty`) get the prompt's first
        token in its place.
        """
        if image_features is None or "custom_generate" in kwargs:
            return super().generate(inputs, *args, image_features=image_features, **kwargs)
        ids: Any = kwargs.pop("input_ids", None) if inputs is None else inputs  # (B, T)
        features = torch.cat(image_features) if isinstance(image_features, tuple) else image_features
        embeds = self._embed(ids, features, already_checked=False)  # (B, T, D)
        without_images = torch.where(ids == self.image_token_id, ids[:, :1], ids)
        out = super().generate(without_images, *args, inputs_embeds=embeds, **kwargs)
        sequences = out if isinstance(out, Tensor) else out.sequences  # (B · answers, T + new)
        sequences[:, : ids.shape[1]] = ids.repeat_interleave(len(sequences) // len(ids), dim=0)
        return out

    def hidden_at(self, positions: Tensor, input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """Return the last hidden states (S, D), which the language head takes, at the positions b · T + t.

        Args:
            positions: (S,).
            input_ids: (B, T).
            attention_mask: (B, T), 0 for padding.
            kwargs: `image_features` and `already_checked` as for `forward`; `position_ids`.
        """
        features, checked = kwargs.pop("image_features", None), kwargs.pop("already_checked", False)
        inputs_embeds = self._embed(input_ids, features, checked)  # (B, T, D)
        if attention_mask is not None and (attention_mask[:, 1:] <= attention_mask[:, :-1]).all():
            attention_mask = None  # no token sees padding after it, and without a mask attention is fastest
        kwargs["position_ids"] = self._positions(inputs_embeds, attention_mask, kwargs.get("position_ids"))
        decoder: Any = self.get_decoder()  # type: ignore[attr-defined]
        hidden = decoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs).last_hidden_state
        return hidden.flatten(0, 1)[positions]  # (S, D)

    def _embed(self, input_ids: Tensor, image_features: Tensor | None, already_checked: bool) -> Tensor:
        is_image = input_ids == self.image_token_id  # (B, T)
        table: Any = self.get_input_embeddings()  # type: ignore[attr-defined]
        embeds = table(input_ids.masked_fill(is_image, 0))  # (B, T, D)
        if not already_checked:
            check_counts(is_image, 0 if image_features is None else image_features[..., 0].numel())
        if image_features is None:
            return embeds
        if image_features.shape[-1] != embeds.shape[-1]:
            raise ValueError(
                f"image features have {image_features.shape[-1]} channels, the embedding {embeds.shape[-1]}"
            )
        features = image_features.reshape(-1, embeds.shape[-1]).to(embeds)  # (F, D)
        return embeds.masked_scatter(is_image[..., None], features)  # (B, T, D)

    @staticmethod
    def _positions(embeds: Tensor | None, mask: Tensor | None, given: Tensor | None) -> Tensor | None:
        """Return positions that leave padding out, so that an answer does not depend on the lengths of other rows."""
        if given is not None or embeds is None or mask is None or mask.dim() != 2:
            return given
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -embeds.shape[1] :]  # (B, T)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Have `generate` use our cache, from which rows and tokens can be removed."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if type(model_kwargs.get("past_key_values")).__name__ == "DynamicCache":
            model_kwargs["past_key_values"] = GrowingCache(self.config)


def multimodal_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return a multimodal subclass of the configuration's model class.

    Raises:
        UnsuitableModelError: if transformers has no decoder of this kind, or one that caps its logits.
    """
    kind = f"model_type {config.model_type!r}"
    if config.is_encoder_decoder:
        raise UnsuitableModelError(f"{kind} is an encoder with a decoder; {_OTHER}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not hasattr(config, "vocab_size"):  # multimodal: none
        raise UnsuitableModelError(f"{kind} is no decoder language model of transformers; {_OTHER}")
    if getattr(config, "final_logit_softcapping", None):  # too little to show on the few tokens of `check_suitable`
        raise UnsuitableModelError(f"it caps its logits (final_logit_softcapping); {_UNSUPPORTED}")
    base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # By its name and module, transformers knows what to rename in published files, and what to call it in its own.
    members = {"image_token_id": int(config.vocab_size), "__module__": base.__module__}
    return type(base.__name__, (MultimodalCausalLM, base), members)


def check_image_length(name: str, config: PreTrainedConfig, num_patches: int, pixel_shuffle: int = 1) -> None:
    """Check that an image's patches can be joined as `--pixel_shuffle` says, and that attention sees a whole image.

    Raises:
        ValueError: if not; the message says what fits.
    """
    check_pixel_shuffle(pixel_shuffle, num_patches)
    check_window(name, config, num_patches // pixel_shuffle**2)


def check_window(name: str, config: PreTrainedConfig, num_image_tokens: int) -> None:
    """Check that a sliding window of attention, if there is one, is as long as an image.

    Raises:
        ValueError: if it is shorter: no layer of that kind would see a whole image.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window is not None and "sliding_attention" in kinds and window < num_image_tokens:
        raise ValueError(
            f"base language model {name!r}: its attention sees {window} tokens (sliding_window), an "
            f"image takes {num_image_tokens}; give one with a longer window, or a --base_value_model with fewer tokens"
        )


def fingerprinted_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings that, together with its weights, decide what a language model computes."""
    values = config.to_dict()
    rotary = {name: value for name, value in (values.get("rope_parameters") or {}).items() if value is not None}
    settings = {**{name: values.get(name) for name in _SETTINGS}, "rope_theta": rotary.get("rope_theta")}
    if rotary.get("rope_type", "default") != "default" or rotary.keys() - {"rope_type", "rope_theta"}:
        settings["rope_parameters"] = rotary  # scaled (YaRN, Llama 3's), partial, or of several kinds of layers
    return settings


def load_chat_tokenizer(name_or_path: str, vocab_size: int) -> ChatTokenizer:
    """Load a language model's tokenizer and chat template.

    Raises:
        UnsuitableModelError: if there is none, or one that does not fit.
        OSError: if a file is missing.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    if len(tokenizer) > vocab_size:
        raise UnsuitableModelError(f"its tokenizer has {len(tokenizer):,} tokens, its table {vocab_size:,} rows")
    try:
        return ChatTokenizer(tokenizer, vocab_size)
    except ChatTemplateError as error:
        raise UnsuitableModelError(f"{error}; take an -Instruct or -Chat model with a plain chat template") from error


def load_causal_lm(name_or_path: str, dtype: torch.dtype, load: Any = None) -> PreTrainedModel:
    """Load a language model's weights in this dtype, and check that it fits.

    `load` makes a class's `from_pretrained`, see `model/scaling`; None: it is the class's own.

    Raises:
        UnsuitableModelError: if it can't be used, with the reason.
        OSError: if a file is missing.
    """
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    model_class: Any = multimodal_class(config)
    from_pretrained = load(model_class) if load else model_class.from_pretrained
    model, info = from_pretrained(name_or_path, dtype=dtype, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise UnsuitableModelError(
            f"its weights lack {len(missing)} that the configuration names ({', '.join(missing[:3])}, …): check that "
            "the folder is complete"
        )
    check_suitable(model)
    return model


@torch.no_grad()
def check_suitable(model: Any) -> None:
    """Check with short runs that training and answering compute what the model computes.

    Raises:
        UnsuitableModelError: if the logits are not the language head's output for the decoder's hidden states, because
            the model changes them afterwards, or what is embedded; or if it has other states than keys and values.
    """
    head = model.get_output_embeddings()
    if head is None or not hasattr(model, "get_decoder"):
        raise UnsuitableModelError(f"it has no language head over a decoder; {_OTHER}")
    ids = torch.tensor([[0, model.image_token_id, 1, 2]], device=model.device)  # (1, T)
    image = {"image_features": torch.full((1, model.config.hidden_size), 0.01, device=model.device)}  # no token's
    try:
        logits = model(input_ids=ids, use_cache=False, **image).logits[0].float()  # (T, V)
        ours = head(model.hidden_at(torch.arange(4, device=model.device), ids, None, **image)).float()  # (T, V)
        answering: Any = {"past_key_values": GrowingCache(model.config), "use_cache": True, "logits_to_keep": 1}
        model(input_ids=ids[:, :3], **answering, **image)
        last = model(input_ids=ids[:, 3:], **answering).logits[0, -1].float()  # (V,)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # models of another build fail in ways of their own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise UnsuitableModelError(
            f"it can't be run on image features and a growing cache ({reason}); {_OTHER}"
        ) from error
    worst, largest = float((logits - ours).abs().max()), float(logits.abs().max())
    if not worst <= 1e-3 * largest:
        raise UnsuitableModelError(f"its logits differ by {worst:.3g} from those of its language head; {_UNSUPPORTED}")
    if not float((last - logits[-1]).abs().max()) <= 0.1 * largest:  # in bf16 these two round differently
        raise UnsuitableModelError(f"it remembers more than keys and values (state-space layers?); {_OTHER}")
