"""Number formats: what one element can be, how elements share scales, and what a quantized tensor is."""

from qbench.formats.element import Codebook, Element, Float, Int
from qbench.formats.qtensor import QTensor
from qbench.formats.ranges import Range, RangeFit
from qbench.formats.scale import SCALES
from qbench.formats.tensor import Block, QParams, TensorFormat, fake_quantize, fit, quantize, shared_scale, uniform

__all__ = [
    "SCALES",
    "Block",
    "Codebook",
    "Element",
    "Float",
    "Int",
    "QParams",
    "QTensor",
    "Range",
    "RangeFit",
    "TensorFormat",
    "fake_quantize",
    "fit",
    "quantize",
    "shared_scale",
    "uniform",
]
