"""Public names, and all options of the console programs."""

from __future__ import annotations

import importlib
import inspect
import sys
import typing
from dataclasses import fields
from typing import Any, Literal

from make_inputs import write_json
from peft import LoraConfig

import kprune_ext
import peft_corda
from peft_corda import CordaConfig


def values_for(kind: Any) -> list[str]:
    """Values that an option of a type takes on the command line."""
    choices = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin is Literal:
        return [str(choice) for choice in choices]
    if origin is list:
        return ["[first, second]"]
    if origin is dict:
        return ['{"first": 3}']
    if choices:
        return [value for choice in choices for value in values_for(choice)]
    return {int: ["3"], float: ["0.25"], str: ["text"], type(None): ["null"]}[kind]


def options_of(module: Any) -> dict[str, list[dict[str, Any]]]:
    """By subcommand, every option and positional with values that it takes."""
    parsers = module.build_parser()._subcommands_action._name_parser_map
    found = {}
    for command, parser in parsers.items():
        options = module.COMMANDS[command]
        types = typing.get_type_hints(options)
        names = {field.name for field in fields(options)}
        rows = []
        for action in parser._actions:
            takes = action.dest in names and type(action).__name__ != "_StoreTrueAction"
            rows.append(
                {
                    "name": action.dest,
                    "options": list(action.option_strings),
                    "required": bool(action.required),
                    "values": values_for(types[action.dest]) if takes else [],
                }
            )
        found[command] = rows
    return found


def parameters_of(value: Any) -> list[str]:
    if not callable(value):
        return []
    inherited = {"self"}
    if value is CordaConfig:  # those of PEFT are PEFT's
        inherited |= {*inspect.signature(LoraConfig).parameters}
    return [name for name in inspect.signature(value).parameters if name not in inherited]


def members_of(value: Any) -> list[str]:
    """What our own class and its bases of ours have that does not start with an underscore."""
    if not inspect.isclass(value):
        return []
    ours = [kind for kind in value.__mro__ if kind.__module__.startswith(OURS)]
    found = {
        name for kind in ours for name in (*vars(kind), *vars(kind).get("__annotations__", ()))
    }
    return sorted(name for name in found if not name.startswith("_"))


OURS = ("peft_corda", "kprune_ext")


def write_names() -> None:
    programs = {"peft-corda": "peft_corda", "kprune": "kprune_ext"}
    modeling = importlib.import_module("kprune_ext.modeling")
    architectures = importlib.import_module("kprune_ext.architectures").ARCHITECTURES
    classes = [name for name in vars(modeling) if name.startswith("KPrune")]
    write_json(
        "names.json",
        {
            "all": {name: list(sys.modules[name].__all__) for name in OURS},
            "parameters": {
                f"{package.__name__}.{name}": parameters_of(getattr(package, name))
                for package in (peft_corda, kprune_ext)
                for name in package.__all__
            },
            "members": {
                f"{package.__name__}.{name}": members_of(getattr(package, name))
                for package in (peft_corda, kprune_ext)
                for name in package.__all__
            },
            "model types": [row.model_type for row in architectures],
            "modeling": sorted(classes),
            "programs": programs,
            "options": {
                program: options_of(importlib.import_module(f"{package}.cli"))
                for program, package in programs.items()
            },
        },
    )
