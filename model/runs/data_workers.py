"""Data workers ignore signals that are meant for the process they work for.

A terminal's Ctrl-C and torchrun's SIGTERM reach a whole group of processes. If the workers die, the step in progress
fails, which the run is to finish and save.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class _IgnoreSignals:
    """Initialises a worker."""

    then: Callable[[int], Any] | None  # the loader's own initialisation

    def __call__(self, worker_id: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, "sigwaitinfo"):  # Linux tells who sent a signal
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_wait_for_the_parent, args=(os.getppid(),), daemon=True).start()
        if self.then is not None:
            self.then(worker_id)


def _wait_for_the_parent(parent: int) -> None:
    """End this process on the SIGTERM with which PyTorch ends its workers; others are not for us."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)


def with_calm_workers(loader: Any) -> Any:
    """Prepare a data loader whose workers are not started yet, and return it.

    Its workers ignore signals from anybody but the process they work for. It draws their seeds from a generator of its
    own, so that dropout depends neither on how often an evaluation starts workers nor on whether a run was resumed.
    """
    inner = getattr(loader, "base_dataloader", loader)  # accelerate wraps PyTorch's
    if not isinstance(inner.worker_init_fn, _IgnoreSignals):
        inner.worker_init_fn = _IgnoreSignals(inner.worker_init_fn)
        inner.generator = torch.Generator()
    return loader
