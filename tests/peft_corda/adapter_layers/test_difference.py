"""`s (B A − B0 A0) x` from changes: the same numbers, nothing at the start, right gradients."""

import pytest
import torch

from peft_corda.adapter_layers.difference import add_difference

SCALE = 0.7


def factors(dtype=torch.float32, rank=5, inputs=24, outputs=40):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(rank, inputs), draw(outputs, rank), draw(rank, inputs), draw(outputs, rank)


def data(dtype=torch.float32, inputs=24, outputs=40, rows=(3, 17)):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*rows, inputs, generator=generator, dtype=torch.float64)
    result = torch.randn(*rows, outputs, generator=generator, dtype=torch.float64)
    return result.to(dtype), x.to(dtype)


def plainly(result, x, da, db, a0, b0):
    a, b = a0 + da, b0 + db
    return result + SCALE * ((x @ a.T) @ b.T - (x @ a0.T) @ b0.T)


def test_value_is_that_of_separate_products():
    result, x = data(torch.float64)
    given = factors(torch.float64)
    expected = plainly(result, x, *given)
    assert torch.allclose(add_difference(result, x, *given, SCALE), expected, rtol=1e-12)
    with torch.no_grad():
        assert torch.allclose(add_difference(result, x, *given, SCALE), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 33])
def test_nothing_at_the_start(dtype, base, autocast, rank):
    a, b, *_ = factors(dtype, rank)
    result, x = data(base)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        zeros = torch.zeros_like(a), torch.zeros_like(b)
        summed = add_difference(result, x.to(dtype), *zeros, a, b, SCALE)
    assert torch.equal(summed, result)


def test_gradients():
    result, x = (t.requires_grad_() for t in data(torch.float64, rows=(2, 3)))
    a, b, a0, b0 = factors(torch.float64)
    a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda result, x, a, b: add_difference(result, x, a, b, a0, b0, SCALE), (result, x, a, b)
    )


@pytest.mark.parametrize("wanted", ["x", "a", "b"])
def test_gradient_of_one_alone(wanted):
    result, x = data(torch.float64)
    a, b, a0, b0 = factors(torch.float64)
    tensor = {"x": x, "a": a, "b": b}[wanted].requires_grad_()
    weights = torch.randn(result.shape, dtype=torch.float64)
    expected = torch.autograd.grad((plainly(result, x, a, b, a0, b0) * weights).sum(), tensor)
    found = torch.autograd.grad(
        (add_difference(result, x, a, b, a0, b0, SCALE) * weights).sum(), tensor
    )
    assert torch.allclose(found[0], expected[0], rtol=1e-10)


def test_gradients_under_autocast_have_the_dtype_of_what_they_belong_to():
    result, x = data()
    x.requires_grad_()
    a, b, a0, b0 = factors()
    a.requires_grad_(), b.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        add_difference(result, x, a, b, a0, b0, SCALE).sum().backward()
    expected = torch.autograd.grad(plainly(result, x, a, b, a0, b0).sum(), (x, a, b))
    for tensor, exact in zip((x, a, b), expected, strict=True):
        assert tensor.grad.dtype == torch.float32
        assert (tensor.grad - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_changes_are_not_lost_next_to_a_large_start(dtype):
    """Separate products of this size would cancel to noise."""
    a, b, *_ = (t.to(dtype) for t in factors(torch.float64))
    a, b = 1e3 * a, 1e3 * b
    changes = [(1e-4 * torch.randn(t.shape, dtype=torch.float64)).to(dtype) for t in (a, b)]
    result, x = data(dtype)
    given = [0 * result, x, *changes, a, b]
    exact = plainly(*(t.double() for t in given))
    found, separate = add_difference(*given, SCALE), plainly(*given)
    assert (found - exact).norm() < 8 * torch.finfo(dtype).eps * exact.norm()
    assert (separate - exact).norm() > 1e-3 * exact.norm()
