"""Make the demo's language model: a small QWen over the real vocabulary, pretrained on text alone.

    python -m benchmarks.easy_vqa.pretrain_qwen --output demo_output/base_qwen

It learns the training questions about scenes told in words (see texts.py). Only about a hundred of the vocabulary's
151,936 tokens ever occur, so it is trained over those, plus one row that stands for each of the others alike; that is
exactly the full vocabulary's softmax with equal rows. Then both tables are spread out to full size and saved in the
format of the published checkpoints.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig

from dataset.prompt import encode_sample
from model.device import pick_device
from qwen import IGNORE_INDEX, QWenConfig, QWenLMHeadModel, QWenTokenizer

from ..vocabulary import vocabulary_file
from .fitting import Schedule, fit, written_whole
from .questions import KINDS, Question, load_questions, scenes_told
from .shapes import COLORS, SHAPES, Scene, random_scene
from .texts import Turn, captioning, conversation

VOCAB_SIZE = 151936
HIDDEN, LAYERS, HEADS, MLP_WIDTH = 128, 4, 4, 256
CONTEXT = 1024  # tokens
BATCHES = ((64, 1), (64, 1), (64, 1), (32, 4))  # conversations and turns of each, equally likely
CAPTION_SHARE = 0.1
SHARE_PRESENT = 1 / 3  # of the yes/no questions, those that ask for what is there
SEED = 42


class TextSource:
    """Draws conversations about scenes told in words.

    Every kind of question is drawn equally often, and of yes and no the rarer answer once in three times. In the data
    "is there a red shape?" is answered with yes once in eight times, and a model that always says no is content there.

    Args:
        questions: the training split's; those about pictures that show the same scene are put together.
        rng: decides everything that is drawn.
    """

    def __init__(self, questions: list[Question], rng: random.Random) -> None:
        self.rng = rng
        scenes = scenes_told(questions)
        self.by_kind: dict[Scene, dict[str, list[Question]]] = {}
        for question in questions:
            if question.image_id in scenes:
                kinds = self.by_kind.setdefault(scenes[question.image_id], {})
                kinds.setdefault(_kind_and_answer(question), []).append(question)
        self.scenes = list(self.by_kind)

    def draw_batch(self) -> list[list[Turn]]:
        """Return conversations of one length, so that little is padding: many short ones, or some long ones."""
        size, num_turns = self.rng.choice(BATCHES)
        return [self.draw(num_turns) for _ in range(size)]

    def draw(self, num_turns: int = 1) -> list[Turn]:
        """Return questions about one scene, or a scene to be told in Chinese."""
        rng = self.rng
        if rng.random() < CAPTION_SHARE:
            return captioning(random_scene(rng), rng)
        scene = rng.choice(self.scenes)
        return conversation(scene, [self._question(scene) for _ in range(num_turns)], rng)

    def _question(self, scene: Scene) -> Question:
        kind = self.rng.choice(KINDS)
        if not kind.startswith("what"):
            is_present = self.rng.random() < SHARE_PRESENT
            kind += " yes" if is_present != kind.startswith("no") else " no"
        return self.rng.choice(self.by_kind[scene][kind])


def _kind_and_answer(question: Question) -> str:
    return question.kind if question.kind.startswith("what") else f"{question.kind} {question.answer}"


def occurring_ids(tokenizer: QWenTokenizer, questions: list[Question]) -> list[int]:
    """Return all token ids that conversations of a `TextSource` can hold, ascending."""
    found: set[int] = set()
    for text in {question.text for question in questions}:
        found.update(encode_sample(tokenizer, [(text, "yes"), (text, "no")], 1).input_ids)
    rng = random.Random(SEED)
    for scene in [Scene(shape, color) for shape in SHAPES for color in COLORS]:
        turns = [turn for _ in range(100) for turn in (captioning(scene, rng), [(scene.color, scene.shape)])]
        for conversation_turns in turns:
            found.update(encode_sample(tokenizer, conversation_turns, 1).input_ids)
        words = [Question(scene.shape, scene.color, 0)]
        for _ in range(100):
            found.update(encode_sample(tokenizer, conversation(scene, words, rng), 1).input_ids)
    return sorted(found)


def config_of(vocab_size: int) -> QWenConfig:
    """Return the configuration of the demo's QWen with a vocabulary of this size."""
    return QWenConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        kv_channels=HIDDEN // HEADS,
        intermediate_size=2 * MLP_WIDTH,
        seq_length=CONTEXT,
        max_position_embeddings=CONTEXT,
        initializer_range=0.08,  # about 1 / √HIDDEN: narrow as it is, attention would else begin all but uniform
    )


class SmallVocabulary:
    """The model over the ids that occur and one more row, `other`, for each of the rest.

    Args:
        ids: those that occur, ascending.
    """

    def __init__(self, ids: list[int], device: torch.device) -> None:
        self.ids = ids
        self.row_of = {token: row for row, token in enumerate(ids)}
        self.other = len(ids)
        self.model = QWenLMHeadModel(config_of(len(ids) + 1))
        self.model.to(device)  # type: ignore[arg-type]
        # A sum over n equal rows in the softmax is one row's share times n: log n is added to its logit.
        self.bias = torch.zeros(len(ids) + 1, device=device)
        self.bias[self.other] = math.log(VOCAB_SIZE - len(ids))

    def batch(self, tokenizer: QWenTokenizer, conversations: list[list[Turn]]) -> tuple[Tensor, Tensor]:
        """Return rows of this vocabulary and labels, both (conversations, longest), padded on the right."""
        samples = [encode_sample(tokenizer, turns, 1) for turns in conversations]
        longest = max(len(sample.input_ids) for sample in samples)
        ids = torch.full((len(samples), longest), self.row_of[tokenizer.eod_id])
        labels = torch.full((len(samples), longest), IGNORE_INDEX)
        for row, sample in enumerate(samples):
            rows = [self.row_of[token] for token in sample.input_ids]
            ids[row, : len(rows)] = torch.tensor(rows)
            supervised = torch.tensor([label != IGNORE_INDEX for label in sample.labels])
            labels[row, : len(rows)] = torch.where(supervised, ids[row, : len(rows)], IGNORE_INDEX)
        return ids.to(self.bias.device), labels.to(self.bias.device)

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy of the next token where labels are, over the full vocabulary."""
        hidden = self.model.transformer(input_ids=ids).last_hidden_state[:, :-1]
        supervised = labels[:, 1:] != IGNORE_INDEX
        logits = self.model.lm_head(hidden[supervised]).float() + self.bias
        return functional.cross_entropy(logits, labels[:, 1:][supervised])

    @torch.no_grad()
    def full_size(self) -> QWenLMHeadModel:
        """Return the same model over the full vocabulary."""
        full = QWenLMHeadModel(config_of(VOCAB_SIZE))
        small = {name: weight.cpu() for name, weight in self.model.state_dict().items()}
        wte, head = small.pop("transformer.wte.weight"), small.pop("lm_head.weight")
        full.load_state_dict(small, strict=False)
        full.transformer.wte.weight[self.ids] = wte[: self.other]
        full.lm_head.weight.copy_(head[self.other].expand(VOCAB_SIZE, -1))
        full.lm_head.weight[self.ids] = head[: self.other]
        return full.eval()


def pretrain(tokenizer: QWenTokenizer, schedule: Schedule) -> QWenLMHeadModel:
    """Train from a fixed seed; the result has the full vocabulary and is on the CPU."""
    torch.manual_seed(SEED)
    questions = load_questions("train")
    source = TextSource(questions, random.Random(SEED))
    small = SmallVocabulary(occurring_ids(tokenizer, questions), pick_device())
    print(f"{len(small.ids)} of the vocabulary's {VOCAB_SIZE:,} tokens occur in the text")

    def loss_of_batch() -> Tensor:
        return small.loss(*small.batch(tokenizer, source.draw_batch()))

    fit(small.model, loss_of_batch, schedule, "QWen, text only")
    return small.full_size()


def save(model: QWenLMHeadModel, tokenizer: QWenTokenizer, folder: Path) -> None:
    """Write model and tokenizer as the published chat checkpoints are, except that answers are greedy."""
    model.generation_config = GenerationConfig(
        chat_format="chatml",
        eos_token_id=tokenizer.eod_id,
        pad_token_id=tokenizer.eod_id,
        max_window_size=CONTEXT,
        max_new_tokens=64,
        do_sample=False,
    )
    with written_whole(folder) as temporary:
        model.save_pretrained(str(temporary))
        tokenizer.save_pretrained(str(temporary))


def main() -> None:
    """Pretrain and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps (%(default)s)")
    args = parser.parse_args()
    tokenizer = QWenTokenizer(str(vocabulary_file()))
    save(pretrain(tokenizer, Schedule(args.steps, 2e-3)), tokenizer, args.output)


if __name__ == "__main__":
    main()
