"""Training: the losses of a plain loop, two learning rates, accumulation, evaluation and saving."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny_vlm import PAD_ID, collate, enliven_trained, new_model, sample, trainable_parameters
from torch.testing import assert_close
from torch.utils.data import Dataset

from model import VLMTrainer, VLMTrainingArguments
from model.runs import callbacks
from model.trainer import optimizer_groups
from qwen import IGNORE_INDEX

SAMPLES = [
    sample(i % 3, num_words=3 + i % 4, num_answer=1 + (3 * i) % 7, seed=i) for i in range(8)
]  # no, one and two images, answers of 1 to 7 tokens


class Samples(Dataset):
    def __init__(self, samples=SAMPLES) -> None:
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


class RecordingCollator:
    """Collates, and keeps the batches."""

    def __init__(self) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []

    def __call__(self, samples):
        self.batches.append(collate(*samples))
        return dict(self.batches[-1])


def arguments(folder, **changes) -> VLMTrainingArguments:
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-3,
        "feature_proj_lr": 5e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 3,
    }
    return VLMTrainingArguments(**{**settings, **changes})


def train(model, folder, **changes) -> VLMTrainer:
    trainer = VLMTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=Samples(),
        eval_dataset=Samples(),
        data_collator=RecordingCollator(),
    )
    trainer.train()
    return trainer


def collate_list(samples):
    return collate(*samples)


def logged(trainer: VLMTrainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.fixture
def model(tiny_bases):
    return enliven_trained(new_model(tiny_bases), std=0.1)


def test_every_process_hears_that_the_configuration_could_not_be_written(model, tmp_path, monkeypatch):
    """One that did not would wait for the first process in the first step."""
    monkeypatch.setattr(callbacks, "gather_object", lambda problems: ["the disk is full", *problems])
    parts = {"args": arguments(tmp_path), "train_dataset": Samples(), "data_collator": collate_list}
    trainer = VLMTrainer(model=model, run_config={"training": {}}, **parts)
    with pytest.raises(OSError, match="the disk is full"):
        trainer.train()


# Optimizer groups


def test_groups_cover_every_trainable_parameter_once(model, tmp_path):
    args = arguments(tmp_path, weight_decay=0.1)
    groups = optimizer_groups(model, args)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    expected = {
        id(parameter): (5e-3 if name.startswith("projector.") else 1e-3, 0.1 if name.endswith("weight") else 0.0)
        for name, parameter in trainable_parameters(model).items()
    }
    assert found == expected
    assert len(expected) == 12 + 4
    # LoRA first: what Trainer logs and schedules as "the" learning rate is the first group's.
    assert [group["name"] for group in groups] == ["lora matrices", "projector matrices", "projector vectors"]


def test_a_stray_trainable_parameter_is_an_error_that_names_it(model, tmp_path):
    model.qwen.transformer.ln_f.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"trainable parameters.*: [\w.]*transformer\.ln_f\.weight$"):
        optimizer_groups(model, arguments(tmp_path))


# Losses


def plain_loop(model, batches, *, steps, lr, projector_lr, decay) -> tuple[list[float], list[float]]:
    """AdamW over two groups, linear decay to 0, gradients clipped to a norm of 1; no Trainer."""
    trained = trainable_parameters(model.train())
    lora = [p for name, p in trained.items() if "lora_" in name]
    matrices = [model.projector[0].weight, model.projector[2].weight]
    biases = [model.projector[0].bias, model.projector[2].bias]
    optimizer = torch.optim.AdamW(
        [
            {"params": lora, "lr": lr, "weight_decay": decay},
            {"params": matrices, "lr": projector_lr, "weight_decay": decay},
            {"params": biases, "lr": projector_lr, "weight_decay": 0.0},
        ]
    )
    base_rates = [group["lr"] for group in optimizer.param_groups]
    losses, norms = [], []
    for step, batch in zip(range(steps), batches, strict=True):
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * (1 - step / steps)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def test_losses_and_weights_are_those_of_a_plain_loop(tiny_bases, tmp_path):
    model, twin = (enliven_trained(new_model(tiny_bases), std=0.1) for _ in range(2))
    trainer = train(model, tmp_path, num_train_epochs=3, max_steps=-1, weight_decay=0.1)
    batches = trainer.data_collator.batches
    assert len(batches) == 12

    losses, norms = plain_loop(twin, batches, steps=12, lr=1e-3, projector_lr=5e-3, decay=0.1)

    assert losses[-1] < losses[0] - 0.5  # it learns something
    assert max(norms) > 1 > min(norms)  # the clip is at work, but not always
    assert logged(trainer) == pytest.approx(losses, rel=1e-6)
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-4)
    for name, parameter in trainable_parameters(twin).items():
        assert_close(trainable_parameters(model)[name], parameter, rtol=1e-4, atol=1e-6, msg=name)


def test_gradient_checkpointing_gives_the_same_losses(tiny_bases, tmp_path):
    runs = []
    for checkpointing in (False, True):
        model = enliven_trained(new_model(tiny_bases), std=0.1)
        runs.append(logged(train(model, tmp_path, gradient_checkpointing=checkpointing)))
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
    assert model.qwen.transformer.h[0].gradient_checkpointing


def test_bf16_trains_fp32_masters(tiny_bases, tmp_path):
    """At a small rate a bf16 master would not move: 1e-5 is less than half a step of a weight of 0.1."""
    model = enliven_trained(new_model(tiny_bases, dtype=torch.bfloat16), std=0.1)
    before = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
    train(model, tmp_path, bf16=True, learning_rate=1e-5, feature_proj_lr=1e-5, max_steps=1)
    for name, parameter in trainable_parameters(model).items():
        assert parameter.dtype == torch.float32
        assert (parameter != before[name]).float().mean() > 0.95, name


# What is logged


# Evaluating and saving


def evaluate(model, folder, samples, batch_size: int = 2) -> float:
    args = arguments(folder, per_device_eval_batch_size=batch_size)
    trainer = VLMTrainer(model=model, args=args, eval_dataset=Samples(samples), data_collator=collate_list)
    return trainer.evaluate()["eval_loss"]


def test_the_evaluation_loss_is_the_mean_over_supervised_tokens_and_nothing_changes(model, tmp_path):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        sums = [model.eval()(**collate(one), num_items_in_batch=1).loss for one in SAMPLES]
    tokens = sum(int((one["labels"][1:] != IGNORE_INDEX).sum()) for one in SAMPLES)
    expected = float(sum(sums)) / tokens
    for batch_size in (1, 2, 3, 8):
        assert evaluate(model, tmp_path, SAMPLES, batch_size) == pytest.approx(expected, rel=1e-6), batch_size
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_left_out_samples_do_not_change_the_evaluation_loss(model, tmp_path):
    left_out = {"input_ids": torch.tensor([PAD_ID]), "labels": torch.tensor([IGNORE_INDEX])}
    good = evaluate(model, tmp_path, SAMPLES[:4])
    mixed = [one for sample in SAMPLES[:4] for one in (left_out, sample)] + [left_out] * 4
    for batch_size in (1, 2, 8):
        assert evaluate(model, tmp_path, mixed, batch_size) == pytest.approx(good, rel=1e-6), batch_size
    assert math.isnan(evaluate(model, tmp_path, [left_out] * 3))  # a mean of nothing


def test_the_best_checkpoint_is_loaded_at_the_end(model, tmp_path):
    trainer = train(
        model,
        tmp_path,
        # So high a rate that it gets worse, after a first step that does nothing.
        learning_rate=2.0,
        feature_proj_lr=2.0,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=1,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        max_steps=3,
        save_total_limit=1,
        load_best_model_at_end=True,
    )
    losses = logged(trainer, "eval_loss")
    assert losses[0] < min(losses[1:])
    best = tmp_path / "checkpoint-1"
    assert trainer.state.best_model_checkpoint == str(best)
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    assert best.is_dir()  # though save_total_limit is 1 and it is not the newest
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-6)


# Settings


def test_several_gpus_in_one_process_are_not_split_over(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 4
    assert args.n_gpu == 1
    assert args.train_batch_size == args.per_device_train_batch_size
