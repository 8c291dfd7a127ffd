"""Load a checkpoint's weights and training state, which Trainer does at its own moments."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from .evaluating import TokenMeanTrainer
from .resuming import Resumed, use_settings

logger = logging.getLogger(__name__)


class LoadingTrainer(TokenMeanTrainer):
    """A Trainer that loads checkpoints of ours."""

    model: Any
    _resumed: Resumed | None = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load_checkpoint(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer: Any = self.optimizer
        own = [dict(group) for group in optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:  # rates and weight decay are those of the flags now, not those of the checkpoint
            use_settings(optimizer, self.lr_scheduler, own)

    def _load_scaler(self, checkpoint: str | None) -> None:
        super()._load_scaler(checkpoint)
        if self._resumed is not None:
            self._resumed.loading = None  # it was the last of the checkpoint's files

    def _load_best_model(self) -> None:
        # The folder is one of this run, whatever trainer_state.json names.
        best = Path(str(self.args.output_dir)) / Path(str(self.state.best_model_checkpoint)).name
        if not best.is_dir():
            logger.warning("the best checkpoint %s is missing; the weights of the last step are kept", best)
            return
        logger.info("loading the best checkpoint %s (score %s)", best, self.state.best_metric)
        self.model.load_checkpoint(best)
