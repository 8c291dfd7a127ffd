"""What train.py does around the training itself: what identifies a run, and how it ends."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataprocess.image_io import ImageError
from dataset import ImageCaptionDataset, SampleError
from dataset.bad_samples import TooManyBadSamplesError

from ..checkpoints.tensor_files import CheckpointError
from ..console import in_one_line, is_out_of_memory, out_of_memory
from .callbacks import NotFiniteError

if TYPE_CHECKING:
    from ..arguments import VLMTrainingArguments
    from ..trainer import VLMTrainer
    from ..vision_language_model import VisionLanguageModel

logger = logging.getLogger("train")

_RESUME = "resume with the same command and --resume_from_checkpoint auto"
_LESS_MEMORY = (
    "lower --per_device_train_batch_size and raise --gradient_accumulation_steps by as much, which leaves the steps as "
    "they are, or try --gradient_checkpointing true, --bf16 true, a smaller --max_length or --lora_rank; "
    "--resume_from_checkpoint auto resumes from the last checkpoint"
)


def run_identity(
    model: VisionLanguageModel, train_set: ImageCaptionDataset, args: VLMTrainingArguments
) -> dict[str, Any]:
    """Return what a run is about; a resumed run must have the same."""
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


def finish(trainer: VLMTrainer) -> int:
    """Write the final weights, and log how the run ended and what comes next.

    Returns:
        The exit status.
    """
    folder, step = str(trainer.args.output_dir), trainer.state.global_step
    train_set = getattr(trainer.train_dataset, "dataset", trainer.train_dataset)
    if isinstance(train_set, ImageCaptionDataset):
        train_set.cuts.log()
    received = trainer.stop_on_signal.received if step < trainer.state.max_steps else 0
    if received and not trainer.save_failure:
        name = signal.Signals(received).name
        logger.info("stopped by %s after step %d, which is saved; %s", name, step, _RESUME)
        return 128 + received
    problem = ""
    if not received:
        try:
            trainer.save_model()  # much smaller than a checkpoint, so it may fit where that did not
        except OSError as error:
            problem = f"the final weights could not be written to {folder}: {in_one_line(error)}"
    if trainer.save_failure:
        saved = "" if received or problem else f"; the final weights are in {folder}"
        failed = f"its last checkpoint could not be written: {trainer.save_failure}"
        return _fail(f"the run ended at step {step}; {failed}{saved}", 1)
    if problem:
        return _fail(problem, 1)
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        folder = trainer.state.best_model_checkpoint  # the run folder would mean its newest checkpoint
    logger.info("done; ask the model with: python test.py --model_weights %s --image_path …", folder)
    return 0


def report_failure(error: BaseException, *, has_begun: bool) -> int:
    """Log an error that the user can do something about in one line; any other is raised again.

    Args:
        error: the error that is being handled.
        has_begun: whether training had begun.

    Returns:
        The exit status: 2 for a mistake in what the user gave, 1 for a run that failed, 130 for Ctrl-C.
    """
    if isinstance(error, KeyboardInterrupt):  # between the first step and the last, it is waited for
        return _fail("stopped by SIGINT before or after the steps; checkpoints are unchanged", 128 + signal.SIGINT)
    if is_out_of_memory(error):
        return _fail(out_of_memory(error, _LESS_MEMORY), 1)
    if isinstance(error, NotFiniteError):
        return _fail(in_one_line(error), 1)
    if isinstance(error, OSError) and has_begun:
        return _fail(f"{in_one_line(error)}; fix that, and {_RESUME}", 1)
    of_data = (SampleError, ImageError, TooManyBadSamplesError, CheckpointError, ImportError)
    if isinstance(error, of_data if has_begun else (ValueError, OSError, ImportError)):
        return _fail(in_one_line(error), 2)
    raise error


def _fail(message: str, status: int) -> int:
    message = f"train.py: {message}"
    logger.error(message)
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        _tell_torchrun(message, Path(error_file))
    return status


_AFTER_TORCHRUN = """
import os, select, sys
try:
    select.select([os.pidfd_open(int(sys.argv[1]))], [], [], 60)
except ProcessLookupError:
    pass
os.write(2, os.fsencode(sys.argv[2] + chr(10)))
"""


def _tell_torchrun(message: str, error_file: Path) -> None:
    """Have the message end what the user sees, which is a screenful of torchrun's own once a process has failed.

    torchrun's report names what its error file says. The line is then printed again after torchrun has ended, by a
    process of its own and once for all ranks.
    """
    note = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
    try:
        error_file.write_text(json.dumps({"message": note}), encoding="utf-8")
        (error_file.parent.parent / "said").touch(exist_ok=False)
        if hasattr(os, "pidfd_open"):  # Linux
            command = [sys.executable, "-S", "-c", _AFTER_TORCHRUN, str(os.getppid()), message]
            quiet = subprocess.DEVNULL
            subprocess.Popen(command, stdin=quiet, stdout=quiet, start_new_session=True)
    except OSError as error:
        logger.debug("torchrun could not be told: %s", error)
