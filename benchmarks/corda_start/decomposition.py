"""What a model loses with the k smallest components of every linear layer (CorDA, Table 6).

    python -m benchmarks.corda_start.decomposition --wikitext train.txt test.txt \\
        --nq train.jsonl validation.jsonl

The components of `W C` are ordered by what the layer does on the text that `C` comes from. Discarding
the k smallest of them, and multiplying by `C⁻¹`, leaves `W − U_k U_kᵀ W`, where `U_k` are the left
singular vectors with the smallest singular values. Three choices of `U_k` are compared by perplexity on
both corpora:

    svd             U_k of W itself
    corda(corpus)   U_k of W C, where C is the damped mean outer product of the inputs on that corpus
    sqrt(corpus)    U_k of W C^½: the eigenvectors of W C Wᵀ (not in the paper)

The paper finds that `corda` loses least when it is calibrated on the corpus that is measured, and still
less than `svd` when it is calibrated on the other one. Results go to
`benchmarks/results/corda_decomposition.json` and to a Markdown table beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from peft_corda.base_model.weights import decomposable, dense_weight
from peft_corda.decomposition.covariance import damped
from peft_corda.decomposition.directions import decompose

from ..common import corpora, linear_layers, models, records
from ..common.command_line import add_language_model, add_results, add_threads, make_parser

CORPORA = ("wikitext", "nq")
KS = [16, 32, 64, 128, 256]
JUDGED = [16, 64, 128]  # the k for which the order of the methods is judged

# From a layer's name and weight to the matrix that its weight is multiplied by.
Factor = Callable[[str, Tensor], Tensor]
# Mean loss of each window, by corpus.
Losses = dict[str, Tensor]


def discarded_count(k: int, shape: torch.Size) -> int:
    """The number of components that a layer loses: k, but at most half of what it has.

    Without the cap, a key or value projection would lose all of them, whatever the method.
    """
    return min(k, min(shape) // 2)


def plain(name: str, weight: Tensor) -> Tensor:
    """No weighting."""
    return torch.eye(weight.shape[1], dtype=torch.float64)


def weighted_by(covariances: Mapping[str, Tensor], root: bool) -> Factor:
    """`C`, or with `root` a factor `L` of it.

    As `L Lᵀ = C`, the left singular vectors and singular values of `W L` are those of `W C^½`.
    """

    def factor(name: str, weight: Tensor) -> Tensor:
        covariance = damped(covariances[name], linear_layers.DAMPING)
        return torch.linalg.cholesky(covariance) if root else covariance

    return factor


def smallest_directions(
    weights: Mapping[str, Tensor], factor: Factor, most: int
) -> dict[str, Tensor]:
    """The directions `U (out, …)` of each layer, the smallest component first."""
    directions = {}
    for name, weight in weights.items():
        count = discarded_count(most, weight.shape)
        found, _ = decompose(decomposable(weight), factor(name, weight), count, "kpm")
        directions[name] = found.U
    return directions


@contextmanager
def discarded(
    weights: Mapping[str, Tensor], directions: Mapping[str, Tensor], k: int
) -> Iterator[None]:
    """Run a block with the k smallest components discarded, then restore the weights."""
    originals = {name: weight.clone() for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            lost = directions[name][:, : discarded_count(k, weight.shape)]
            original = decomposable(weight)
            weight.copy_(original - lost @ (lost.T @ original))
        yield
    finally:
        for name, weight in weights.items():
            weight.copy_(originals[name])


def measure_all(
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    methods: Mapping[str, Factor],
    evaluation: Mapping[str, Tensor],
    args: argparse.Namespace,
) -> dict[tuple[str, int], Losses]:
    """The losses by method and k. The whole model, k = 0, is called `whole`."""

    def measure(method: str, k: int) -> Losses:
        start = time.perf_counter()
        losses = {
            name: models.window_losses(model, windows, args.batch_size)
            for name, windows in evaluation.items()
        }
        values = {name: models.perplexity(loss) for name, loss in losses.items()}
        seconds = round(time.perf_counter() - start, 1)
        print(json.dumps({"method": method, "k": k, **values, "seconds": seconds}), flush=True)
        return losses

    found = {("whole", 0): measure("whole", 0)}
    for method, factor in methods.items():
        directions = smallest_directions(weights, factor, max(args.k))
        for k in args.k:
            with discarded(weights, directions, k):
                found[method, k] = measure(method, k)
    return found


def order_of(found: Mapping[tuple[str, int], Losses], family: str, corpus: str, k: int) -> dict:
    """Whether calibrating on this corpus is better than on the other, and that better than none."""
    (other_corpus,) = set(CORPORA) - {corpus}
    own = found[f"{family}({corpus})", k][corpus]
    other = found[f"{family}({other_corpus})", k][corpus]
    svd = found["svd", k][corpus]
    return {
        "family": family,
        "corpus": corpus,
        "k": k,
        "perplexity": {
            "own": models.perplexity(own),
            "other": models.perplexity(other),
            "svd": models.perplexity(svd),
        },
        "own_to_other": models.compared(own, other),
        "other_to_svd": models.compared(other, svd),
        "holds": models.perplexity(own) < models.perplexity(other) < models.perplexity(svd),
    }


def as_report(
    found: Mapping[tuple[str, int], Losses],
    weights: Mapping[str, Tensor],
    settings: dict,
    origin: dict,
) -> dict:
    """All figures, as JSON."""
    ks = sorted({k for _, k in found})
    shapes = [weight.shape for weight in weights.values()]
    return {
        **origin,
        "settings": settings,
        "layers": len(weights),
        "layers_capped_at_half_their_components": {
            k: sum(discarded_count(k, shape) < k for shape in shapes) for k in ks
        },
        "runs": [
            {
                "method": method,
                "k": k,
                "perplexity": {name: models.perplexity(loss) for name, loss in losses.items()},
            }
            for (method, k), losses in found.items()
        ],
        "order": [
            order_of(found, family, corpus, k)
            for family in ("corda", "sqrt")
            for corpus in CORPORA
            for k in JUDGED
            if k in ks
        ],
    }


def as_markdown(report: dict) -> str:
    """A table per corpus, and whether the order of the methods holds."""
    settings = report["settings"]
    by_method: dict[str, dict[int, dict[str, float]]] = {}
    for run in report["runs"]:
        by_method.setdefault(run["method"], {})[run["k"]] = run["perplexity"]
    whole = by_method.pop("whole")[0]
    ks = list(next(iter(by_method.values())))
    counts = report["layers_capped_at_half_their_components"]
    capped = [f"{count} at k = {k}" for k, count in counts.items() if count]
    parts = [
        f"Perplexity of {settings['model']} after discarding the k smallest components of each of its "
        f"{report['layers']} linear layers; a layer loses half of its components at most "
        f"({', '.join(capped) or 'none'} reached that). Calibrated on "
        f"{settings['calibration_windows']} windows of {settings['length']} tokens, measured on "
        f"{settings['test_windows']} from another split, in {settings['dtype']}. "
        f"`{report['command']}`\n"
    ]
    for corpus in CORPORA:
        rows = [
            [method, shown(whole[corpus]), *(shown(values[k][corpus]) for k in ks)]
            for method, values in by_method.items()
        ]
        parts += [f"On {corpus}:\n", records.table(["method", "k = 0", *map(str, ks)], rows)]
    return "\n".join([*parts, *(statement(report["order"], f) for f in ("corda", "sqrt"))])


def shown(value: float) -> str:
    """A perplexity with two decimals, or with an exponent where it is large."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def statement(order: list[dict], family: str) -> str:
    """A sentence on whether the order holds: calibrated on this corpus < on the other < plain SVD."""
    rows = [row for row in order if row["family"] == family]
    if not rows:
        return f"{family}: the order of the methods was not looked at (k = {JUDGED}).\n"
    failed = [f"{row['corpus']} at k = {row['k']}" for row in rows if not row["holds"]]
    verdict = (
        f"does not hold on {', '.join(failed)}" if failed else f"holds in all {len(rows)} cases"
    )
    # Perplexity falls by `margin` standard errors from the right to the left of the order.
    margin, corpus, k, pair = min(
        (-row[pair]["log_ratio"] / row[pair]["standard_error"], row["corpus"], row["k"], pair)
        for row in rows
        for pair in ("own_to_other", "other_to_svd")
    )
    ks = ", ".join(str(k) for k in sorted({row["k"] for row in rows}))
    return (
        f"{family}: calibrated on the measured corpus < calibrated on the other < plain SVD {verdict} "
        f"(both corpora, k = {ks}). The smallest margin is that of {pair.replace('_', ' ')} on "
        f"{corpus} at k = {k}: {margin:.1f} standard errors, paired over the windows.\n"
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    split = {"nargs": 2, "type": Path, "required": True, "metavar": ("TRAIN", "TEST")}
    add("--wikitext", **split, help="Text files.")
    add("--nq", **split, help="JSON Lines files with the fields question and answer.")
    add_language_model(parser)
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="Precision.")
    add("--k", type=int, nargs="+", default=KS, help="Numbers of components to discard.")
    add("--length", type=int, default=256, help="Tokens per window.")
    add("--calibration-windows", type=int, default=64, help="Number of windows to calibrate on.")
    add("--test-windows", type=int, default=20, help="Number of windows to measure with.")
    add("--batch-size", type=int, default=4, help="Windows per batch.")
    add_threads(parser)
    add("--seed", type=int, default=0, help="Seed for drawing the calibration windows.")
    add_results(parser, "--output")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    model = models.load_model(args.model, getattr(torch, args.dtype))
    tokenizer = models.load_tokenizer(args.model)
    targets = linear_layers.linear_layers(model)
    methods: dict[str, Factor] = {"svd": plain}
    evaluation = {}
    for corpus in CORPORA:
        train, test = (
            corpora.cut(corpora.read_corpus(path), tokenizer, args.length)
            for path in getattr(args, corpus)
        )
        sample = corpora.drawn(train, args.calibration_windows, args.seed)
        found = linear_layers.covariances(model, targets, sample, args.batch_size)
        methods[f"corda({corpus})"] = weighted_by(found, root=False)
        methods[f"sqrt({corpus})"] = weighted_by(found, root=True)
        evaluation[corpus] = corpora.spread(test, args.test_windows)
    weights = {name: dense_weight(name, module) for name, module in targets.items()}
    losses = measure_all(model, weights, methods, evaluation, args)
    kept = ("dtype", "length", "calibration_windows", "test_windows", "batch_size", "seed")
    settings = {"model": records.model_label(args.model), "damping": linear_layers.DAMPING}
    settings |= {name: getattr(args, name) for name in kept}
    origin = records.provenance(__spec__.name, argv or sys.argv[1:])
    report = as_report(losses, weights, settings, origin)
    report["seconds"] = round(time.perf_counter() - start)
    records.write_report(args.output, "corda_decomposition", report, as_markdown(report))


if __name__ == "__main__":
    main()
