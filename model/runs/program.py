"""What train.py does around the training itself: the order of the data, what identifies a run, and how it ends."""

from __future__ import annotations

import logging
import signal
from typing import Any

from dataset import ImageCaptionDataset
from dataset.epoch_order import EpochOrder
from dataset.grouped_order import GroupedOrder, estimated_lengths, padding_shares

from ..arguments import VLMTrainingArguments
from ..errors import in_one_line
from ..trainer import VLMTrainer
from ..vision_language_model import VisionLanguageModel
from .failures import HOW_TO_RESUME, fail
from .run_report import folder_to_ask

logger = logging.getLogger("train")


def in_epoch_order(train_set: ImageCaptionDataset, args: VLMTrainingArguments) -> EpochOrder:
    """Put the training set in the order that `--train_sampling_strategy` names: a function of seed and epoch alone."""
    seed = args.seed if args.data_seed is None else args.data_seed
    if args.train_sampling_strategy != "group_by_length":
        return EpochOrder(train_set, seed, shuffled=args.train_sampling_strategy == "random")
    lengths = estimated_lengths(train_set)
    if args.process_index == 0:  # one process logs it: it takes a second or two
        shares = [100 * share for share in padding_shares(train_set, lengths, args.train_batch_size, seed)]
        logger.info("batches grouped by length: about %.1f%% of their tokens are padding, %.1f%% ungrouped", *shares)
    return GroupedOrder(train_set, seed, lengths)


def run_identity(
    model: VisionLanguageModel, train_set: ImageCaptionDataset, args: VLMTrainingArguments
) -> dict[str, Any]:
    """Return what a run is about; a resumed run must have the same."""
    trained: dict[str, Any] = {"train_only": model.train_only}
    if model.has_lora:
        lora = model.language_model.peft_config["default"]
        targets = "|".join(sorted(lora.target_modules))
        trained = {"lora_rank": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": targets}
    return {
        "training data": train_set.fingerprint,
        "number of samples": len(train_set),
        "max_length": train_set.max_length,
        "seed": args.seed,
        "data_seed": args.data_seed,
        **trained,
        "projector_layers": model.projector_layers,
        **({"pixel_shuffle": model.pixel_shuffle} if model.pixel_shuffle != 1 else {}),  # older runs have no such key
        **({"vision_feature_layer": layer} if (layer := model.vision_tower.feature_layer) != -1 else {}),
        **{name.replace("_fingerprint", ""): value for name, value in model.fingerprints.items()},
        "order": args.train_sampling_strategy,
    }


def finish(trainer: VLMTrainer) -> int:
    """Write the final weights, log how the run ended and what comes next, and return the exit status."""
    folder, step = str(trainer.args.output_dir), trainer.state.global_step
    in_order: Any = trainer.train_dataset
    in_order.dataset.cuts.log()
    received = trainer.stop_on_signal.received if step < trainer.state.max_steps else 0
    if received and not trainer.save_failure:
        name = signal.Signals(received).name
        logger.info("stopped by %s after step %d, which is saved; %s", name, step, HOW_TO_RESUME)
        return 128 + received
    problems = []
    if trainer.save_failure:
        problems.append(
            f"the run ended at step {step}; its last checkpoint could not be written: {trainer.save_failure}"
        )
    if not received:
        try:
            trainer.save_model()  # much smaller than a checkpoint, so it may fit where that did not
        except OSError as error:
            problems.append(f"the final weights could not be written to {folder}: {in_one_line(error)}")
        else:
            problems += [f"the final weights are in {folder}"] if problems else []
    if problems:
        return fail("; ".join(problems), 1)
    logger.info("done; ask the model with: python test.py --model_weights %s --image_path …", folder_to_ask(trainer))
    return 0
