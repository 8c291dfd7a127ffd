"""Train LoRA and projector of a vision-language model on image captions.

    torchrun --nproc_per_node=1 train.py --image_map data/image_map_b.json --captions_file data/captions_b.json \
        --base_language_model Qwen/Qwen-7B-Chat --base_value_model openai/clip-vit-large-patch14 \
        --output_dir weights/train_V1_5 --lora_rank 128 --learning_rate 3e-5 --feature_proj_lr 1e-4

`train.sh` holds the full published command. Runs under torchrun or plain `python train.py`, on CUDA GPUs or the CPU.
Beside the flags below, every flag of transformers' `TrainingArguments` is taken; `--help` explains each.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed

from dataprocess.image_io import ImageError
from dataset import ImageCaptionDataset, SampleError, VLMCollator
from dataset.bad_samples import TooManyBadSamplesError
from dataset.epoch_order import EpochOrder
from model import CheckpointError, VisionLanguageModel, VLMTrainer, VLMTrainingArguments
from model.argument_checks import check_previous
from model.arguments import DataArguments, ModelArguments, is_dry_run, parse_arguments
from model.checkpoints.checkpoint import read_checkpoint
from model.console import in_one_line, is_out_of_memory, out_of_memory, set_up_logging
from model.dry_run.report import dry_run
from model.feature_caching.fill import complete_feature_cache
from model.language_model import load_tokenizer
from model.runs.callbacks import NotFiniteError, WatchBadEvalSamples, WatchBadSamples
from model.runs.resuming import check_identity, checkpoint_to_resume, files_in_the_way
from model.runs.run_folder import hold_run_folder, run_config
from model.runs.run_state import RunState
from qwen import QWenTokenizer

logger = logging.getLogger("train")

_LESS_MEMORY = (
    "lower --per_device_train_batch_size and raise --gradient_accumulation_steps by as much, which leaves the steps as "
    "they are, or try --gradient_checkpointing true, --bf16 true, a smaller --max_length or --lora_rank; "
    "--resume_from_checkpoint auto goes on from the last checkpoint"
)


def build_model(model_args: ModelArguments, args: VLMTrainingArguments) -> VisionLanguageModel:
    """Load both base models and add LoRA layers and projector: fresh ones, or those of `--previous_lora_weights`."""
    previous = model_args.previous_lora_weights
    if previous is not None:
        check_previous(model_args, read_checkpoint(previous))
    model = VisionLanguageModel.from_pretrained(
        model_args.base_language_model,
        model_args.base_value_model,
        previous,
        dtype=args.frozen_dtype,
        device=args.device,
        trainable=True,
        lora_dropout=model_args.lora_dropout,
        projector_layers=model_args.projector_layers or 2,
    )
    if previous is None:
        model.add_lora(model_args.lora_settings)
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
        "on_bad_sample": data_args.on_bad_sample,
        "max_bad_fraction": data_args.max_bad_fraction,
    }
    train_set = ImageCaptionDataset(
        data_args.image_map, data_args.captions_file, max_samples=data_args.max_train_samples, **common
    )
    if data_args.eval_image_map is None or data_args.eval_captions_file is None:
        return train_set, None
    return train_set, ImageCaptionDataset(
        data_args.eval_image_map, data_args.eval_captions_file, training=False, **common
    )


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
    if args.process_index == 0:  # the one that says it; it takes a second or two
        shares = [100 * share for share in train_set.padding_shares(lengths, args.train_batch_size, seed)]
        logger.info("batches grouped by length: about %.1f%% of their tokens are padding, %.1f%% ungrouped", *shares)
    return EpochOrder(train_set, seed, lengths)


def build_trainer(argv: Sequence[str], lock: contextlib.ExitStack) -> VLMTrainer:
    """Everything before the first step; nothing that was there is deleted or changed.

    Args:
        argv: the command line.
        lock: holds the output folder, until it is closed.

    Returns:
        The trainer; `resume_from_checkpoint` among its arguments is the checkpoint to go on from, or None.

    Raises:
        ValueError: for whatever the user can mend; the message says how.
        OSError: for files that are missing or can't be read.
    """
    model_args, data_args, args = parse_arguments(argv, __doc__)
    set_up_logging(args.process_index, args.world_size)
    lock.enter_context(hold_run_folder(args))
    resume = checkpoint_to_resume(args)
    in_the_way = files_in_the_way(args, resume)
    set_seed(args.seed)
    tokenizer = load_tokenizer(model_args.base_language_model)
    model = build_model(model_args, args)
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
        run_config=run_config(model_args, data_args, args, identity["order"]),
        overwritten=in_the_way,
        train_dataset=ordered,
        eval_dataset=eval_set,
        data_collator=VLMCollator(tokenizer.pad_token_id),
        callbacks=watches,
    )
    trainer.create_optimizer()  # flags that it does not like are found before anything is written
    if data_args.feature_cache is not None:
        complete_feature_cache(
            data_args.feature_cache, data_args.feature_cache_dtype, model, (train_set, eval_set), args
        )
    args.resume_from_checkpoint = resume
    return trainer


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
    with contextlib.ExitStack() as lock:
        try:
            if is_dry_run(argv):
                return dry_run(*parse_arguments(argv, __doc__))
            trainer = build_trainer(argv, lock)
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
                "train.py: %s; fix that, and resume with the same command and --resume_from_checkpoint auto",
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
    received = trainer.stop_on_signal.received
    if received and step < trainer.state.max_steps:
        if trainer.save_failure:
            return 1
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
    if trainer.save_failure:
        logger.error("train.py: the final weights are in %s", folder)
        return 1
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        folder = trainer.state.best_model_checkpoint  # of a run folder, the newest would be taken
    logger.info("done; ask the model with: python test.py --model_weights %s --image_path …", folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
