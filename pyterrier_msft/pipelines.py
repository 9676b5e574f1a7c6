"""The transformers that a pipeline consists of."""

from collections.abc import Iterator
from typing import Any

import pyterrier as pt


def parts_of(transformer: pt.Transformer) -> list[pt.Transformer]:
    """Return the transformers that a transformer uses."""
    try:
        found = pt.inspect.subtransformers(transformer).values()
    except pt.inspect.InspectError:
        return []
    return [part for each in found for part in (each if isinstance(each, list) else [each])]


def all_parts_of(transformer: Any) -> Iterator[pt.Transformer]:
    """Yield a transformer and, at any depth, those that it uses, in their order; nothing for another object."""
    if isinstance(transformer, pt.Transformer):
        yield transformer
        for part in parts_of(transformer):
            yield from all_parts_of(part)
