"""Run in a process of its own: load models with their Auto classes and compare what they give.

Usage: python kprune_process.py FOLDER plugin|remote [TOLERANCE]

FOLDER has cases.json, ``[[name, Auto class], …]``, and for each case a model in ``name/model``,
inputs and outputs in ``name/inputs`` and ``name/outputs`` (safetensors). Outputs are equal up to the
tolerance, which is 0 by default: kernels may round by where in memory a loaded weight begins.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file


def main(folder: Path, mode: str, tolerance: float) -> None:
    torch.set_num_threads(1)
    options = {}
    if mode == "plugin":
        import kprune_ext  # noqa: F401
    else:
        options = {"trust_remote_code": True}
    for name, auto in json.loads((folder / "cases.json").read_text()):
        source = folder / name / "model"
        model = getattr(transformers, auto).from_pretrained(source, **options)
        with torch.no_grad():
            output = model(**load_file(folder / name / "inputs"))
        for key, expected in load_file(folder / name / "outputs").items():
            close = {"rtol": tolerance, "atol": tolerance}
            assert torch.allclose(output[key], expected, **close), (name, key)
        if mode == "remote":
            model.save_pretrained(folder / name / "again")
            again = getattr(transformers, auto).from_pretrained(folder / name / "again", **options)
            for key, value in model.state_dict().items():
                assert torch.equal(again.state_dict()[key], value), (name, key)
    assert ("kprune_ext" in sys.modules) == (mode == "plugin")
    print("compared", len(json.loads((folder / "cases.json").read_text())))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float([*sys.argv, 0][3]))
