"""What every family of kernels gets around it, in one place: fake kernels, autograd, and no silent second derivative.

A family is a namespace of operators with one set of schemas: ``bkind3d`` (C++ on CPU tensors, CUDA on CUDA tensors) and
``bkind3d_triton``. :func:`attach` gives each of its operators

- a fake kernel: shapes, dtypes and strides, for torch.compile and torch.export;
- autograd, through the ``*_backward`` operator;
- for each ``*_backward`` operator a formula that raises: without one its derivative would be silently zero;
- the same autograd as a ``torch.autograd.Function``, for eager mode: torch's own wrapping of registered formulas costs
  a small problem as much as the operation itself.

:func:`call` runs an operator: traced as it is registered, in eager mode by that function.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

INT16_EDGES = 2**15  # up to here the winner's index is int16


# As in csrc/schema.cpp, for the families that are not defined there.
SCHEMAS = {
    "unproject": (
        "(Tensor features, Tensor q, Tensor? view_mask, Tensor? view_weights, int[] shape, str aggregation, str unseen)"
        " -> (Tensor volume, Tensor counts)"
    ),
    "unproject_backward": (
        "(Tensor grad_volume, Tensor features, Tensor q, Tensor? view_mask, Tensor? view_weights, int[] shape, "
        "str aggregation, str unseen, bool needs_features, bool needs_q, bool needs_weights, bool deterministic)"
        " -> (Tensor grad_features, Tensor grad_q, Tensor grad_weights)"
    ),
    "soft_argmax3d": (
        "(Tensor logits, float temperature, bool covariance) -> (Tensor mean, Tensor peak, Tensor covariance, "
        "Tensor maximum, Tensor total, Tensor argmax)"
    ),
    "soft_argmax3d_backward": (
        "(Tensor grad_mean, Tensor grad_peak, Tensor? grad_covariance, Tensor logits, float temperature, Tensor mean, "
        "Tensor covariance, Tensor maximum, Tensor total, Tensor argmax) -> Tensor"
    ),
    "linear_soft_argmax3d": (
        "(Tensor features, Tensor weight, Tensor? bias, float temperature, bool covariance) -> (Tensor mean, "
        "Tensor peak, Tensor covariance, Tensor maximum, Tensor total, Tensor argmax)"
    ),
    "linear_soft_argmax3d_backward": (
        "(Tensor grad_mean, Tensor grad_peak, Tensor? grad_covariance, Tensor features, Tensor weight, Tensor? bias, "
        "float temperature, Tensor mean, Tensor covariance, Tensor maximum, Tensor total, Tensor argmax, "
        "bool needs_features, bool needs_weight) -> (Tensor grad_features, Tensor grad_weight)"
    ),
    "rasterize_edges": (
        "(Tensor keypoints, Tensor weights, Tensor edges, int[] sizes, float[] sigmas) -> (Tensor[] maps, "
        "Tensor winners)"
    ),
    "rasterize_edges_backward": (
        "(Tensor[] grad_maps, Tensor keypoints, Tensor weights, Tensor edges, Tensor winners, int[] sizes, "
        "float[] sigmas, bool deterministic) -> (Tensor grad_keypoints, Tensor grad_weights)"
    ),
    "group_norm_act": (
        "(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int groups, float eps, str activation) -> (Tensor y, "
        "Tensor mean, Tensor rstd)"
    ),
    "group_norm_act_backward": (
        "(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? output, Tensor mean, Tensor rstd, str activation, "
        "bool needs_x, bool needs_weight, bool needs_residual) -> (Tensor grad_x, Tensor grad_weight, "
        "Tensor grad_bias, Tensor grad_residual)"
    ),
}


# How many outputs of an operator are for its caller; what follows is kept for the backward pass.
RETURNED = {"unproject": 2, "soft_argmax3d": 3, "linear_soft_argmax3d": 3, "rasterize_edges": 1, "group_norm_act": 1}


def attach(namespace: str, ops: Collection[str] | None = None) -> None:
    """Register fake kernels and autograd for the operators of ``namespace``. Once for each operation.

    Args:
        namespace: of the operators.
        ops: the operations that it has; all by default.

    Raises:
        RuntimeError: an operator is missing; nothing has then been registered.
    """
    ops = _OPERATORS if ops is None else ops
    missing = [name for op in ops for name in (op, f"{op}_backward") if not _exists(namespace, name)]
    if missing:
        raise RuntimeError(f"operators {', '.join(missing)} are missing")
    for op in ops:
        fake, fake_backward, setup_context, backward = _OPERATORS[op]
        name = f"{namespace}::{op}"
        torch.library.register_fake(name, fake)
        torch.library.register_fake(f"{name}_backward", fake_backward)
        formula = backward(_backward_operator(namespace, op))
        torch.library.register_autograd(name, formula, setup_context=setup_context)
        torch.library.register_autograd(f"{name}_backward", _no_second_derivative(op))
        _EAGER[namespace, op] = _eager(namespace, op, setup_context, formula)


def call(namespace: str, op: str, *arguments: Any) -> Any:
    """The first :data:`RETURNED` outputs at least of the operator ``op`` of ``namespace``, which is attached.

    Raises:
        RuntimeError: a derivative is asked for that the compiled kernels do not have; the message names the backend
            that has it.
    """
    if torch.compiler.is_compiling():
        return _operator(namespace, op)(*arguments)
    if (transforms := torch._C._functorch.get_interpreter_stack()) is not None:
        _refuse_transforms(op, transforms)
        _refuse_tangents(op, arguments)
        return _operator(namespace, op)(*arguments)
    if forward_ad._current_level >= 0:
        _refuse_tangents(op, arguments)
    return _EAGER[namespace, op](arguments)


_EAGER: dict[tuple[str, str], Callable[[tuple[Any, ...]], Any]] = {}  # filled by attach()


def _eager(namespace: str, op: str, setup_context: Any, formula: Any) -> Callable[[tuple[Any, ...]], Any]:
    """The operator in eager mode, of its arguments as a tuple."""
    operator = _operator(namespace, op).default
    listed = "Tensor[]" in SCHEMAS[op]  # the first output is a list, which an autograd.Function cannot return
    count = RETURNED[op]

    def forward(ctx: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = operator(*arguments)
        setup_context(ctx, arguments, outputs)
        return tuple(outputs[0]) if listed else outputs[:count]

    def backward(ctx: Any, *gradients: Any) -> Any:
        return formula(ctx, gradients) if listed else formula(ctx, *gradients)

    passes = {"forward": staticmethod(forward), "backward": staticmethod(backward), "boxed_grads_call": False}
    function: Any = type(op, (torch.autograd.Function,), passes)  # its name is seen in profiles
    # Without what Function.apply does for torch.func before: call() has seen to that.
    apply = super(torch.autograd.Function, function).apply

    def run(arguments: tuple[Any, ...]) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            outputs = apply(*arguments)
            return (list(outputs),) if listed else outputs
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return run


def _backward_operator(namespace: str, op: str) -> Callable[..., Any]:
    """The operator of the backward pass; where that is itself differentiated, with the formula that raises."""
    operator = _operator(namespace, f"{op}_backward").default

    def run(*arguments: Any) -> Any:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return operator(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return run


def _refuse_transforms(op: str, transforms: Collection[Any]) -> None:
    """Raise inside torch.func.grad and its like, and where torch.func.vmap cannot take the operator.

    Their own messages would name neither the operation nor the mend.
    """
    for level in transforms:
        if level.key() == TransformType.Grad:
            raise RuntimeError(
                f"{op}: the compiled kernels cannot be differentiated by torch.func (grad, vjp, jacrev); use "
                "backend='reference' for that, or loss.backward()"
            )
        if level.key() == TransformType.Vmap and "Tensor[]" in SCHEMAS[op]:  # it maps single tensors alone
            raise RuntimeError(f"{op}: torch.func.vmap does not take the compiled kernels; use backend='reference'")


def _refuse_tangents(op: str, arguments: tuple[Any, ...]) -> None:
    """Raise if a tensor carries a forward-mode tangent: an operator without a formula for it would drop it silently."""
    tensors = (a for a in arguments if isinstance(a, Tensor))
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            f"{op}: the compiled kernels have no forward-mode derivative; use backend='reference' for one"
        )


def _operator(namespace: str, name: str) -> Any:
    return getattr(getattr(torch.ops, namespace), name)


def _exists(namespace: str, name: str) -> bool:
    return hasattr(getattr(torch.ops, namespace), name)


def _no_second_derivative(op: str) -> Any:
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{op}: the compiled kernels have no second derivative; use backend='reference' for one")

    return backward


# ---- unproject ----


def _unproject_fake(
    features: Tensor,
    q: Tensor,
    view_mask: Tensor | None,
    view_weights: Tensor | None,
    shape: list[int],
    aggregation: str,
    unseen: str,
) -> tuple[Tensor, Tensor]:
    n, _, c = features.shape[:3]
    volume = torch.empty(
        (n, c, *shape), dtype=features.dtype, device=features.device, memory_format=torch.channels_last_3d
    )
    return volume, features.new_empty((n, *shape), dtype=torch.uint8)


def _unproject_backward_fake(
    grad_volume: Tensor,
    features: Tensor,
    q: Tensor,
    view_mask: Tensor | None,
    view_weights: Tensor | None,
    shape: list[int],
    aggregation: str,
    unseen: str,
    needs_features: bool,
    needs_q: bool,
    needs_weights: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, m, c, h, w = features.shape
    grad_features = features.new_empty((n, m, h, w, c) if needs_features else (0,))
    return (
        grad_features.permute(0, 1, 4, 2, 3) if needs_features else grad_features,
        q.new_empty((n, m, 3, 4) if needs_q else (0,)),
        q.new_empty((n, m, c) if needs_weights else (0,)),
    )


def _unproject_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, q, view_mask, view_weights, shape, aggregation, unseen = inputs
    ctx.save_for_backward(features, q, view_mask, view_weights)
    ctx.options = list(shape), aggregation, unseen
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _unproject_autograd(backward_operator: Callable[..., Any]) -> Any:
    def backward(ctx: Any, grad_volume: Tensor | None, _: Any) -> Any:
        features, q, view_mask, view_weights = ctx.saved_tensors
        if grad_volume is None:
            grad_volume = features.new_zeros(()).expand(features.shape[0], features.shape[2], *ctx.options[0])
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], view_weights is not None and ctx.needs_input_grad[3]
        gradients = backward_operator(
            grad_volume,
            features,
            q,
            view_mask,
            view_weights,
            *ctx.options,
            *needs,
            torch.are_deterministic_algorithms_enabled(),
        )
        grad_features, grad_q, grad_weights = (g if need else None for g, need in zip(gradients, needs))
        return grad_features, grad_q, None, grad_weights, None, None, None

    return backward


# ---- soft_argmax3d ----


def _moments(like: Tensor, n: int, j: int, covariance: bool) -> tuple[Tensor, ...]:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return (
        like.new_empty((n, j, 3), dtype=dtype),
        like.new_empty((n, j), dtype=dtype),
        like.new_empty((n, j, 3, 3) if covariance else (0,), dtype=dtype),
        like.new_empty((n, j), dtype=dtype),
        like.new_empty((n, j), dtype=dtype),
        like.new_empty((n, j), dtype=torch.int64),
    )


def _soft_argmax3d_fake(logits: Tensor, temperature: float, covariance: bool) -> tuple[Tensor, ...]:
    return _moments(logits, logits.shape[0], logits.shape[1], covariance)


def _soft_argmax3d_backward_fake(
    grad_mean: Tensor,
    grad_peak: Tensor,
    grad_covariance: Tensor | None,
    logits: Tensor,
    temperature: float,
    mean: Tensor,
    covariance: Tensor,
    maximum: Tensor,
    total: Tensor,
    argmax: Tensor,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _soft_argmax3d_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ctx.temperature, ctx.has_covariance = inputs
    mean, _, covariance, maximum, total, argmax = output
    ctx.save_for_backward(logits, mean, covariance, maximum, total, argmax)
    ctx.mark_non_differentiable(maximum, total, argmax)
    ctx.set_materialize_grads(False)


def _soft_argmax3d_autograd(backward_operator: Callable[..., Any]) -> Any:
    def backward(ctx: Any, grad_mean: Tensor | None, grad_peak: Tensor | None, grad_covariance: Any, *_: Any) -> Any:
        logits, mean, covariance, maximum, total, argmax = ctx.saved_tensors
        grad_logits = backward_operator(
            torch.zeros_like(mean) if grad_mean is None else grad_mean,
            torch.zeros_like(total) if grad_peak is None else grad_peak,
            grad_covariance if ctx.has_covariance else None,
            logits,
            ctx.temperature,
            mean,
            covariance,
            maximum,
            total,
            argmax,
        )
        return grad_logits, None, None

    return backward


# ---- linear_soft_argmax3d ----


def _linear_soft_argmax3d_fake(
    features: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, covariance: bool
) -> tuple[Tensor, ...]:
    return _moments(features, features.shape[0], weight.shape[0], covariance)


def _linear_soft_argmax3d_backward_fake(
    grad_mean: Tensor,
    grad_peak: Tensor,
    grad_covariance: Tensor | None,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    mean: Tensor,
    covariance: Tensor,
    maximum: Tensor,
    total: Tensor,
    argmax: Tensor,
    needs_features: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    grad_features = features.new_empty((0,))
    if needs_features:
        grad_features = torch.empty(
            features.shape, dtype=features.dtype, device=features.device, memory_format=torch.channels_last_3d
        )
    return grad_features, weight.new_empty(weight.shape if needs_weight else (0,))


def _linear_soft_argmax3d_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, weight, bias, ctx.temperature, ctx.has_covariance = inputs
    mean, _, covariance, maximum, total, argmax = output
    ctx.save_for_backward(features, weight, bias, mean, covariance, maximum, total, argmax)
    ctx.mark_non_differentiable(maximum, total, argmax)
    ctx.set_materialize_grads(False)


def _linear_soft_argmax3d_autograd(backward_operator: Callable[..., Any]) -> Any:
    def backward(ctx: Any, grad_mean: Tensor | None, grad_peak: Tensor | None, grad_covariance: Any, *_: Any) -> Any:
        features, weight, bias, mean, covariance, maximum, total, argmax = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        gradients = backward_operator(
            torch.zeros_like(mean) if grad_mean is None else grad_mean,
            torch.zeros_like(total) if grad_peak is None else grad_peak,
            grad_covariance if ctx.has_covariance else None,
            features,
            weight,
            bias,
            ctx.temperature,
            mean,
            covariance,
            maximum,
            total,
            argmax,
            *needs,
        )
        grad_features, grad_weight = (g if need else None for g, need in zip(gradients, needs))
        # What is added to all logits of a softmax does not change it.
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        return grad_features, grad_weight, grad_bias, None, None

    return backward


# ---- rasterize_edges ----
#
# The maps are a list, so that each has memory and a gradient of its own. The winners are one flat tensor, map after
# map: only backward reads them, and each further tensor in a list costs microseconds at every call.


def _rasterize_edges_fake(
    keypoints: Tensor, weights: Tensor, edges: Tensor, sizes: list[int], sigmas: list[float]
) -> tuple[list[Tensor], Tensor]:
    n = keypoints.shape[0]
    index = torch.int16 if edges.shape[0] <= INT16_EDGES else torch.int32
    shapes = list(zip(sizes[::2], sizes[1::2]))
    maps = [keypoints.new_empty((n, h, w)) for h, w in shapes]
    return maps, keypoints.new_empty((n * sum(h * w for h, w in shapes),), dtype=index)


def _rasterize_edges_backward_fake(
    grad_maps: list[Tensor],
    keypoints: Tensor,
    weights: Tensor,
    edges: Tensor,
    winners: Tensor,
    sizes: list[int],
    sigmas: list[float],
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    return keypoints.new_empty(keypoints.shape), weights.new_empty(weights.shape)


def _rasterize_edges_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    keypoints, weights, edges, sizes, sigmas = inputs
    ctx.save_for_backward(keypoints, weights, edges, output[1])
    ctx.options = list(sizes), list(sigmas)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _rasterize_edges_autograd(backward_operator: Callable[..., Any]) -> Any:
    def backward(ctx: Any, grad_maps: Sequence[Tensor | None], *_: Any) -> Any:
        keypoints, weights, edges, winners = ctx.saved_tensors
        sizes, sigmas = ctx.options
        shapes = zip(sizes[::2], sizes[1::2])
        grad_keypoints, grad_weights = backward_operator(
            [
                keypoints.new_zeros(()).expand(keypoints.shape[0], h, w) if g is None else g
                for g, (h, w) in zip(grad_maps, shapes)
            ],
            keypoints,
            weights,
            edges,
            winners,
            sizes,
            sigmas,
            torch.are_deterministic_algorithms_enabled(),
        )
        return grad_keypoints, grad_weights, None, None, None

    return backward


# ---- group_norm_act ----


def empty_channels_last(like: Tensor) -> Tensor:
    """A new map or volume in the shape and dtype of another, channels-last in memory."""
    last = torch.channels_last if like.ndim == 4 else torch.channels_last_3d
    return torch.empty(like.shape, dtype=like.dtype, device=like.device, memory_format=last)


def _group_norm_act_fake(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, groups: int, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (weight.new_empty((x.shape[0], groups)) for _ in range(2))
    return empty_channels_last(x), mean, rstd


def _group_norm_act_backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    output: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    activation: str,
    needs_x: bool,
    needs_weight: bool,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_channels_last(x) if needs_x else x.new_empty((0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        empty_channels_last(x) if needs_residual else x.new_empty((0,)),
    )


def _group_norm_act_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, _, _, ctx.activation = inputs
    y, mean, rstd = output
    # Which elements a ReLU lets through is seen from x again, unless a residual was added to it.
    kept = y if residual is not None and ctx.activation != "none" else None
    ctx.save_for_backward(x, weight, bias, kept, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _group_norm_act_autograd(backward_operator: Callable[..., Any]) -> Any:
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        if grad is None:
            return (None,) * 7
        x, weight, bias, output, mean, rstd = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        plain = ctx.activation == "none"  # the gradient of the residual is then that of the output
        grad_x, grad_weight, grad_bias, grad_residual = backward_operator(
            grad,
            x,
            weight,
            bias,
            output,
            mean,
            rstd,
            ctx.activation,
            needs_x,
            needs_weight or needs_bias,
            needs_residual and not plain,
        )
        return (
            grad_x if needs_x else None,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            (grad if plain else grad_residual) if needs_residual else None,
            *[None] * 3,
        )

    return backward


_OPERATORS: dict[str, tuple[Any, Any, Any, Any]] = {
    "unproject": (_unproject_fake, _unproject_backward_fake, _unproject_setup, _unproject_autograd),
    "soft_argmax3d": (
        _soft_argmax3d_fake,
        _soft_argmax3d_backward_fake,
        _soft_argmax3d_setup,
        _soft_argmax3d_autograd,
    ),
    "linear_soft_argmax3d": (
        _linear_soft_argmax3d_fake,
        _linear_soft_argmax3d_backward_fake,
        _linear_soft_argmax3d_setup,
        _linear_soft_argmax3d_autograd,
    ),
    "rasterize_edges": (
        _rasterize_edges_fake,
        _rasterize_edges_backward_fake,
        _rasterize_edges_setup,
        _rasterize_edges_autograd,
    ),
    "group_norm_act": (
        _group_norm_act_fake,
        _group_norm_act_backward_fake,
        _group_norm_act_setup,
        _group_norm_act_autograd,
    ),
}
