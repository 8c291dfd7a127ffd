"""Make the demo's vision tower: a small CLIP, contrastively pretrained on captioned pictures of one shape.

    python -m benchmarks.easy_vqa.pretrain_clip --output demo_output/base_clip

Half of each batch are training pictures whose questions tell what they show, half are freshly drawn; no test picture is
used. Two things differ from CLIP's own recipe (Radford et al. 2021, https://arxiv.org/abs/2103.00020):

- Each picture has three true captions, "a blue circle", "a circle" and "a blue shape", contrasted with others of their
  kind. With the first alone colours are learnt in a minute, and shapes wait for them.
- The mean of the patch features is trained like the class token's. CLIP's last layer gives its patches no gradient, and
  it is they that the vision-language model reads.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from dataset import load_image
from model.device import pick_device

from .fitting import Schedule, fit, written_whole
from .questions import image_path, load_questions, scenes_told
from .shapes import COLORS, IMAGE_SIZE, SHAPES, Scene, draw_scene, random_scene

BATCH = 64  # pictures
SEED = 42
START, END = "<start>", "<end>"
PROJECTION = 64  # width of the space that pictures and captions meet in

CAPTION_KINDS: tuple[tuple[str, ...], ...] = (
    tuple(Scene(shape, color).caption for shape in SHAPES for color in COLORS),
    tuple(f"a {shape}" for shape in SHAPES),
    tuple(f"a {color} shape" for color in COLORS),
)
"""The captions of each kind; a picture has one true caption of every kind."""


def true_captions(scene: Scene) -> tuple[int, int, int]:
    """Return the position of a scene's true caption within each kind."""
    true = (scene.caption, f"a {scene.shape}", f"a {scene.color} shape")
    return tuple(captions.index(caption) for captions, caption in zip(CAPTION_KINDS, true, strict=True))  # type: ignore[return-value]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, those of the captions."""
    words = sorted({word for captions in CAPTION_KINDS for caption in captions for word in caption.split()})
    vocabulary = {word: number for number, word in enumerate([START, END, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single=f"{START} $A {END}", special_tokens=[(START, 0), (END, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END, model_max_length=8
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """Return a fresh CLIP: 64 patches of 8 pixels, 3 layers of width 96; one layer for the text."""
    config = CLIPConfig(
        vision_config={
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 384,
            "projection_dim": PROJECTION,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "projection_dim": PROJECTION,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        projection_dim=PROJECTION,
    )
    return CLIPModel(config)


def make_processor() -> CLIPImageProcessorPil:
    """Return a processor that gives pixels from -1 to 1, at the size that the model takes."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def pixels(image: Image.Image) -> Tensor:
    """Return an RGB picture as bytes (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class PictureSource:
    """Draws batches of pictures and the numbers of their true captions.

    Args:
        rng: decides everything that is drawn.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        told = scenes_told(load_questions("train"))
        self.scenes = list(told.values())
        self.images = torch.stack([pixels(load_image(image_path("train", image_id))) for image_id in told])

    def draw(self, size: int) -> tuple[Tensor, Tensor]:
        """Return training and drawn pictures, half each: pixels -1 to 1 (size, 3, H, W), captions (size, kinds)."""
        chosen = [self.rng.randrange(len(self.scenes)) for _ in range(size // 2)]
        drawn = [random_scene(self.rng) for _ in range(size - len(chosen))]
        fresh = torch.stack([pixels(draw_scene(scene, self.rng)) for scene in drawn])
        images = torch.cat([self.images[chosen], fresh]).float() / 127.5 - 1
        captions = [true_captions(scene) for scene in [*(self.scenes[number] for number in chosen), *drawn]]
        return images, torch.tensor(captions)


def image_embeddings(model: CLIPModel, pixel_values: Tensor) -> list[Tensor]:
    """Return unit vectors (N, projection) from the class token, like CLIP, and from the mean of the patch features."""
    states = model.vision_model(pixel_values=pixel_values).last_hidden_state
    pooled = (states[:, 0], states[:, 1:].mean(dim=1))
    projected = [model.visual_projection(model.vision_model.post_layernorm(state)) for state in pooled]
    return [functional.normalize(vectors.float(), dim=-1) for vectors in projected]


def contrastive_loss(similarity: Tensor, true: Tensor) -> Tensor:
    """Return CLIP's loss, both ways, where several pictures may share a caption.

    Args:
        similarity: (N pictures, C captions), scaled.
        true: (N,), the number of each picture's caption.
    """
    shared = functional.one_hot(true, similarity.shape[1]).to(similarity.dtype)
    present = shared.sum(dim=0) > 0
    pictures_of = (shared / shared.sum(dim=0).clamp(min=1)).T[present]  # for each caption, its pictures, equally likely
    by_picture = functional.cross_entropy(similarity, true)
    by_caption = functional.cross_entropy(similarity.T[present], pictures_of)
    return (by_picture + by_caption) / 2


def pretrain(schedule: Schedule) -> tuple[CLIPModel, PreTrainedTokenizerFast]:
    """Train from a fixed seed; the model is returned on the CPU."""
    torch.manual_seed(SEED)
    device = pick_device()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    model.set_attn_implementation("eager")  # for so few patches on a CPU, in bf16, twice as fast as SDPA
    model.to(device)  # type: ignore[arg-type]
    source = PictureSource(random.Random(SEED))
    texts = [
        tokenizer(list(captions), return_tensors="pt", padding=True)["input_ids"].to(device)
        for captions in CAPTION_KINDS
    ]

    def loss_of_batch() -> Tensor:
        images, true = (tensor.to(device) for tensor in source.draw(BATCH))
        embeddings = image_embeddings(model, images)
        scale = model.logit_scale.exp()
        losses = []
        for kind, text in enumerate(texts):
            captions = functional.normalize(model.get_text_features(input_ids=text).pooler_output.float(), dim=-1)
            losses += [contrastive_loss(scale * vectors @ captions.T, true[:, kind]) for vectors in embeddings]
        return torch.stack(losses).sum()

    fit(model, loss_of_batch, schedule, "CLIP")
    return model.cpu(), tokenizer


def main() -> None:
    """Pretrain and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps (%(default)s)")
    args = parser.parse_args()
    model, tokenizer = pretrain(Schedule(args.steps, 1e-3))
    with written_whole(args.output) as folder:
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        make_processor().save_pretrained(str(folder))


if __name__ == "__main__":
    main()
