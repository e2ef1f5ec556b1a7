"""The Python on the documentation's pages runs in the order it is printed, and does what is said."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import kprune_ext
import peft_corda
from kprune_ext import KPruneReport
from kprune_ext.architectures import ARCHITECTURES
from peft_corda import CordaConfig
from tests.helpers.corda import make_batches, make_model
from tests.helpers.kprune import word_tokenizer
from tests.helpers.kprune_decoders import decoder_batches, equal_texts, tiny_decoder
from tests.helpers.kprune_models import tiny

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {
    str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if "```python" in path.read_text()
}
TRIED = {
    "tutorial-corda.md", "tutorial-kprune.md", "distributed.md", "howto/trl.md", "howto/qlora.md",
    "howto/resume.md", "howto/adapters.md", "howto/export.md", "howto/task.md", "howto/family.md",
    "howto/decoders.md", "howto/data.md", "howto/how-small.md",
    # in test_docs_howto.py:
    "index.md", "howto/corda.md", "howto/kprune.md", "howto/from-peft-corda.md", "howto/onnx.md",
    "howto/prune-then-adapt.md", "howto/sentence-transformers.md",
}  # fmt: skip
LORA_OPTIONS = {"r": 8, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def python_blocks(page):
    """The blocks of Python on a page."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


def run_page(page, names=None):
    """All Python of a page in one namespace, in the working directory."""
    names = {} if names is None else names
    for block in python_blocks(page):
        exec(compile(block, page, "exec"), names)
    return names


def training_arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_page_with_code_is_tried():
    assert PAGES == TRIED


def test_no_link_leads_nowhere():
    """Links between pages, and the names of files that the pages mention."""
    root = DOCS.parent
    for path in DOCS.rglob("*.md"):
        text = path.read_text()
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert link.startswith("http") or (path.parent / link).exists(), (path.name, link)
        for file in re.findall(
            r"`((?:examples|benchmarks|tests|peft_corda|kprune_ext)/[^`*{]+)`", text
        ):
            assert (root / file).exists(), (path.name, file)


def test_corda_tutorial(here, capsys):
    names = run_page("tutorial-corda.md")
    printed = capsys.readouterr().out
    before, after = (
        [float(part) for part in re.findall(r"[\d.]+(?= task| knowledge)", line)]
        for line in re.findall(r"(?:before|after):.*", printed)
    )
    assert after[0] < 0.2 * before[0]
    assert abs(after[1] - before[1]) < 0.15 * before[1]
    assert "the 14 of July in 1989" in printed
    assert names["plain"].peft_config["default"].peft_type == "LORA"


def test_kprune_tutorial(here, capsys):
    names = run_page("tutorial-kprune.md")
    assert names["accuracy"](names["model"]) > 0.95
    assert isinstance(names["pruned"].kprune_report, KPruneReport)
    printed = capsys.readouterr().out
    assert float(re.search(r"pruned: ([\d.]+)", printed)[1]) > 0.95
    assert "'label': 'food'" in printed


def test_page_on_processes(tmp_path):
    make_model("bert").save_pretrained(tmp_path)
    rows = [{"input_ids": row, "labels": row[0] % 2} for row in make_batches()[0]["input_ids"]]
    names = run_page(
        "distributed.md",
        {
            "model": make_model("bert"),
            "dataloader": DataLoader(rows, batch_size=2),
            "name": str(tmp_path),
        },
    )
    for batch in names["dataloader"]:
        names["pruned"](**batch).loss.backward()
        names["optimizer"].step()


def test_page_on_trl(here, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = Dataset.from_list([{"text": "one and two are three"}] * 8)
    names = {
        "model": AutoModelForCausalLM.from_pretrained(tiny_model),
        "fresh_model": AutoModelForCausalLM.from_pretrained(tiny_model),
        "dataset": rows,
        "dataloader": [dict(tokenizer(rows["text"][:], return_tensors="pt"))],
        "options": {
            "output_dir": "run",
            "max_steps": 2,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
        },
    }
    run_page("howto/trl.md", names)
    assert names["trainer"].state.global_step == 2
    assert (here / "factors.safetensors").exists()


def test_page_on_quantised_models(here):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(here / "base")
    names = run_page(
        "howto/qlora.md", {"model_id": str(here / "base"), "dataloader": make_batches()}
    )
    model = names["model"].eval()
    ids = make_batches()[0]["input_ids"]
    with torch.no_grad():
        start = model(input_ids=ids).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, start)


def test_page_on_resuming(here):
    config = CordaConfig(**LORA_OPTIONS)
    rows = [{"input_ids": row, "labels": row} for row in make_batches()[0]["input_ids"]]

    def fresh():
        from peft import get_peft_model

        from peft_corda import calibrate

        model = make_model("llama")
        calibrate(model, config, make_batches(), verbose=False)
        arguments = training_arguments(here / "run", save_steps=2, learning_rate=1e-2)
        return Trainer(get_peft_model(model, config), arguments, train_dataset=rows)

    whole = fresh()
    whole.train()
    for folder in (here / "run").glob("checkpoint-4"):
        folder.rename(here / "last")  # as if the run had ended after two steps
    names = {"model": make_model("llama"), "config": config, "dataloader": make_batches()}
    names["trainer"] = fresh()  # last, as it sets the seed of what follows
    run_page("howto/resume.md", names)
    again = dict(names["trainer"].model.named_parameters())
    assert all(torch.equal(value, again[name]) for name, value in whole.model.named_parameters())
    assert names["trainer"].state.global_step == 4
    assert (here / "factors.safetensors").exists()


def test_page_on_several_adapters(here):
    names = {
        "model": make_model("llama"),
        "knowledge_batches": make_batches(seed=1),
        "task_batches": make_batches(seed=2),
        "three_rows": make_batches()[0]["input_ids"][:3],
    }
    run_page("howto/adapters.md", names)
    base = make_model("llama")(input_ids=names["three_rows"]).logits
    torch.testing.assert_close(names["logits"], base)  # untrained: all three are the original
    assert (here / "adapters" / "both" / "adapter_config.json").exists()


def test_page_on_export(here):
    from peft import get_peft_model

    from peft_corda import calibrate

    config = CordaConfig(**LORA_OPTIONS)
    model = make_model("llama")
    calibrate(model, config, make_batches(), verbose=False)
    model = get_peft_model(model, config)
    model.save_pretrained("adapter")
    rows = [{"input_ids": row, "labels": row} for row in make_batches()[0]["input_ids"]]
    names = {"model": model, "args": training_arguments(here / "run"), "train_dataset": rows}
    run_page("howto/export.md", names)
    (command,) = re.findall(
        r"```bash\n(.*?)\n```", (DOCS / "howto/export.md").read_text(), re.DOTALL
    )
    subprocess.run([sys.executable, "-m", "peft_corda", *command.split()[1:]], check=True)
    for folder, rank in {
        "adapter-lora": 8,
        "adapter-small": 8,
        "trained-lora": 8,
        "trained-again": 16,
    }.items():
        found = LoraConfig.from_pretrained(folder)
        assert (found.peft_type, found.r) == ("LORA", rank), folder
        PeftModel.from_pretrained(make_model("llama"), folder)


def test_page_on_tasks(here):
    torch.manual_seed(0)
    # So large that heads and neurons, not what stays, take most of the measured time.
    sizes = {"hidden_size": 192, "num_attention_heads": 4, "intermediate_size": 1536}
    encoder = BertModel(BertConfig(vocab_size=99, num_hidden_layers=2, **sizes)).eval()
    names = {"encoder": encoder, "dataloader": make_batches(), "heads": torch.randn(192, 3)}
    run_page("howto/task.md", names)
    assert names["pruned"].kprune_report.flops <= 0.5 * names["pruned"].kprune_report.flops_before
    assert names["faster"](**make_batches()[0]).last_hidden_state.isfinite().all()
    assert (here / "latency.json").exists()


def test_page_on_data(here):
    tiny("bert").save_pretrained(here / "model")
    word_tokenizer(here).save_pretrained(here / "model")
    names = run_page("howto/data.md", {"folder": str(here / "model")})
    report = names["pruned"].kprune_report
    assert report.flops <= 0.5 * report.flops_before and report.samples == 300


def test_page_on_how_small(here):
    model, batches = make_model("bert"), make_batches()
    validation = [(batch, model(**batch).logits.argmax(-1)) for batch in batches]
    names = {"model": model, "dataloader": batches, "validation": validation, "torch": torch}
    names = run_page("howto/how-small.md", names)
    assert names["found"].trials[0].score == 1.0 and (here / "search.json").exists()


def test_page_on_families():
    if importlib.util.find_spec("transformers.models.ernie") is None:
        pytest.fail("The page's example has gone from transformers.")
    run_page("howto/family.md")


def test_page_on_language_models(here):
    batches = decoder_batches()
    names = {"model": tiny_decoder("llama"), "dataloader": batches, "prompt": equal_texts()}
    run_page("howto/decoders.md", names)
    assert names["answer"].shape[1] <= names["prompt"]["input_ids"].shape[1] + 8
    text = (DOCS / "howto" / "decoders.md").read_text()
    types = {row.model_type for row in ARCHITECTURES if row.is_causal}
    assert types == set(re.findall(r"`(\w+)`", "".join(re.findall(r"\| [^|]+ \|( `.*?) \|", text))))


def test_pages_build_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # an advertisement of the theme's
    done = subprocess.run(command, cwd=DOCS.parent, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    reference = (tmp_path / "api" / "index.html").read_text()
    for package in (peft_corda, kprune_ext):
        for name in set(package.__all__) - {"__version__"}:
            assert f'id="{package.__name__}.{name}"' in reference, name
