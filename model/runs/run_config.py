"""`train_config.json` in a run's folder: every flag as it was understood, for people to read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ..arguments import DataArguments, ModelArguments, VLMTrainingArguments
from ..checkpoints.multimodal_config import package_versions

RUN_CONFIG = "train_config.json"


def save_run_config(model_args: ModelArguments, data_args: DataArguments, args: VLMTrainingArguments) -> None:
    """Write the resolved configuration next to the checkpoints."""
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    resolved = {
        "model": asdict(model_args),
        "data": asdict(data_args),
        "training": args.to_dict(),
        "package_versions": package_versions(),
    }
    text = json.dumps(resolved, indent=2, ensure_ascii=False, default=str)
    whole = folder / f"tmp-{RUN_CONFIG}"
    whole.write_text(text + "\n", encoding="utf-8")
    whole.replace(folder / RUN_CONFIG)  # an older one stays where the disk is full
