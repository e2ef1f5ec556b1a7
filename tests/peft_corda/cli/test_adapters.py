"""`peft-corda init` and `peft-corda export`."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_corda import CordaFactors, calibrate, cli, export_lora
from tests.helpers.corda import logits_of, make_batches, make_config, make_model, train_steps
from tests.helpers.text import SENTENCES, make_tokenizer

BATCH = make_batches(seed=7)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tokenizer().save_pretrained(folder / "llama")
    model = make_model("llama")
    model.save_pretrained(folder / "llama")
    (folder / "data.txt").write_text("\n".join(SENTENCES))
    config = make_config()
    calibrate(model, config, make_batches(), methods=("kpm", "ipm"), verbose=False)
    config.corda_factors.save(folder / "factors.safetensors")
    adapted = get_peft_model(model, config)
    train_steps(adapted, BATCH)
    adapted.save_pretrained(folder / "trained")
    return folder


def init(folder, output, **changes):
    given = {"model": folder / "llama", "output": output, "device": "cpu"} | changes
    return ["init", *(f"--{key}={value}" for key, value in given.items())]


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


class TestInit:
    def test_from_factors(self, folder, tmp_path, capsys):
        output = tmp_path / "new" / "adapter"
        cli.main(
            [
                *init(
                    folder, output, factors=folder / "factors.safetensors", corda_method="ipm", r=4,
                    rank_pattern='{"q_proj": 6}', lora_alpha=12, alpha_pattern='{"k_proj": 2}',
                    corda_scaling="paper", lora_dropout=0.1, modules_to_save="[lm_head]",
                ),
                "--use_rslora",
            ]
        )  # fmt: skip
        assert f"PeftModel.from_pretrained(model, {str(output)!r}" in capsys.readouterr().out
        config = make_config(
            corda_method="ipm", r=4, rank_pattern={"q_proj": 6}, lora_alpha=12, use_rslora=True,
            alpha_pattern={"k_proj": 2}, corda_scaling="paper", lora_dropout=0.1,
            modules_to_save=["lm_head"], corda_factors=str(folder / "factors.safetensors"),
        )  # fmt: skip
        get_peft_model(make_model("llama"), config).save_pretrained(tmp_path / "own")
        found, expected = weights(output), weights(tmp_path / "own")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        configs = [
            json.loads((path / "adapter_config.json").read_text())
            for path in (output, tmp_path / "own")
        ]
        for own in configs:
            own["target_modules"].sort()
            own.pop("base_model_name_or_path")
        assert configs[0] == configs[1]

    def test_trainers_can_go_on_from_it(self, folder, tmp_path):
        cli.main(init(folder, tmp_path / "adapter", factors=folder / "factors.safetensors", r=8))
        base = make_model("llama")
        expected = logits_of(base, BATCH)
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
        assert torch.equal(logits_of(adapted, BATCH), expected)
        train_steps(adapted, BATCH)
        reference = make_config(corda_factors=CordaFactors.load(folder / "factors.safetensors"))
        straight = get_peft_model(make_model("llama"), reference)
        train_steps(straight, BATCH)
        assert torch.equal(logits_of(adapted, BATCH), logits_of(straight, BATCH))

    def test_from_data(self, folder, tmp_path):
        sizes = {"num_samples": 10, "max_length": 8, "batch_size": 4, "r": 5}
        data = folder / "data.txt"
        cli.main(init(folder, tmp_path / "adapter", data=data, corda_method="ipm", **sizes))
        factors = tmp_path / "factors.safetensors"
        cli.main(
            [
                "calibrate", f"--model={folder / 'llama'}", f"--data={data}", f"--output={factors}",
                "--corda_method=ipm", "--device=cpu",
                *(f"--{name}={value}" for name, value in sizes.items()),
            ]
        )  # fmt: skip
        cli.main(init(folder, tmp_path / "same", factors=factors, corda_method="ipm", r=5))
        one, other = weights(tmp_path / "adapter"), weights(tmp_path / "same")
        assert all(torch.equal(one[key], other[key]) for key in other)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({}, "Give exactly one of data .*, covariances .*, factors"),
            (
                {"factors": "{folder}/factors.safetensors", "data": "{folder}/data.txt"},
                "exactly one",
            ),
            (
                {"covariances": "{folder}/data.txt", "data": "{folder}/data.txt"},
                "exactly one",
            ),
            ({"covariances": "{folder}/none.safetensors"}, "none.safetensors"),
            ({"covariances": "{folder}/factors.safetensors"}, "has no covariances"),
            (
                {"covariances": "{folder}/c.safetensors", "max_memory": "1GiB"},
                "max_memory cannot be combined with covariances",
            ),
            (
                {"covariances": "{folder}/c.safetensors", "corda_method": "sc_lora"},
                "sc_lora compares two texts",
            ),
            ({"factors": "{folder}/none.safetensors"}, "No factors file at"),
            (
                {"factors": "{folder}/factors.safetensors", "keep": "{folder}/data.txt"},
                "keep is for a calibration",
            ),
            ({"factors": "{folder}/factors.safetensors", "r": 9}, "too small a rank"),
            (
                {
                    "factors": "{folder}/factors.safetensors",
                    "corda_weighting": "sqrt_covariance",
                    "r": 8,
                },
                "made with corda_weighting='covariance'",
            ),
            ({"data": "{folder}/data.txt", "num_samples": 0}, "num_samples must be at least 1"),
            (
                {"data": "{folder}/data.txt", "lora_alpha": -1},
                "`lora_alpha` must be greater than 0",
            ),
            (
                {"data": "{folder}/data.txt", "output": "{folder}"},
                "holds other files .*a new folder",
            ),
        ],
    )
    def test_wrong_input_writes_nothing(self, folder, tmp_path, changes, message):
        before = sorted(folder.iterdir())
        changes = {key: str(value).format(folder=folder) for key, value in changes.items()}
        output = changes.pop("output", tmp_path / "adapter")
        with pytest.raises(SystemExit, match=f"peft-corda init: error: (?s:.*){message}"):
            cli.main(init(folder, output, **changes))
        assert not list(tmp_path.iterdir()) and sorted(folder.iterdir()) == before


class TestExport:
    def test_gives_what_the_library_gives(self, folder, tmp_path, capsys):
        arguments = ["export", str(folder / "trained"), str(tmp_path / "lora")]
        cli.main([*arguments, "--rank=3", "--dtype=bfloat16"])
        assert f"Wrote {tmp_path / 'lora'}." in capsys.readouterr().out
        export_lora(folder / "trained", tmp_path / "own", rank=3, dtype=torch.bfloat16)
        found, expected = weights(tmp_path / "lora"), weights(tmp_path / "own")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["{folder}/none", "{tmp}/lora"], "No adapter_config.json in .*none'"),
            (["{folder}/trained", "{tmp}/lora", "--rank=0"], "rank must be a whole number of at"),
            (["{folder}/trained", "{folder}/trained"], "dst is src"),
        ],
    )
    def test_wrong_input_writes_nothing(self, folder, tmp_path, arguments, message):
        given = [argument.format(folder=folder, tmp=tmp_path) for argument in arguments]
        with pytest.raises(SystemExit, match=f"peft-corda export: error: .*{message}"):
            cli.main(["export", *given])
        assert not list(tmp_path.iterdir())
