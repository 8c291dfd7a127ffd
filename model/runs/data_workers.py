"""Processes that load data, and signals that are meant for the process they work for.

A terminal's Ctrl-C and torchrun's SIGTERM reach a whole group of processes. Data workers that died of them would make
the step fail that the run is to finish.
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
class _LeaveSignalsAlone:
    """What a worker does first."""

    then: Callable[[int], Any] | None
    """What it would have done first otherwise."""

    def __call__(self, worker_id: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, "sigwaitinfo"):  # on Linux one can tell who sent it
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_wait_for_the_parent, args=(os.getppid(),), daemon=True).start()
        if self.then is not None:
            self.then(worker_id)


def _wait_for_the_parent(parent: int) -> None:
    """End this process on the SIGTERM by which the process it works for ends it; others are not for us."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(128 + signal.SIGTERM)


def with_calm_workers(loader: Any) -> Any:
    """Keep a data loader, whose workers are not started yet, from what would disturb the run.

    Its workers leave SIGINT and SIGTERM to the process they work for. The loader draws their seeds from a generator of
    its own: dropout does not depend on how often an evaluation starts workers, or on whether a run went on in between.
    """
    inner = getattr(loader, "base_dataloader", loader)  # accelerate's is a shell around PyTorch's
    if not isinstance(inner.worker_init_fn, _LeaveSignalsAlone):
        inner.worker_init_fn = _LeaveSignalsAlone(inner.worker_init_fn)
        inner.generator = torch.Generator()
    return loader
