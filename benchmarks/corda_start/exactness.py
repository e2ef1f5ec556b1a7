"""How exact the start of an adapter is, for every linear layer of a real model.

    python -m benchmarks.corda_start.exactness --text train.txt

`W C` is the weight times the damped covariance. For the r largest singular values (`ipm`) the best r
orthonormal directions capture `S₁² + … + S_r²` of its energy `‖W C‖²`, for the r smallest (`kpm`)
they let through as little as `S_n² + …`. Both optima come from a float64 singular value decomposition.
The error is what the directions found miss of the first, or let through beyond the second, relative to
that optimum. Three kinds of directions are compared, with more calibration tokens than dimensions and
with fewer:

    peft_corda   `peft_corda.decomposition.directions.decompose`
    peft         `peft.tuners.lora.corda.collect_eigens_for_layer`, a float32 decomposition
    rounded      the directions of the float64 decomposition, rounded to float32

The second part compares the norms of the starting factors, `‖A‖ / ‖B‖`, after a short and after a
longer calibration. Training depends on them, so they should not depend on the length of the
calibration. Results go to `benchmarks/results/corda_exactness.json` and to Markdown tables beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_corda.base_model.weights import decomposable, dense_weight
from peft_corda.decomposition.covariance import damped
from peft_corda.decomposition.directions import decompose
from peft_corda.decomposition.starting_factors import starting_factors

from ..common import corpora, linear_layers, models, records
from ..common.command_line import add_language_model, add_results, add_threads, make_parser
from . import peft_reference

METHODS = ("ipm", "kpm")
RANKS = (16, 128)
SUBJECTS = ("peft_corda", "peft", "rounded")
NORM_RANK = 16
# Exponents of the singular values of W and the eigenvalues of C in the synthetic part.
WEIGHT_POWER, COVARIANCE_POWER = 1.0, 1.5

Case = tuple[str, int, str]  # method, rank, subject


def at_end(values: Tensor, method: str, rank: int) -> Tensor:
    """The end that the method wants of what a decomposition has found, sorted from the largest."""
    return values[..., :rank] if method == "ipm" else values[..., -rank:]


def energy_errors(weight: Tensor, covariance: Tensor) -> dict[Case, float]:
    """The relative errors of one layer.

    They are negative only where rounding has made a vector too long or too short.
    """
    damped_covariance = damped(covariance, linear_layers.DAMPING)
    product = weight.double() @ damped_covariance
    left, values, _ = torch.linalg.svd(product, full_matrices=False)
    theirs = peft_reference.eigens_of(weight, covariance).U_WC
    errors = {}
    for method in METHODS:
        for rank in RANKS:
            best = at_end(values, method, rank).square().sum()
            found = {
                "peft_corda": decompose(weight, damped_covariance, rank, method)[0].U,
                "peft": at_end(theirs, method, rank),
                "rounded": at_end(left, method, rank).float(),
            }
            for subject, directions in found.items():
                energy = (directions.double().T @ product).square().sum()
                error = float(energy / best - 1)
                errors[method, rank, subject] = error if method == "kpm" else -error
    return errors


def summary(values: Mapping[str, float]) -> dict:
    """The greatest value with its layer, and the median."""
    worst = max(values, key=values.__getitem__)
    return {"worst": values[worst], "layer": worst, "median": median(values.values())}


def energy_rows(
    calibration: str, weights: Mapping[str, Tensor], covariances: Mapping[str, Tensor]
) -> list[dict]:
    """The worst and the median error by case, over the layers of each type and over all layers."""
    errors: dict[Case, dict[str, float]] = {}
    for name, weight in weights.items():
        for case, error in energy_errors(weight, covariances[name]).items():
            errors.setdefault(case, {})[name] = error
    rows = []
    for (method, rank, subject), by_layer in errors.items():
        case = {"calibration": calibration, "method": method, "rank": rank, "subject": subject}
        types = dict.fromkeys(name.rsplit(".", 1)[-1] for name in by_layer)
        for kind in ("all", *types):
            chosen = {n: e for n, e in by_layer.items() if kind in ("all", n.rsplit(".", 1)[-1])}
            rows.append({**case, "type": kind, **summary(chosen)})
    return rows


def synthetic_rows(size: int, seed: int) -> list[dict]:
    """The errors of a random square layer whose spectra fall like powers."""
    torch.manual_seed(seed)
    first, second, third = (
        torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q for _ in range(3)
    )
    index = torch.arange(1, size + 1, dtype=torch.float64)
    weight = (first * index**-WEIGHT_POWER) @ second.T
    covariance = (third * index**-COVARIANCE_POWER) @ third.T
    return [
        {"size": size, "method": method, "rank": rank, "subject": subject, "error": error}
        for (method, rank, subject), error in energy_errors(
            weight.float(), covariance.float()
        ).items()
    ]


def norm_ratios(weight: Tensor, covariance: Tensor) -> dict[tuple[str, str], float]:
    """`‖A‖ / ‖B‖` of the starting factors, by method and scaling."""
    ratios = {}
    for method in METHODS:
        found, _ = decompose(weight, damped(covariance, linear_layers.DAMPING), NORM_RANK, method)
        for scaling in ("balanced", "paper"):
            a, b = starting_factors(weight, found.U, found.S, scaling, adapter_scale=1.0)
            ratios[method, scaling] = float(a.norm() / b.norm())
    return ratios


def peft_norm_ratios(weight: Tensor, covariance: Tensor) -> dict[tuple[str, str], float]:
    """`‖A‖ / ‖B‖` of the factors that PEFT starts with (`corda_init`)."""
    eigens = peft_reference.eigens_of(weight, covariance)
    ratios = {}
    for method in METHODS:
        u, s, v = (at_end(x, method, NORM_RANK) for x in (eigens.U_WC, eigens.S_WC, eigens.V_WC))
        ratios[method, "peft"] = float((v * s.sqrt()).norm() / (u * s.sqrt()).norm())
    return ratios


def norm_rows(
    model: PreTrainedModel, targets: Mapping[str, nn.Module], lengths: Mapping[str, Tensor]
) -> list[dict]:
    """The factor between `‖A‖ / ‖B‖` after two calibrations, worst and median over the layers."""
    found: dict[str, dict[tuple[str, str], dict[str, float]]] = {}
    for length, windows in lengths.items():
        ours = linear_layers.covariances(model, targets, windows, batch_size=1)
        theirs = peft_reference.covariances(model, targets, windows)
        for name, module in targets.items():
            weight = decomposable(dense_weight(name, module))
            ratios = norm_ratios(weight, ours[name]) | peft_norm_ratios(weight, theirs[name])
            for case, ratio in ratios.items():
                found.setdefault(length, {}).setdefault(case, {})[name] = ratio
    short, long = found.values()
    rows = []
    for (method, scaling), ratios in short.items():
        apart = {n: r / long[method, scaling][n] for n, r in ratios.items()}
        row = {"method": method, "scaling": scaling}
        row |= {"apart": summary({n: max(r, 1 / r) for n, r in apart.items()})}
        for length, values in found.items():
            every = values[method, scaling].values()
            row[length] = {"least": min(every), "median": median(every), "greatest": max(every)}
        rows.append(row)
    return rows


def energy_table(rows: list[dict], kinds: list[str]) -> str:
    """The errors of these types of layers."""
    cells: dict[tuple, dict[str, str]] = {}
    for row in rows:
        if row["type"] in kinds:
            key = (row["type"], row["calibration"], row["method"], str(row["rank"]))
            cells.setdefault(key, {})[row["subject"]] = f"{row['median']:.1e}, {row['worst']:.1e}"
    header = ["layers", "calibration", "method", "r", *SUBJECTS]
    ordered = sorted(cells.items(), key=lambda item: kinds.index(item[0][0]))
    return records.table(header, [[*key, *(v[s] for s in SUBJECTS)] for key, v in ordered])


def as_markdown(report: dict) -> str:
    """All tables."""
    settings = report["settings"]
    lengths = [name for name in settings["tokens"] if name not in ("full", "deficient")]
    raised = ", ".join(f"{n} ({name})" for name, n in report["peft_raised_damping"].items())
    parts = [
        f"Relative error in energy, median and worst over the {report['layers']} linear layers of "
        f"{settings['model']}. Calibrated on {settings['tokens']['full']:,} tokens (full) or "
        f"{settings['tokens']['deficient']} (deficient: fewer than dimensions). Layers for which PEFT "
        f"raised the damping: {raised}. `{report['command']}`\n",
        energy_table(report["energy"], ["all"]),
        "The same by type of layer:\n",
        energy_table(
            report["energy"],
            [k for k in dict.fromkeys(r["type"] for r in report["energy"]) if k != "all"],
        ),
        f"`‖A‖ / ‖B‖` of the start at r = {NORM_RANK}, after {' and '.join(lengths)}: factor between "
        "the two calibrations, median and worst over the layers; and its range over the layers.\n",
        records.table(
            ["method", "scaling", "factor", *lengths],
            [
                [row["method"], row["scaling"]]
                + [f"{row['apart']['median']:.3g}, {row['apart']['worst']:.3g}"]
                + [f"{row[n]['least']:.2g} to {row[n]['greatest']:.2g}" for n in lengths]
                for row in report["norms"]
            ],
        ),
    ]
    if report["synthetic"]:
        rows = [
            [f"{v:.1e}" if k == "error" else str(v) for k, v in r.items()]
            for r in report["synthetic"]
        ]
        parts += [
            "Random layer, spectra falling like powers:\n",
            records.table(list(report["synthetic"][0]), rows),
        ]
    return "\n".join(parts)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--text", type=Path, required=True, help="Text file to calibrate on.")
    add_language_model(parser)
    about = "Also judge a random square layer of this size; 4096 without a number."
    add("--large", type=int, nargs="?", const=4096, metavar="SIZE", help=about)
    add_threads(parser)
    add("--seed", type=int, default=0, help="Seed for drawing the calibration windows.")
    add_results(parser, "--output")
    return parser.parse_args(argv)


def calibrations(args: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The windows for the energies, and those for the norms."""
    tokenizer, text = models.load_tokenizer(args.model), corpora.read_corpus(args.text)
    windows = corpora.drawn(corpora.cut(text, tokenizer, 256), 64, args.seed)
    long = corpora.drawn(corpora.cut(text, tokenizer, 1000), 10, args.seed)
    return (
        {"full": windows, "deficient": windows[:1, :128]},
        {"1 x 100 tokens": long[:1, :100], "10 x 1,000 tokens": long},
    )


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    model = models.load_model(args.model, torch.float32)
    targets = linear_layers.linear_layers(model)
    weights = {name: dense_weight(name, module) for name, module in targets.items()}
    for_energy, for_norms = calibrations(args)
    energy, raised = [], {}
    for calibration, windows in for_energy.items():
        found = linear_layers.covariances(model, targets, windows)
        raised[calibration] = sum(peft_reference.raises_damping(found[name]) for name in targets)
        energy += energy_rows(calibration, weights, found)
        print(f"{calibration}: {time.perf_counter() - start:.0f} s", flush=True)
    report = {
        **records.provenance(__spec__.name, argv or sys.argv[1:]),
        "settings": {
            "model": records.model_label(args.model),
            "seed": args.seed,
            "damping": linear_layers.DAMPING,
            "tokens": {n: w.numel() for n, w in (for_energy | for_norms).items()},
            "synthetic": {"weight_power": WEIGHT_POWER, "covariance_power": COVARIANCE_POWER},
        },
        "layers": len(targets),
        "peft_raised_damping": raised,
        "energy": energy,
        "norms": norm_rows(model, targets, for_norms),
        "synthetic": synthetic_rows(args.large, args.seed) if args.large else [],
    }
    report["seconds"] = round(time.perf_counter() - start)
    records.write_report(args.output, "corda_exactness", report, as_markdown(report))


if __name__ == "__main__":
    main()
