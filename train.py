"""Train LoRA and projector of a vision-language model on image captions.

    torchrun --nproc_per_node=1 train.py --image_map data/image_map_b.json --captions_file data/captions_b.json \
        --base_language_model Qwen/Qwen-7B-Chat --base_value_model openai/clip-vit-large-patch14 \
        --output_dir weights/train_V1_5 --lora_rank 128 --learning_rate 3e-5 --feature_proj_lr 1e-4

`train.sh` holds the full published command. Runs under torchrun or plain `python train.py`, on CUDA GPUs or the CPU.
Every flag of transformers' `TrainingArguments` is accepted too.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

import transformers

from dataset import ImageCaptionDataset, VLMCollator
from dataset.prompt import Tokenizer
from model.arguments import DataArguments, ModelArguments, VLMTrainingArguments, parse_arguments
from model.checkpoints.base_models import load_tokenizer
from model.checkpoints.previous import read_previous
from model.console import set_up_logging
from model.dry_run.report import dry_run
from model.export.from_llava import start_from_llava
from model.feature_caching.fill import complete_feature_cache
from model.runs.callbacks import WatchBadSamples
from model.runs.deleting import is_overwriting, overwriting
from model.runs.evaluating import WatchBadEvalSamples
from model.runs.failures import report_failure
from model.runs.program import finish, in_epoch_order, run_identity
from model.runs.resuming import check_identity, checkpoint_to_resume
from model.runs.run_folder import hold_run_folder, run_config
from model.runs.run_report import ReportRun
from model.trainer import VLMTrainer
from model.vision_language_model import VisionLanguageModel


def build_model(model_args: ModelArguments, args: VLMTrainingArguments) -> VisionLanguageModel:
    """Load both base models and add what is trained: projector and LoRA, say, fresh or from earlier weights."""
    model = VisionLanguageModel.from_pretrained(
        model_args.base_language_model,
        model_args.base_value_model,
        model_args.previous_lora_weights,
        dtype=args.frozen_dtype,
        device="cpu" if args.shard_model else args.device,
        trainable=True,
        lora_dropout=model_args.lora_dropout,
        projector_layers=model_args.projector_layers or 2,
        pixel_shuffle=model_args.pixel_shuffle or 1,
        train_only=model_args.train_only or "lora",
        hollow=args.shard_model,
        quantisation=model_args.quantisation,
    )
    if model_args.train_only is None and not model.has_lora:
        model.add_lora(model_args.lora_settings)
    if model_args.from_llava is not None:
        start_from_llava(model, model_args.from_llava)
    return model


def build_datasets(
    model: VisionLanguageModel, tokenizer: Tokenizer, data_args: DataArguments, args: VLMTrainingArguments
) -> tuple[ImageCaptionDataset, ImageCaptionDataset | None]:
    """Open the training set and, where asked for, the evaluation set."""
    common: dict[str, Any] = {
        "tokenizer": tokenizer,
        "image_transform": model.vision_tower.image_transform,
        "num_image_tokens": model.num_image_tokens,
        "max_length": data_args.max_length,
        "seed": args.seed,
        "system": tokenizer.default_system,
        "allow_links": data_args.allow_links,
        "on_bad_sample": data_args.on_bad_sample,
        "max_bad_fraction": data_args.max_bad_fraction,
    }
    train_set = ImageCaptionDataset(
        data_args.image_map, data_args.captions_file, max_samples=data_args.max_train_samples, **common
    )
    if data_args.eval_image_map is None or data_args.eval_captions_file is None:
        return train_set, None
    eval_set = ImageCaptionDataset(data_args.eval_image_map, data_args.eval_captions_file, training=False, **common)
    return train_set, eval_set


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: VLMTrainingArguments, lock: contextlib.ExitStack
) -> VLMTrainer:
    """Do everything that comes before the first step; no file of an earlier run is deleted or changed.

    Other runs are kept out of the output folder until `lock` is closed.

    Raises:
        ValueError: for whatever the user can fix; the message says how.
        OSError: for files that are missing or can't be read.
    """
    set_up_logging(args.process_index, args.world_size)

    # One run, one folder: take it, and find the checkpoint to resume from, or an old run to overwrite.
    is_new = lock.enter_context(hold_run_folder(args))
    resume = checkpoint_to_resume(args) if args.resume_from_checkpoint is not None else None
    overwrites = not is_new and is_overwriting(args, resume)

    # Put tower, projector and language model together; the seed decides the first weights of what is trained.
    transformers.set_seed(args.seed)
    if model_args.previous_lora_weights is not None or model_args.from_llava is not None:
        read_previous(model_args)
    tokenizer = load_tokenizer(model_args.base_language_model)
    model = build_model(model_args, args)

    # Open the data, and make sure that a resumed run trains on the same.
    train_set, eval_set = build_datasets(model, tokenizer, data_args, args)
    identity = run_identity(model, train_set, args)
    if resume is not None:
        check_identity(resume, identity)

    # Hand all of it to Trainer, with an optimizer of two learning rates.
    trainer_class = VLMTrainer
    if args.shard_model:
        from model.scaling.sharded_trainer import ShardedTrainer as trainer_class
    trainer = trainer_class(
        model=model,
        args=args,
        identity=identity,
        run_config=run_config(model_args, data_args, args),
        train_dataset=in_epoch_order(train_set, args),
        eval_dataset=eval_set,
        data_collator=VLMCollator(tokenizer.pad_token_id),
        callbacks=[WatchBadSamples(train_set), *([WatchBadEvalSamples(eval_set)] if eval_set is not None else [])],
    )
    trainer.add_callback(ReportRun(trainer))
    if data_args.eval_generate is not None and eval_set is not None:
        from model.evaluation.answering_samples import AnswerSamples

        trainer.answer_samples = AnswerSamples(trainer, tokenizer, eval_set, data_args)
    trainer.create_optimizer()  # a wrong --optim is found before anything is written

    # Let the tower see every image once, if its features are to be stored.
    if data_args.feature_cache is not None:
        complete_feature_cache(
            data_args.feature_cache, data_args.feature_cache_dtype, model, (train_set, eval_set), args
        )
    args.resume_from_checkpoint = resume
    if overwrites:
        lock.enter_context(overwriting(trainer))
    return trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and return the exit status."""
    set_up_logging()
    has_begun = False
    with contextlib.ExitStack() as lock:
        try:
            # Read the flags, and refuse at once what can't work.
            model_args, data_args, args = parse_arguments(sys.argv[1:] if argv is None else argv, __doc__)
            if data_args.dry_run:
                return dry_run(model_args, data_args, args)
            trainer = build_trainer(model_args, data_args, args, lock)
            has_begun = True
            trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
            return finish(trainer)
        except (Exception, KeyboardInterrupt) as error:
            return report_failure(error, has_begun=has_begun)


if __name__ == "__main__":
    sys.exit(main())
