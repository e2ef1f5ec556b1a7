"""Files and folders that are complete or absent."""

from __future__ import annotations

from peft_corda.files import (
    check_distinct,
    check_output_files,
    check_output_folder,
    replacing,
    resolved,
)

__all__ = ["check_distinct", "check_output_files", "check_output_folder", "replacing", "resolved"]
