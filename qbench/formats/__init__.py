"""Number formats: what one element can be, how elements share scales, and what a quantized tensor is."""

from qbench.formats.element import Int
from qbench.formats.qtensor import QTensor
from qbench.formats.tensor import SCALE_DTYPES, QParams, Range, TensorFormat, fake_quantize, fit, quantize

__all__ = ["SCALE_DTYPES", "Int", "QParams", "QTensor", "Range", "TensorFormat", "fake_quantize", "fit", "quantize"]
