"""One process of `train_step.py`: writes the inputs, or trains one of the peers and prints its figures as JSON.

    python -m benchmarks.training.step_runs write --folder FOLDER --size large-vocabulary
    python -m benchmarks.training.step_runs ours --folder FOLDER --dtype float32 --steps 10 [flags of train.py]
    python -m benchmarks.training.step_runs ours --folder FOLDER --language_model qwen2

*ours* is what `train.py` builds. *peer* is what a user of transformers would write: `LlavaForConditionalGeneration`,
LoRA by PEFT on the same layers (Qwen2 has c_attn in three pieces, so three of PEFT's layers), the projector trained
with it, and the stock Trainer. Both read the same samples in the same order, through the same image processor and
tokenizer. With `qwen2`, ours has the peer's own language model, and LoRA on the same layers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

from dataset import ImageCaptionDataset, VLMCollator
from dataset.chat_template import ChatTokenizer
from dataset.epoch_order import EpochOrder
from dataset.prompt import Tokenizer
from qwen import IMAGE_TOKEN, QWenTokenizer
from visual.base import ImageTransform
from visual.loading import load_image_processor

from ..inputs import ANSWER_TOKENS, SEED, build_trainer, train_flags, write_samples
from ..measure import DTYPES, resident
from ..peers import SIZES, TINY, small_tokenizer, write_both
from ..small_vocabulary import fold_token_ids

RANK, ALPHA, RATE, BATCH = 128, 32, 1e-4, 4
_TARGETS = "q_proj|k_proj|v_proj|up_proj|gate_proj"


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


def build_ours(
    folder: Path, output: str, dtype: str, steps: int, extra: Sequence[str] = (), language_model: str = "qwen"
) -> Trainer:
    """Return what `train.py` trains, with the projector of the folder."""
    flags = train_flags(
        folder,
        output,
        lora_rank=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        learning_rate=RATE,
        feature_proj_lr=RATE,
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        bf16=dtype == "bfloat16",
    )
    if language_model == "qwen2":
        extra = ["--base_language_model", str(folder / "qwen2"), "--target_modules", _TARGETS, *extra]
    trainer = build_trainer([*flags, *extra])
    trainer.model.projector.load_state_dict(load_file(folder / "projector.safetensors"))
    if language_model == "qwen":
        fold_token_ids(trainer, trainer.model.qwen)
    return trainer


def build_peer(
    folder: Path, output: str, dtype: str, steps: int, extra: Sequence[str] = (), language_model: str = "qwen"
) -> Trainer:
    """Return LLaVA with PEFT and the stock Trainer."""
    torch.manual_seed(SEED)
    model = LlavaForConditionalGeneration.from_pretrained(folder / "llava", dtype=getattr(torch, dtype))
    model.requires_grad_(False)
    targets = rf".*language_model.*\.({_TARGETS})"
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets, bias="none")
    wrapped = get_peft_model(model, settings)
    model.model.multi_modal_projector.float().requires_grad_(True)
    tokenizer: Tokenizer = QWenTokenizer.from_pretrained(folder / "qwen")
    if language_model == "qwen2":  # LLaVA embeds its image token too, so that is a row which no word uses
        model.config.image_token_index = model.config.text_config.vocab_size - 1
        tokenizer = ChatTokenizer(AutoTokenizer.from_pretrained(folder / "qwen2"), model.config.image_token_index)
    files = folder / "image_map.json", folder / "captions.json"
    transform = ImageTransform(load_image_processor(str(folder / "clip"), None)[0])
    dataset = ImageCaptionDataset(
        *files, tokenizer, transform, model.config.image_seq_length, seed=SEED, system=tokenizer.default_system
    )
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

    trainer = Trainer(wrapped, args, train_dataset=EpochOrder(dataset, SEED), data_collator=without_ids)
    if language_model == "qwen":
        fold_token_ids(trainer, model)
    return trainer


def noting_shapes(collate: Callable[..., dict[str, Any]]) -> tuple[Callable[..., dict[str, Any]], list[Any]]:
    """Return a collator that notes (rows, tokens, real tokens) of each batch, and the list of its notes."""
    seen: list[tuple[int, ...]] = []

    def noting(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(samples)
        mask = batch["attention_mask"]  # (B, T)
        seen.append((*mask.shape, int(mask.sum())))
        return batch

    return noting, seen


def measure(trainer: Trainer, steps: int, skipped: int) -> dict[str, Any]:
    """Train, and return how fast and with how much memory, without the first steps."""
    trainer.data_collator, seen = noting_shapes(trainer.data_collator)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    seconds = clock.ends[-1] - clock.ends[skipped]
    measured = seen[skipped:steps]
    padded, real = sum(rows * tokens for rows, tokens, _ in measured), sum(real for _, _, real in measured)
    samples = sum(rows for rows, _, _ in measured)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "samples_per_second": samples / seconds,
        "tokens_per_second": real / seconds,
        "peak_bytes_vm": resident("VmHWM"),
        "step_seconds": seconds / (steps - skipped),
        "processor_seconds": (clock.processor[-1] - clock.processor[skipped]) / (steps - skipped),
        "samples": samples,
        "padding": 1 - real / padded,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "losses": losses,
        "first_loss": losses[0],
    }


def main() -> None:
    """Write the inputs, or run one peer."""
    baseline = resident("VmRSS")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["write", "ours", "peer"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", choices=[*SIZES, "tiny"], help="of the models that are written")
    parser.add_argument("--language_model", choices=["qwen", "qwen2"], default="qwen")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--skipped", type=int, default=3)
    given, extra = parser.parse_known_args()
    if given.what == "write":
        # The small tokenizer has nearly two tokens for a word, QWen's one: with half the words, answers are as long.
        write_samples(given.folder, 128, ANSWER_TOKENS if given.language_model == "qwen" else (8, 46))
        write_both(given.folder, SIZES.get(given.size, TINY))
        captions = json.loads((given.folder / "captions.json").read_text(encoding="utf-8")).values()
        texts = (text.replace(IMAGE_TOKEN, "") for sample in captions for text in (sample["q"], sample["a"]))
        small_tokenizer(texts).save_pretrained(given.folder / "qwen2")
        return
    build = {"ours": build_ours, "peer": build_peer}[given.what]
    with tempfile.TemporaryDirectory() as output:
        trainer = build(given.folder, output, given.dtype, given.steps, extra, given.language_model)
        figures = measure(trainer, given.steps, given.skipped)
    print(json.dumps({"baseline_bytes": baseline, **figures}))


if __name__ == "__main__":
    main()
