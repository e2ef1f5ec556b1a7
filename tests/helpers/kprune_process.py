"""Run in a process of its own: load models with their Auto classes and compare what they give.

Usage: python kprune_process.py FOLDER plugin|remote|alone

With `plugin` kprune_ext is imported, with `remote` the code beside the models is run, and with `alone`
there is neither: kprune_ext cannot be found at all.

FOLDER has a file for each of these, such as plugin.json, ``[[name, Auto class, tolerance], …]``, and for
each case a model in ``name/model``, inputs and outputs in ``name/inputs`` and ``name/outputs``
(safetensors). Outputs are equal up to the tolerance: kernels may round by where in memory a loaded
weight begins.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file


class Hidden:
    """Finder by which our packages do not exist, wherever they are installed."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in ("kprune_ext", "peft_corda"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(folder: Path, mode: str) -> None:
    torch.set_num_threads(1)
    options: dict[str, Any] = {}
    if mode == "plugin":
        import kprune_ext  # noqa: F401
    elif mode == "alone":
        sys.meta_path.insert(0, Hidden)  # type: ignore[arg-type]
    else:
        options = {"trust_remote_code": True}
    cases = json.loads((folder / f"{mode}.json").read_text())
    for name, auto, tolerance in cases:
        source = folder / name / "model"
        model = getattr(transformers, auto).from_pretrained(source, **options)
        with torch.no_grad():
            output = model(**load_file(folder / name / "inputs"))
        for key, expected in load_file(folder / name / "outputs").items():
            close = {"rtol": tolerance, "atol": tolerance}
            assert torch.allclose(output[key], expected, **close), (name, key)
        if mode == "alone":
            assert type(model).__module__.startswith("transformers.models."), name
        if mode != "plugin":
            model.save_pretrained(folder / name / "again")
            again = getattr(transformers, auto).from_pretrained(folder / name / "again", **options)
            for key, value in model.state_dict().items():
                assert torch.equal(again.state_dict()[key], value), (name, key)
    assert ("kprune_ext" in sys.modules) == (mode == "plugin")
    print("compared", len(cases))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
