"""The model card of a saved CORDA adapter."""

import re

from huggingface_hub import ModelCard
from peft import get_peft_model

from peft_corda import calibrate, export_lora
from tests.helpers.corda import make_batches, make_config, make_model

HEADING = "## CorDA adapter"


def adapted(name="default", **options):
    model = make_model("llama")
    config = make_config(target_modules=["q_proj"], **options)
    calibrate(model, config, make_batches(), verbose=False)
    return get_peft_model(model, config, adapter_name=name)


def test_says_what_to_do_without_the_plugin_and_what_the_adapter_is(tmp_path):
    adapted(corda_method="ipm", r=4, rank_pattern={"layers.1.*": 6}).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    section = text[text.index(HEADING) :]
    assert "KeyError: 'CORDA'" in section and "`ipm`, which trains the directions" in section
    assert re.findall(r"```\w+\n(.*?)\n```", section, flags=re.DOTALL) == [
        "pip install peft-corda",
        "import peft_corda  # before the adapter is loaded",
    ]
    assert "Rank: 4 to 6." in section and "lora_start_A" in section
    assert ModelCard.load(tmp_path / "README.md").data["library_name"] == "peft"


def test_saving_again_keeps_the_users_text_and_one_section(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    once = card.read_text()
    model.save_pretrained(tmp_path)
    assert card.read_text() == once
    card.write_text(once.replace("# Model Card for Model ID", "# Mine") + "\n## Results\n\nGood.\n")
    adapted(r=3).save_pretrained(tmp_path)
    again = card.read_text()
    assert again.count(HEADING) == 1 and "Rank: 3." in again and "Rank: 8." not in again
    assert "# Mine" in again and "## Results\n\nGood." in again


def test_folders_of_several_adapters_have_a_card_each(tmp_path):
    model = adapted("first")
    model.save_pretrained(tmp_path)
    assert HEADING in (tmp_path / "first" / "README.md").read_text()
    assert not (tmp_path / "default").exists()


def test_a_config_alone_gets_no_card(tmp_path):
    make_config().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_card_of_an_export(tmp_path):
    adapted().save_pretrained(tmp_path / "corda")
    card = tmp_path / "corda" / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    export_lora(tmp_path / "corda", tmp_path / "lora", rank=2)
    text = (tmp_path / "lora" / "README.md").read_text()
    assert HEADING not in text and "KeyError" not in text and "My own words." in text
    assert "LoRA adapter of rank 2, the best approximation of that rank" in text
    card.unlink()
    export_lora(tmp_path / "corda", tmp_path / "bare")
    data = ModelCard.load(tmp_path / "bare" / "README.md").data
    assert (data["library_name"], data["tags"]) == ("peft", ["lora"])
