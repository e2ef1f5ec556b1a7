"""What `test_corda_unreached.py` has two processes do: neither's first batch reaches all targets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from peft_corda import CordaConfig, calibrate
from tests.helpers.corda import bytes_of
from tests.helpers.two_sided import tiny_llava, with_images

TEXT, IMAGES = with_images([0, 0]), with_images([2, 1])
SHARES = {
    "images in the second": [[TEXT, TEXT], [TEXT, IMAGES]],
    "images in the first": [[TEXT, IMAGES], [TEXT]],
    "empty first": [[{}, {}], [{}, TEXT, IMAGES, {}]],
    "none": [[TEXT], [TEXT, TEXT]],
}


def run(batches: list[dict], limit: int | None = None) -> Any:
    config = CordaConfig(r=4, corda_method="kpm", target_modules="all-linear")
    try:
        return bytes_of(calibrate(tiny_llava(), config, batches, limit, progress=False))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    seen = {}
    for name, shares in SHARES.items():
        seen[name] = run(shares[rank])
        seen[name, "passes"] = run(shares[rank], 2**15)
    torch.save(seen, folder / f"seen-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
