"""QWen, first generation: a pre-norm decoder with RMSNorm, rotary positions and a gated MLP.

Written for the published checkpoints `Qwen/Qwen-1_8B`, `-7B`, `-14B` and their `-Chat` versions, whose files load
unchanged (`QWenLMHeadModel.from_pretrained(folder_or_name, dtype=torch.bfloat16)`), without remote code.

Its layers are in `layers.py`. Shape legend: B rows, T tokens of this call, K keys (cached tokens and T), D
`hidden_size`, V vocabulary, S wanted positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .cache import GrowingCache
from .configuration_qwen import QWenConfig
from .cpu_kernels import apply_head
from .layers import QWenBlock, QWenRMSNorm, Rotation, attention_mask_4d, rotary_tables
from .long_context import log_n_scale, ntk_alpha
from .loss import supervised_loss


class QWenPreTrainedModel(PreTrainedModel):
    """Share configuration class, initialisation, loading and abilities between all QWen models."""

    config_class = QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _input_embed_layer = "wte"
    _no_split_modules = ["QWenBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    # Stored in some published files; both are computed here instead.
    _keys_to_ignore_on_load_unexpected = [r"attn\.masked_bias$", r"rotary_emb\.inv_freq$"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers' `from_pretrained`, which would draw missing weights at random; here they are an error.

        Raises:
            ValueError: if a weight is missing or has another shape; the message names the first few.
        """
        load: Any = super().from_pretrained
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = load(pretrained_model_name_or_path, *args, **kwargs)
        shapes = {name: f"{name}: {tuple(got)}, expected {tuple(want)}" for name, got, want in info["mismatched_keys"]}
        names = sorted({*shapes, *info["missing_keys"]})
        if names:
            some = "; ".join(shapes.get(name, f"{name}: missing") for name in names[:5])
            raise ValueError(
                f"the checkpoint {pretrained_model_name_or_path} lacks {len(names)} of the weights that {cls.__name__} "
                f"needs ({some}{'; …' * (len(names) > 5)}): check that it is complete and belongs to its config.json"
            )
        return (model, info) if wants_info else model


class QWenModel(QWenPreTrainedModel):
    """The decoder without its language head."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.h = nn.ModuleList(QWenBlock(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = QWenRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.post_init()

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
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: (B, T); give these or `inputs_embeds`.
            attention_mask: (B, K), 1 for real tokens, 0 for padding on either side; None: no padding.
            position_ids: (B, T), counted from 0 in every row; by default from `attention_mask`, padding left out.
            past_key_values: cache of an earlier call.
            inputs_embeds: (B, T, D).
            use_cache: whether to return a cache; by default as configured, and never while training.
            output_attentions: whether to return attention weights (needs `attn_implementation="eager"`).
            output_hidden_states: whether to return every layer's input, and the final output.
            positions: (S,) the positions b · T + t that are wanted; None: all. `last_hidden_state` is (S, D) then:
                after the attention of the last block nothing mixes positions, so the others are left out.

        Raises:
            ValueError: without exactly one of `input_ids` and `inputs_embeds`, or for attention weights without eager.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError('attention weights exist in eager mode only: load with attn_implementation="eager"')
        output_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, D)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = GrowingCache(self.config)
        rotation, visible = self._rotation_and_mask(x, attention_mask, position_ids, past_key_values)

        x = self.drop(x)
        hidden_states: list[Tensor] = []
        attentions: list[Tensor] = []
        for number, block in enumerate(self.h, start=1):
            if output_states:  # otherwise it would outlive its last use
                hidden_states.append(x)
            wanted = positions if number == len(self.h) else None  # only the last block may leave positions out
            x, weights = block(x, rotation, visible, past_key_values=past_key_values, positions=wanted)  # (B, T, D)
            if output_attentions and weights is not None:
                attentions.append(weights)
        x = self.ln_f(x)  # (B, T, D) or (S, D)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden_states, x) if output_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _rotation_and_mask(
        self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past: Cache | None
    ) -> tuple[Rotation, Tensor | None]:
        """Say where this call's tokens are and what they may see: the same for every layer, so made once."""
        num_past = past.get_seq_length() if past is not None else 0
        num_keys = num_past + x.shape[1]
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            # Padding is not counted; before a row it gets position 0.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, num_past:]  # (B, T)
        elif position_ids is None:
            position_ids = torch.arange(num_past, num_keys, device=x.device)[None]  # (1, T)

        alpha, scale = None, None
        if not self.training and num_keys > self.config.seq_length:  # see long_context.py
            if self.config.use_dynamic_ntk:
                alpha = ntk_alpha(attention_mask, num_keys, self.config.seq_length)
            if self.config.use_logn_attn:
                scale = log_n_scale(position_ids, self.config.seq_length)
        if not self.training and past is not None:
            # The alpha of the prompt rules the whole answer: the cached keys were turned with it.
            alpha = getattr(past, "ntk_alpha", None) if num_past else alpha
            past.ntk_alpha = alpha  # type: ignore[attr-defined]
        cos, sin = rotary_tables(position_ids, self.config.rotary_dim, self.config.rotary_emb_base, alpha)
        return Rotation(cos, sin, scale), attention_mask_4d(x, attention_mask, num_keys)


class QWenLMHeadModel(QWenPreTrainedModel, GenerationMixin):
    """The decoder with its language head: `forward` and `generate`; `chat.py` adds `chat` and `chat_stream`."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    decoder_class: type[QWenModel] = QWenModel

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.transformer = self.decoder_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Have `generate` use our cache, where the caller has chosen none."""
        is_free = model_kwargs.get("past_key_values") is None and generation_config.cache_implementation is None
        if is_free and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = GrowingCache(self.config)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

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
        """Run decoder and head; the arguments not named here are those of the decoder, less `positions`.

        Args:
            labels: (B, T), `IGNORE_INDEX` where no loss is taken; position t is predicted from the tokens before t.
            logits_to_keep: return the logits of the last so many positions only (0 means all), or of these positions.
            num_items_in_batch: divides the summed loss; by default the number of tokens supervised in this call.

        Returns:
            Logits (B, T or `logits_to_keep`, V), the loss where labels are given, and the cache.
        """
        inputs = inputs_embeds if input_ids is None else input_ids  # (B, T) or (B, T, D)
        if inputs is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        num_rows, num_tokens = inputs.shape[:2]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        positions = torch.arange(num_rows * num_tokens, device=inputs.device).view(num_rows, num_tokens)[:, kept]
        # To leave positions out saves the last block most of its work on a prompt.
        wants_all = kwargs.get("output_hidden_states") or self.config.output_hidden_states
        leaves_out = positions.shape[1] < num_tokens and not wants_all
        out = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            positions=positions.flatten() if leaves_out else None,
            **kwargs,
        )
        hidden = out.last_hidden_state  # (B, T, D), or (S, D) with positions
        hidden = hidden.view(*positions.shape, -1) if leaves_out else hidden[:, kept]  # (B, kept, D)
        logits = apply_head(self.lm_head, hidden)  # (B, kept, V)
        loss = None
        if labels is not None:
            loss = supervised_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )
