"""Importing the package adds to PEFT's registries, and changes nothing else."""

import copy
import importlib
import pickle
import subprocess
import sys

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_corda
from peft_corda.adapter import registration
from tests.helpers.corda import make_config


def test_type_is_a_member_like_any_other():
    member = PeftType("CORDA")
    assert member is PeftType["CORDA"] is PeftType.CORDA
    assert member == "CORDA" and member in list(PeftType) and isinstance(member, PeftType)
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member


def test_registering_twice_is_harmless():
    members = list(PeftType)
    registration.register_corda()
    importlib.reload(registration).register_corda()
    assert list(PeftType) == members
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.CORDA] is peft_corda.CordaConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.CORDA] is peft_corda.CordaModel


def test_a_method_of_that_name_in_peft_itself_is_not_overwritten(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.CORDA, PeftConfig)
    with pytest.raises(ImportError, match="PEFT already has a method named CORDA"):
        registration.register_corda()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.CORDA] is PeftConfig


def test_import_replaces_nothing_of_peft_or_transformers():
    program = """
import importlib, inspect, sys
import peft, peft.peft_model, peft.tuners.lora.layer, peft.tuners.lora.model, peft.utils.save_and_load
import peft.tuners.tuners_utils, peft.mapping_func, transformers, transformers.pytorch_utils

def snapshot():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("peft", "transformers", "torch") and module is not None:
            for key, value in list(vars(module).items()):
                if inspect.isfunction(value) or inspect.isclass(value):
                    found[name, key] = value
                if inspect.isclass(value) and value.__module__.startswith(("peft", "transformers")):
                    for attribute, member in list(vars(value).items()):
                        if inspect.isfunction(member):
                            found[name, key, attribute] = member
    return found

before = snapshot()
import peft_corda
after = snapshot()
changed = [key for key in before if after.get(key) is not before[key]]
assert len(before) > 1000 and not changed, changed
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_config_survives_json_pickle_and_copies(tmp_path):
    config = make_config(corda_method="ipm", corda_damping=0.1, rank_pattern={"q_proj": 2})
    config.save_pretrained(tmp_path)
    for other in (
        PeftConfig.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
    ):
        assert type(other) is peft_corda.CordaConfig
        assert other.to_dict() == config.to_dict()
