"""Writes the files beside these scripts: what version 0.1 of both packages left on disk.

They were made once, with commit 23278c2 on the path, and are not to be made anew: the tests in
`tests/compatibility` are about files of the past. From a checkout of that commit in `OLD` (a full path):

    cd OLD && PYTHONPATH=OLD HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python \\
        THIS_REPOSITORY/tests/data/v0_1/make.py THIS_REPOSITORY/tests/data/v0_1

Nothing but public names is used, and the console programs' own tables of options. What is written:

    batches.safetensors     the inputs of all models: calibration batches of text, and images
    bases/NAME              tiny random models, so that no test depends on how weights are drawn
    factors/NAME            CordaFactors.save, by method and weighting
    adapters/NAME           save_pretrained of trained CORDA adapters
    exported/NAME           export_lora of one of them
    checkpoints/NAME        folders of calibrations that were cut off
    pruned/NAME             save_pretrained of pruned models; code beside them is called .py.txt
    on_pruned/NAME          adapters of pruned models, without a task: PEFT notes the model's module
    json/NAME               a latency table, reports, options, configs of both console programs
    names.json              public names, and all options of the console programs
    expected/KIND/NAME      what the old code computed from the above

"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
from make_corda import write_adapters, write_checkpoints, write_factors
from make_inputs import write_bases
from make_json import write_json_files
from make_kprune import write_pruned
from make_names import write_names

import kprune_ext
import peft_corda


def main() -> None:
    """Write everything into the folder that is given, in place of what is there but the scripts."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]).resolve()
    for package in (peft_corda, kprune_ext):
        if Path(str(package.__file__)).resolve().parents[1] != Path.cwd():
            sys.exit(
                f"{package.__name__} is that of {package.__file__}, not of the old commit here."
            )
    os.chdir(folder)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix != ".py":
            path.unlink()
    write_bases()
    write_factors()
    write_adapters()
    write_checkpoints()
    write_pruned()
    write_json_files()
    write_names()


if __name__ == "__main__":
    main()
