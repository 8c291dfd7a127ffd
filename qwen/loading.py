"""Loading that fails where weights are missing or have other shapes, where transformers goes on with random ones."""

from __future__ import annotations

from typing import Any

_NUM_SHOWN = 5


class CompleteLoadingMixin:
    """To stand before `PreTrainedModel` among a class's bases."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load as transformers' `from_pretrained`, but completely.

        Args:
            pretrained_model_name_or_path: folder or hub name.
            output_loading_info: whether to give back what was found missing or unexpected, too.
            ignore_mismatched_sizes: whether weights of another shape may be replaced by random ones.
            args: as transformers takes them.
            kwargs: likewise.

        Raises:
            ValueError: if a weight is missing or has another shape; the message names the first few.
        """
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        misshapen = {name for name, *_ in info["mismatched_keys"]}
        missing = set(info["missing_keys"]) - misshapen
        problems = []
        if missing:
            problems.append(
                f"lacks {len(missing)} weight{'s' * (len(missing) > 1)} that {cls.__name__} needs ({_some(missing)})"
            )
        if misshapen and not ignore_mismatched_sizes:
            shapes = {f"{n}: {tuple(got)}, expected {tuple(want)}" for n, got, want in info["mismatched_keys"]}
            noun = "weight" if len(misshapen) == 1 else "weights"
            problems.append(f"holds {len(misshapen)} {noun} of another shape ({_some(shapes)})")
        if problems:
            raise ValueError(
                f"the checkpoint {pretrained_model_name_or_path} {' and '.join(problems)}: "
                "check that it is complete and that config.json belongs to it"
            )
        return (model, info) if output_loading_info else model


def _some(names: set[str]) -> str:
    shown = sorted(names)[:_NUM_SHOWN]
    return "; ".join(shown) + ("; …" if len(names) > _NUM_SHOWN else "")
