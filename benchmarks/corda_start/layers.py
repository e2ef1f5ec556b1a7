"""Single layers at the sizes of 7B models, for `corda_init.py`: synthetic, from a seed.

The weight is Gaussian with a mild power law of singular values in a random basis. The covariance is
that of random tokens whose variances follow a steeper power law, with a few massive directions on top
as in the hidden states of language models; from more tokens than dimensions ("full"), or from so few
that only the damping makes it regular ("few").
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from corda_init_sides import Seconds, Stopwatch, in_turn
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig as PeftCordaConfig
from peft.tuners.lora.corda import collect_eigens_for_layer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_corda.decomposition.covariance import damped
from peft_corda.decomposition.directions import left_singular

METHODS = ("kpm", "ipm")
DAMPING = 0.01  # the default of both sides
WEIGHT_DECAY, VARIANCE_DECAY = 0.25, 1.2
MASSIVE, MASSIVE_FACTOR = 4, 100.0
FEW_TOKENS, TOKENS_PER_DIMENSION = 512, 2
ROWS = 2048  # tokens made at a time


class CountInversions(TorchDispatchMode):
    """PEFT doubles its damping until its inverse is good enough, and does not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.count += "linalg_inv" in str(func)
        return func(*args, **(kwargs or {}))


def rotated(rows: Tensor, signs: Tensor) -> Tensor:
    """Rows in another orthonormal basis, a dense one: random signs, then the Hartley transform.

    As good as a random rotation here, and takes `n log n` where that takes `n²`.
    """
    spectrum = torch.fft.fft(rows * signs, norm="ortho")
    return spectrum.real - spectrum.imag


def random_signs(size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1.0


def power_law(size: int, exponent: float) -> Tensor:
    return torch.arange(1, size + 1, dtype=torch.float32) ** -exponent


def make_weight(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """`(rows, columns)` float32."""
    gaussian = torch.randn(rows, columns, generator=generator) / columns**0.5
    scaled = gaussian * power_law(columns, WEIGHT_DECAY)
    return rotated(scaled, random_signs(columns, generator))


def make_covariance(size: int, tokens: int, generator: torch.Generator) -> Tensor:
    """`(size, size)` float32, the mean outer product of `tokens` tokens."""
    variances = power_law(size, VARIANCE_DECAY)
    variances[:MASSIVE] *= MASSIVE_FACTOR
    signs = random_signs(size, generator)
    total = torch.zeros(size, size)
    for start in range(0, tokens, ROWS):
        count = min(ROWS, tokens - start)
        rows = torch.randn(count, size, generator=generator) * variances.sqrt()
        rows = rotated(rows, signs)
        total.addmm_(rows.T, rows)
    return total / tokens


@torch.no_grad()
def ours(weight: Tensor, covariance: Tensor, rank: int, method: str) -> tuple[Seconds, Tensor]:
    watch = Stopwatch()
    directions, _ = left_singular(weight, damped(covariance, DAMPING), rank, method)
    return watch.read(), directions


def peft(weight: Tensor, covariance: Tensor) -> tuple[Seconds, Tensor, int]:
    """Time, all left singular vectors (PEFT crops them later) and the number of inversions."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.covariance_matrix = covariance
    config = LoraConfig(init_lora_weights="corda", corda_config=PeftCordaConfig())
    watch = Stopwatch()
    with CountInversions() as inversions:
        eigens = collect_eigens_for_layer(layer, config)
    return watch.read(), eigens.U_WC, inversions.count


def exact_values(product: Tensor) -> Tensor:
    """Singular values of `W C` in float64, largest first.

    A QR decomposition first makes the matrix square. Both steps are backward stable, so that the
    values are as accurate as those of a plain decomposition, at a fraction of the time.
    """
    tall = product if product.shape[0] >= product.shape[1] else product.T
    return torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R)


def energy(directions: Tensor, product: Tensor) -> float:
    """`‖Uᵀ W C‖²` for the space spanned by `U`, which float32 leaves a little short of orthonormal."""
    basis = torch.linalg.qr(directions.double()).Q
    return float((basis.T @ product).square().sum())


class LayerCase:
    """One weight and covariance, both sides' times and what they found."""

    def __init__(self, shape: str, kind: str, rank: int) -> None:
        rows, columns = (int(size) for size in shape.split("x"))
        generator = torch.Generator().manual_seed(0)
        tokens = FEW_TOKENS if kind == "few" else TOKENS_PER_DIMENSION * columns
        self.weight = make_weight(rows, columns, generator)
        self.covariance = make_covariance(columns, tokens, generator)
        self.rank = rank
        self.found: dict[tuple[str, str], Tensor] = {}
        self.record: dict[str, Any] = {
            "shape": shape,
            "covariance": kind,
            "tokens": tokens,
            "rank": rank,
            "our_damping": DAMPING,
            "seconds": {"ours kpm": [], "ours ipm": [], "peft": []},
        }

    def run_ours(self) -> None:
        for method in METHODS:
            seconds, directions = ours(self.weight, self.covariance, self.rank, method)
            self.record["seconds"][f"ours {method}"].append(seconds)
            self.found["ours", method] = directions

    def run_peft(self) -> None:
        seconds, vectors, inversions = peft(self.weight, self.covariance)
        self.record["seconds"]["peft"].append(seconds)
        self.record["peft_damping"] = DAMPING * 2 ** (inversions - 1)
        self.found["peft", "kpm"] = vectors[:, -self.rank :].clone()
        self.found["peft", "ipm"] = vectors[:, : self.rank].clone()

    def judge(self) -> None:
        """Energies relative to the best that is possible, under the damping of either side."""
        found: dict[str, float] = {}
        for damping in sorted({DAMPING, self.record["peft_damping"]}):
            product = self.weight.double() @ damped(self.covariance, damping)
            squares = exact_values(product).square()
            best = {"ipm": squares[: self.rank].sum(), "kpm": squares[-self.rank :].sum()}
            for (side, method), directions in self.found.items():
                relative = energy(directions, product) / float(best[method])
                found[f"{side} {method}, damping {damping:g}"] = relative
            self.record.setdefault("condition", float((squares[0] / squares[-1]).sqrt()))
        self.record["energy_relative_to_optimum"] = found


def measure_layer(shape: str, kind: str, args: argparse.Namespace) -> dict:
    case = LayerCase(shape, kind, args.layer_rank)
    for number in range(args.repeats):
        in_turn(number, [case.run_ours, case.run_peft])
    if args.quality:
        case.judge()
    print(json.dumps(case.record), file=sys.stderr, flush=True)
    return case.record
