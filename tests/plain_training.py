"""Training as a loop of our own: transformers' class, stock PEFT, image features put in by hand, and all logits."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qwen import IGNORE_INDEX


def plain_losses(trainer: Any, language_name: str, steps: int, rate: float = 1e-2) -> list[float]:
    """Train the trainer's model, not yet trained, on its batches; the rate falls linearly to 0 over the whole run."""
    ours = trainer.model
    base = AutoModelForCausalLM.from_pretrained(language_name, dtype=torch.float32)
    lora = ours.language_model.peft_config["default"]
    settings = {"r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": list(lora.target_modules)}
    stock = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    stock.load_state_dict(ours.language_model.state_dict())
    projector = copy.deepcopy(ours.projector)
    trained = [*(p for p in stock.parameters() if p.requires_grad), *projector.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    batches = trainer.get_train_dataloader()
    whole = trainer.args.max_steps if trainer.args.max_steps > 0 else len(batches) * int(trainer.args.num_train_epochs)
    table, found = base.get_input_embeddings(), []
    for step, batch in zip(range(steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / whole)
        is_image = batch["input_ids"] == base.config.vocab_size
        embeds = table(batch["input_ids"].masked_fill(is_image, 0)).clone()
        if "pixel_values" in batch:
            features = projector(ours.vision_tower(batch["pixel_values"]))
            embeds[is_image] = features.flatten(0, 1)
        logits = stock(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE_INDEX
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        found.append(loss.item())
    return found
