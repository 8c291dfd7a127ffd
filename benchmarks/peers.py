"""Our model and transformers' LLaVA, of one size and over the same random weights.

LLaVA is built as a user of transformers would build it: a CLIP tower, a projector of two layers, and Qwen2, which has
QWen's layers with the projection of queries, keys and values in three pieces. Ours has a QWen, or the same Qwen2.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from model import VisionLanguageModel, build_projector
from qwen import IMAGE_TOKEN_ID, MultimodalQWenLMHeadModel, QWenConfig
from visual import build_vision_tower

from .inputs import SEED
from .random_weights import clip_config, qwen_config, write_tower
from .vocabulary import vocabulary_file


@dataclass(frozen=True)
class Size:
    """Sizes of tower and language model; the defaults are those of the large vocabulary."""

    layers: int = 8
    """Blocks of the language model."""
    width: int = 512
    """Channels of the language model."""
    inner: int = 1376
    """Channels inside its MLP, in Qwen-7B's proportion to its width."""
    heads: int = 8
    """Heads of the language model."""
    vocabulary: int = 151_936
    """Rows of embedding and language head."""
    tower_layers: int = 6
    """Blocks of the tower."""
    tower_width: int = 384
    """Channels of the tower."""
    image_size: int = 224
    """Pixels."""
    patch_size: int = 14
    """Pixels."""

    @property
    def num_image_tokens(self) -> int:
        """Features of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def qwen(self) -> QWenConfig:
        """The language model's configuration."""
        return qwen_config(self.layers, self.width, self.heads, self.inner, self.vocabulary)

    @property
    def clip(self) -> CLIPVisionConfig:
        """The tower's configuration."""
        width = self.tower_width
        return clip_config(self.tower_layers, width, 4 * width, self.image_size, self.patch_size)


SIZES = {
    # Qwen's vocabulary over 8 layers of width 512: three quarters of all that multiplies is the language head.
    "large-vocabulary": Size(),
    # The same layers, the head as large a share (8.8%) as in Qwen-7B: rows = 151,936 · (8 · 512) / (32 · 4096).
    "proportional": Size(vocabulary=4748),
    # Twice as wide, with the same share.
    "wide": Size(width=1024, inner=2752, vocabulary=9496),
}
"""Where the vocabulary is smaller than Qwen's, `small_vocabulary.py` maps token ids onto the rows that there are."""
TINY = Size(1, 16, 32, 2, 152_000, 1, 64, 28, 14)
"""A model of no size, for trying a benchmark."""


def build_ours(size: Size, dtype: torch.dtype) -> VisionLanguageModel:
    """Our model with random weights, as it is once its LoRA is merged."""
    with tempfile.TemporaryDirectory() as folder:
        write_tower(Path(folder), size.clip, dtype)
        tower = build_vision_tower(folder, dtype)
    torch.manual_seed(SEED)
    qwen = MultimodalQWenLMHeadModel(size.qwen).to(dtype)
    projector = build_projector(tower.hidden_size, size.width)
    model = VisionLanguageModel(tower, projector, qwen, "", {}).requires_grad_(False)
    return model.eval()


def build_peer(size: Size, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """LLaVA of the same size with random weights of its own."""
    torch.manual_seed(SEED)
    return LlavaForConditionalGeneration(llava_config(size)).to(dtype).requires_grad_(False).eval()


def llava_config(size: Size) -> LlavaConfig:
    """LLaVA's configuration."""
    text = Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=size.clip,
        text_config=text,
        image_token_index=IMAGE_TOKEN_ID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=size.num_image_tokens,
        tie_word_embeddings=False,
    )


@torch.no_grad()
def copy_weights(ours: VisionLanguageModel, peer: LlavaForConditionalGeneration) -> None:
    """Give the peer our model's weights, so that both have to give the same answers."""
    peer.model.vision_tower.load_state_dict(ours.vision_tower.model.state_dict())
    for theirs, mine in (
        (peer.model.multi_modal_projector.linear_1, 0),
        (peer.model.multi_modal_projector.linear_2, 2),
    ):
        theirs.load_state_dict(ours.projector[mine].state_dict())
    text, qwen = peer.model.language_model, ours.qwen.transformer
    text.embed_tokens.weight.copy_(qwen.wte.weight)
    text.norm.weight.copy_(qwen.ln_f.weight)
    peer.lm_head.weight.copy_(ours.qwen.lm_head.weight)
    for theirs, block in zip(text.layers, qwen.h, strict=True):
        parts: tuple[nn.Linear, ...] = (theirs.self_attn.q_proj, theirs.self_attn.k_proj, theirs.self_attn.v_proj)
        for part, weight, bias in zip(
            parts, block.attn.c_attn.weight.chunk(3), block.attn.c_attn.bias.chunk(3), strict=True
        ):
            part.weight.copy_(weight)
            part.bias.copy_(bias)
        theirs.self_attn.o_proj.weight.copy_(block.attn.c_proj.weight)
        theirs.mlp.up_proj.weight.copy_(block.mlp.w1.weight)
        theirs.mlp.gate_proj.weight.copy_(block.mlp.w2.weight)
        theirs.mlp.down_proj.weight.copy_(block.mlp.c_proj.weight)
        theirs.input_layernorm.weight.copy_(block.ln_1.weight)
        theirs.post_attention_layernorm.weight.copy_(block.ln_2.weight)


def write_ours(folder: Path, size: Size) -> VisionLanguageModel:
    """Write random weights as QWen, CLIP and projector; returns the model that they are of."""
    ours = build_ours(size, torch.float32)
    ours.qwen.save_pretrained(str(folder / "qwen"))
    shutil.copy(vocabulary_file(), folder / "qwen")
    write_tower(folder / "clip", size.clip, torch.float32)
    save_file(ours.projector.state_dict(), folder / "projector.safetensors")
    return ours


def write_both(folder: Path, size: Size) -> None:
    """Write one set of random weights in our format, as LLaVA's, and LLaVA's language model as a Qwen2 of its own."""
    ours, peer = write_ours(folder, size), build_peer(size, torch.float32)
    copy_weights(ours, peer)
    peer.save_pretrained(str(folder / "llava"))
    qwen2 = Qwen2ForCausalLM(peer.config.text_config)
    qwen2.model, qwen2.lm_head = peer.model.language_model, peer.lm_head
    qwen2.save_pretrained(str(folder / "qwen2"))


def small_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a tokenizer of at most 4,700 tokens on texts; its chat template writes QWen's prompt."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = {"vocab_size": 4700, "min_frequency": 1, "initial_alphabet": alphabet, "show_progress": False}
    around = "\nsystem\nYou are a helpful assistant.\nuser\nassistant\n"
    tokenizer.train_from_iterator([around, *texts], trainers.BpeTrainer(special_tokens=control, **settings))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=control[2], pad_token=control[0])
    fast.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return fast
