"""Tiny LLaVA folders made by transformers, for the tests of `--from_llava`."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tiny_towers import pixels
from tiny_vlm import new_model
from transformers import CLIPModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipModel

from model import VisionLanguageModel
from model.export.from_llava import start_from_llava

BLOCKS = 3
"""Of the towers that the folders are made with."""
WIDTH = 16
"""Of the tiny QWen's embedding."""


def write_llava(
    folder: Path, tower: str, blocks: int = BLOCKS, width: int = WIDTH, **changes
) -> LlavaForConditionalGeneration:
    """A LLaVA of transformers over the first blocks of a tower, saved as transformers saves it."""
    whole = (CLIPModel if "clip" in Path(tower).name else SiglipModel).from_pretrained(tower)
    vision = whole.config.vision_config
    vision.num_hidden_layers = blocks
    if not isinstance(whole, CLIPModel):
        vision.vision_use_head = False
    text = LlamaConfig(
        vocab_size=50, hidden_size=width, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    strategy = "default" if isinstance(whole, CLIPModel) else "full"
    settings = {"vision_feature_layer": -2, "vision_feature_select_strategy": strategy, **changes}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **settings)).eval()
    weights = whole.vision_model.state_dict()
    own = model.model.vision_tower.state_dict()
    model.model.vision_tower.load_state_dict({name: weights[name.removeprefix("vision_model.")] for name in own})
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    shutil.copy(Path(tower) / "preprocessor_config.json", folder)
    return model


def start(language: str, tower: str, folder: Path) -> VisionLanguageModel:
    """A model over these bases that starts from a LLaVA folder."""
    model = new_model((language, tower))
    start_from_llava(model, str(folder))
    return model.eval()


@torch.no_grad()
def assert_same_features(ours: VisionLanguageModel, theirs: LlavaForConditionalGeneration) -> None:
    """The features that the language models get are those of transformers."""
    images = pixels()
    expected = torch.stack(list(theirs.model.get_image_features(images).pooler_output))
    assert torch.allclose(ours.encode_images(images), expected, atol=1e-5)
    assert expected.std() > 0.1
