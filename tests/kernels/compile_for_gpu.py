"""Compiles the kernels as they are launched at a model's sizes, for a GPU that need not be there; prints one line each:
name, bytes of shared memory. Run by test_compiles.py in a process of its own, because it replaces Triton's driver.

    python tests/kernels/compile_for_gpu.py 90
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from qbench.kernels.dequant_matmul import triton as dequant_matmul
from qbench.kernels.fake_quant import triton as fake_quant
from qbench.kernels.hadamard import triton as hadamard
from qbench.kernels.pack import triton as pack
from qbench.kernels.quantize_token import triton as quantize_token


class Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(self, *arguments, grid, warmup, run=JITFunction.run, **options):
    """Stands in for JITFunction.run: all but the launch."""
    kernel = run(self, *arguments, grid=grid, warmup=True, **options)
    assert kernel.asm["cubin"]
    print(self.__name__, kernel.metadata.shared, flush=True)


def main() -> None:
    triton.runtime.driver.set_active(Driver(int(sys.argv[1])))
    JITFunction.run = compile_only
    bf16, fp32, byte = torch.bfloat16, torch.float32, torch.uint8
    x = torch.empty(64, 4096, dtype=bf16)
    fake_quant.fake_quant(x, 4, 128, False, None, None, torch.float16)
    fake_quant.fake_quant(x.new_empty(3, 11008), 8, -1, True, None, None, torch.bfloat16)
    quantize_token.quantize_token(x, "float8_e4m3fn")
    quantize_token.quantize_token(x.new_empty(3, 11008), "int8")
    for bits in (3, 4):
        pack.unpack(pack.pack(x.new_empty(64, 4096, dtype=byte), bits), bits, 4096, True)
    for n, k, dtype in ((8192, 1, fp32), (14336, 28, bf16), (344 * 16, 344, bf16)):
        hadamard.hadamard(torch.empty(64, n, dtype=dtype), torch.empty(k, k, dtype=torch.int8))
    packed, scale = torch.empty(4096, 2048, dtype=byte), torch.empty(4096, 32, dtype=bf16)
    for tokens in (1, 256):
        dequant_matmul.dequant_matmul(x.new_empty(tokens, 4096), packed, scale, scale, 4, 128)
    dequant_matmul.dequant_matmul(x.new_empty(1, 2048), packed, scale[:, :1], None, 8, -1)
    dequant_matmul.dequant_matmul(torch.empty(5, 101), packed[:, :51], scale[:, :15].contiguous(), None, 4, 7)


if __name__ == "__main__":
    main()
