"""The flags of train.py that evaluate: which of them go together."""

from __future__ import annotations

from typing import Any


def check_evaluation(data_args: Any, args: Any) -> None:
    """Check what is evaluated, which metric chooses the best checkpoint, and whether the schedule follows it.

    Args:
        data_args: `DataArguments`.
        args: `VLMTrainingArguments`.

    Raises:
        ValueError: for what is wrong, with what is expected.
    """
    strategy = args.eval_strategy
    if (data_args.eval_image_map is None) != (data_args.eval_captions_file is None):
        raise ValueError("--eval_image_map and --eval_captions_file belong together; one of them is missing")
    if strategy != "no" and data_args.eval_image_map is None:
        raise ValueError(f"--eval_strategy {strategy.value} needs --eval_image_map and --eval_captions_file; give both")
    if data_args.eval_generate is not None and strategy == "no":
        raise ValueError(
            "--eval_generate needs --eval_image_map, --eval_captions_file and an evaluation; give that, or leave it out"
        )
    if data_args.eval_generate is None and data_args.eval_max_new_tokens != type(data_args).eval_max_new_tokens:
        given = f"--eval_max_new_tokens {data_args.eval_max_new_tokens}"
        raise ValueError(f"{given}: nothing is answered without --eval_generate; give it too, or leave this out")
    best = args.metric_for_best_model
    if data_args.eval_generate is None and best not in (None, "loss", "eval_loss"):
        raise ValueError(f"--metric_for_best_model {best}: only loss is measured without --eval_generate; give it too")
    schedule, options = args.lr_scheduler_type, args.lr_scheduler_kwargs or {}
    fitting = "max" if args.greater_is_better else "min"
    if schedule in ("reduce_lr_on_plateau", "greedy") and options.get("mode", "min") != fitting:
        raise ValueError(
            f"--lr_scheduler_type {schedule.value} would take bad values of {best} for good ones; give "
            f"""--lr_scheduler_kwargs '{{"mode": "{fitting}"}}'"""
        )
