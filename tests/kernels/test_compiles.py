"""Every kernel compiles to machine code for a GPU and wants no more shared memory than one has, without a GPU."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
CAPABILITY, SHARED_BYTES = 90, 163 * 1024
"""H100; but no more shared memory than a block may have on an A100 (80), whose limit is lower."""
KERNELS = {
    "fake_quant_kernel",
    "quantize_token_kernel",
    "pack_kernel",
    "unpack_kernel",
    "transform_kernel",
    "mix_kernel",
    "vector_kernel",
    "matrix_kernel",
}


def _version():
    return importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "not installed"


@pytest.mark.skipif(
    not _version().startswith("3.9."),
    reason=f"compiling without a GPU needs internals of Triton 3.9 (here {_version()})",
)
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process")
def test_every_kernel_compiles(tmp_path):
    command = [sys.executable, str(FOLDER / "compile_for_gpu.py"), str(CAPABILITY)]
    root = FOLDER.parents[1]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in lines} == KERNELS
    for name, shared in lines:
        assert int(shared) <= SHARED_BYTES, name
