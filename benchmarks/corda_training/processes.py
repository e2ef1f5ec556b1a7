"""One process against two, one thread each: wall time of calibration and of decomposition.

    python -m benchmarks.corda_training.processes

A random Llama model is calibrated on the same sequences, divided among the processes. This needs as many
idle cores as processes. Statistics and decompositions are timed apart, by the calls that `calibrate`
makes. Results go to `benchmarks/results/corda_processes.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM

from kprune_ext.common.processes import Processes
from peft_corda import CordaConfig
from peft_corda.base_model.forward import Runner
from peft_corda.base_model.input_groups import discover
from peft_corda.base_model.targets import find_targets
from peft_corda.calibration.collect import PassOptions, collect_covariances
from peft_corda.calibration.decompose import factorise

from ..common.command_line import add_child, make_parser
from ..common.records import RESULTS


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--hidden", type=int, default=576, help="Width of the model.")
    add("--blocks", type=int, default=8, help="Number of blocks.")
    add("--sequences", type=int, default=32, help="Number of sequences.")
    add("--length", type=int, default=256, help="Tokens per sequence.")
    add("--rank", type=int, default=32, help="Rank.")
    add("--method", default="kpm", choices=["kpm", "ipm"], help="Method.")
    add("--repeats", type=int, default=3, help="Number of rounds; the fastest one counts.")
    add("--report", type=Path, default=RESULTS / "corda_processes.json", help="File to write.")
    add_child(parser, type=Path)
    return parser.parse_args(argv)


def make_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": 8 * args.hidden // 3}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    if args.hidden % 9:
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=1024, num_hidden_layers=args.blocks, **sizes, **heads)
    return LlamaForCausalLM(config).eval()


def child(args: argparse.Namespace) -> None:
    """Time both parts in one of several processes, which wait for the slowest."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    processes, model = Processes(), make_model(args)
    config = CordaConfig(r=args.rank, corda_method=args.method, target_modules="all-linear")
    ids = torch.randint(1024, (args.sequences, args.length))
    batches = [{"input_ids": row[None]} for row in ids[processes.rank :: processes.count]]
    targets = find_targets(model, config)
    runner = Runner(model, targets)
    groups = discover(runner, {"input_ids": ids[:1]}).groups
    times: dict[str, list[float]] = {"statistics": [], "decomposition": []}
    for _ in range(args.repeats):
        distributed.barrier()
        start = time.perf_counter()
        options = PassOptions(processes=processes)
        covariances = collect_covariances(runner, batches, groups, options)
        distributed.barrier()
        middle = time.perf_counter()
        factorise(groups, covariances, targets, config, [args.method], processes)
        distributed.barrier()
        times["statistics"].append(middle - start)
        times["decomposition"].append(time.perf_counter() - middle)
    if processes.is_main:
        args.one.write_text(json.dumps(times))
    distributed.destroy_process_group()


def measured(count: int, arguments: list[str]) -> dict[str, list[float]]:
    """The times with this number of processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    module = ["--module", __spec__.name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times.json"
        subprocess.run(
            [*launch, f"--nproc_per_node={count}", *module, *arguments, "--one", str(path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
        )
        return json.loads(path.read_text())


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    args = parse_arguments(arguments)
    if args.one is not None:
        child(args)
        return
    seconds = {count: measured(count, arguments) for count in (1, 2)}
    best = {count: {part: min(own) for part, own in t.items()} for count, t in seconds.items()}
    speedup = {part: best[1][part] / best[2][part] for part in best[1]}
    settings = {key: value for key, value in vars(args).items() if key not in ("one", "report")}
    args.report.write_text(
        json.dumps({"settings": settings, "seconds": seconds, "speedup": speedup}, indent=1) + "\n"
    )
    print("| part | 1 process, s | 2 processes, s | speed-up |\n| --- | --- | --- | --- |")
    for part, gain in speedup.items():
        print(f"| {part} | {best[1][part]:.2f} | {best[2][part]:.2f} | {gain:.2f}× |")


if __name__ == "__main__":
    main()
