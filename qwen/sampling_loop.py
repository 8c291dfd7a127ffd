"""The loop of transformers_stream_generator behind `chat_stream`'s sampling, in the form of `answering.decode`.

The library (0.0.5) was written for transformers 4.2x and patches the model there. Here its loop alone is used, on an
object that plays the model for it. Everything around the loop is done by today's `generate`, whose tokens it draws.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import utils as generation_utils


def library_decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    limits: Sequence[int],
    generators: Sequence[torch.Generator | None],
    **inputs: Any,
) -> Iterator[dict[int, int]]:
    """Sample the tokens of one row as `decode` does; its limit is among the stopping criteria.

    The library's `generate` is left out, as it reseeds the global generators and knows an older transformers only.
    """
    with _names_that_transformers_dropped():
        from transformers_stream_generator.main import NewGenerationMixin
    criteria = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
    for token in NewGenerationMixin.sample_stream(_LoopModel(model), input_ids, **criteria, **inputs):  # (1,)
        yield {0: int(token)}


class _LoopModel:
    """Plays the model (`self`) for the library's loop, which was written for an older transformers."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config
        # Without stop ids: the stopping criteria know them, and the loop multiplies tokens if there are several.
        self.generation_config = GenerationConfig()
        self.is_prompt = True

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Tell the model what is new: all that the cache does not hold at first, then one token at a time."""
        is_prompt, self.is_prompt = self.is_prompt, False
        num_new = input_ids.shape[1] - kwargs["past_key_values"].get_seq_length() if is_prompt else 1
        return self.model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=num_new, is_first_iteration=is_prompt, **kwargs
        )

    def __call__(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        output.logits = output.logits.float()  # in which `generate` samples too
        return output

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.model._update_model_kwargs_for_generation(*args, **kwargs)


@contextlib.contextmanager
def _names_that_transformers_dropped() -> Iterator[None]:
    """Supply, while it is imported, what the library imports and sampling one row never uses."""
    # Looked up now: transformers may replace its own module object when it imports a part of itself.
    transformers = sys.modules["transformers"]
    wanted = [(transformers, name) for name in ("BeamSearchScorer", "ConstrainedBeamSearchScorer")]
    wanted += [(transformers, name) for name in ("DisjunctiveConstraint", "PhrasalConstraint")]
    wanted += [(generation_utils, name) for name in ("SampleOutput", "GenerateOutput")]
    missing = [(module, name) for module, name in wanted if not hasattr(module, name)]
    for module, name in missing:
        setattr(module, name, type(name, (), {}))
    try:
        yield
    finally:
        for module, name in missing:
            delattr(module, name)
