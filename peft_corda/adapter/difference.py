"""Computes `result + s · (B A − B0 A0) x`, exactly `result` where `A = A0` and `B = B0`.

Two separate products would need four multiplications, and would cancel only if the same kernels run.
Written as

    B A − B0 A0 = B (A − A0) + (B − B0) A0

every term is zero at the start, whatever the kernel. Both terms share one multiplication with
`[A − A0; A0]` and one with `[B, B − B0]`, and the sum keeps the digits that a difference of large
products would lose.

A custom autograd function saves memory and time in the backward pass. Where autograd asks for something
that such a function cannot give (`torch.func`, forward-mode differentiation, tracing), the same products
are computed by ordinary operations instead.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F


def add_difference(
    result: Tensor,
    x: Tensor,
    factor_a: Tensor,
    factor_b: Tensor,
    start_a: Tensor,
    start_b: Tensor,
    scale: float,
) -> Tensor:
    """Add the adapter's output to the output of the base layer.

    The starting values need no gradients, and nothing is saved for them: the backward pass needs
    `x`, which the gradient of `A` needs anyway, and `A x`.

    Args:
        result: Output of the base layer, `(…, out)`.
        x: Input of the layer, `(…, in)`, in the dtype of the factors.
        factor_a: The factor `A`, `(r, in)`.
        factor_b: The factor `B`, `(out, r)`.
        start_a: The starting value `A0`, of the shape of `A`; without gradient.
        start_b: The starting value `B0`, of the shape of `B`; without gradient.
        scale: The scale `s`.

    Returns:
        The sum, `(…, out)`, in the wider dtype of `result` and the computation. Under autocast the
        products are computed in the dtype of autocast.
    """
    factors = (factor_a, factor_b, start_a, start_b)
    if not torch.is_autocast_enabled(x.device.type):
        return _apply(result, x, *factors, scale)
    dtype = torch.get_autocast_dtype(x.device.type)
    # The factors are subtracted in full precision, before the cast.
    with torch.autocast(x.device.type, enabled=False):
        return _apply(result, x.to(dtype), *factors, scale)


def _apply(result: Tensor, x: Tensor, *rest: Any) -> Tensor:
    if _is_transformed():
        return _plain(result, x, *rest)
    if torch.is_grad_enabled():
        return cast(Tensor, _AddDifference.apply(result, x, *rest))
    return _forward(result, x, *rest)[0]


def _is_transformed() -> bool:
    """Whether autograd functions are unsuitable: in `torch.func`, forward mode, tracing and export."""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():
        is_exporting = getattr(torch.compiler, "is_exporting", None)  # from torch 2.7 on
        return is_exporting is not None and bool(is_exporting())
    return forward_ad._current_level >= 0 or torch.jit.is_tracing()


def _plain(
    result: Tensor,
    x: Tensor,
    factor_a: Tensor,
    factor_b: Tensor,
    start_a: Tensor,
    start_b: Tensor,
    scale: float,
) -> Tensor:
    """Returns the sum, computed by operations that autograd knows, none of them in place."""
    hidden = F.linear(x, _down(factor_a, start_a, x.dtype))
    return result + F.linear(hidden, _up(factor_b, start_b, x.dtype)) * scale


def _forward(
    result: Tensor,
    x: Tensor,
    factor_a: Tensor,
    factor_b: Tensor,
    start_a: Tensor,
    start_b: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns the sum, and `[(A − A0) x, A0 x]`."""
    hidden = x.reshape(-1, x.shape[-1]) @ _down(factor_a, start_a, x.dtype).T
    up = _up(factor_b, start_b, x.dtype)
    if result.dtype != x.dtype:
        return result + (hidden @ up.T).mul_(scale).view(result.shape), hidden
    # Not a view, which a custom function may not return to callers that change it in place.
    summed = result.clone(memory_format=torch.contiguous_format)
    summed.view(-1, summed.shape[-1]).addmm_(hidden, up.T, alpha=scale)
    return summed, hidden


class _AddDifference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        x: Tensor,
        factor_a: Tensor,
        factor_b: Tensor,
        start_a: Tensor,
        start_b: Tensor,
        scale: float,
    ) -> Tensor:
        summed, hidden = _forward(result, x, factor_a, factor_b, start_a, start_b, scale)
        rank = len(factor_a)
        trained = hidden[:, :rank] + hidden[:, rank:]  # A x
        ctx.save_for_backward(x, trained, factor_a, factor_b, start_a, start_b)
        ctx.scale = scale
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, trained, factor_a, factor_b, start_a, start_b = ctx.saved_tensors
        _, wants_x, wants_a, wants_b, *_ = ctx.needs_input_grad
        rank, dtype = len(factor_a), x.dtype
        rows = x.reshape(-1, x.shape[-1])
        given = gradient.reshape(-1, gradient.shape[-1]).to(dtype)
        if torch.is_grad_enabled():
            # The gradients are differentiated in turn, which needs `A x` as a function of both.
            trained = rows @ factor_a.to(dtype).T
        for_x = for_a = for_b = hidden = None
        if wants_x:
            hidden = (given @ _up(factor_b, start_b, dtype)).mul_(ctx.scale)
            for_x = (hidden @ _down(factor_a, start_a, dtype)).view(x.shape)
        if wants_a:
            own = (
                (given @ factor_b.to(dtype)).mul_(ctx.scale) if hidden is None else hidden[:, :rank]
            )
            for_a = (own.T @ rows).to(factor_a.dtype)
        if wants_b:
            for_b = (given.T @ trained).mul_(ctx.scale).to(factor_b.dtype)
        return gradient, for_x, for_a, for_b, None, None, None


def _down(factor_a: Tensor, start_a: Tensor, dtype: torch.dtype) -> Tensor:
    """The stacked factors `[A − A0; A0]`, `(2r, in)`."""
    return torch.cat([factor_a - start_a, start_a]).to(dtype)


def _up(factor_b: Tensor, start_b: Tensor, dtype: torch.dtype) -> Tensor:
    """The stacked factors `[B, B − B0]`, `(out, 2r)`."""
    return torch.cat([factor_b, factor_b - start_b], dim=1).to(dtype)
