"""Sampling token by token, with the loop of transformers_stream_generator.

The library (0.0.5) was written for transformers 4.2x and patches the model there. Here its loop alone is used, on an
object that plays the model for it; everything around the loop is done by today's `generate`, whose tokens it draws.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import utils as generation_utils


def sampled_tokens(
    model: Any, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> Iterator[int]:
    """Draw the tokens that `generate` draws under the same seed, one at a time, as they are asked for.

    Args:
        model: a model with `generate`, or one wrapped by PEFT.
        input_ids: (1, T).
        config: complete settings, one answer without beams.
        model_kwargs: what else `generate` takes.

    Yields:
        Token ids, a stop token included.
    """
    # `generate` prepares masks, cache, logits processors and stopping criteria, and leaves the loop to the callable.
    tokens = model.generate(
        input_ids=input_ids, generation_config=config, custom_generate=_run_sampling_loop, **model_kwargs
    )
    for token in tokens:
        yield int(token)


def _run_sampling_loop(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Iterator[Tensor]:
    """Draw token after token (1,), as a decoding method that `generate` calls.

    The library's `generate` is left out, as it reseeds the global generators and knows an older transformers only.
    """
    loop = _library_sampling_loop()
    return loop(
        _LoopModel(model),
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        **model_kwargs,
    )


class _LoopModel:
    """Plays the model (`self`) for the library's loop, which was written for an older transformers."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config
        # Without stop ids: the stopping criteria know them, and the loop multiplies tokens if there are several.
        self.generation_config = GenerationConfig()
        self.is_prefill = True

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Tell the model what is new: all that the cache does not hold at first, then one token at a time."""
        is_prefill, self.is_prefill = self.is_prefill, False
        cache = kwargs.get("past_key_values")
        num_new = None
        if cache is not None and kwargs.get("use_cache", True):
            num_new = input_ids.shape[1] - cache.get_seq_length() if is_prefill else 1
        return self.model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=num_new, is_first_iteration=is_prefill, **kwargs
        )

    def __call__(self, **inputs: Any) -> Any:
        """Run the model; logits come in fp32, in which `generate` samples too."""
        output = self.model(**inputs)
        output.logits = output.logits.float()
        return output

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.model._update_model_kwargs_for_generation(*args, **kwargs)


@functools.cache
def _library_sampling_loop() -> Callable[..., Iterator[Tensor]]:
    with _names_that_transformers_dropped():
        from transformers_stream_generator.main import NewGenerationMixin
    return NewGenerationMixin.sample_stream


@contextlib.contextmanager
def _names_that_transformers_dropped() -> Iterator[None]:
    """Supply, for as long as the import takes, what the library imports and sampling one row never uses."""
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
