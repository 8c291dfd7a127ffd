"""Train LoRA and projector of a vision-language model on image captions.

    torchrun --nproc_per_node=1 train.py --image_map data/image_map_b.json --captions_file data/captions_b.json \
        --base_language_model Qwen/Qwen-7B-Chat --base_value_model openai/clip-vit-large-patch14 \
        --output_dir weights/train_V1_5 --lora_rank 128 --learning_rate 3e-5 --feature_proj_lr 1e-4

`train.sh` holds the full published command. Runs under torchrun or plain `python train.py`, on CUDA GPUs or the CPU.
Beside the flags below, every flag of transformers' `TrainingArguments` is taken; `--help` explains each.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser, set_seed

from dataset import ImageCaptionDataset, SampleError, VLMCollator
from dataset.image_io import ImageError
from model import LoraSettings, VisionLanguageModel, VLMTrainer, VLMTrainingArguments, read_checkpoint
from model.checkpoint import CheckpointError, package_versions, resolve_checkpoint
from model.console import in_one_line, set_up_logging
from model.device import has_accelerator, pick_device, pick_dtype
from qwen import QWenTokenizer

logger = logging.getLogger("train")

RUN_CONFIG = "train_config.json"


@dataclass
class ModelArguments:
    """Which models are put together, and which LoRA layers are trained."""

    base_language_model: str = field(
        default="Qwen/Qwen-7B-Chat", metadata={"help": "Hub name or folder of the QWen language model."}
    )
    base_value_model: str = field(
        default="openai/clip-vit-large-patch14",
        metadata={"help": "Hub name or folder of the vision tower: CLIP, SigLIP, DINOv2 or ViT."},
    )
    lora_rank: int | None = field(
        default=None, metadata={"help": "LoRA rank. Default: 128, or that of --previous_lora_weights."}
    )
    lora_alpha: int | None = field(
        default=None,
        metadata={"help": "LoRA updates are scaled by alpha / rank. Default: 32, or that of --previous_lora_weights."},
    )
    lora_dropout: float = field(default=0.10, metadata={"help": "Dropout before the LoRA layers."})
    target_modules: str = field(
        default="c_attn|w1|w2", metadata={"help": "Linear layers that get LoRA: last parts of their names, with bars."}
    )
    projector_layers: int = field(default=2, metadata={"help": "2 (Linear, GELU, Linear) or 1 (Linear)."})
    previous_lora_weights: str | None = field(
        default=None,
        metadata={"help": "Checkpoint (the original project's too) whose LoRA and projector training starts from."},
    )


@dataclass
class DataArguments:
    """What is trained and evaluated on."""

    image_map: str = field(metadata={"help": "image_map.json, as dataprocess/process_image.py writes it."})
    captions_file: str = field(metadata={"help": "captions.json, likewise."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many samples only."})
    max_length: int = field(
        default=2048, metadata={"help": "Tokens per sample, image tokens included; longer answers are cut."}
    )
    eval_image_map: str | None = field(default=None, metadata={"help": "As --image_map, for evaluation."})
    eval_captions_file: str | None = field(default=None, metadata={"help": "As --captions_file, for evaluation."})
    allow_links: bool = field(default=False, metadata={"help": "Follow links in the image folder that lead out of it."})


def with_machine_defaults(argv: Sequence[str]) -> list[str]:
    """Add the flags whose default depends on the machine, where the user said nothing.

    They go in before `TrainingArguments` is built: it sets the process group up, and two processes that learn of the
    CPU later each believe they are alone.
    """
    given = {word.split("=", 1)[0].replace("-", "_").removeprefix("__") for word in argv if word.startswith("--")}
    defaults: dict[str, str] = {}
    if not has_accelerator():
        defaults["use_cpu"] = "true"
    elif "use_cpu" not in given:
        defaults["dataloader_num_workers"] = "4"
    device = torch.device("cpu") if "use_cpu" in given | defaults.keys() else pick_device()
    if not given & {"bf16", "fp16"}:
        autocast = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(pick_dtype(device))
        if autocast is not None:
            defaults[autocast] = "true"
    if find_spec("tensorboard") is not None:
        defaults["report_to"] = "tensorboard"
    if "eval_image_map" in given:
        defaults["eval_strategy"] = "epoch"
    added = [word for name, value in defaults.items() if name not in given for word in (f"--{name}", value)]
    return [*added, *argv]


def parse_arguments(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, VLMTrainingArguments]:
    """Read the command line.

    Raises:
        SystemExit: for flags that argparse refuses.
        ValueError: for values that contradict each other.
    """
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, VLMTrainingArguments),  # type: ignore[arg-type]
        description=__doc__,
        allow_abbrev=False,
    )
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(args=with_machine_defaults(argv))
    if (data_args.eval_image_map is None) != (data_args.eval_captions_file is None):
        raise ValueError("--eval_image_map and --eval_captions_file go together; one of them is missing")
    if training_args.remove_unused_columns:
        raise ValueError("--remove_unused_columns must be false: the data set gives just what the model takes")
    return model_args, data_args, training_args


def frozen_dtype(args: VLMTrainingArguments) -> torch.dtype:
    """Dtype of the frozen weights: that of autocast, fp32 where there is none."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def build_model(model_args: ModelArguments, args: VLMTrainingArguments) -> VisionLanguageModel:
    """Load both base models and put LoRA layers in, fresh ones or those of a checkpoint.

    Raises:
        CheckpointError: if the previous weights do not fit the base models or an explicit flag.
        LoraTargetError: if target modules do not exist.
    """
    previous = model_args.previous_lora_weights
    if previous is not None:
        config = read_checkpoint(previous).lora_config
        for flag, asked, there in (
            ("--lora_rank", model_args.lora_rank, config.r),
            ("--lora_alpha", model_args.lora_alpha, config.lora_alpha),
        ):
            if asked is not None and asked != there:
                raise CheckpointError(
                    f"{flag} {asked} disagrees with --previous_lora_weights {previous}, which was trained with "
                    f"{there}; leave the flag out or give {there}"
                )
    model = VisionLanguageModel.from_pretrained(
        model_args.base_language_model,
        model_args.base_value_model,
        previous,
        dtype=frozen_dtype(args),
        device=args.device,
        trainable=True,
        lora_dropout=model_args.lora_dropout,
        projector_layers=model_args.projector_layers,
    )
    if previous is None:
        model.add_lora(
            LoraSettings(
                rank=128 if model_args.lora_rank is None else model_args.lora_rank,
                alpha=32 if model_args.lora_alpha is None else model_args.lora_alpha,
                dropout=model_args.lora_dropout,
                target_modules=LoraSettings.parse_targets(model_args.target_modules),
            )
        )
    return model


def build_datasets(
    model: VisionLanguageModel, tokenizer: QWenTokenizer, data_args: DataArguments, args: VLMTrainingArguments
) -> tuple[ImageCaptionDataset, ImageCaptionDataset | None]:
    """Open the training set and, where asked for, the evaluation set."""
    common: dict[str, Any] = {
        "tokenizer": tokenizer,
        "image_transform": model.vision_tower.image_transform,
        "num_image_tokens": model.num_image_tokens,
        "max_length": data_args.max_length,
        "seed": args.seed,
        "allow_links": data_args.allow_links,
    }
    train_set = ImageCaptionDataset(
        data_args.image_map, data_args.captions_file, max_samples=data_args.max_train_samples, **common
    )
    if data_args.eval_image_map is None or data_args.eval_captions_file is None:
        return train_set, None
    return train_set, ImageCaptionDataset(
        data_args.eval_image_map, data_args.eval_captions_file, training=False, **common
    )


def save_run_config(model_args: ModelArguments, data_args: DataArguments, args: VLMTrainingArguments) -> None:
    """Write the resolved configuration beside the checkpoints."""
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    resolved = {
        "model": asdict(model_args),
        "data": asdict(data_args),
        "training": args.to_dict(),
        "package_versions": package_versions(),
    }
    text = json.dumps(resolved, indent=2, ensure_ascii=False, default=str)
    (folder / RUN_CONFIG).write_text(text + "\n", encoding="utf-8")


def resume_folder(args: VLMTrainingArguments) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means; `auto` is the newest complete one, or none."""
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted == "auto":
        if not any(Path(str(args.output_dir)).glob("checkpoint-*/trainer_state.json")):
            return None
        wanted = args.output_dir
    return str(resolve_checkpoint(str(wanted)))


def build_trainer(argv: Sequence[str]) -> VLMTrainer:
    """Everything before the first step.

    Raises:
        ValueError: for whatever the user can mend; the message says how.
        OSError: for files that are missing or can't be read.
    """
    model_args, data_args, args = parse_arguments(argv)
    set_up_logging(args.process_index, args.world_size)
    set_seed(args.seed)
    tokenizer = QWenTokenizer.from_pretrained(model_args.base_language_model)
    model = build_model(model_args, args)
    train_set, eval_set = build_datasets(model, tokenizer, data_args, args)
    if args.process_index == 0:
        save_run_config(model_args, data_args, args)
    return VLMTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=VLMCollator(tokenizer.pad_token_id),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit status."""
    set_up_logging()
    try:
        trainer = build_trainer(sys.argv[1:] if argv is None else argv)
        resume = resume_folder(trainer.args)
    except (ValueError, OSError) as error:
        logger.error("train.py: %s", in_one_line(error))
        return 2
    try:
        trainer.train(resume_from_checkpoint=resume)
    except (SampleError, ImageError) as error:
        logger.error("train.py: %s", in_one_line(error))
        return 2
    train_set = trainer.train_dataset
    if isinstance(train_set, ImageCaptionDataset):
        train_set.log_cuts()
    trainer.save_model()
    logger.info("done; ask the model with: python test.py --model_weights %s --image_path …", trainer.args.output_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
