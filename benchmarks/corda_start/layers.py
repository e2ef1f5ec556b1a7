"""Single synthetic layers at the sizes of 7B models, for `init.py`, made from a seed.

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
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig as PeftCordaConfig
from peft.tuners.lora.corda import collect_eigens_for_layer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_corda.decomposition.covariance import damped
from peft_corda.decomposition.directions import decompose

from ..common.linear_layers import DAMPING
from ..common.stopwatch import Seconds, Stopwatch
from .sides import in_turn

METHODS = ("kpm", "ipm")
WEIGHT_DECAY, VARIANCE_DECAY = 0.25, 1.2
MASSIVE, MASSIVE_FACTOR = 4, 100.0
FEW_TOKENS, TOKENS_PER_DIMENSION = 512, 2
ROWS = 2048  # tokens made at a time


class CountInversions(TorchDispatchMode):
    """Counts inversions: PEFT doubles its damping until its inverse is good enough, silently."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.count += "linalg_inv" in str(func)
        return func(*args, **(kwargs or {}))


def rotated(rows: Tensor, signs: Tensor) -> Tensor:
    """Rows in a dense orthonormal basis: random signs, then the Hartley transform.

    This is as good as a random rotation here, and takes `n log n` steps in place of `n²`.
    """
    spectrum = torch.fft.fft(rows * signs, norm="ortho")
    return spectrum.real - spectrum.imag


def random_signs(size: int, generator: torch.Generator) -> Tensor:
    """Signs `(size,)`, each 1 or −1."""
    given = {"generator": generator, "device": generator.device}
    return torch.randint(0, 2, (size,), **given) * 2.0 - 1.0


def power_law(size: int, exponent: float) -> Tensor:
    """The numbers from 1 to `size` to the power of `−exponent`."""
    return torch.arange(1, size + 1, dtype=torch.float32) ** -exponent


def gaussian(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Normal numbers `(rows, columns)`, on the generator's device."""
    return torch.randn(rows, columns, generator=generator, device=generator.device)


def make_weight(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A weight `(rows, columns)` in float32."""
    scaled = gaussian(rows, columns, generator) / columns**0.5
    scaled *= power_law(columns, WEIGHT_DECAY).to(scaled)
    return rotated(scaled, random_signs(columns, generator))


def make_covariance(size: int, tokens: int, generator: torch.Generator) -> Tensor:
    """The mean outer product `(size, size)` of as many tokens, in float32."""
    variances = power_law(size, VARIANCE_DECAY)
    variances[:MASSIVE] *= MASSIVE_FACTOR
    signs = random_signs(size, generator)
    variances = variances.to(signs)
    total = torch.zeros(size, size, device=generator.device)
    for start in range(0, tokens, ROWS):
        count = min(ROWS, tokens - start)
        rows = gaussian(count, size, generator) * variances.sqrt()
        rows = rotated(rows, signs)
        total.addmm_(rows.T, rows)
    return total / tokens


@torch.no_grad()
def ours(weight: Tensor, covariance: Tensor, rank: int, method: str) -> tuple[Seconds, Tensor]:
    """The time that `peft_corda` takes, and the directions that it finds."""
    watch = Stopwatch()
    found, _ = decompose(weight, damped(covariance, DAMPING), rank, method)
    return watch.read(), found.U


def peft(weight: Tensor, covariance: Tensor) -> tuple[Seconds, Tensor, int]:
    """The time that PEFT takes, all left singular vectors and the number of inversions.

    PEFT crops the vectors later.
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.covariance_matrix = covariance
    config = LoraConfig(init_lora_weights="corda", corda_config=PeftCordaConfig())
    watch = Stopwatch()
    with CountInversions() as inversions:
        eigens = collect_eigens_for_layer(layer, config)
    return watch.read(), eigens.U_WC, inversions.count


def exact_values(product: Tensor) -> Tensor:
    """The singular values of `W C` in float64, largest first.

    First, a QR decomposition makes the matrix square. Both steps are backward stable, so the values
    are as accurate as those of a plain decomposition, in a fraction of the time.
    """
    tall = product if product.shape[0] >= product.shape[1] else product.T
    return torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R)


def energy(directions: Tensor, product: Tensor) -> float:
    """`‖Uᵀ W C‖²` for the space that `U` spans; in float32, `U` is not quite orthonormal."""
    basis = torch.linalg.qr(directions.double()).Q
    return float((basis.T @ product).square().sum())


class LayerCase:
    """One weight and covariance, the times of both sides, and what each has found."""

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
        """Measure `peft_corda` with both methods."""
        for method in METHODS:
            seconds, directions = ours(self.weight, self.covariance, self.rank, method)
            self.record["seconds"][f"ours {method}"].append(seconds)
            self.found["ours", method] = directions

    def run_peft(self) -> None:
        """Measure PEFT, whose decomposition serves both methods."""
        seconds, vectors, inversions = peft(self.weight, self.covariance)
        self.record["seconds"]["peft"].append(seconds)
        self.record["peft_damping"] = DAMPING * 2 ** (inversions - 1)
        self.found["peft", "kpm"] = vectors[:, -self.rank :].clone()
        self.found["peft", "ipm"] = vectors[:, : self.rank].clone()

    def judge(self) -> None:
        """Record the energies relative to the best possible ones, for the damping of either side."""
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
    """The record of one layer, by both sides in turn."""
    case = LayerCase(shape, kind, args.layer_rank)
    for number in range(args.repeats):
        in_turn(number, [case.run_ours, case.run_peft])
    if args.quality:
        case.judge()
    print(json.dumps(case.record), file=sys.stderr, flush=True)
    return case.record
