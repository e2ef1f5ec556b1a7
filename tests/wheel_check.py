"""The built packages, in an environment of their own that has what they declare and nothing else.

    python tests/wheel_check.py

Builds sdist and wheel, the wheel from the sdist; installs the wheel in the versions of constraints.txt;
runs both command lines and a small job of each method there, away from the source. Then it runs what the
README says to install, with the wheel in place of the clone, and the README's examples as they are
pasted, which have to print what it shows. `make test` runs it after the tests, since it needs a package
index.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

JOB = """
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from transformers import LlamaConfig, LlamaForCausalLM
from kprune_ext import KPruneConfig, kprune
from peft_corda import CordaConfig, calibrate, export_lora

sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
sizes["intermediate_size"] = 64
batches = [{"input_ids": torch.randint(3, 50, (4, 8))} for _ in range(4)]

model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
config = CordaConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
before = model(**batches[0]).logits
calibrate(model, config, batches, verbose=False)
adapted = get_peft_model(model, config).eval()
assert torch.equal(adapted(**batches[0]).logits, before)
adapted.save_pretrained("adapter")
export_lora("adapter", "lora")

classifier = BertForSequenceClassification(BertConfig(**sizes)).eval()
pruned = kprune(classifier, batches, KPruneConfig(reduction=0.5), progress=False)
pruned.save_pretrained("pruned")
again = AutoModelForSequenceClassification.from_pretrained("pruned")
assert torch.equal(again(**batches[0]).logits, pruned(**batches[0]).logits)
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, text=True, capture_output=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def readme_examples(text: str) -> list[tuple[str, str]]:
    """Each Python block that is followed by what it prints, and that."""
    return re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", text, flags=re.DOTALL)


def install_lines(text: str) -> list[list[str]]:
    """The words of the commands of the section on installation, after `pip install`."""
    block = text.partition("## Install")[2].partition("```bash\n")[2].partition("```")[0]
    lines = [line.split() for line in block.splitlines() if line.strip()]
    assert lines and all(words[:2] == ["pip", "install"] for words in lines), lines
    return [words[2:] for words in lines]


def check_readme(python: Path, wheel: Path, folder: Path) -> None:
    """Installs what the README says, and runs its examples at the same time."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    places = {".": str(wheel), "constraints.txt": str(ROOT / "constraints.txt")}
    for words in install_lines(text):
        named = [places.get(word, word) for word in words]
        run(python, "-m", "pip", "install", "--quiet", *named, cwd=folder)
    examples = readme_examples(text)
    assert len(examples) == text.count("```python") == 2, len(examples)
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    running = [
        subprocess.Popen(
            [python, "-c", code],
            cwd=folder,
            env={**alone, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for code, _ in examples
    ]
    for process, (_, shown) in zip(running, examples, strict=True):
        printed, errors = process.communicate()
        assert process.returncode == 0, errors
        assert printed == shown, f"An example of the README prints\n{printed}\nand shows\n{shown}"


def build(folder: Path) -> tuple[Path, Path]:
    """Sdist and wheel."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def check_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"peft_corda", "kprune_ext"}, tops
    assert {"peft_corda/py.typed", "kprune_ext/py.typed"} <= set(names)
    assert "License-Expression: Apache-2.0" in text, text
    assert any(name.endswith("licenses/LICENSE") for name in names), names


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, wheel = build(folder)
        check_contents(wheel)
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / "bin" / "python"
        quiet = ("--quiet", "--disable-pip-version-check", "--constraint", ROOT / "constraints.txt")
        for package in ("torch", wheel):  # torch first, so that pip looks at one version only
            run(python, "-m", "pip", "install", *quiet, package, cwd=folder)
        run(python, "-m", "pip", "check", cwd=folder)
        for program, words in {
            "peft-corda": ("calibrate", "export"),
            "kprune": ("prune", "report"),
        }.items():
            module = {"peft-corda": "peft_corda", "kprune": "kprune_ext"}[program]
            for command in ((python.with_name(program),), (python, "-m", module)):
                shown = run(*command, "--help", cwd=folder)
                assert all(word in shown for word in words), shown
                run(*command, words[0], "--print_config", cwd=folder)
        run(python, "-c", JOB, cwd=folder)
        check_readme(python, wheel, folder)
    print("The wheel installs and works on its own, and the README's examples print what it shows.")


if __name__ == "__main__":
    main()
