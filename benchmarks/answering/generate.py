"""Time to the first token, and tokens per second, next to transformers' LLaVA of the same size and weights.

    python -m benchmarks.answering.generate
    python -m benchmarks.answering.generate --dtypes float32 --batches 1 --rounds 3 --tokens 16

Peers run in turn, each in a process of its own, on the same prompts and pictures: an image, 20 to 41 words, and as many
greedy tokens as asked for. Prints a table of medians; writes generate.json and generate.png into the output folder.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..measure import DTYPES, itself, medians, parser, publish, run_in_turn, text_table

PEERS = ("ours", "llava")


def make_inputs(size: Any, batch: int, dtype: str) -> tuple[list[list[int]], Any]:
    """Return prompts of several lengths with an image in each, and the images' pixels (batch, 3, S, S)."""
    import torch

    from qwen import IMAGE_TOKEN_ID

    generator = torch.Generator().manual_seed(batch)
    prompts = []
    for row in range(batch):
        words = torch.randint(0, size.vocabulary - 1000, (20 + 3 * (row % 8),), generator=generator).tolist()
        prompts.append([*words[:5], *[IMAGE_TOKEN_ID] * size.num_image_tokens, *words[5:]])
    pixels = torch.randn(batch, 3, size.image_size, size.image_size, generator=generator)
    return prompts, pixels.to(getattr(torch, dtype))


def prepare(peer: str, size: Any, prompts: Sequence[Sequence[int]], pixels: Any) -> Callable[[int, Any], list[int]]:
    """Build a peer; returns a function from a number of tokens, and a call after each, to the first answer's ids."""
    import torch
    from transformers import GenerationConfig

    from qwen.answering import pad_left
    from qwen.batch_answering import generate_batch

    from ..peers import build_ours, build_peer, copy_weights

    ours = build_ours(size, pixels.dtype)
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if peer == "ours":

        def answer(number: int, after_each: Any) -> list[int]:
            features = list(ours.encode_images(pixels))
            config = GenerationConfig(max_new_tokens=number, **settings)
            return generate_batch(ours.qwen, prompts, features, config, stopping_criteria=[after_each])[0]

        return answer
    llava = build_peer(size, pixels.dtype)
    copy_weights(ours, llava)
    ids, mask = pad_left(prompts, torch.device("cpu"))

    def answer_llava(number: int, after_each: Any) -> list[int]:
        calls = {"max_new_tokens": number, "stopping_criteria": [after_each]}
        made = llava.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, **calls, **settings)
        return made[0, ids.shape[1] :].tolist()

    return answer_llava


def run_one(peer: str, args: argparse.Namespace, size: Any) -> dict[str, Any]:
    """Measure one peer in this process.

    Returns:
        `first` (seconds to the first token, images included), `rate` (tokens per second of all rows, after the first),
        `whole` (seconds for all of it), and the ids of the first answer.
    """
    import torch

    batch, tokens = args.batches[0], args.tokens
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    times: list[float] = []

    def after_each(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Note the time; a stopping criterion, which generation calls after each token, and which never stops it."""
        times.append(clock())
        return torch.zeros(len(ids), dtype=torch.bool)

    with torch.inference_mode():
        prompts, pixels = make_inputs(size, batch, args.dtypes[0])
        answer = prepare(peer, size, prompts, pixels)
        answer(2, after_each)  # what is set up once is not measured
        firsts, wholes = [], []
        for _ in range(args.repeats):
            times.clear()
            start = clock()
            ids = answer(tokens, after_each)
            firsts.append(times[0] - start)
            wholes.append(times[-1] - start)
    first, whole = min(firsts), min(wholes)
    steps = min(whole - first for whole, first in zip(wholes, firsts, strict=True))
    return {"first": first, "whole": whole, "rate": (tokens - 1) * batch / steps, "ids": ids}


def compare(args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Return medians by setting, peer and figure; prints on the way whether both give the same tokens in fp32."""
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for dtype in args.dtypes:
        for batch in args.batches:
            flags = ["--dtypes", dtype, "--batches", str(batch), "--tokens", str(args.tokens)]
            flags += ["--clock", args.clock, "--repeats", str(args.repeats)]
            tiny = ["--tiny"] if args.tiny else []
            commands = {peer: [*itself(__file__), "--one", peer, *flags, *tiny] for peer in PEERS}
            runs = run_in_turn(commands, args.rounds, args.threads)
            setting = f"{'fp32' if dtype == 'float32' else 'bf16'}, batch {batch}"
            figures[setting] = {peer: medians(done) for peer, done in runs.items()}
            if dtype == "float32":
                same = runs["ours"][0].values["ids"] == runs["llava"][0].values["ids"]
                print(f"{setting}: {'the same tokens' if same else 'OTHER TOKENS'} from both")
    return figures


def show(figures: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the table; ratios above 1 mean that ours is faster."""
    heads = ("", "first token, s", "LLaVA", "ratio", "tokens/s", "LLaVA", "ratio", "whole answer, s", "LLaVA", "ratio")
    rows = []
    for setting, by_peer in figures.items():
        ours, llava = by_peer["ours"], by_peer["llava"]
        row = [setting]
        for name, form in (("first", "{:.3f}"), ("rate", "{:.1f}"), ("whole", "{:.2f}")):
            ratio = ours[name] / llava[name] if name == "rate" else llava[name] / ours[name]
            row += [form.format(ours[name]), form.format(llava[name]), f"{ratio:.2f}x"]
        rows.append(row)
    return text_table(heads, rows)


def main() -> None:
    """Compare, or measure one."""
    parse = parser(__doc__, rounds=5, can_be_tiny=True)
    add = parse.add_argument
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="precisions (%(default)s)")
    add("--batches", nargs="+", type=int, default=[1, 8], help="questions at once (%(default)s)")
    add("--tokens", type=int, default=64, help="tokens of an answer (%(default)s)")
    add("--repeats", type=int, default=2, help="measurements in a process; the fastest counts (%(default)s)")
    clock = "cpu: processor time, on a shared machine (%(default)s)"
    add("--clock", choices=("wall", "cpu"), default="wall", help=clock)
    add("--one", choices=PEERS, help=argparse.SUPPRESS)
    args = parse.parse_args()
    if args.one:
        from ..peers import TINY, Size

        print(json.dumps(run_one(args.one, args, TINY if args.tiny else Size())))
        return
    figures = compare(args)
    print(show(figures))
    panels = {
        unit: {
            setting: {peer: values[name] for peer, values in by_peer.items()} for setting, by_peer in figures.items()
        }
        for unit, name in (("seconds to the first token", "first"), ("tokens per second", "rate"))
    }
    results = {"settings": vars(args) | {"output": None}, "medians": figures}
    publish(args.output, "generate", results, "Answering: ours and transformers' LLaVA", panels)


if __name__ == "__main__":
    main()
