"""Data as people have them: texts, pairs, chats, data sets and tokens become batches of tensors."""

from .batching import as_batches
from .encoding import Encoding, sequence_length

__all__ = ["Encoding", "as_batches", "sequence_length"]
