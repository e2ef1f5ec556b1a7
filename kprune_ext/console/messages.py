"""Messages of other libraries that say nothing to those who run a command."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# transformers and PEFT import torchao and bitsandbytes if they are installed, whether a model needs
# them or not. These then tell which of their kernels this machine cannot use.
_TALKATIVE = ("torchao", "bitsandbytes", "torch.utils._pytree")


@contextmanager
def without_foreign_messages() -> Iterator[None]:
    """Shows only errors of libraries that comment on being imported, until the block ends."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
