"""CorDA's start on a device: statistics, decompositions and a whole model, against PEFT's own.

    python -m benchmarks.gpu.start

Layers have the shapes of Llama-7B's; the model is a random one of Llama-3.2-1B's shape, its weights with
the decaying spectra of `corda_start.layers`. PEFT decomposes every layer in full, so its time for the
model is put together from its statistics, measured on the whole model, and its decomposition, measured
once for every shape. Results go to `benchmarks/results/gpu_start.{json,md}`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig as PeftCordaConfig
from peft.tuners.lora.corda import calib_cov_distribution
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_corda import CordaConfig, calibrate
from peft_corda.decomposition.covariance import CovarianceAccumulator, damped
from peft_corda.decomposition.directions import decompose

from ..common.linear_layers import DAMPING
from ..common.memory import MIB
from ..common.records import table
from ..corda_start.layers import make_covariance, make_weight
from ..corda_start.peft_reference import eigens_of
from ..corda_start.sides import clear_peft
from .cells import Cells, part_parser, peak_of, product_rate, seconds_of

METHODS = ("kpm", "ipm")
SHAPES = ("4096x4096", "11008x4096", "4096x11008")
TINY_SHAPES = ("48x48", "96x48", "48x96")


def random_model(tiny: bool, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """A random model of Llama-3.2-1B's shape."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256}
    if tiny:
        sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99}
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, dtype=dtype))
    model = model.to(dtype).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for module in linears(model).values():
            module.weight.copy_(make_weight(*module.weight.shape, generator))
    return model


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{name}"
    }


def batches_of(
    model: LlamaForCausalLM, count: int, size: int, length: int
) -> list[dict[str, Tensor]]:
    """Random tokens on the model's device."""
    generator = torch.Generator().manual_seed(1)
    shape = (count * size, length)
    ids = torch.randint(3, model.config.vocab_size, shape, generator=generator).to(model.device)
    return [{"input_ids": part} for part in ids.split(size)]


def statistics_cell(
    features: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Time and error of the sum of a layer's inputs, against float64."""
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(tokens, features, generator=generator, device=device)
    rows *= torch.linspace(0.01, 2.0, features, device=device)
    rows = rows.to(dtype)
    times = []
    for _ in range(6):
        accumulator = CovarianceAccumulator(features, device)
        times.append(seconds_of(lambda a=accumulator: a.update(rows), device))
    exact = rows.double().T @ rows.double() / tokens
    error = (accumulator.finish().matrix - exact).norm() / exact.norm()
    return {
        "seconds": min(times[1:]),
        "flops_per_second": tokens * features**2 / min(times[1:]),  # symmetric: half the products
        "relative_error": float(error),
    }


def layer_case(shape: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """A weight in bfloat16, and a covariance from twice as many tokens as dimensions."""
    rows, columns = (int(size) for size in shape.split("x"))
    generator = torch.Generator(device).manual_seed(0)
    weight = make_weight(rows, columns, generator).bfloat16()
    return weight, make_covariance(columns, 2 * columns, generator)


def best_energy(product: Tensor, method: str, rank: int) -> float:
    """The largest energy of so many directions (ipm), or the smallest (kpm), in float64.

    The smallest come from the inverse of a triangle, since a Gram matrix would lose their digits.
    """
    tall = product if product.shape[0] >= product.shape[1] else product.T
    triangle = torch.linalg.qr(tall, mode="r").R
    if method == "ipm":
        return float(torch.linalg.eigvalsh(triangle @ triangle.T)[-rank:].sum())
    identity = torch.eye(len(triangle), dtype=triangle.dtype, device=triangle.device)
    inverse = torch.linalg.solve_triangular(triangle, identity, upper=True)
    return float((1 / torch.linalg.eigvalsh(inverse @ inverse.T)[-rank:]).sum())


@torch.no_grad()
def ours_layer_cell(shape: str, method: str, rank: int, device: torch.device) -> dict[str, Any]:
    """Time and memory of our decomposition of one layer."""
    weight, covariance = layer_case(shape, device)

    def run() -> Tensor:
        matrix = damped(covariance, DAMPING, covariance.dtype)
        return decompose(weight.float(), matrix, rank, method)[0].U

    run()  # what the libraries set up once
    found, about = peak_of(run, device)
    exact = weight.double() @ damped(covariance, DAMPING)
    best = best_energy(exact, method, rank)
    energy = (torch.linalg.qr(found.double()).Q.T @ exact).square().sum()
    return about | {"energy_relative_to_optimum": float(energy) / best}


@torch.no_grad()
def peft_layer_cell(shape: str, device: torch.device) -> dict[str, Any]:
    """Time and memory of PEFT's decomposition of one layer, for any method and rank."""
    eigens_of(*layer_case("64x64", device))  # what the libraries set up once
    weight, covariance = layer_case(shape, device)
    return peak_of(lambda: eigens_of(weight, covariance), device)[1]


def ours_model_cell(model: LlamaForCausalLM, batches: list, method: str, rank: int) -> dict:
    """Time of `calibrate` and `get_peft_model` on the whole model, and the memory of the former."""
    config = CordaConfig(corda_method=method, r=rank, target_modules="all-linear")
    factors, about = peak_of(
        lambda: calibrate(model, config, batches, progress=False), model.device
    )
    adapted, start = peak_of(lambda: get_peft_model(model, config), model.device)
    adapted.unload()
    about["seconds"] += start["seconds"]
    return about | {"get_peft_model": start["seconds"], "modules": len(factors.modules)}


def peft_model_cell(model: LlamaForCausalLM, batches: list) -> dict:
    """Time and memory of PEFT's statistics on the whole model, one sequence at a time."""
    names = sorted({name.rpartition(".")[2] for name in linears(model)})
    config = LoraConfig(
        init_lora_weights="corda",
        corda_config=PeftCordaConfig(corda_method="kpm"),
        target_modules=names,
    )

    def run_model() -> None:
        for batch in batches:
            for ids in batch["input_ids"].split(1):
                model.model(input_ids=ids, use_cache=False)

    _, about = peak_of(
        lambda: calib_cov_distribution(model, config, run_model, None, None), model.device
    )
    clear_peft(model)
    shapes = Counter(f"{m.out_features}x{m.in_features}" for m in linears(model).values())
    return about | {"shapes": dict(shapes)}


@torch.no_grad()
def forward_cell(model: LlamaForCausalLM, batches: list) -> dict[str, float]:
    """What no statistics can do without: the model's own forward passes."""
    run = lambda: [model.model(**batch, use_cache=False) and None for batch in batches]  # noqa: E731
    run()
    return peak_of(run, model.device)[1]


def whole_model(cells: Cells, rank: int) -> None:
    """All cells of the whole model."""
    count, size, length = (2, 2, 16) if cells.tiny else (32, 4, 1024)
    model = random_model(cells.tiny, torch.bfloat16, cells.device)
    batches = batches_of(model, count, size, length)
    cells.report["model"] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": count * size * length,
        "rank": rank,
    }
    cells.run("model: forward alone", partial(forward_cell, model, batches))
    for method in METHODS:
        key = f"model: ours, {method}"
        cells.run(key, partial(ours_model_cell, model, batches, method, rank))
    cells.run("model: PEFT's statistics", partial(peft_model_cell, model, batches))
    for shape in cells.report["cells"]["model: PEFT's statistics"].get("shapes", {}):
        cells.run(f"layer {shape}: PEFT", partial(peft_layer_cell, shape, cells.device))


def peft_total(cells: dict[str, Any]) -> float | None:
    """PEFT's seconds for the whole model: its statistics, and each shape as often as it occurs."""
    statistics = cells.get("model: PEFT's statistics", {})
    if "shapes" not in statistics:
        return None
    total = statistics["seconds"]
    for shape, count in statistics["shapes"].items():
        cell = cells.get(f"layer {shape}: PEFT", {})
        if "seconds" not in cell:
            return None
        total += count * cell["seconds"]
    return float(total)


def as_markdown(report: dict[str, Any]) -> str:
    """All cells, and the whole model against PEFT."""
    cells = report["cells"]
    rows = []
    for key, cell in cells.items():
        memory = f"{cell['peak_bytes'] / MIB:,.0f} MiB" if "peak_bytes" in cell else "–"
        seconds = f"{cell['seconds']:.4g} s" if "seconds" in cell else cell.get("error", "–")
        more = {k: v for k, v in cell.items() if k not in ("seconds", "peak_bytes", "error")}
        rows.append([key, seconds, memory, ", ".join(f"{k} {_short(v)}" for k, v in more.items())])
    lines = [
        f"# CorDA's start on {report['device']}",
        "",
        f"`{report['provenance']['command']}`",
        "",
        table(["what", "time", "peak above the start", "more"], rows),
    ]
    total = peft_total(cells)
    if total is not None:
        for method in METHODS:
            own = cells.get(f"model: ours, {method}", {})
            if "seconds" in own:
                lines.append(
                    f"- whole model, {method}: {own['seconds']:.1f} s, PEFT {total:.1f} s: "
                    f"{total / own['seconds']:.1f} times as long{_memory_text(own, cells)}."
                )
    return "\n".join([*lines, ""])


def _memory_text(own: dict[str, Any], cells: dict[str, Any]) -> str:
    theirs = cells["model: PEFT's statistics"].get("peak_bytes")
    if theirs is None or "peak_bytes" not in own:
        return ""
    return f"; peak {theirs / own['peak_bytes']:.1f} times as much in PEFT's statistics alone"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    args = part_parser(__doc__).parse_args(given)
    cells = Cells("gpu_start", __spec__.name, args, given, as_markdown)
    device, tiny = cells.device, cells.tiny
    shapes, rank = (TINY_SHAPES, 8) if tiny else (SHAPES, 128)
    for dtype in ("float64", "float32", "bfloat16"):
        measure: Callable[[], dict] = lambda d=dtype: {  # noqa: E731
            "flops_per_second": product_rate(getattr(torch, d), device, 128 if tiny else 8192)
        }
        cells.run(f"product rate, {dtype}", measure)
    for features in (48,) if tiny else (4096, 11008):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            run = partial(statistics_cell, features, 64 if tiny else 8192, dtype, device)
            cells.run(f"statistics of {features} features, {str(dtype)[6:]}", run)
    for shape in shapes:
        for method in METHODS:
            run = partial(ours_layer_cell, shape, method, rank, device)
            cells.run(f"layer {shape}: ours, {method}", run)
    whole_model(cells, rank)
    for shape in shapes:
        cells.run(f"layer {shape}: PEFT", partial(peft_layer_cell, shape, device))
    cells.finish()


if __name__ == "__main__":
    main()
