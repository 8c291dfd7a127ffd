"""QWen, first generation: a pre-norm decoder with RMSNorm, rotary positions and a gated MLP.

Written for the published checkpoints `Qwen/Qwen-1_8B`, `-7B`, `-14B` and their `-Chat` versions, whose files load
unchanged (`QWenLMHeadModel.from_pretrained(folder_or_name, dtype=torch.bfloat16)`), without remote code.

Its layers are in `layers.py`. Shape legend: B rows, T tokens of this call, K keys (past + T), D `hidden_size`, S kept
positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .chat import ChatMixin
from .configuration_qwen import QWenConfig
from .growing_cache import GrowingCache
from .layers import QWenBlock, QWenRMSNorm
from .loading import CompleteLoadingMixin
from .loss import next_token_loss
from .positions import Rotation, attention_mask_4d, log_n_scale, ntk_alpha, position_ids_of, rotary_tables

_FEW = 16
"""Positions up to which the head, in fp32 on the CPU, is faster with its weight on the left (1.6 times for 8)."""


class QWenPreTrainedModel(CompleteLoadingMixin, PreTrainedModel):
    """What every QWen model shares: configuration class, initialisation, and what it supports."""

    config_class = QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["QWenBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    # Written into some published files; both are computed here instead.
    _keys_to_ignore_on_load_unexpected = [r"attn\.masked_bias$", r"rotary_emb\.inv_freq$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, QWenRMSNorm):
            nn.init.ones_(module.weight)


class QWenModel(QWenPreTrainedModel):
    """The decoder without its language head."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.h = nn.ModuleList(QWenBlock(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embedding."""
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.wte = value  # type: ignore[assignment]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        positions: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: (B, T); give these or `inputs_embeds`.
            attention_mask: (B, K), 1 for real tokens, 0 for padding on either side; None: no padding.
            position_ids: (B, T), counted from 0 in every row; by default from `attention_mask`, padding left out.
            past_key_values: cache of an earlier call.
            inputs_embeds: (B, T, D).
            use_cache: whether to give back a cache; by default as configured, and never while training.
            output_attentions: whether to give back attention weights (needs `attn_implementation="eager"`).
            output_hidden_states: whether to give back every layer's input, and the final output.
            positions: (S,) the positions b · T + t that are wanted; None: all. `last_hidden_state` is (S, D) then:
                after the attention of the last block nothing mixes positions, so the others are left out.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given, or if attention weights
                are asked of another implementation than eager.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError('attention weights exist in eager mode only: load with attn_implementation="eager"')
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = GrowingCache(self.config)
        rotation, visible = self._geometry(x, attention_mask, position_ids, past_key_values)

        x = self.drop(x)
        hidden_states: list[Tensor] = []
        attentions: list[Tensor] = []
        for number, block in enumerate(self.h, start=1):
            if output_hidden_states:  # else it would outlive its last use
                hidden_states.append(x)
            wanted = positions if number == len(self.h) else None  # the last block
            x, weights = block(x, rotation, visible, past_key_values=past_key_values, positions=wanted)
            if output_attentions and weights is not None:
                attentions.append(weights)
        x = self.ln_f(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _geometry(
        self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past: Cache | None
    ) -> tuple[Rotation, Tensor | None]:
        """Where the tokens of this call stand, and what they may see: the same for every layer, so made once."""
        num_rows, num_tokens = x.shape[:2]
        num_past = past.get_seq_length() if past is not None else 0
        num_keys = num_past + num_tokens
        if position_ids is None:
            position_ids = position_ids_of(attention_mask, num_past, num_tokens, x.device)
        alpha = None
        scale = None
        if not self.training and self.config.use_dynamic_ntk:
            # The alpha of the prefill rules the whole generation: the cached keys were turned with it.
            if num_past and hasattr(past, "ntk_alpha"):
                alpha = getattr(past, "ntk_alpha")  # noqa: B009, a Cache has no such attribute of its own
            else:
                alpha = ntk_alpha(attention_mask, num_keys, self.config.seq_length)
            if past is not None:
                past.ntk_alpha = alpha  # type: ignore[attr-defined]
        if not self.training and self.config.use_logn_attn and num_keys > self.config.seq_length:
            scale = log_n_scale(position_ids, self.config.seq_length)
        cos, sin = rotary_tables(position_ids, self.config.rotary_dim, self.config.rotary_emb_base, alpha)
        visible = attention_mask_4d(attention_mask, num_rows, num_tokens, num_keys, x.device)
        return Rotation(cos, sin, scale), visible


class QWenLMHeadModel(ChatMixin, QWenPreTrainedModel, GenerationMixin):
    """The decoder with its language head: `forward`, `generate`, `chat` and `chat_stream`."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    decoder_class: type[QWenModel] = QWenModel

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.transformer = self.decoder_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """Return the language head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the language head."""
        self.lm_head = value

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Have `generate` use our cache in place of its own, where the caller has chosen none."""
        is_free = model_kwargs.get("past_key_values") is None and generation_config.cache_implementation is None
        prepare: Any = super()._prepare_cache_for_generation  # type: ignore[misc]
        prepare(generation_config, model_kwargs, *args, **kwargs)
        if is_free and type(model_kwargs.get("past_key_values")) is DynamicCache:
            model_kwargs["past_key_values"] = GrowingCache(self.config)

    def _head(self, x: Tensor) -> Tensor:
        """Logits (B, T, vocab_size) of hidden states (B, T, D)."""
        # As a matrix: of a slice of positions, even in one row, PyTorch would copy the head's weight for each row.
        rows = x.reshape(-1, x.shape[-1])
        is_plain = type(self.lm_head) is nn.Linear and x.dtype == self.lm_head.weight.dtype == torch.float32
        if is_plain and 1 < len(rows) <= _FEW and x.device.type == "cpu" and not torch.is_grad_enabled():
            logits = (self.lm_head.weight @ rows.t()).t()
        else:
            logits = self.lm_head(rows)
        return logits.reshape(*x.shape[:-1], -1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run decoder and head; the arguments not named here are those of `QWenModel.forward`, less `positions`.

        Args:
            labels: (B, T), `IGNORE_INDEX` where no loss is taken; position t is predicted from the tokens before t.
            logits_to_keep: give the logits of the last so many positions only (0 means all), or of these positions.
            num_items_in_batch: number of supervised tokens that the summed loss is divided by; by default this
                call's own, which makes the loss a mean.

        Returns:
            Logits (B, T or `logits_to_keep`, vocab_size), the loss where labels are given, and the cache.
        """
        inputs = inputs_embeds if input_ids is None else input_ids
        if inputs is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        positions = None
        if not (kwargs.get("output_hidden_states") or self.config.output_hidden_states):
            # When a prompt is read, the last block has little to do after its attention.
            positions = _positions(inputs, columns)
        out = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            positions=positions,
            **kwargs,
        )
        hidden = out.last_hidden_state
        logits = self._head(hidden[:, columns] if positions is None else hidden.unflatten(0, (len(inputs), -1)))
        loss = None
        if labels is not None:
            if logits.shape[1] != labels.shape[1]:
                raise ValueError(f"labels have {labels.shape[1]} positions, the kept logits {logits.shape[1]}")
            loss = next_token_loss(logits, labels, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )


def _positions(inputs: Tensor, columns: slice | Tensor) -> Tensor | None:
    """Positions b · T + t of some columns of `inputs` (B, T, ...), as `QWenModel.forward` takes them; None for all."""
    num_rows, num_tokens = inputs.shape[:2]
    chosen = torch.arange(num_tokens, device=inputs.device)[columns]
    if len(chosen) == num_tokens:
        return None
    return (torch.arange(num_rows, device=inputs.device)[:, None] * num_tokens + chosen).flatten()
