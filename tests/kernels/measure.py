"""What tests measure: bytes that autograd keeps, and errors in units of a dtype."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def saved_elements() -> Iterator[list[int]]:
    """Element counts of the distinct tensors that autograd saves for backward inside; read after the block."""
    kept: dict[int, Tensor] = {}
    counts: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counts
    counts += [tensor.numel() for tensor in kept.values()]


def gradients(function: Callable[..., Any], *inputs: Tensor, seed: int = 0) -> tuple[Tensor, ...]:
    """Gradients of a fixed random linear functional of the floating outputs."""
    inputs = tuple(t.detach().clone().requires_grad_() for t in inputs)
    outputs = function(*inputs)
    outputs = [o for o in (outputs if isinstance(outputs, (tuple, list)) else [outputs]) if o.is_floating_point()]
    generator = torch.Generator().manual_seed(seed)
    total = sum((o.double() * torch.randn(o.shape, generator=generator).double()).sum() for o in outputs)
    return torch.autograd.grad(total, inputs)
