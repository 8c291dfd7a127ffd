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
import signal
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from dataset import ImageCaptionDataset, SampleError, VLMCollator
from dataset.annotations import Annotations
from dataset.bad_samples import TooManyBadSamplesError
from dataset.epoch_order import EpochOrder, epoch_permutation, padding_share
from dataset.image_io import ImageError
from dataset.sample_sizes import drawn_batches, sample_sizes
from model import LoraSettings, VisionLanguageModel, VLMTrainer, VLMTrainingArguments, read_checkpoint
from model.arguments import DataArguments, ModelArguments, is_dry_run, parse_arguments
from model.checkpoint import CheckpointError, package_versions
from model.console import in_one_line, set_up_logging
from model.dry_run import Plan, planned_model, report, settings_to_show
from model.guards import ClearOnFirstStep, NotFiniteError, WatchBadEvalSamples, WatchBadSamples
from model.language_model import load_tokenizer
from model.memory import is_out_of_memory, out_of_memory
from model.resuming import checkpoint_to_resume, files_in_the_way
from model.run_state import RunState, check_identity
from qwen import QWenTokenizer
from visual.feature_cache import open_feature_cache

logger = logging.getLogger("train")

_LESS_MEMORY = (
    "lower --per_device_train_batch_size and raise --gradient_accumulation_steps by as much, which leaves the steps as "
    "they are, or try --gradient_checkpointing true, --bf16 true, a smaller --max_length or --lora_rank; "
    "--resume_from_checkpoint auto goes on from the last checkpoint"
)
RUN_CONFIG = "train_config.json"
_LOOKED_AT = 2000  # samples whose tokens are counted for what is printed beforehand: a second or two


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
    targets = model_args.target_modules
    asked = None if targets is None else LoraSettings.parse_targets(targets)
    if previous is not None:
        config = read_checkpoint(previous).lora_config
        check_previous(previous, lora_rank=(model_args.lora_rank, config.r))
        check_previous(previous, lora_alpha=(model_args.lora_alpha, config.lora_alpha))
    model = VisionLanguageModel.from_pretrained(
        model_args.base_language_model,
        model_args.base_value_model,
        previous,
        dtype=frozen_dtype(args),
        device=args.device,
        trainable=True,
        lora_dropout=model_args.lora_dropout,
        projector_layers=model_args.projector_layers or 2,
    )
    if previous is not None:
        names = (name for name, _ in model.named_parameters() if ".lora_A." in name)
        there = {name.split(".lora_A.")[0].rsplit(".", 1)[-1] for name in names}
        check_previous(previous, target_modules=(_with_bars(asked), _with_bars(there)))
        check_previous(previous, projector_layers=(model_args.projector_layers, model.projector_layers))
        return model
    default = LoraSettings()
    model.add_lora(
        LoraSettings(
            rank=model_args.lora_rank or default.rank,
            alpha=model_args.lora_alpha or default.alpha,
            dropout=model_args.lora_dropout,
            target_modules=default.target_modules if asked is None else asked,
        )
    )
    return model


def _with_bars(names: Collection[str] | None) -> str | None:
    return None if names is None else "|".join(sorted(set(names)))


def check_previous(folder: str, **flags: tuple[Any, Any]) -> None:
    """Hold explicit flags against the checkpoint that training starts from.

    Args:
        folder: the checkpoint.
        flags: for a flag's name, what was asked for (None: nothing) and what the checkpoint has.

    Raises:
        CheckpointError: if they disagree.
    """
    for name, (asked, there) in flags.items():
        if asked is not None and asked != there:
            raise CheckpointError(
                f"--{name} {asked} disagrees with --previous_lora_weights {folder}, which was trained with {there}; "
                f"leave the flag out or give {there}"
            )


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
        "on_bad_sample": data_args.on_bad_sample,
        "max_bad_fraction": data_args.max_bad_fraction,
        "feature_cache": model.feature_cache,
    }
    train_set = ImageCaptionDataset(
        data_args.image_map, data_args.captions_file, max_samples=data_args.max_train_samples, **common
    )
    if data_args.eval_image_map is None or data_args.eval_captions_file is None:
        return train_set, None
    return train_set, ImageCaptionDataset(
        data_args.eval_image_map, data_args.eval_captions_file, training=False, **common
    )


def save_run_config(
    model_args: ModelArguments, data_args: DataArguments, args: VLMTrainingArguments, order: str
) -> None:
    """Write the resolved configuration beside the checkpoints; `order` is the sampling strategy that was asked for."""
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    resolved = {
        "model": asdict(model_args),
        "data": asdict(data_args),
        "training": {**args.to_dict(), "train_sampling_strategy": order},
        "package_versions": package_versions(),
    }
    text = json.dumps(resolved, indent=2, ensure_ascii=False, default=str)
    whole = folder / f"tmp-{RUN_CONFIG}"
    whole.write_text(text + "\n", encoding="utf-8")
    whole.replace(folder / RUN_CONFIG)  # an older one stays where the disk is full


def run_identity(
    model: VisionLanguageModel, train_set: ImageCaptionDataset, args: VLMTrainingArguments
) -> dict[str, Any]:
    """What a run is about: a resumed one must have the same."""
    lora = model.language_model.peft_config["default"]
    return {
        "training data": train_set.fingerprint,
        "number of samples": len(train_set),
        "max_length": train_set.max_length,
        "seed": args.seed,
        "data_seed": args.data_seed,
        "lora_rank": lora.r,
        "lora_alpha": lora.lora_alpha,
        "target_modules": "|".join(sorted(lora.target_modules)),
        "projector_layers": model.projector_layers,
        **{name.replace("_fingerprint", ""): value for name, value in model.fingerprints.items()},
        "order": args.train_sampling_strategy,
    }


def in_order(train_set: ImageCaptionDataset, args: VLMTrainingArguments) -> EpochOrder:
    """The training set in the order that `--train_sampling_strategy` names, to be read one after the other.

    Trainer's own samplers can't go on in mid-epoch with other batches, and its grouping reads every sample first; these
    orders are functions of seed and epoch.
    """
    strategy, args.train_sampling_strategy = args.train_sampling_strategy, "sequential"
    seed = args.seed if args.data_seed is None else args.data_seed
    if strategy != "group_by_length":
        return EpochOrder(train_set, seed, shuffled=strategy == "random")
    lengths = train_set.estimated_lengths()
    ordered = EpochOrder(train_set, seed, lengths)
    orders = ordered.permutation(0), epoch_permutation(len(lengths), seed, 0)
    shares = [100 * looked_at_padding(train_set, order, args.train_batch_size) for order in orders]
    logger.info("batches grouped by length: about %.1f%% of their tokens are padding, %.1f%% ungrouped", *shares)
    return ordered


def looked_at_padding(train_set: ImageCaptionDataset, order: Tensor, batch_size: int) -> float:
    """The share of padding, 0 to 1, in batches from all over an epoch, by true tokens: estimates would flatter.

    Args:
        train_set: the samples.
        order: (samples,) int64, of the epoch.
        batch_size: samples of a batch.
    """
    if len(order) > _LOOKED_AT:
        batches = order[: len(order) - len(order) % batch_size].view(-1, batch_size)
        order = batches[:: -(-len(order) // _LOOKED_AT)].flatten()
    return padding_share(train_set.lengths(order.tolist()), batch_size)


def build_trainer(argv: Sequence[str]) -> VLMTrainer:
    """Everything before the first step; nothing that was there is deleted or changed.

    Returns:
        The trainer; `resume_from_checkpoint` among its arguments is the checkpoint to go on from, or None.

    Raises:
        ValueError: for whatever the user can mend; the message says how.
        OSError: for files that are missing or can't be read.
    """
    model_args, data_args, args = parse_arguments(argv, __doc__)
    set_up_logging(args.process_index, args.world_size)
    resume = checkpoint_to_resume(args)
    in_the_way = files_in_the_way(args, resume)
    set_seed(args.seed)
    tokenizer = load_tokenizer(model_args.base_language_model)
    model = build_model(model_args, args)
    if data_args.feature_cache is not None:
        model.feature_cache = open_feature_cache(
            data_args.feature_cache, model.vision_tower, data_args.feature_cache_dtype
        )
    train_set, eval_set = build_datasets(model, tokenizer, data_args, args)
    identity = run_identity(model, train_set, args)
    if resume is not None:
        check_identity(RunState.read(Path(resume)), identity, Path(resume))
    ordered = in_order(train_set, args)
    watches = [WatchBadSamples(train_set)]
    if eval_set is not None:
        watches.append(WatchBadEvalSamples(eval_set))
    trainer = VLMTrainer(
        model=model,
        args=args,
        identity=identity,
        train_dataset=ordered,
        eval_dataset=eval_set,
        data_collator=VLMCollator(tokenizer.pad_token_id),
        callbacks=[*watches, ClearOnFirstStep(in_the_way)],
    )
    trainer.create_optimizer()  # flags that it does not like are found before anything is written
    args.resume_from_checkpoint = resume
    if args.process_index == 0:
        save_run_config(model_args, data_args, args, identity["order"])
    return trainer


def dry_run(argv: Sequence[str]) -> int:
    """Print to stdout what a run would be and take, from configurations and texts; nothing is loaded or written.

    Raises:
        ValueError: for whatever the user can mend.
        OSError: for files that are missing or can't be read.
    """
    model_args, data_args, args = parse_arguments(argv, __doc__)
    set_up_logging(args.process_index, args.world_size)
    shape, lora = planned_model(model_args)
    tokenizer = load_tokenizer(model_args.base_language_model)
    files = data_args.image_map, data_args.captions_file
    samples = Annotations(*files, data_args.max_train_samples, skip_bad=True, need_folders=False)
    sizes = sample_sizes(samples, tokenizer, shape.image_tokens, data_args.max_length, _LOOKED_AT, args.seed)
    if not sizes:
        raise SampleError(f"none of {len(samples)} samples fits into --max_length {data_args.max_length}; raise it")
    batches = drawn_batches(sizes, args.per_device_train_batch_size, args.seed)
    plan = Plan.of(args, len(samples), data_args.max_length)
    if args.process_index == 0:
        sys.stdout.write(report(shape, settings_to_show(lora, args, frozen_dtype(args)), plan, sizes, batches))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit status."""
    set_up_logging()
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:  # before the first step or after the last; in between, signals are waited for
        logger.error("train.py: stopped by SIGINT outside of the steps; checkpoints are as they were")
        return 128 + signal.SIGINT
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logger.error("train.py: %s", out_of_memory(error, _LESS_MEMORY))
        return 1


def run(argv: Sequence[str]) -> int:
    """Train; returns the exit status."""
    try:
        if is_dry_run(argv):
            return dry_run(argv)
        trainer = build_trainer(argv)
    except (ValueError, OSError, ImportError) as error:
        logger.error("train.py: %s", in_one_line(error))
        return 2
    try:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except (SampleError, ImageError, TooManyBadSamplesError, CheckpointError, ImportError) as error:
        logger.error("train.py: %s", in_one_line(error))
        return 2
    except NotFiniteError as error:
        logger.error("train.py: %s", in_one_line(error))
        return 1
    except OSError as error:
        logger.error(
            "train.py: %s; mend that, and go on with the same command and --resume_from_checkpoint auto",
            in_one_line(error),
        )
        return 1
    return finish(trainer)


def finish(trainer: VLMTrainer) -> int:
    """Say how the run ended and what comes next; returns the exit status."""
    folder, step = trainer.args.output_dir, trainer.state.global_step
    train_set = getattr(trainer.train_dataset, "dataset", trainer.train_dataset)
    if isinstance(train_set, ImageCaptionDataset):
        train_set.log_cuts()
    if trainer.save_failure:
        logger.error(
            "train.py: the run ended at step %d; its last checkpoint could not be written: %s",
            step,
            trainer.save_failure,
        )
        return 1
    received = trainer.stop_on_signal.received
    if received and step < trainer.state.max_steps:
        logger.info(
            "stopped by %s after step %d, which is saved; go on with the same command and "
            "--resume_from_checkpoint auto",
            *(signal.Signals(received).name, step),
        )
        return 128 + received
    try:
        trainer.save_model()
    except OSError as error:
        logger.error("train.py: the final weights could not be written to %s: %s", folder, in_one_line(error))
        return 1
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        folder = trainer.state.best_model_checkpoint  # of a run folder, the newest would be taken
    logger.info("done; ask the model with: python test.py --model_weights %s --image_path …", folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
