"""Compare two GGUF files with our own model: llama.cpp's server is asked over HTTP, as by those it will serve.

The server is the one in the package xllamacpp. It runs as a process of its own, on a free port of this machine alone,
and computes with caches in fp32. llama.cpp looks GELU up in a table of half precision, so the two differ more than two
programs in fp32 do.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import itertools
import json
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dataset.prompt import Tokenizer

from ..checkpoints.base_models import load_tokenizer
from .gguf_files import gguf_names
from .sources import Sources
from .verify import GREEDY, Answer, Comparison, ExportMismatchError, our_answers, sample_picture

TOLERANCES = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of log-probabilities, as a share of the largest logit, by the dtype of the matrices: llama.cpp
rounds what it multiplies by them to the same."""
_NUM_COMPARED = 20
"""Most likely tokens whose log-probabilities are compared at each position."""
_SERVER = """
import sys
import xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.mmproj.path, settings.n_ctx, settings.cpuparams.n_threads = (
    sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
)
settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
settings.warmup = settings.fit_params = settings.ui = False
server = xllamacpp.Server(settings)
print(server.listening_address, flush=True)
sys.stdin.read()  # until whoever asks is done, or gone
"""


@dataclass(frozen=True)
class ServerAnswer:
    """The prompt as the server read it, and its answer."""

    prompt: list[int]  # T ids, image tokens included
    num_prompt_tokens: int  # as the server counts them
    tokens: list[int]
    likeliest: list[dict[int, float]]  # log-probabilities by token, for each position


def verify_gguf(sources: Sources, folder: Path, by_block: bool = False) -> list[Comparison] | str:
    """Ask llama.cpp and our own model the same questions, with a picture and without one, and compare.

    Returns:
        One entry per question; or, where xllamacpp is not installed, the reason why nothing was compared.

    Raises:
        ExportMismatchError: if llama.cpp can't read the files, or prompts, answers or log-probabilities differ.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        return "llama.cpp's server is not installed: pip install xllamacpp"
    tokenizer = load_tokenizer(sources.language_name)
    forbidden = parts_of_characters(tokenizer, sources.language.vocab_size)
    pictures = [sample_picture(sources.tower.image_size), None]
    expected = our_answers(sources, pictures, forbidden, by_block)
    length = max(answer.inputs["input_ids"].shape[1] for answer in expected) + GREEDY["max_new_tokens"]
    compared, image = [], [tokenizer.image_token_id] * sources.tower.num_image_tokens
    text, mmproj = gguf_names(sources)
    with serving(folder / text, folder / mmproj, length) as server:
        for ours in expected:
            messages = _messages(ours.question, pictures[0] if ours.has_image else None)
            compared.append(_compare(ours, _ask(server, messages, image, forbidden), sources.dtype))
    return compared


# ---- The server


class Server:
    """A running server.

    Args:
        address: http://HOST:PORT.
        log: what it says about itself.
    """

    def __init__(self, address: str, log: Path) -> None:
        self.address, self.log = address, log
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy on the way to itself

    def post(self, path: str, **values: Any) -> Any:
        """Send a request; return the answer.

        Raises:
            ExportMismatchError: if there is none.
        """
        request = urllib.request.Request(
            self.address + path, json.dumps(values).encode(), {"Content-Type": "application/json"}
        )
        try:
            with self.opener.open(request) as reply:
                return json.load(reply)
        except OSError as error:
            raise ExportMismatchError(f"llama.cpp does not answer ({error}){_last_words(self.log)}") from error


@contextlib.contextmanager
def serving(text: Path, mmproj: Path, length: int) -> Iterator[Server]:
    """Run a server while the block runs; should this process be killed, the server ends, too.

    Args:
        text: GGUF file of the language model.
        mmproj: GGUF file of tower and projector.
        length: the longest conversation, in tokens.

    Raises:
        ExportMismatchError: if it can't load the files.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        words = [str(text), str(mmproj), str(length), str(torch.get_num_threads())]
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", _SERVER, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        assert process.stdout is not None
        try:
            address = next((line.strip() for line in process.stdout if line.startswith("http")), None)
            if address is None:
                raise ExportMismatchError(f"llama.cpp can't load the files{_last_words(log)}")
            yield Server(address, log)
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
                process.communicate(timeout=20)  # closes its input
            process.kill()
            process.wait()


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f": {lines[-1][-200:]}" if lines else ""


# ---- Asking and comparing


def parts_of_characters(tokenizer: Tokenizer, num_rows: int) -> list[int]:
    """Return the ids of tokens that hold a part of a character: for these, the server gives no log-probabilities."""
    return [index for index in range(num_rows) if "\ufffd" in tokenizer.decode([index])]


def _messages(question: str, image: Image.Image | None) -> list[dict[str, Any]]:
    if image is None:
        return [{"role": "user", "content": question}]
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def _ask(server: Server, messages: list[dict[str, Any]], image: list[int], forbidden: list[int]) -> ServerAnswer:
    """Ask for a greedy answer.

    Args:
        server: a running one.
        messages: as OpenAI's interface has them.
        image: the ids that stand for a picture in our own prompts.
        forbidden: ids that the answer does without; their log-probabilities are the model's all the same.
    """
    text = server.post("/apply-template", messages=messages)["prompt"]
    prompt: list[int] = []
    for position, part in enumerate(re.split(r"<__media\w*__>", text)):
        prompt += image if position else []
        prompt += server.post("/tokenize", content=part, parse_special=True, add_special=False)["tokens"]
    settings = {"temperature": 0, "repeat_penalty": 1, "max_tokens": GREEDY["max_new_tokens"]}
    settings["logit_bias"] = [[index, False] for index in forbidden]
    reply = server.post(
        "/v1/chat/completions", messages=messages, logprobs=True, top_logprobs=_NUM_COMPARED, **settings
    )
    said = reply["choices"][0]["logprobs"]["content"]
    return ServerAnswer(
        prompt=prompt,
        num_prompt_tokens=reply["usage"]["prompt_tokens"],
        tokens=[token["id"] for token in said],
        likeliest=[{one["id"]: one["logprob"] for one in token["top_logprobs"]} for token in said],
    )


def _compare(ours: Answer, theirs: ServerAnswer, dtype: torch.dtype) -> Comparison:
    """Compare up to the first token that differs, which has to be one that our model finds as likely as its own."""
    where = f"{ours.question!r} {'with' if ours.has_image else 'without'} a picture"
    prompt = ours.inputs["input_ids"][0].tolist()
    if theirs.prompt != prompt or theirs.num_prompt_tokens != len(prompt):
        raise ExportMismatchError(
            f"{where}: llama.cpp reads the prompt as {theirs.num_prompt_tokens} tokens, {theirs.prompt[:8]} and so on; "
            f"expected {len(prompt)} tokens, {prompt[:8]} and so on"
        )
    logprobs = ours.logits.log_softmax(-1)  # (tokens + 1, V)
    pairs = zip(ours.tokens, theirs.tokens, strict=False)
    num_equal = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    seen = list(zip(logprobs, theirs.likeliest[: num_equal + 1], strict=False))
    difference = max(abs(float(row[token]) - value) for row, found in seen for token, value in found.items())
    largest = float(ours.logits.abs().max())
    tolerance, lost = TOLERANCES[dtype] * largest, 0.0
    if num_equal < len(theirs.tokens):
        row = logprobs[num_equal]
        lost = float(row.max() - row[theirs.tokens[num_equal]])
    is_cut = num_equal == len(theirs.tokens) < len(ours.tokens) - 1  # the end token itself may be left out
    if not difference <= tolerance or lost > tolerance or is_cut:
        raise ExportMismatchError(
            f"{where}: {num_equal} of {len(ours.tokens)} greedy tokens are equal, and log-probabilities differ by up "
            f"to {difference:.2g}; expected all tokens (or as likely ones), and at most {tolerance:.2g}"
        )
    return Comparison(ours.question, ours.has_image, len(prompt), num_equal, len(ours.tokens), difference, largest)
