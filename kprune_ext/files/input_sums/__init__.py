"""Sums of the inputs of a model's linear layers, in a file: written layer by layer, read as needed."""

from .reading import InputSums, LayerInputs
from .writing import SumsWriter, written_sums

__all__ = ["InputSums", "LayerInputs", "SumsWriter", "written_sums"]
