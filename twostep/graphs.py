"""Looking at the graphs that autograd keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def nodes(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the tensors' graphs, once."""
    seen, pending = set(), [output.grad_fn for output in outputs]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending += [parent for parent, _ in node.next_functions]


def is_leafs(node: Any) -> bool:
    """Whether this node puts gradients into a leaf, its `variable`."""
    return type(node).__name__ == "AccumulateGrad"
