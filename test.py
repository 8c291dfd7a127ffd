r"""Ask a trained vision-language model about an image.

    python test.py --model_weights weights/train_V1_5/checkpoint-10000 --image_path test_img/1.jpg \
        --prompt "使用语言描述一下图中出现了那些颜色<|extra_0|>"

The answer alone goes to stdout, everything else to stderr. `<|extra_0|>` in the prompt says where the image belongs;
a prompt without it gets it in front. With a folder as image path, every picture in it is asked about, one line each:
`name<TAB>answer`, line breaks written as \n. Without `--prompt`, a chat about the image, turn by turn.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import set_seed

from dataset import SYSTEM_PROMPT, load_image
from dataset.image_io import ImageError, pictures_in
from dataset.prompt import count_placeholders
from dataset.window import fit_prompt
from model import VisionLanguageModel
from model.console import OneLineErrors, in_one_line, one_line, set_up_logging, use_utf8
from model.device import parse_dtype, pick_device
from model.language_model import load_tokenizer
from model.memory import is_out_of_memory, out_of_memory
from qwen import IMAGE_TOKEN, QWenTokenizer
from qwen.chatml import DEFAULT_MAX_WINDOW_SIZE
from qwen.stream import answer_ids, complete_config, stream_ids

logger = logging.getLogger("test")

Turns = list[tuple[str, str]]


class Assistant:
    """A model, its tokenizer, and how it is to answer.

    Args:
        model: LoRA is merged into its base weights.
        tokenizer: QWen's tokenizer.
        system: the system prompt.
        options: generation settings that come before the model's own `generation_config.json`.
    """

    def __init__(
        self, model: VisionLanguageModel, tokenizer: QWenTokenizer, system: str, options: dict[str, Any]
    ) -> None:
        model.merge_lora()
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.system = system
        self.options = options
        self.max_window_size = int(
            getattr(complete_config(model.qwen, None), "max_window_size", DEFAULT_MAX_WINDOW_SIZE)
        )

    @torch.inference_mode()
    def features(self, images: Sequence[Image.Image]) -> torch.Tensor | None:
        """Run the vision tower over images; (images, tokens, width), or None if there are none."""
        if not images:
            return None
        transform = self.model.vision_tower.image_transform
        return self.model.encode_images(torch.stack([transform(image) for image in images]))

    def stream(self, prompt: str, features: torch.Tensor | None, history: Turns | None = None) -> Iterator[str]:
        """Answer; gives the growing text. Nothing is done before the first is asked for."""
        ids, kwargs = self._inputs(prompt, features, history)
        yield from stream_ids(self.model.qwen, self.tokenizer, ids, **kwargs)

    def answer(self, prompt: str, features: torch.Tensor | None, history: Turns | None = None) -> str:
        """Answer; gives the whole text."""
        ids, kwargs = self._inputs(prompt, features, history)
        return answer_ids(self.model.qwen, self.tokenizer, ids, **kwargs)

    def _inputs(
        self, prompt: str, features: torch.Tensor | None, history: Turns | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        ids = fit_prompt(
            self.tokenizer, prompt, self.model.num_image_tokens, history or [], self.system, self.max_window_size
        )
        kwargs = dict(self.options)
        if features is not None:
            kwargs["image_features"] = (features.flatten(0, 1),)
        return torch.tensor([ids]), kwargs


def with_placeholders(prompt: str, num_images: int) -> str:
    """The prompt, with a placeholder for every image in front if it has none at all.

    Raises:
        ValueError: if it has some, but not as many as there are images.
    """
    found = count_placeholders(prompt)
    if found == 0:
        return IMAGE_TOKEN * num_images + prompt
    if found != num_images:
        raise ValueError(
            f"the prompt has {found} placeholders {IMAGE_TOKEN}, --image_path gives {num_images} images; "
            "write one placeholder for each image, or none at all"
        )
    return prompt


def ask_once(assistant: Assistant, prompt: str, images: Sequence[Image.Image], stream: bool) -> None:
    """Print the answer to a prompt that has a placeholder for each of these images."""
    features = assistant.features(images)
    if stream:
        show(assistant.stream(prompt, features))
    else:
        print(assistant.answer(prompt, features))


def show(texts: Iterator[str], *, may_be_stopped: bool = False) -> str:
    """Print a growing text as it grows, and a line break at its end; returns what was printed.

    With `may_be_stopped`, Ctrl-C ends the text there, and nothing else.
    """
    shown = ""
    try:
        with contextlib.closing(texts):  # type: ignore[type-var]
            for text in texts:
                new, shown = text[len(shown) :], text
                print(new, end="", flush=True)
    except BaseException as error:
        if not (may_be_stopped and isinstance(error, KeyboardInterrupt)):
            if shown:
                print(flush=True)  # whatever comes next begins a line
            raise
        sys.stderr.write(" [stopped]")
        sys.stderr.flush()
    print(flush=True)
    return shown


def ask_about_each(assistant: Assistant, prompt: str, paths: Sequence[Path]) -> int:
    """Print `name<TAB>answer` for every picture; returns the number of pictures that can't be read."""
    failed = 0
    for path in paths:
        try:
            features = assistant.features([load_image(path)])
        except ImageError as error:
            logger.error("test.py: %s", error)
            failed += 1
            continue
        answer = assistant.answer(prompt, features)
        print(f"{one_line(path.name)}\t{one_line(answer)}", flush=True)
    return failed


def chat(assistant: Assistant, images: Sequence[Image.Image]) -> None:
    """Ask for questions on stdin until its end, `exit` or `quit`; answers see the turns before them.

    Ctrl-C ends an answer, whose beginning then counts as the answer; at the prompt it leaves.
    """
    features = assistant.features(images)
    history: Turns = []
    sys.stderr.write("Ask about the image; `exit` or the end of input leaves.\n")
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        sys.stderr.write(prompt)
        sys.stderr.flush()
        line = sys.stdin.readline()
        question = line.strip()
        if not line or question in ("exit", "quit"):
            return
        if not question:
            continue
        try:
            # The first question brings the images; a later one can't bring any, so there a placeholder is dropped.
            question = question.replace(IMAGE_TOKEN, "") if history else with_placeholders(question, len(images))
        except ValueError as error:
            logger.error("test.py: %s", error)
            continue
        try:
            answer = show(assistant.stream(question, features, history), may_be_stopped=True)
        except (ValueError, RuntimeError, MemoryError) as error:
            logger.error("test.py: %s", explain(error))
            continue
        if answer:  # stopped before its first word, a question was not asked
            history.append((question, answer))


def explain(error: Exception) -> str:
    """One line about an error, with advice where memory ran out.

    Raises:
        RuntimeError: the error itself, if it is one of this program's own.
    """
    if is_out_of_memory(error):
        return out_of_memory(
            error,
            "give fewer images and shorter questions, lower --max_new_tokens, load half the bytes with "
            "--dtype bfloat16, or use --device cpu",
        )
    if isinstance(error, (ValueError, OSError)):
        return in_one_line(error)
    raise error


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ValueError: for flags that do not exist or are not of their type.
    """
    parser = OneLineErrors(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model_weights", help="checkpoint folder, or a run folder (its newest complete checkpoint)")
    add("--base_language_model", help="hub name or folder; default: what the checkpoint was trained on")
    add("--base_value_model", help="hub name or folder of the vision tower; default: likewise")
    add("--image_path", nargs="+", default=[], metavar="PATH", help="a picture, several, or a folder of pictures")
    add("--prompt", help=f"the question; {IMAGE_TOKEN} stands for an image. Without it: a chat")
    add("--system", default=SYSTEM_PROMPT, help="system prompt (%(default)s)")
    add("--stream", action="store_true", help="print the answer while it is generated")
    add("--seed", type=int, default=42, help="of sampling (%(default)s)")
    add("--device", help="cpu, cuda, cuda:0, …; default: a GPU where there is one")
    add("--dtype", help="float32, bfloat16 or float16; default: bfloat16 on CUDA, float32 on CPU")
    generation = parser.add_argument_group(
        "generation", "What is not given is as the model's generation_config.json says."
    )
    add = generation.add_argument
    add("--max_new_tokens", type=int, help="length limit of an answer, in tokens")
    add("--temperature", type=float, help="above 0; lower is more certain")
    add("--top_p", type=float, help="sample from the likeliest tokens that make up this share, 0 to 1")
    add("--top_k", type=int, help="sample from the k likeliest tokens; 0: all")
    add("--repetition_penalty", type=float, help="above 1 makes repeating less likely")
    sampling = generation.add_mutually_exclusive_group()
    sampling.add_argument("--do_sample", action="store_true", default=None, help="sample")
    sampling.add_argument("--greedy", action="store_false", dest="do_sample", help="take the likeliest token each time")
    return parser.parse_args(argv)


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The generation settings that were given.

    Raises:
        ValueError: if one is out of its range.
    """
    for name, valid, wanted in (
        ("seed", lambda value: 0 <= value < 2**32, "at least 0 and below 2**32"),
        ("max_new_tokens", lambda value: value >= 1, "at least 1"),
        ("temperature", lambda value: value > 0, "above 0; for no randomness use --greedy"),
        ("top_p", lambda value: 0 < value <= 1, "above 0 and at most 1"),
        ("top_k", lambda value: value >= 0, "at least 0"),
        ("repetition_penalty", lambda value: value > 0, "above 0"),
    ):
        value = getattr(args, name)
        if value is not None and not valid(value):
            raise ValueError(f"--{name} {value}: must be {wanted}")
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "do_sample")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def load_assistant(args: argparse.Namespace) -> Assistant:
    """Load model and tokenizer.

    Raises:
        ValueError: for a checkpoint or a setting that does not fit.
        OSError: for files that are missing.
    """
    if args.model_weights is None:
        raise ValueError("--model_weights is missing: give a checkpoint folder, as train.py writes it")
    options = generation_options(args)
    device = pick_device(args.device)
    dtype = parse_dtype(args.dtype) if args.dtype else None
    model = VisionLanguageModel.from_pretrained(
        args.base_language_model, args.base_value_model, args.model_weights, dtype, device
    )
    return Assistant(model, load_tokenizer(model.base_language_model), args.system, options)


def run(args: argparse.Namespace) -> int:
    """Load, then answer; returns the exit status."""
    paths = [Path(path) for path in args.image_path]
    is_folder = len(paths) == 1 and paths[0].is_dir()
    if is_folder and args.prompt is None:
        raise ValueError("--image_path is a folder, so --prompt is needed; a chat is about one picture")
    # Pictures and prompt are looked at first: a mistake there should not cost the loading of the model.
    if is_folder:
        paths = pictures_in(paths[0])
    images = [] if is_folder else [load_image(path) for path in paths]
    prompt = args.prompt if args.prompt is None else with_placeholders(args.prompt, 1 if is_folder else len(images))
    assistant = load_assistant(args)
    set_seed(args.seed)
    if is_folder:
        return 2 if ask_about_each(assistant, prompt, paths) else 0
    if prompt is None:
        chat(assistant, images)
    else:
        ask_once(assistant, prompt, images, args.stream)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Answer; returns the exit status, 2 for what the user can mend."""
    use_utf8()
    set_up_logging()
    try:
        return run(parse_arguments(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        logger.error("test.py: %s", explain(error))
        return 1 if is_out_of_memory(error) else 2
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
