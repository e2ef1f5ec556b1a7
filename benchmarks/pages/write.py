"""Make the documentation's tables and pictures anew from the committed results.

    python -m benchmarks.pages.write

Tables are filled into the pages of docs/benchmarks, pictures are written to docs/pictures, and the
studies' own pictures in benchmarks/results are drawn again. No study is run.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..common.command_line import make_parser
from ..common.records import RESULTS
from ..corda_training import encoder, pareto, tradeoff
from ..kprune import accuracy, decoder_tables, recovery
from .pictures import PICTURES, draw
from .tables import fill

DOCS = Path(__file__).parents[2] / "docs"
_OWN = {
    "corda_finetune": tradeoff,
    "corda_finetune_rank8": tradeoff,
    "corda_forgetting": pareto,
    "corda_forgetting_mbpp": pareto,
    "corda_encoder": encoder,
    "corda_encoder_mrpc": encoder,
    "kprune_accuracy": accuracy,
    "kprune_recovery": recovery,
    "kprune_decoders": decoder_tables,
}


def main(given: list[str] | None = None) -> None:
    make_parser(__doc__).parse_args(given)
    for page in sorted((DOCS / "benchmarks").glob("*.md")):
        page.write_text(fill(page.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
    for name in PICTURES:
        draw(name, RESULTS, DOCS / "pictures")
    for name, study in _OWN.items():
        report = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        study.plot(report, RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
