"""The model card of a saved CORDA adapter."""

import re
from email.message import Message

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

from kprune_ext.files import presentation
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
        "pip install .  # in a clone of the repository of peft-corda",
        "import peft_corda  # before the adapter is loaded\nfrom peft import PeftModel\n\n"
        'model = PeftModel.from_pretrained(base_model, "path or hub id of this adapter")',
    ]
    assert "Rank: 4 to 6." in section and "lora_start_A" in section
    assert ModelCard.load(tmp_path / "README.md").data["library_name"] == "peft"


def test_the_card_is_short_and_has_what_the_hub_reads(tmp_path):
    adapted(task_type="CAUSAL_LM").save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "[More Information Needed]" not in card.text and "## Uses" not in card.text
    assert len(card.text.splitlines()) < 40 and "- PEFT " in card.text
    assert card.data["pipeline_tag"] == "text-generation" and "corda" in card.data["tags"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("## Uses", "## My uses"),
        lambda text: text + "\nA line of mine.\n",
        lambda text: text.replace("[More Information Needed]", "Me.", 1),
    ],
)
def test_a_template_that_was_edited_keeps_every_word(edit, tmp_path):
    """Also one that PEFT alone wrote: a LoRA's folder that a CORDA adapter is saved into."""
    lora = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    mine = edit(card.read_text())
    card.write_text(mine)
    adapted().save_pretrained(tmp_path)
    text = card.read_text()
    words = ModelCard(mine).text.splitlines()
    assert set(words) <= set(ModelCard(text).text.splitlines()) and HEADING in text


def test_the_repositorys_address_is_used_where_it_is_known(monkeypatch):
    class Installed:
        def __init__(self, url, direct="{}"):
            self.metadata = Message()
            if url:
                self.metadata["Project-URL"] = f"Repository, {url}"
            self.direct = direct

        def read_text(self, name):
            return self.direct

    vcs = '{"url": "%s", "vcs_info": {"vcs": "git"}}'
    for installed, wanted in [
        (Installed("https://example.org/a/b"), "https://example.org/a/b"),
        (Installed(None, vcs % "https://example.org/c"), "https://example.org/c"),
        (Installed(None, vcs % "https://me:secret@example.org/c"), None),
        (Installed(None, '{"url": "file:///home/me/clone", "dir_info": {}}'), None),
        (Installed(None, ""), None),
    ]:
        monkeypatch.setattr(presentation, "distribution", lambda _, one=installed: one)
        assert presentation.repository_url() == wanted
        assert (f"git+{wanted}" in presentation.how_to_install()) == (wanted is not None)


def test_saving_again_keeps_the_users_text_and_one_section(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    once = card.read_text()
    model.save_pretrained(tmp_path)
    assert card.read_text() == once
    card.write_text(once.replace("# Adapter", "# Mine") + "\n## Results\n\nGood.\n")
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
