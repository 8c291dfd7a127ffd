"""How much memory training takes, from shapes alone: no weights are read, nothing is run.

Shape legend: B rows, T tokens of the longest row, N images of the batch, P tokens per image, S supervised positions of
the batch; D width, W heads x head size, K key and value heads x head size, I the MLP's inner width, L layers and V
vocabulary of the language model; D_v, I_v width and inner width of the tower, P_v its patches per image, as many as P
but for pixel shuffle; r LoRA's rank; s bytes of the frozen dtype (4 or 2).

What lasts from step to step:

    frozen weights        s x (tower + language model)
    trained weights       4 x (LoRA + projector): fp32, whatever s is
    optimizer             8 x the same: AdamW's two moments
    DDP's buckets         4 x the same, with several processes

What autograd keeps of a step until its backward pass has used it. A frozen linear layer keeps nothing: only its input's
gradient is wanted, which its weight gives. Every layer keeps

    both norms            2 x (B, T, D) fp32: what their statistics are taken of
    attention             2 x (B, T, W) for the rotated queries and the output, 2 x (B, T, K) for the rotated keys and
                          the values; (B, H, T) fp32 log-sum-exp
    MLP                   2 x (B, T, I): w1(x) and w2(x)
    LoRA, each layer      (B, T, in) dropped input and (B, T, r), both in s; (B, T, in) dropout mask: s bytes on the
                          CPU, one on CUDA. Without dropout the input itself, which layers with the same input share,
                          and which for the attention's output projection is counted above

After the attention of the last layer there are S positions in place of B x T. Added to that are 2 x (S, D) in fp32, for
the last norm and the loss's gradient, and the projector's inputs N x (P_v x D_v + P x 2D). With gradient checkpointing
only (B, T, D) per layer is kept; one layer's tensors are computed again in the backward pass.

Blocks of transformers' Llama-like models keep more, by three numbers of `ModelShape`: the MLP 3 x (B, T, I), since its
activation is a step of its own; Qwen3's norms of queries and keys (B, T, W + K) fp32; and the last layer and the last
norm are run at all B x T positions.

A language model that is trained (`--train_only all`) is fp32, and has no LoRA. Its linear layers keep their inputs, as
LoRA does without dropout; under autocast each of them its own copy, and 2 bytes a parameter as weights are cast. Norms
keep what they multiply their weights with, (B, T, D) fp32 each. Positions are not taken in chunks by the head.

Quantised layers (`--load_in_4bit`, `--load_in_8bit`) take `quantised_bytes` in place of s x their weights, and one of
them at a time is dequantised, into s x its weights. In 8 bits those without LoRA keep their inputs, as LoRA does
without dropout.

What exists at one moment only, on top of the above:

    language head         (S, V) in fp32, three times, of as many positions as are taken at a time: logits, their
                          log-probabilities, and those of the positions before
    backward of a layer   gradients 4 x (B, T, I) and, in fp32, 4 x (B, T, D)
    tower                 N x P_v x (2 I_v + 4 D_v), before anything else of the step exists
    gradients             4 x (LoRA + projector): complete when all activations are gone, unless steps are accumulated;
                          of a trained language model, that of the head is the first

So the peak is the largest of these moments, not the sum of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

FP32 = 4
CUDA_CONTEXT = 600_000_000
"""Bytes that CUDA, cuBLAS and their kernels take before the first tensor. An assumption."""
HOST_PROCESS = 400_000_000
"""Bytes that a process on the CPU takes apart from these tensors: fitted to `benchmarks/training/memory.py`."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of both models, in channels or counts."""

    layers: int  # L: blocks of the language model
    width: int  # D: channels of its residual stream
    heads: int  # H: heads of a block
    attention_width: int  # W: heads times channels of a head
    key_width: int  # K: key and value heads times channels of a head
    inner: int  # I: channels inside its MLP
    vocabulary: int  # V: rows of the language head
    image_tokens: int  # P: tokens of an image
    patches: int  # P_v: features of an image as the tower gives them
    tower_width: int  # D_v: channels of the tower
    tower_inner: int  # I_v: channels inside the tower's MLP
    lora_inputs: tuple[str, ...]  # of each layer of a block that is trained: attention, attention output, MLP, product
    tower_parameters: int  # frozen
    language_parameters: int  # frozen, unless `trains_language`
    projector_parameters: int  # trained
    lora_parameters: int  # trained
    mlp_kept: int = 2  # tensors of I channels that the MLP keeps, without LoRA
    normed_width: int = 0  # channels of queries and keys that are normed head by head: 0, or W + K
    trains_language: bool = False  # whether the language model is trained as a whole
    outside_blocks: int = 0  # parameters of the language model that belong to no block: embedding, last norm, head
    last_layer_whole: bool = False  # whether what follows the last attention runs at all positions, not at S
    quantised_parameters: int = 0  # weights of the language model that take 4 or 8 bits each
    quantised_bytes: int = 0  # what these take, with their scales
    dequantised_parameters: int = 0  # weights of the largest of these layers
    kept_inputs: tuple[str, ...] = ()  # that quantised layers without LoRA keep, as those of 8 bits do

    @property
    def frozen(self) -> int:
        """Parameters that are not trained."""
        return self.tower_parameters + (0 if self.trains_language else self.language_parameters)

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        language = self.language_parameters if self.trains_language else self.lora_parameters
        return self.projector_parameters + language


@dataclass(frozen=True)
class Setting:
    """How a model is trained, as far as memory goes."""

    dtype_bytes: int = 2  # s: 2 for bf16 and fp16, 4 for fp32
    device: str = "cuda"  # cpu or cuda
    rank: int = 128  # r: LoRA's rank
    dropout: float = 0.1  # LoRA's dropout, 0 to 1
    checkpointing: bool = False  # activations are computed again in the backward pass
    accumulates: bool = False  # gradients of an earlier batch are kept while the next one runs
    processes: int = 1  # that train together
    chunk_logits: int | None = None  # logits that the language head makes at a time; None: all of a batch


@dataclass(frozen=True)
class BatchShape:
    """The batch of one process."""

    rows: int  # B: samples
    tokens: int  # T: of the longest sample, to which the others are padded
    supervised: int  # S: positions of the whole batch that have a label
    images: int  # N: images of the whole batch


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process takes on its device."""

    frozen_weights: int  # tower and language model
    trained_weights: int  # LoRA and projector, in fp32
    gradients: int  # of the trained weights; with several processes DDP's buckets too
    optimizer: int  # AdamW's moments
    activations: int  # what autograd keeps for the backward pass, the language head left out
    language_head: int  # log-probabilities and gradients at supervised positions
    other: int  # CUDA's context; on the CPU what the process takes apart from its tensors
    peak: int  # the most at one moment: gradients and the language head's tensors need not exist at the same time


def estimate_memory(shape: ModelShape, setting: Setting, batch: BatchShape) -> MemoryEstimate:
    """Estimate what one process takes while it trains; the module's docstring says what is counted."""
    s = setting.dtype_bytes
    frozen = s * (shape.frozen - shape.quantised_parameters) + shape.quantised_bytes
    trained = FP32 * shape.trained
    buckets = trained if setting.processes > 1 else 0
    kept, backward = activations_of(shape, setting, batch)
    logits = batch.supervised * shape.vocabulary
    head = 3 * FP32 * min(logits, setting.chunk_logits or logits)
    whole = [0, 0, 0]  # gradient of the head, weights as autocast casts them, and gradients next to the last backward
    if shape.trains_language:
        head = 3 * FP32 * logits
        whole = [FP32 * shape.vocabulary * shape.width, s * shape.language_parameters * (s < FP32), backward]
    tower = s * batch.images * shape.patches * (2 * shape.tower_inner + 4 * shape.tower_width)
    earlier = trained if setting.accumulates else 0
    lasting = frozen + 3 * trained + buckets  # with the optimizer's two moments
    other = CUDA_CONTEXT if setting.device == "cuda" else HOST_PROCESS
    return MemoryEstimate(
        frozen_weights=frozen,
        trained_weights=trained,
        gradients=trained + buckets,
        optimizer=2 * trained,
        activations=kept + whole[1] + (backward if setting.checkpointing else 0),
        language_head=head,
        other=other,
        peak=lasting
        + max(trained + whole[2], earlier + max(tower, kept + whole[0] + whole[1] + max(head, backward)))
        + other,
    )


def activations_of(shape: ModelShape, setting: Setting, batch: BatchShape) -> tuple[int, int]:
    """Return the bytes that are kept from the forward pass, and those that exist while one layer goes backward."""
    s, tokens = setting.dtype_bytes, batch.rows * batch.tokens
    layer = _kept_by_layer(shape, setting, tokens, tokens)
    last = tokens if shape.last_layer_whole else batch.supervised
    if setting.checkpointing:
        kept = shape.layers * tokens * shape.width * (FP32 if shape.trains_language else s)
    else:
        kept = (shape.layers - 1) * layer + _kept_by_layer(shape, setting, tokens, last)
    kept += FP32 * (last * (2 if shape.trains_language else 1) + batch.supervised) * shape.width
    kept += s * batch.images * (shape.patches * shape.tower_width + shape.image_tokens * 2 * shape.width)
    backward = 4 * tokens * (shape.inner * s + shape.width * FP32) + s * shape.dequantised_parameters
    return kept, backward + (layer if setting.checkpointing else 0)


def _kept_by_layer(shape: ModelShape, setting: Setting, tokens: int, after: int) -> int:
    """Count the bytes that autograd keeps of one block of `tokens` positions, `after` of them after the attention."""
    s, d, w, i = setting.dtype_bytes, shape.width, shape.attention_width, shape.inner
    channels = {"attention": d, "attention output": w, "MLP": d, "product": i}
    mask = 0 if not setting.dropout else s if setting.device == "cpu" else 1
    lora = dict.fromkeys(channels, 0)  # bytes by input
    casts = shape.trains_language and s < FP32
    for name in shape.lora_inputs:
        known = lora[name] and not (casts and channels[name] == d)
        shared = not setting.dropout and (known or name == "attention output")  # kept as they are, once
        lora[name] += s * setting.rank + (0 if shared else channels[name] * (s + mask))
    for name in shape.kept_inputs:
        if name != "attention output" and (setting.dropout or not lora[name]):  # that is counted with the attention
            lora[name] += s * channels[name]
    norms = FP32 * (2 if shape.trains_language else 1)
    before = norms * (d + shape.normed_width) + FP32 * shape.heads + 2 * s * (w + shape.key_width)
    before += lora.pop("attention")
    return tokens * before + after * (norms * d + shape.mlp_kept * s * i + sum(lora.values()))
