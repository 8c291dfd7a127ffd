"""How much memory training takes where the language model is split (`--shard_model`), and what processes send.

Computed from shapes, as `model/dry_run/memory_estimate.py` does; its legend holds here, with P processes.

    kept by each          1 / P of what lasts: the language model's weights, LoRA, moments and gradients; tower,
                          projector with its moments and gradients, and the scales of 4-bit weights, whole
    gathered for a step   embedding, last norm and language head; of two blocks, the one that runs and the next, the
                          weights and LoRA; the gradients of one block; of a trained model, those of head and embedding

What a process sends in a step is what a ring of P processes sends: (P - 1) / P of what is gathered, every block twice
(for the forward and the backward pass, with gradient checkpointing too), head and embedding
once; the same share of the gradients, which are fp32; and twice that of the projector's gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..dry_run.memory_estimate import (
    CUDA_CONTEXT,
    FP32,
    HOST_PROCESS,
    BatchShape,
    ModelShape,
    Setting,
    activations_of,
)

PROCESSES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class SplitEstimate:
    """Bytes of one process."""

    kept: int  # from step to step: its shares, tower and projector, with optimizer
    gathered: int  # of others' shares at one moment
    peak: int  # the most at one moment
    sent: int  # in a step of one batch
    read: int  # of the base models' files, while loading


def estimate_split(shape: ModelShape, setting: Setting, batch: BatchShape) -> SplitEstimate:
    """Estimate what one of `setting.processes` takes; the module's docstring says what is counted."""
    s, processes = setting.dtype_bytes, setting.processes
    weight = FP32 if shape.trains_language else s  # bytes of each of the language model's numbers
    packed = shape.quantised_parameters // 2  # in 4 bits
    scales = shape.quantised_bytes - packed if packed else 0
    language = weight * (shape.language_parameters - shape.quantised_parameters) + packed
    outside = weight * shape.outside_blocks
    trained = FP32 * (shape.language_parameters if shape.trains_language else shape.lora_parameters)
    projector, tower = FP32 * shape.projector_parameters, s * shape.tower_parameters
    lora = 0 if shape.trains_language else trained

    share = -(-(language + lora + 2 * trained) // processes)
    kept = share + scales + tower + 3 * projector
    block = (language - outside + lora) // shape.layers
    block_gradients = trained // shape.layers
    gathered = outside + 2 * block if processes > 1 else 0

    activations, backward = activations_of(shape, setting, batch)
    logits = batch.supervised * shape.vocabulary
    head = 3 * FP32 * min(logits, setting.chunk_logits or logits)
    if shape.trains_language:
        head = 3 * FP32 * logits + outside
        casts = s * shape.language_parameters if s < FP32 else 0  # kept by autograd; but for one block, if recomputed
        activations += casts // shape.layers if setting.checkpointing else casts
        backward += outside
    images = s * batch.images * shape.patches * (2 * shape.tower_inner + 4 * shape.tower_width)
    gradients = trained // processes + projector
    earlier = gradients if setting.accumulates else 0
    moment = max(
        gradients + block_gradients, earlier + max(images, activations + max(head, backward + block_gradients))
    )
    other = CUDA_CONTEXT if setting.device == "cuda" else HOST_PROCESS
    sent = (outside + 2 * (language - outside + lora) + trained + 2 * projector) * (processes - 1) // processes
    whole = shape.language_parameters - shape.quantised_parameters
    read = s * (shape.tower_parameters + shape.quantised_parameters + -(-whole // processes))
    return SplitEstimate(kept, gathered, kept + gathered + moment + other, sent, read)


def split_rows(
    shape: ModelShape, settings: Mapping[str, Setting], batches: Sequence[BatchShape], processes: int
) -> list[list[str]]:
    """Return the rows of a table: the most at one moment, in GB, by the number of processes."""
    columns: dict[str, Setting] = {}
    for name, setting in settings.items():
        if not setting.checkpointing:
            columns[name] = setting
        columns[f"{name}, checkpointing"] = replace(setting, checkpointing=True)
    rows = [["split over (--shard_model), GB", *columns]]
    for number in sorted({*PROCESSES, processes}):
        splits = [replace(setting, processes=number) for setting in columns.values()]
        peaks = [max(estimate_split(shape, split, batch).peak for batch in set(batches)) for split in splits]
        rows.append([f"{number} process{'es' * (number > 1)}", *(f"{peak / 1e9:.2f}" for peak in peaks)])
    return rows
