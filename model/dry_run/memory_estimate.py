"""How much memory training takes, from shapes alone: no weights are read, nothing is run.

Shape legend: B rows, T tokens of the longest row, N images of the batch, P tokens per image, S supervised positions of
the batch; D width, W heads x head size, I the MLP's inner width, L layers and V vocabulary of the language model;
D_v, I_v width and inner width of the tower; r LoRA's rank; s bytes of the frozen dtype (4 or 2).

What lasts from step to step:

    frozen weights        s x (tower + language model)
    trained weights       4 x (LoRA + projector): fp32, whatever s is
    optimizer             8 x the same: AdamW's two moments
    DDP's buckets         4 x the same, where there are several processes

What autograd keeps of a step until its backward pass has used it. A frozen linear layer keeps nothing: only its input's
gradient is wanted, which its weight gives. Every layer keeps

    both norms            2 x (B, T, D) fp32: what their statistics are taken of
    attention             (B, T, W) each for the turned queries and keys, the values and the output; (B, H, T) fp32
                          log-sum-exp
    MLP                   2 x (B, T, I): w1(x) and w2(x)
    LoRA, each layer      (B, T, in) dropped input and (B, T, r), both in s; (B, T, in) dropout mask: s bytes on the
                          CPU, one on CUDA. Without dropout the input itself, which is once for w1 and w2, and for
                          the attention's c_proj is counted above

Behind the attention of the last layer there are S positions in place of B x T. To that come 2 x (S, D) in fp32, for the
last norm and the loss's gradient, and the projector's inputs N x P x (D_v + 2D). With gradient checkpointing only
(B, T, D) per layer is kept; one layer's tensors are made again in the backward pass.

What is there at one moment only, on top of the above:

    language head         (S, V) in fp32, three times, of as many positions as are taken at a time: logits, their
                          log-probabilities, and those of the positions before
    backward of a layer   gradients 4 x (B, T, I) and, in fp32, 4 x (B, T, D)
    tower                 N x P x (2 I_v + 4 D_v), before anything else of the step is there
    gradients             4 x (LoRA + projector): complete when all activations are gone, unless steps are accumulated

So the peak is the largest of these moments, not the sum of all rows.

An evaluation keeps nothing for a backward pass, finds no gradients and makes no cache of keys and values. It has
tower and language head at one moment each, as above; from the projector on N x P x D, and beside that the larger of

    attention of a block  3 x (B, T, D): the embedded ids, the block's input, its norm; (B, T, 4W): queries, keys and
                          values, and turned queries; and of the keys that are being turned, in fp32, 3 x (B, T, W),
                          4 x where s is 2
    MLP of a block        5 x (B, T, D): as above, what the attention adds, and their sum; 3 x (B, T, I)
"""

from __future__ import annotations

from dataclasses import dataclass

FP32 = 4
CUDA_CONTEXT = 600_000_000
"""Bytes that CUDA, cuBLAS and their kernels take before the first tensor. An assumption."""
HOST_PROCESS = 135_000_000
"""Bytes that a process on the CPU takes beside its tensors: tokenizer, and modules that are loaded on use. Measured."""
HOST_HOLES = 4
"""How many layers' tensors glibc's heap takes more than was asked for: pieces that are freed in another order than they
were made leave holes. Fitted to runs with and without gradient checkpointing; a run that avoids the heap
(MALLOC_MMAP_THRESHOLD_=262144) has none, but spends more time."""


@dataclass(frozen=True)
class ModelShape:
    """What the estimate needs to know of both models, all but the last four in channels or counts."""

    layers: int
    """L: blocks of the language model."""
    width: int
    """D: channels of its residual stream."""
    heads: int
    """H: heads of a block."""
    attention_width: int
    """W: heads times channels of a head."""
    inner: int
    """I: channels inside its MLP."""
    vocabulary: int
    """V: rows of the language head."""
    image_tokens: int
    """P: features of an image."""
    tower_width: int
    """D_v: channels of the tower."""
    tower_inner: int
    """I_v: channels inside the tower's MLP."""
    lora_layers: frozenset[str]
    """Linear layers of a block that have LoRA: `attn.c_attn`, `attn.c_proj`, `mlp.w1`, `mlp.w2`, `mlp.c_proj`."""
    tower_parameters: int
    """Parameters of the tower, frozen."""
    language_parameters: int
    """Parameters of the language model, frozen."""
    projector_parameters: int
    """Parameters of the projector, trained."""
    lora_parameters: int
    """Parameters of LoRA, trained."""

    @property
    def frozen(self) -> int:
        """Parameters that are not trained."""
        return self.tower_parameters + self.language_parameters

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return self.projector_parameters + self.lora_parameters


@dataclass(frozen=True)
class Setting:
    """How a model is trained, as far as memory goes."""

    dtype_bytes: int = 2
    """s: 2 for bf16 and fp16, 4 for fp32."""
    device: str = "cuda"
    """`cpu` or `cuda`."""
    rank: int = 128
    """r: LoRA's rank."""
    dropout: float = 0.1
    """LoRA's dropout, 0 to 1."""
    checkpointing: bool = False
    """Whether activations are made again in the backward pass."""
    accumulates: bool = False
    """Whether gradients of an earlier batch are kept while the next one runs."""
    processes: int = 1
    """GPUs, or processes on the CPU, that train together."""
    chunk_logits: int | None = None
    """Logits that the language head makes at a time; None: all of a batch."""


@dataclass(frozen=True)
class BatchShape:
    """The batch of one process."""

    rows: int
    """B: samples."""
    tokens: int
    """T: of the longest sample, to which the others are padded."""
    supervised: int
    """S: positions of the whole batch that have a label."""
    images: int
    """N: images of the whole batch."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process takes on its device."""

    frozen_weights: int
    """Tower and language model."""
    trained_weights: int
    """LoRA and projector, in fp32."""
    gradients: int
    """Of the trained weights; with several processes DDP's buckets too."""
    optimizer: int
    """AdamW's moments."""
    activations: int
    """What autograd keeps for the backward pass, the language head left out."""
    language_head: int
    """Log-probabilities and gradients at supervised positions."""
    other: int
    """CUDA's context; on the CPU what the process takes beside its tensors, and holes in its heap."""
    peak: int
    """The largest of all moments: gradients and the language head's tensors need not be there at the same time."""


def kept_by_layer(shape: ModelShape, setting: Setting, tokens: int, behind: int | None = None) -> int:
    """Bytes that autograd keeps of one block of the language model.

    Args:
        shape: of the model.
        setting: dtype, device and LoRA.
        tokens: B x T.
        behind: positions that go on behind the attention; None: all.
    """
    s = setting.dtype_bytes
    before, after = _kept_by_lora(shape, setting)
    attention = FP32 * shape.width + 4 * s * shape.attention_width + FP32 * shape.heads
    mlp = FP32 * shape.width + 2 * s * shape.inner
    return tokens * (attention + before) + (tokens if behind is None else behind) * (mlp + after)


def _kept_by_lora(shape: ModelShape, setting: Setting) -> tuple[int, int]:
    """Bytes of a position that the LoRA layers of a block keep: of that before its attention, and of those behind."""
    s, dropout = setting.dtype_bytes, setting.dropout
    d, w, i = shape.width, shape.attention_width, shape.inner
    reads = {"attn.c_attn": d, "attn.c_proj": w, "mlp.w1": d, "mlp.w2": d, "mlp.c_proj": i}
    there = [name for name in reads if name in shape.lora_layers]
    mask = 0 if not dropout else s if setting.device == "cpu" else 1
    if not dropout:  # what a layer reads is kept as it is, and some of that is kept already
        reads["attn.c_proj"] = 0
        if "mlp.w1" in there:
            reads["mlp.w2"] = 0
    kept = {name: reads[name] * (s + mask) + s * setting.rank for name in there}
    before = kept.pop("attn.c_attn", 0)
    return before, sum(kept.values())


def activations_of(shape: ModelShape, setting: Setting, batch: BatchShape) -> tuple[int, int]:
    """What the backward pass finds, and what it takes beside that for one layer.

    Returns:
        Bytes that are kept from the forward pass, and bytes that are there while one layer goes backward.
    """
    s = setting.dtype_bytes
    tokens = batch.rows * batch.tokens
    layer = kept_by_layer(shape, setting, tokens)
    if setting.checkpointing:
        kept = shape.layers * tokens * shape.width * s
    else:
        kept = (shape.layers - 1) * layer + kept_by_layer(shape, setting, tokens, batch.supervised)
    kept += 2 * FP32 * batch.supervised * shape.width
    kept += s * batch.images * shape.image_tokens * (shape.tower_width + 2 * shape.width)
    backward = 4 * tokens * (shape.inner * s + shape.width * FP32)
    return kept, backward + (layer if setting.checkpointing else 0)


def estimate_memory(shape: ModelShape, setting: Setting, batch: BatchShape) -> MemoryEstimate:
    """Estimate what one process takes on its device while it trains; the module's docstring says what is counted."""
    trained = FP32 * shape.trained
    buckets = trained if setting.processes > 1 else 0
    kept, backward = activations_of(shape, setting, batch)
    head, tower = _head_and_tower(shape, setting, batch)
    frozen, other = setting.dtype_bytes * shape.frozen, _beside_tensors(shape, setting, batch)
    lasting = frozen + trained + 2 * trained + buckets + other
    earlier = trained if setting.accumulates else 0
    moments = (lasting + trained, lasting + earlier + max(tower, kept + max(head, backward)))
    activations = kept + (backward if setting.checkpointing else 0)
    return MemoryEstimate(
        frozen_weights=frozen,
        trained_weights=trained,
        gradients=trained + buckets,
        optimizer=2 * trained,
        activations=activations,
        language_head=head,
        other=other,
        peak=max(moments),
    )


def evaluated_layer(shape: ModelShape, setting: Setting, batch: BatchShape) -> int:
    """Bytes at most of the decoder while one block of it evaluates a batch, its weights and image features left out."""
    s = setting.dtype_bytes
    in_fp32 = (3 if s == FP32 else 4) * FP32 * shape.attention_width
    attention = s * (3 * shape.width + 4 * shape.attention_width) + in_fp32
    mlp = s * (5 * shape.width + 3 * shape.inner)
    return batch.rows * batch.tokens * max(attention, mlp)


def estimate_evaluation(shape: ModelShape, setting: Setting, batch: BatchShape) -> int:
    """Bytes at most on the device while a batch is evaluated, what lasts from step to step included."""
    s = setting.dtype_bytes
    features = s * batch.images * shape.image_tokens * shape.width
    head, tower = _head_and_tower(shape, setting, batch)
    copies = 4 if setting.processes > 1 else 3  # trained weights, two moments, DDP's buckets
    lasting = s * shape.frozen + copies * FP32 * shape.trained + _beside_tensors(shape, setting, batch)
    return lasting + max(tower, features + max(evaluated_layer(shape, setting, batch), head))


def _head_and_tower(shape: ModelShape, setting: Setting, batch: BatchShape) -> tuple[int, int]:
    """Bytes that the language head has at one moment, and the tower at another."""
    logits = batch.supervised * shape.vocabulary
    features = batch.images * shape.image_tokens
    tower = setting.dtype_bytes * features * (2 * shape.tower_inner + 4 * shape.tower_width)
    return 3 * FP32 * min(logits, setting.chunk_logits or logits), tower


def _beside_tensors(shape: ModelShape, setting: Setting, batch: BatchShape) -> int:
    """CUDA's context; on the CPU what the process takes, and holes in its heap."""
    if setting.device == "cuda":
        return CUDA_CONTEXT
    return HOST_PROCESS + HOST_HOLES * kept_by_layer(shape, setting, batch.rows * batch.tokens)
