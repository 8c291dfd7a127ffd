"""train.py, which writes a line for each batch to $RECORD: step, IDs, number of processes, meeting.

$STEP_SECONDS is how long each batch waits afterwards, $GROUP_TIMEOUT how long a process waits for another: on the CPU,
transformers does not pass --ddp_timeout on.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from pathlib import Path

import torch

import train
from model.trainer import VLMTrainer

compute_step = VLMTrainer.training_step


def training_step(self, model, inputs, *further):
    ids = [int(index) for index in inputs["ids"]]
    loss = compute_step(self, model, inputs, *further)
    meeting = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"  # another port each time that machines meet
    line = {"step": self.state.global_step, "ids": ids, "processes": self.args.world_size, "meeting": meeting}
    with Path(os.environ["RECORD"]).open("a") as file:
        file.write(json.dumps(line) + "\n")
    time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
    return loss


if __name__ == "__main__":
    VLMTrainer.training_step = training_step  # type: ignore[method-assign]
    patience = datetime.timedelta(seconds=int(os.environ.get("GROUP_TIMEOUT", "600")))
    torch.distributed.init_process_group("gloo", timeout=patience)
    sys.exit(train.main())
