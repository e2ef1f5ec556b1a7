"""Computes `result + s · (B A − B0 A0) x` from the changes of `A` and `B`.

With `A = A0 + ΔA` and `B = B0 + ΔB`,

    B A − B0 A0 = B ΔA + ΔB A0.

Both terms share one multiplication with `[ΔA; A0]` and one with `[B, ΔB]`. Where the changes are zero,
so is every term, whatever the kernel and the dtype. No digits are lost to a difference of large
products.

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
    change_a: Tensor,
    change_b: Tensor,
    start_a: Tensor,
    start_b: Tensor,
    scale: float,
) -> Tensor:
    """Add the adapter's output to the output of the base layer.

    The starting values need no gradients, and nothing is saved for them: the backward pass needs
    `x`, which the gradient of `ΔA` needs anyway, and `A x`.

    Args:
        result: Output of the base layer, `(…, out)`.
        x: Input of the layer, `(…, in)`, in the dtype of the factors.
        change_a: The change `ΔA = A − A0`, `(r, in)`.
        change_b: The change `ΔB = B − B0`, `(out, r)`.
        start_a: The starting value `A0`, `(r, in)`; without gradient.
        start_b: The starting value `B0`, `(out, r)`; without gradient.
        scale: The scale `s`.

    Returns:
        The sum, `(…, out)`, in the wider dtype of `result` and the computation. Under autocast the
        products are computed in the dtype of autocast.
    """
    factors = (change_a, change_b, start_a, start_b)
    if not torch.is_autocast_enabled(x.device.type):
        return _apply(result, x, *factors, scale)
    dtype = torch.get_autocast_dtype(x.device.type)
    # `B0` and `ΔB` are added in full precision, before the cast.
    with torch.autocast(x.device.type, enabled=False):
        return _apply(result, x.to(dtype), *factors, scale)


def _apply(result: Tensor, x: Tensor, *rest: Any) -> Tensor:
    if is_transformed():
        return _plain(result, x, *rest)
    if torch.is_grad_enabled():
        return cast(Tensor, _AddDifference.apply(result, x, *rest))
    return _forward(result, x, *rest)[0]


def is_transformed() -> bool:
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
    change_a: Tensor,
    change_b: Tensor,
    start_a: Tensor,
    start_b: Tensor,
    scale: float,
) -> Tensor:
    """Returns the sum, computed by operations that autograd knows, none of them in place."""
    hidden = F.linear(x, _down(change_a, start_a, x.dtype))
    return result + F.linear(hidden, _up(change_b, start_b, x.dtype)) * scale


def _forward(
    result: Tensor,
    x: Tensor,
    change_a: Tensor,
    change_b: Tensor,
    start_a: Tensor,
    start_b: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Returns the sum, and `[ΔA x, A0 x]`."""
    hidden = x.reshape(-1, x.shape[-1]) @ _down(change_a, start_a, x.dtype).T
    up = _up(change_b, start_b, x.dtype)
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
        change_a: Tensor,
        change_b: Tensor,
        start_a: Tensor,
        start_b: Tensor,
        scale: float,
    ) -> Tensor:
        summed, hidden = _forward(result, x, change_a, change_b, start_a, start_b, scale)
        rank = len(change_a)
        trained = hidden[:, :rank] + hidden[:, rank:]  # A x
        ctx.save_for_backward(x, trained, change_a, change_b, start_a, start_b)
        ctx.scale = scale
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, trained, change_a, change_b, start_a, start_b = ctx.saved_tensors
        _, wants_x, wants_a, wants_b, *_ = ctx.needs_input_grad
        rank, dtype = len(change_a), x.dtype
        rows = x.reshape(-1, x.shape[-1])
        given = gradient.reshape(-1, gradient.shape[-1]).to(dtype)
        if torch.is_grad_enabled():
            # The gradients are differentiated in turn, which needs `A x` as a function of both.
            trained = rows @ (start_a + change_a).to(dtype).T
        for_x = for_a = for_b = hidden = None
        if wants_x:
            hidden = (given @ _up(change_b, start_b, dtype)).mul_(ctx.scale)
            for_x = (hidden @ _down(change_a, start_a, dtype)).view(x.shape)
        if wants_a:
            if hidden is None:
                hidden = (given @ (start_b + change_b).to(dtype)).mul_(ctx.scale)
            own = hidden[:, :rank]
            for_a = (own.T @ rows).to(change_a.dtype)
        if wants_b:
            for_b = (given.T @ trained).mul_(ctx.scale).to(change_b.dtype)
        return gradient, for_x, for_a, for_b, None, None, None


def _down(change_a: Tensor, start_a: Tensor, dtype: torch.dtype) -> Tensor:
    """The stacked factors `[ΔA; A0]`, `(2r, in)`."""
    return torch.cat([change_a, start_a]).to(dtype)


def _up(change_b: Tensor, start_b: Tensor, dtype: torch.dtype) -> Tensor:
    """The stacked factors `[B, ΔB]`, `(out, 2r)`."""
    return torch.cat([start_b + change_b, change_b], dim=1).to(dtype)
