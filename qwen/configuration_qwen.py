"""Configuration of the first-generation Qwen models (`model_type: "qwen"`)."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

IGNORE_INDEX = -100
"""Label of positions without a loss (PyTorch's default for cross entropy)."""


@strict
class QWenConfig(PreTrainedConfig):
    """Sizes and switches of a QWen model, under the names of the published `config.json` files, which load unchanged.

    The defaults are Qwen-7B-Chat's. A file's `auto_map` (a pointer to Python code next to the weights) is dropped: this
    package is the code, and nothing remote is ever run.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 151936  # rows of the embedding and of the language head: the tokenizer's 151,851 ids, padded
    hidden_size: int = 4096  # width of the residual stream, in channels
    num_hidden_layers: int = 32  # blocks
    num_attention_heads: int = 32  # heads of each block
    kv_channels: int = 128  # channels of one head
    intermediate_size: int = 22016  # *twice* the inner width of the MLP, in channels
    layer_norm_epsilon: float = 1e-6  # added to the mean of squares in RMSNorm
    initializer_range: float = 0.02  # standard deviation of freshly drawn weights
    rotary_pct: float = 1.0  # share of a head's channels that the rotary embedding turns, 0 to 1
    rotary_emb_base: float | int = 10000  # base of the rotary frequencies
    seq_length: int = 8192  # context that the model was trained with, in tokens
    max_position_embeddings: int = 32768  # longest context that is meant to be used, in tokens
    no_bias: bool = True  # whether the linear layers other than `c_attn` go without a bias
    tie_word_embeddings: bool = False  # whether the language head shares the embedding's weight
    emb_dropout_prob: float | int = 0.0  # dropout after the embedding, 0 to 1
    attn_dropout_prob: float | int = 0.0  # dropout on attention weights, 0 to 1
    scale_attn_weights: bool = True  # whether scores are divided by the square root of the head size
    use_cache: bool = True  # whether `forward` returns keys and values
    use_dynamic_ntk: bool = True  # whether prompts past `seq_length` stretch the rotary base (inference only)
    use_logn_attn: bool = True  # whether queries past `seq_length` are scaled by log-n (inference only)
    # Kept for compatibility and otherwise ignored: `from_pretrained(dtype=, attn_implementation=)` chooses.
    use_flash_attn: str | bool = "auto"
    bf16: bool = False
    fp16: bool = False
    fp32: bool = False
    softmax_in_fp32: bool = False
    use_cache_quantization: bool = False
    use_cache_kernel: bool = False
    onnx_safe: bool | None = None

    def __post_init__(self, **kwargs: object) -> None:
        """Drop `auto_map`, then check what later code takes for granted.

        Raises:
            ValueError: if `intermediate_size` or the rotary size is odd.
        """
        kwargs.pop("auto_map", None)
        if self.intermediate_size % 2:
            raise ValueError(
                f"intermediate_size is twice the MLP's inner width, so it must be even; got {self.intermediate_size}"
            )
        if self.rotary_dim % 2:
            raise ValueError(
                f"rotary_pct {self.rotary_pct} of kv_channels {self.kv_channels} is {self.rotary_dim} channels; "
                "the rotary embedding turns pairs, so the number must be even"
            )
        super().__post_init__(**kwargs)

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that the rotary embedding turns."""
        return int(self.kv_channels * self.rotary_pct)
