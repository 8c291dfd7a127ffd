"""The order of an epoch: a function of seed and epoch, from which a position can be told."""

from __future__ import annotations

import torch
from stopped_runs import Answers
from torch.utils.data import DataLoader

from dataset.epoch_order import EpochOrder, epoch_permutation


def ids(order: EpochOrder) -> list[int]:
    return [order[i]["id"] for i in range(len(order))]


def test_it_is_a_permutation_that_is_always_the_same():
    torch.manual_seed(1)
    first = epoch_permutation(1000, 42, 3)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, epoch_permutation(1000, 42, 3))
    assert sorted(first.tolist()) == list(range(1000))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "no generator is touched"
    # So it is on every machine: a run may go on on another one.
    assert epoch_permutation(8, 42, 0).tolist() == [0, 2, 5, 6, 4, 3, 7, 1]


def test_epochs_and_seeds_differ():
    orders = {tuple(epoch_permutation(50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_places_are_drawn_evenly():
    """Each of 5 samples comes first in about a fifth of 2000 epochs: 400, give or take 4 standard deviations of 18."""
    first = [int(epoch_permutation(5, 7, epoch)[0]) for epoch in range(2000)]
    assert all(330 < first.count(number) < 470 for number in range(5))


def test_the_epoch_reaches_order_and_data_set():
    order = EpochOrder(Answers(20), 5)
    for epoch in (0, 1, 0):
        order.set_epoch(epoch)
        assert ids(order) == epoch_permutation(20, 5, epoch).tolist()
        assert int(order.dataset._epoch) == epoch


def test_workers_that_outlive_an_epoch_follow():
    order = EpochOrder(Answers(12), 5)
    loader = DataLoader(order, num_workers=2, persistent_workers=True, collate_fn=lambda batch: batch[0]["id"])
    assert list(loader) == epoch_permutation(12, 5, 0).tolist()
    order.set_epoch(1)
    assert list(loader) == epoch_permutation(12, 5, 1).tolist()
