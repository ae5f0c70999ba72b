"""Operations that are worth a GPU kernel: each is defined in plain torch (`reference`) and written again in Triton.

    fake_quant       quantize and decode in groups (formats' conventions), without keeping codes
    quantize_token   int8 or float8 codes and one scale per token
    pack, unpack     codes of 2 to 8 bits to bytes and back
    dequant_matmul   x times the transpose of a packed 4- or 8-bit weight
    hadamard         fast Walsh-Hadamard transform, mixed radix

The reference is the definition; both backends take the same arguments. `default_backend(device)` names the one that
runs where a caller gives none: a value to record beside a measurement. Triton is imported when it is first used.
"""

from qbench.kernels.backend import BACKENDS, Backend, default_backend
from qbench.kernels.dequant_matmul import dequant_matmul
from qbench.kernels.fake_quant import fake_quant
from qbench.kernels.hadamard import hadamard
from qbench.kernels.pack import pack, unpack
from qbench.kernels.quantize_token import quantize_token

__all__ = [
    "BACKENDS",
    "Backend",
    "default_backend",
    "dequant_matmul",
    "fake_quant",
    "hadamard",
    "pack",
    "quantize_token",
    "unpack",
]
