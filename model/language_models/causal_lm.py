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

from dataset.chat_template import ChatTokenizer
from qwen.cache import GrowingCache
from qwen.multimodal_generation import GeneratesWithImages, check_counts

_SETTINGS = (
    *("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act"),
    *("sliding_window", "tie_word_embeddings"),
)
_UNSUPPORTED = "models that change their logits after the language head are not supported, take another one"


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
        UnsuitableModelError: if transformers has no causal language model of this kind.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsuitableModelError(
            f"model_type {config.model_type!r} is no decoder language model of transformers; give one, as "
            "Qwen/Qwen-7B-Chat"
        )
    base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    members = {"image_token_id": int(config.vocab_size), "__module__": __name__}
    return type(f"Multimodal{base.__name__}", (MultimodalCausalLM, base), members)


def fingerprinted_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings that, together with its weights, decide what a language model computes."""
    values = config.to_dict()
    rotary = values.get("rope_parameters") or {}
    return {**{name: values.get(name) for name in _SETTINGS}, "rope_theta": rotary.get("rope_theta")}


def load_chat_tokenizer(name_or_path: str, vocab_size: int) -> ChatTokenizer:
    """Load a language model's tokenizer and chat template.

    Raises:
        ChatTemplateError: if there is none, or one that does not fit.
        OSError: if a file is missing.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    if len(tokenizer) > vocab_size:
        raise UnsuitableModelError(f"its tokenizer has {len(tokenizer):,} tokens, its table {vocab_size:,} rows")
    return ChatTokenizer(tokenizer, vocab_size)


def load_causal_lm(name_or_path: str, dtype: torch.dtype) -> PreTrainedModel:
    """Load a language model's weights in this dtype, and check that it fits.

    Raises:
        UnsuitableModelError: if it can't be used, with the reason.
        OSError: if a file is missing.
    """
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    loaded: Any = multimodal_class(config).from_pretrained(name_or_path, dtype=dtype, output_loading_info=True)
    model, info = loaded
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
    """Check with a short run that the logits are the language head's output for the decoder's hidden states.

    Raises:
        UnsuitableModelError: if they are not: such models change their logits afterwards, or what is embedded.
    """
    head = model.get_output_embeddings()
    if getattr(model.config, "final_logit_softcapping", None):  # too little to show on few tokens
        raise UnsuitableModelError(f"it caps its logits (final_logit_softcapping); {_UNSUPPORTED}")
    if head is None or not hasattr(model, "get_decoder"):
        raise UnsuitableModelError("it has no language head over a decoder")
    ids = torch.arange(4, device=model.device)[None] % model.config.vocab_size  # (1, T)
    positions = torch.arange(4, device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0].float()  # (T, V)
    ours = head(model.hidden_at(positions, ids, None)).float()  # (T, V)
    worst = float((logits - ours).abs().max())
    if not worst <= 1e-3 * float(logits.abs().max()):
        raise UnsuitableModelError(f"its logits differ by {worst:.3g} from those of its language head; {_UNSUPPORTED}")
