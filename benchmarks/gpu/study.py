"""The study of what adapters learn and forget, with settings that fit into minutes on a GPU.

    python -m benchmarks.gpu.study --model MODEL --data DATA

This runs `benchmarks.corda_training.finetune` with its `gpu` preset, shortened, arm by arm, so that what
there is time for is complete: one seed of every method first. Results go to
`benchmarks/results/gpu_study.{json,md,png}`; see there for the settings.
"""

from __future__ import annotations

import json
import sys

from ..corda_training import finetune
from .cells import checked_device, part_parser

# Shorter than the preset: a run takes about half a minute on a recent data-centre GPU.
SHORTER = {
    "steps": 250, "task_examples": 512, "questions": 1000, "windows": 256, "early_examples": 64,
    "calibration_questions": 512, "calibration_windows": 128,
}  # fmt: skip
TINY = {
    "rank": 2, "steps": 2, "batch_size": 2, "max_length": 60, "calibration_windows": 4,
    "calibration_questions": 4, "task_examples": 4, "early_examples": 2, "questions": 4, "windows": 2,
    "dtype": "float32",
}  # fmt: skip
# What decides the comparison comes first.
ARMS = (("lora", 1e-3), ("kpm", 1e-3), ("ipm", 5e-4), ("lora", 5e-4), ("kpm", 2e-3), ("lora", 2e-3))


def main(arguments: list[str] | None = None) -> None:
    parser = part_parser(__doc__)
    parser.add_argument("--model", required=True, help="Language model: a folder or a GGUF file.")
    parser.add_argument("--data", required=True, help="Folder of the data sets.")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="Seeds of training."
    )
    args = parser.parse_args(arguments)
    checked_device(args.device)
    shared = ["--data", args.data, "--model", args.model, "--preset", "gpu", "--name", "gpu_study"]
    shared += ["--settings", json.dumps(TINY if args.tiny else SHORTER), "--device", args.device]
    shared += ["--results", str(args.results), "--factors", str(args.results / "gpu_factors")]
    for seed in args.seeds[:1] if args.tiny else args.seeds:
        for method, rate in ARMS[:2] if args.tiny else ARMS:
            run = ["--methods", method, "--rates", str(rate), "--seeds", str(seed)]
            finetune.main([*shared, *run])


if __name__ == "__main__":
    sys.exit(main())
