"""`peft-corda` on a tiny model and files of the user's own."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from safetensors import safe_open
from transformers import T5Config, T5ForConditionalGeneration

from kprune_ext.common.text_data import load_rows, padded_batches, read_texts
from peft_corda import CordaFactors, apply_ranks, calibrate, cli
from tests.helpers.corda import VOCABULARY, logits_of, make_batches, make_config, make_model
from tests.helpers.text import SENTENCES, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    for kind in ("llama", "bert"):
        make_tokenizer().save_pretrained(folder / kind)
        make_model(kind).save_pretrained(folder / kind)
    rows = [{"text": text, "title": f"w{i}", "n": i} for i, text in enumerate(SENTENCES)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "data.txt").write_text("\n".join(SENTENCES) + "\n\n")
    return folder


def options(folder, output, **changes):
    given = {
        "model": folder / "llama", "data": folder / "data.jsonl", "output": output, "num_samples": 10,
        "max_length": 8, "batch_size": 4, "r": 6, "device": "cpu",
    } | changes  # fmt: skip
    return ["calibrate", *(f"--{key}={value}" for key, value in given.items())]


def test_calibrate_gives_what_the_library_gives(folder, tmp_path, capsys):
    output, written = tmp_path / "new" / "factors.safetensors", tmp_path / "report.json"
    cli.main(options(folder, output, corda_method="both", report=written))
    found = CordaFactors.load(output)
    texts = read_texts(load_rows(str(folder / "data.jsonl")), [["text"]])
    batches = padded_batches(texts, make_tokenizer(), 10, 8, 4)
    expected = calibrate(
        make_model("llama"), make_config(r=6), batches, methods=("kpm", "ipm"), verbose=False
    )
    assert found.methods == ("kpm", "ipm") and found.modules.keys() == expected.modules.keys()
    for name, module in expected.modules.items():
        for method, own in module.directions.items():
            torch.testing.assert_close(found.modules[name].directions[method].S, own.S)
    reports = json.loads(written.read_text())
    assert reports["kpm"]["method"] == "kpm" and reports["ipm"]["modules"][0]["rank"] == 6
    out = capsys.readouterr().out
    assert "CorDA kpm, 14 modules" in out and "CorDA ipm, 14 modules" in out
    adapted = get_peft_model(make_model("llama"), make_config(r=6, corda_factors=str(output)))
    batch = make_batches()[0]
    assert torch.equal(logits_of(adapted, batch), logits_of(make_model("llama"), batch))


def test_options_reach_the_calibration(folder, tmp_path):
    output = tmp_path / "factors.safetensors"
    cli.main(
        options(
            folder, output, target_modules="[q_proj,up_proj]", exclude_modules="[layers.0.mlp.up_proj]",
            rank_pattern='{"q_proj": 3}', corda_damping=0.5, corda_weighting="sqrt_covariance",
            corda_method="ipm", max_memory="40KB", checkpoint_dir=tmp_path / "parts",
        )
    )  # fmt: skip
    found = CordaFactors.load(output)
    assert {name: found.rank(name, "ipm") for name in found.modules} == {
        "model.layers.0.self_attn.q_proj": 3,
        "model.layers.1.self_attn.q_proj": 3,
        "model.layers.1.mlp.up_proj": 6,
    }
    assert (found.methods, found.damping, found.weighting) == (("ipm",), 0.5, "sqrt_covariance")
    assert (tmp_path / "parts" / "plan.json").exists()


def test_packed_text_file_and_an_encoder(folder, tmp_path):
    output = tmp_path / "factors.safetensors"
    changes = {"model": folder / "bert", "task": "SEQ_CLS", "data": folder / "data.txt"}
    cli.main([*options(folder, output, **changes), "--pack"])
    tokens = {name: own.tokens for name, own in CordaFactors.load(output).modules.items()}
    # Ten windows of eight tokens; the pooler sees one of each window.
    assert tokens["bert.encoder.layer.0.attention.self.query"] == 80
    assert tokens["bert.pooler.dense"] == 10


def test_encoder_decoder(folder, tmp_path):
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    config = T5Config(vocab_size=VOCABULARY, **sizes, **tokens)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    make_tokenizer().save_pretrained(tmp_path / "t5")
    output = tmp_path / "factors.safetensors"
    arguments = options(folder, output, model=tmp_path / "t5", task="SEQ_2_SEQ_LM")
    with pytest.raises(SystemExit, match=r"encoder-decoder, which reads two texts.*target_field"):
        cli.main(arguments)
    assert not output.exists()
    cli.main([*arguments, "--target_field=title"])
    tokens = {name: module.tokens for name, module in CordaFactors.load(output).modules.items()}
    # A start token and one word in the decoder; the encoder has eight words at most.
    assert tokens["decoder.block.0.layer.0.SelfAttention.q"] == 20
    assert tokens["encoder.block.0.layer.0.SelfAttention.q"] > 20


def test_print_config_round_trip(folder, tmp_path, capsys):
    arguments = options(folder, tmp_path / "factors.safetensors", target_modules="[q_proj]")
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--pack", "--print_config"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    (tmp_path / "options.yaml").write_text(printed)
    assert yaml.safe_load(printed)["target_modules"] == ["q_proj"]
    parser = cli.build_parser()
    by_flags = parser.parse_args([*arguments, "--pack"])
    by_file = parser.parse_args(["calibrate", f"--config={tmp_path / 'options.yaml'}"])
    found, wanted = (vars(given["calibrate"]) for given in (by_file, by_flags))
    assert {**found, "config": None} == {**wanted, "config": None}
    cli.main(["calibrate", f"--config={tmp_path / 'options.yaml'}", "--r=2"])
    found = CordaFactors.load(tmp_path / "factors.safetensors")
    assert {found.rank(name, "kpm") for name in found.modules} == {2}


class TestReport:
    @pytest.fixture(scope="class")
    def file(self, folder):
        path = folder / "factors.safetensors"
        cli.main(options(folder, path, corda_method="both"))
        return str(path)

    def test_table_files_and_allocation(self, file, tmp_path, capsys):
        capsys.readouterr()
        cli.main(
            [
                "report", file, "--method=ipm", "--r=5", "--corda_scaling=paper", "--mean_rank=3",
                f"--json={tmp_path / 'r.json'}", f"--plot={tmp_path / 'p.png'}",
            ]
        )  # fmt: skip
        out = capsys.readouterr().out
        assert "model.layers.1.self_attn.q_proj" in out and "CorDA ipm, 14 modules" in out
        written = json.loads((tmp_path / "r.json").read_text())
        assert (written["scaling"], written["modules"][0]["rank"]) == ("paper", 5)
        assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
        ranks = json.loads(out[out.index("\n{") :])["rank_pattern"]
        config = apply_ranks(make_config(corda_method="ipm", corda_factors=file), ranks)
        adapted = get_peft_model(make_model("llama"), config)
        with safe_open(file, "pt") as opened:
            shapes = [own["shape"] for own in json.loads(opened.metadata()["modules"]).values()]
        assert adapted.num_parameters(only_trainable=True) <= 3 * sum(map(sum, shapes))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "factors hold 'kpm' and 'ipm'. Say which one to use"),
            (["--method=kpm", "--r=7"], "rank 7 requested, 6 in the factors"),
            (["--method=kpm", "--budget=5"], "budget of 5 parameters is too small"),
            (
                ["--method=kpm", "--budget=5000", "--mean_rank=2"],
                "Give exactly one of budget and mean_rank",
            ),
        ],
    )
    def test_wrong_input_writes_nothing(self, file, tmp_path, arguments, message):
        json_file, picture = tmp_path / "r.json", tmp_path / "p.png"
        with pytest.raises(SystemExit, match=f"peft-corda report: error: .*{message}"):
            cli.main(["report", file, *arguments, f"--json={json_file}", f"--plot={picture}"])
        assert not list(tmp_path.iterdir())

    def test_no_such_file(self, tmp_path):
        with pytest.raises(SystemExit, match="report: error: No factors file at"):
            cli.main(["report", str(tmp_path / "none.safetensors")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "{folder}/none.jsonl"}, "No data file at .*none.jsonl'. Give the path of a .txt"),
        ({"data": "{folder}/llama/model.safetensors"}, "data file .* is of an unknown type"),
        ({"text_field": "question"}, "no field 'question'; its fields are text, title, n"),
        ({"text_field": "n"}, "field 'n' holds values of type int, not text"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"max_length": 99999}, "max_length=99999 is more than the 2048 positions"),
        ({"model": "{folder}/nothing"}, "nothing"),
        ({"target_modules": "[query]"}, "No module of LlamaForCausalLM matches"),
        ({"r": 30}, "r=30 is larger than module"),
        ({"output": "{folder}"}, "is a folder; give the path of the file to write"),
        ({"device_map": "cpu"}, "either device or device_map"),
        ({"target_field": "title"}, "target_field is for encoder-decoder models"),
        ({"checkpoint_dir": "{folder}/data.txt"}, "data.txt"),
    ],
)
def test_wrong_input_writes_nothing(folder, tmp_path, changes, message):
    changes = {k: str(v).format(folder=folder) for k, v in changes.items()}
    flags = ["--pack"] if changes.pop("pack", None) else []
    changes["report"] = tmp_path / "report.json"
    output = changes.pop("output", tmp_path / "factors.safetensors")
    arguments = options(folder, output, **changes)
    with pytest.raises(SystemExit, match=f"peft-corda calibrate: error: (?s:.*){message}"):
        cli.main([*arguments, *flags])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "have 24 rows with text, fewer than num_samples=30. All are used"),
        (["--pack"], "enough for 22 windows of 8 tokens, fewer than num_samples=30. All are used"),
    ],
)
def test_fewer_rows_than_asked_for_are_all_used(folder, tmp_path, flags, message):
    output = tmp_path / "factors.safetensors"
    with pytest.warns(UserWarning, match=message):
        cli.main([*options(folder, output, num_samples=30), *flags])
    assert output.exists()


def test_a_report_that_cannot_be_written_leaves_no_factors(folder, tmp_path, monkeypatch):
    (tmp_path / "factors.safetensors").write_text("before")

    def failing(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("kprune_ext.files.writing.save_file", failing)
    arguments = options(folder, tmp_path / "factors.safetensors", report=tmp_path / "report.json")
    with pytest.raises(SystemExit, match="calibrate: error: no space left"):
        cli.main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["factors.safetensors"]
    assert (tmp_path / "factors.safetensors").read_text() == "before"


@pytest.mark.parametrize(
    "arguments",
    [
        ["calibrate", "--model=m", "--data=d"],
        ["calibrate", "--model=m", "--data=d", "--output=o", "--r=many"],
        ["calibrate", "--model=m", "--data=d", "--output=o", "--corda_method=best"],
        ["report", "file", "--nonsense=1"],
        ["improve"],
        [],
    ],
)
def test_unusable_arguments_end_with_two_lines(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    said, where = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("peft-corda") and where.startswith("See: peft-corda")


def test_help_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "peft_corda", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(name in done.stdout for name in ("calibrate", "report", "init", "export"))


@pytest.mark.parametrize("program", ["peft_corda", "kprune_ext"])
def test_the_parser_itself_needs_no_heavy_library(program):
    """Modules that are imported before the arguments are checked."""
    light = {"argparse", "jsonargparse", "safetensors", "yaml", *sys.stdlib_module_names}
    seen, waiting = set(), [f"{program}.cli.main"]
    while waiting:
        name = waiting.pop()
        seen.add(name)
        spec = importlib.util.find_spec(name)
        for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                origin = importlib.util.resolve_name(
                    "." * node.level + (node.module or ""), spec.parent
                )
                inner = [f"{origin}.{alias.name}" for alias in node.names]
                found = [
                    one
                    for one in inner
                    if origin.startswith(("peft_corda", "kprune_ext"))
                    and importlib.util.find_spec(origin).submodule_search_locations
                    and importlib.util.find_spec(one)
                ]
                names = found or [origin]
            for other in names:
                if other.startswith(("peft_corda", "kprune_ext")):
                    waiting += [other] if other not in seen else []
                else:
                    assert other.split(".")[0] in light, f"{name} imports {other}"
    assert "kprune_ext.console.program" in seen
