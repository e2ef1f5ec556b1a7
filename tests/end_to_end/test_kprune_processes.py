"""Every family and task in new processes: with the plugin, and without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, ViTImageProcessor, pipeline

from kprune_ext import KPruneConfig, kprune, load_report
from kprune_ext.architectures.table import find_architecture
from kprune_ext.checkpoint_files.self_contained import MODELING_FILE
from kprune_ext.modeling.classes import kept_units
from kprune_ext.modeling.copying import record_kept, uneven_copy
from kprune_ext.units.sublayers import sublayers
from kprune_ext.units.surgery import shrink
from tests.helpers.kprune import padded, sequences, tiny_bert, word_tokenizer
from tests.helpers.kprune_checkpoints import equal_cut, write_case, write_cases
from tests.helpers.kprune_models import CASES, auto_class, batches_for, tiny

TESTS = Path(__file__).parents[1]


def run(script: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """A process that keeps remote code out of the user's cache, and has no terminal to ask."""
    environment = os.environ | {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        [sys.executable, *script],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
    )


def cut(model, heads, neurons):
    """A copy with these heads in each layer, and these neurons."""
    pruned = uneven_copy(model)
    units = [indices for pair in zip(heads, neurons, strict=True) for indices in pair]
    for sublayer, kept in zip(sublayers(pruned, find_architecture(pruned)), units, strict=True):
        shrink(sublayer, kept)
    record_kept(pruned, list(zip(heads, neurons, strict=True)))
    return pruned


def with_empty_sublayers(model):
    """No heads in the first layer, no neurons in the last one, uneven in between."""
    last = len(kept_units(model.config)[0].neurons)
    return cut(model, [[], [1, 3]], [[0, *range(2, last, 3)], []])


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A self-contained checkpoint of every family and task, in either layout."""
    folder = tmp_path_factory.mktemp("cases")
    cases: dict[str, list[tuple[str, str, float]]] = {"free": [], "uniform": []}
    for layout, prune in (("free", with_empty_sublayers), ("uniform", equal_cut)):
        for number, (family, task) in enumerate(CASES):
            name = f"{layout} {number:02} {family} {task}"
            write_case(folder, name, prune(tiny(family, task)), batches_for(family, 4)[0])
            cases[layout].append((name, auto_class(task).__name__, 0.0))
    write_cases(folder, cases)
    return folder


@pytest.mark.parametrize(("mode", "layouts"), [("plugin", 2), ("remote", 1), ("alone", 1)])
def test_every_family_and_task_in_a_new_process(
    mode: str, layouts: int, saved: Path, tmp_path
) -> None:
    """What is loaded without the package is also saved again, by transformers alone."""
    done = run([str(TESTS / "helpers" / "kprune_process.py"), str(saved), mode], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith(f"compared {layouts * len(CASES)}")


def test_without_the_plugin_the_message_names_it(tmp_path) -> None:
    """As far as transformers lets a checkpoint: the model type, or the repository with its card."""
    pruned = kprune(tiny_bert(), padded(sequences(8)), progress=False)
    pruned.save_pretrained(tmp_path / "plain")
    pruned.save_pretrained(tmp_path / "with code", self_contained=True)
    script = """
import sys
from transformers import AutoConfig, AutoModelForSequenceClassification
for source in sys.argv[1:]:
    for auto in (AutoConfig, AutoModelForSequenceClassification):
        try:
            auto.from_pretrained(source)
        except ValueError as error:
            print("MESSAGE", " ".join(str(error).split()))
"""
    done = run(["-c", script, str(tmp_path / "plain"), str(tmp_path / "with code")], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    messages = [line for line in done.stdout.splitlines() if "MESSAGE" in line]
    assert len(messages) == 4
    assert all("model type `kprune_ext_bert`" in message for message in messages[:2])
    assert all("trust_remote_code=True" in message for message in messages[2:])
    card = (tmp_path / "with code" / "README.md").read_text()
    assert "import kprune_ext" in card and f"`{MODELING_FILE}`" in card


def test_the_code_belongs_to_the_self_contained_form_only(tmp_path) -> None:
    pruned = kprune(tiny_bert(), padded(sequences(8)), KPruneConfig(), progress=False)
    pruned.save_pretrained(tmp_path, self_contained=True)
    text = (tmp_path / MODELING_FILE).read_text()
    compile(text, MODELING_FILE, "exec")
    assert len(text.splitlines()) < 270
    imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert all(
        line.split()[1].partition(".")[0] in {"torch", "transformers", *sys.stdlib_module_names}
        for line in imports
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModelForSequenceClassification"] == (
        "modeling_kprune_ext.KPruneBertForSequenceClassification"
    )
    assert "auto_map" not in pruned.config.to_dict()

    # With the plugin, the code is not run; saved again without asking for it, it is not there.
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(pruned)
    loaded.save_pretrained(tmp_path)
    assert not (tmp_path / MODELING_FILE).exists()
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert load_report(tmp_path) == pruned.kprune_report


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("sequence", "text-classification"),
        ("tokens", "token-classification"),
        ("masked", "fill-mask"),
        ("embeddings", "feature-extraction"),
    ],
)
def test_text_pipelines(family: str, task: str, name: str, tmp_path, caplog) -> None:
    pruned = with_empty_sublayers(tiny(family, task))
    pruned.save_pretrained(tmp_path)
    tokenizer = word_tokenizer(tmp_path)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # not all have token types
    tokenizer.save_pretrained(tmp_path)
    run_it = pipeline(name, model=str(tmp_path), device="cpu")
    assert type(run_it.model) is type(pruned)
    result = run_it("word3 [MASK] word5")
    with torch.no_grad():
        output = pruned(**run_it.tokenizer("word3 [MASK] word5", return_tensors="pt"))
    first = output.last_hidden_state if task == "embeddings" else output.logits
    if task == "embeddings":
        torch.testing.assert_close(torch.tensor(result), first)
    elif task == "tokens":
        # The word, the mask and the word, between the special tokens; none has the label "O".
        scores = first[0].softmax(-1).amax(-1)[[row["index"] for row in result]].tolist()
        assert len(result) == 3
        assert [float(row["score"]) for row in result] == pytest.approx(scores, rel=1e-4)
    else:
        position = run_it.tokenizer("word3 [MASK] word5")["input_ids"].index(4)
        rows = first[0, position] if task == "masked" else first[0]
        assert result[0]["score"] == pytest.approx(rows.softmax(-1).max().item(), rel=1e-4)
    assert "not supported" not in caplog.text


@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_image_pipelines(family: str, tmp_path) -> None:
    from PIL import Image

    pruned = with_empty_sublayers(tiny(family, "images"))
    pruned.save_pretrained(tmp_path)
    size = {"height": 16, "width": 16}
    processor = ViTImageProcessor(size=size)
    processor.save_pretrained(tmp_path)
    image = Image.new("RGB", (20, 30), (200, 10, 90))
    result = pipeline("image-classification", model=str(tmp_path), device="cpu")(image)
    with torch.no_grad():
        logits = pruned(**processor(image, return_tensors="pt")).logits[0]
    assert result[0]["score"] == pytest.approx(logits.softmax(-1).max().item(), rel=1e-3)
