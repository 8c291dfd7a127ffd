"""Samples of similar length next to each other: reproducible, complete, and with less padding."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from tiny_run import MIXED_CAPTIONS, write_data

import train
from benchmarks.training.grouped import padding_share
from dataset import ImageCaptionDataset
from dataset.epoch_order import epoch_permutation
from dataset.grouped_order import estimated_lengths, grouped_permutation, padding_shares


def random_lengths(number: int, seed: int = 0) -> torch.Tensor:
    """Of captions behind an image: 270 to 350 tokens, a tenth of them far longer."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(270, 351, (number,), generator=generator)
    return torch.where(torch.rand(number, generator=generator) < 0.1, lengths + 500, lengths)


def test_it_is_the_same_on_every_machine():
    lengths = torch.tensor([5, 3, 9, 3, 1, 7, 3] * 3)
    expected = [0, 16, 10, 13, 15, 8, 7, 2, 5, 9, 4, 20, 11, 3, 14, 19, 1, 6, 17, 12, 18]
    assert grouped_permutation(lengths, 42, 0).tolist() == expected


@pytest.mark.parametrize("samples_of_a_step", [4, 16, 64, 128])
def test_what_is_taken_together_is_of_similar_length(samples_of_a_step):
    """Over accumulation and processes too: none waits for the one with the long samples."""
    lengths = random_lengths(20_000)
    grouped = lengths[grouped_permutation(lengths, 42, 0)]
    steps = grouped[: -(len(grouped) % 128)].view(-1, samples_of_a_step).float()
    spread = steps.amax(dim=1) - steps.amin(dim=1)
    assert spread.median() <= 5
    assert padding_share(grouped, samples_of_a_step) < 0.03
    assert padding_share(lengths[epoch_permutation(len(lengths), 42, 0)], samples_of_a_step) > 0.2


@pytest.mark.parametrize("number", [1, 17, 31, 129, 20_000])
def test_it_is_a_permutation_whose_first_block_has_the_longest_sample(number):
    """It was not where it is among the samples that fill no block: 20 of 400 epochs of 17 samples."""
    lengths = random_lengths(number)
    lengths[number // 2] = 2000
    block = max(1, min(128, number // 8))
    for epoch in range(200 if number < 200 else 2):
        order = grouped_permutation(lengths, 42, epoch)
        assert sorted(order.tolist()) == list(range(number))
        assert number // 2 in order[:block].tolist(), epoch


@pytest.mark.parametrize("other", [(42, 1), (43, 0)])
def test_each_epoch_and_seed_puts_other_samples_together(other):
    lengths = random_lengths(20_000)
    batches = [{frozenset(b.tolist()) for b in grouped_permutation(lengths, *of).split(4)} for of in ((42, 0), other)]
    assert len(batches[0] & batches[1]) < 5


# ---- Lengths, and the flag


@pytest.fixture
def open_samples(tmp_path, tokenizer):
    """Write samples and open them; no image is opened, and there is none."""

    def build(samples, **kwargs) -> ImageCaptionDataset:
        _, image_map, _, captions = write_data(tmp_path, samples, tmp_path)
        return ImageCaptionDataset(image_map, captions, tokenizer, torch.zeros, 50, **kwargs)

    return build


def test_estimates_count_images_and_the_mean_of_alternatives(open_samples):
    assert estimated_lengths(open_samples(MIXED_CAPTIONS, max_length=90))[2] == 90, "two images, cut at the limit"
    data = open_samples(MIXED_CAPTIONS)
    lengths = estimated_lengths(data).tolist()
    assert lengths[0] in range(70, 85)
    assert lengths[10] in range(20, 30)
    true = [len(data.encode(sample).input_ids) for sample in data.annotations]
    assert torch.corrcoef(torch.tensor([true, lengths]).float())[0, 1] > 0.95


def test_padding_is_that_of_the_first_epoch(open_samples):
    """A bad sample has one token in its batch; alternatives are those that the epoch draws, not the first ones."""
    answers = [["a", *["long " * n] * 4] for n in (9, 40, 80)]
    data = open_samples([(None, ("long " * 300, "a")), *((None, ("q", a)) for a in answers)], max_length=200)
    tokens = torch.ones(4)
    tokens[1:] = torch.tensor([len(data[index]["input_ids"]) for index in (1, 2, 3)])
    shares = []
    for order in (grouped_permutation(estimated_lengths(data), 5, 0), epoch_permutation(4, 5, 0)):
        shares.append(padding_share(tokens[order], 2))
    assert padding_shares(data, estimated_lengths(data), 2, 5) == pytest.approx(tuple(shares))
    assert max(tokens) > 80


@pytest.mark.parametrize("process_index", [0, 1])
def test_the_flag_names_the_order_and_one_process_says_the_padding(open_samples, caplog, process_index):
    data, given = open_samples(MIXED_CAPTIONS), {"seed": 3, "data_seed": None, "train_batch_size": 4}
    orders = {}
    with caplog.at_level(logging.INFO, logger="train"):
        for name in ("sequential", "random", "group_by_length"):
            args = SimpleNamespace(train_sampling_strategy=name, process_index=process_index, **given)
            orders[name] = train.in_epoch_order(data, args)
    for epoch in (0, 1):
        assert orders["sequential"].permutation(epoch).tolist() == list(range(12))
        assert torch.equal(orders["random"].permutation(epoch), epoch_permutation(12, 3, epoch))
        expected = grouped_permutation(estimated_lengths(data), 3, epoch)
        assert torch.equal(orders["group_by_length"].permutation(epoch), expected)
    assert ("padding" in caplog.text) == (process_index == 0)
