"""One run of one peer of `train_step.py`, in a process of its own: prints its figures as JSON.

    python -m benchmarks.training.step_runs ours --folder FOLDER --dtype float32 --steps 10

*ours* is what `train.py` builds. *peer* is what a user of transformers would write: `LlavaForConditionalGeneration`,
LoRA by PEFT on the same layers (Qwen2 has c_attn in three pieces, so three of PEFT's layers), the projector trained
with it, and the stock Trainer. Both read the same samples in the same order, through the same image processor and
tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from dataset import ImageCaptionDataset, VLMCollator
from dataset.epoch_order import EpochOrder
from qwen import QWenTokenizer
from train import build_trainer
from visual.base import ImageTransform
from visual.loading import load_image_processor

from ..peers import SEED
from ..small_vocabulary import FoldedLabels, fold, fold_labels
from .step_work import counted_work, gemm_seconds

RANK, ALPHA, RATE, BATCH = 128, 32, 1e-4, 4
_PEER_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|up_proj|gate_proj)"
_QWEN_ROWS = 151_936


def memory(name: str) -> int:
    """`VmRSS` or `VmHWM` of this process, in bytes; 0 where there is no such thing."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


class Clock(TrainerCallback):
    """Notes the time, and the processor time used up by then, when training began (0) and when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.processor: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())
        self.processor.append(time.process_time())

    on_step_end = on_train_begin


def build_ours(folder: Path, output: str, dtype: str, steps: int, extra: Sequence[str]) -> Trainer:
    """What `train.py` trains, with the projector of the folder."""
    flags = {
        "base_language_model": folder / "qwen",
        "base_value_model": folder / "clip",
        "image_map": folder / "image_map.json",
        "captions_file": folder / "captions.json",
        "output_dir": output,
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0,
        "learning_rate": RATE,
        "feature_proj_lr": RATE,
        "per_device_train_batch_size": BATCH,
        "max_steps": steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": SEED,
        "use_cpu": "true",
        "bf16": str(dtype == "bfloat16").lower(),
    }
    trainer = build_trainer([*(word for name, value in flags.items() for word in (f"--{name}", str(value))), *extra])
    trainer.model.projector.load_state_dict(load_file(folder / "projector.safetensors"))
    if trainer.model.qwen.config.vocab_size < _QWEN_ROWS:
        trainer.model.qwen.transformer.wte = fold(trainer.model.qwen.transformer.wte)
        trainer.data_collator = FoldedLabels(trainer.data_collator, trainer.model.qwen.config.vocab_size)
    return trainer


def build_peer(folder: Path, output: str, dtype: str, steps: int, extra: Sequence[str]) -> Trainer:
    """LLaVA, PEFT and the stock Trainer."""
    torch.manual_seed(SEED)
    model = LlavaForConditionalGeneration.from_pretrained(folder / "llava", dtype=getattr(torch, dtype))
    model.requires_grad_(False)
    if model.config.text_config.vocab_size < _QWEN_ROWS:
        model.set_input_embeddings(fold(model.get_input_embeddings()))
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=_PEER_TARGETS, bias="none")
    wrapped = get_peft_model(model, settings)
    model.model.multi_modal_projector.float().requires_grad_(True)
    tokenizer = QWenTokenizer.from_pretrained(folder / "qwen")
    files = folder / "image_map.json", folder / "captions.json"
    transform = ImageTransform(load_image_processor(str(folder / "clip")))
    dataset = ImageCaptionDataset(*files, tokenizer, transform, model.config.image_seq_length, seed=SEED)
    args = TrainingArguments(
        output_dir=output,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=SEED,
        use_cpu=True,
        bf16=dtype == "bfloat16",
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )
    collate = VLMCollator(tokenizer.pad_token_id)

    def without_ids(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in collate(samples).items() if name != "ids"}

    return Trainer(wrapped, args, train_dataset=EpochOrder(dataset, SEED), data_collator=without_ids)


def shapes_seen(collate: Callable[..., dict[str, Any]], rows: int) -> tuple[Callable[..., dict[str, Any]], list[Any]]:
    """A collator that notes each batch's tokens, real tokens and supervised ones, and folds labels to `rows`."""
    seen: list[tuple[int, ...]] = []

    def noting(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(samples)
        mask, labels = batch["attention_mask"], batch["labels"]
        seen.append((*mask.shape, int(mask.sum()), int((labels[:, 1:] >= 0).sum()), len(batch["pixel_values"])))
        return fold_labels(batch, rows) if rows < _QWEN_ROWS else batch

    return noting, seen


def measure(trainer: Trainer, steps: int, skipped: int) -> dict[str, Any]:
    """Train, and say how fast, with how much memory, and how far from bare matrix products."""
    head: Any = next(module for name, module in trainer.model.named_modules() if name.endswith("lm_head"))
    trainer.data_collator, seen = shapes_seen(trainer.data_collator, head.weight.shape[0])
    clock = Clock()
    trainer.add_callback(clock)
    loaded = memory("VmHWM")
    trainer.train()
    seconds = clock.ends[-1] - clock.ends[skipped]
    peak = memory("VmHWM")
    measured = seen[skipped:steps]
    padded, real = sum(b * t for b, t, *_ in measured), sum(n for *_, n, _, _ in measured)
    samples = sum(b for b, *_ in measured)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {
        "samples_per_second": samples / seconds,
        "tokens_per_second": real / seconds,
        "peak_bytes_vm": peak,
        "peak_bytes_loaded": loaded,
        "step_seconds": seconds / (steps - skipped),
        "processor_seconds": (clock.processor[-1] - clock.processor[skipped]) / (steps - skipped),
        "samples": samples,
        "padding": 1 - real / padded,
        "trained_parameters": trained,
        "losses": losses,
        "first_loss": losses[0],
        "batches": measured,
    }


def share_of_products(trainer: Trainer, figures: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What the step's matrix products alone take here, in the same process right after it, by processor time.

    Other work on the machine, which comes and goes, then does not count.
    """
    work = counted_work(trainer.model, figures["batches"])
    bare, flops = gemm_seconds(work, dtype)
    number = len(figures["batches"])
    return {
        "counted_gflop": flops / number / 1e9,
        "gemm_gflops": flops / bare / 1e9,
        "share_of_gemm_rate": bare / number / figures["processor_seconds"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run one peer."""
    baseline = memory("VmRSS")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["ours", "peer"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--skipped", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no_products", action="store_true", help="Do not time the bare products.")
    parser.add_argument("--profile", action="store_true")
    given, extra = parser.parse_known_args(argv)
    torch.set_num_threads(given.threads)
    build = {"ours": build_ours, "peer": build_peer}[given.peer]
    with tempfile.TemporaryDirectory() as output:
        trainer = build(given.folder, output, given.dtype, given.steps, extra)
        if given.profile:
            show_profile(trainer)
            return
        figures = measure(trainer, given.steps, given.skipped)
    if given.peer == "ours" and not given.no_products:
        figures |= share_of_products(trainer, figures, getattr(torch, given.dtype))
    print(json.dumps({"baseline_bytes": baseline, **figures}))


def show_profile(trainer: Trainer) -> None:
    """Print where the time of the steps goes."""
    head: nn.Module = next(m for name, m in trainer.model.named_modules() if name.endswith("lm_head"))
    trainer.data_collator, _ = shapes_seen(trainer.data_collator, head.weight.shape[0])  # type: ignore[union-attr]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer.train()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=45))


if __name__ == "__main__":
    main()
