"""The subcommand `kprune export`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..export import export_deci, export_gguf

if TYPE_CHECKING:
    from ..command_inputs.options import ExportOptions


def run_export(options: ExportOptions) -> None:
    """Runs `kprune export`: writes a model for another engine.

    Raises:
        ValueError, OSError, ImportError: If an option or file is invalid, or the engine has no such
            model; nothing is written then.
    """
    if options.format == "gguf":
        export_gguf(
            options.model,
            options.output,
            options.tokenizer,
            dtype=options.dtype,
            pad=options.pad,
            pre_tokenizer=options.pre_tokenizer,
            overwrite=options.overwrite,
        )
        print(f"Wrote {options.output}. llama.cpp and programs built on it load it.")
        return
    if options.pre_tokenizer is not None or options.overwrite:
        raise ValueError("pre_tokenizer and overwrite are options of the format gguf alone.")
    export_deci(
        options.model, options.output, options.tokenizer, dtype=options.dtype, pad=options.pad
    )
    print(f"Wrote {options.output}. vLLM loads it with --trust-remote-code.")
