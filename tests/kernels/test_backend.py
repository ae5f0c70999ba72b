"""Which implementation runs: one rule, and no silent fallback."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qbench.errors import SpecError
from qbench.kernels import default_backend, fake_quant

ROOT = Path(__file__).parents[2]


def test_the_default_depends_on_the_device_and_on_triton_alone(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert default_backend(cpu) == "reference"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert (default_backend(cuda), default_backend(cpu)) == ("triton", "reference")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert default_backend(cuda) == "reference"


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: name)
        with pytest.raises(
            SpecError, match=r"backend=triton: needs a CUDA tensor \(given: cpu\) or TRITON_INTERPRET=1"
        ):
            fake_quant(torch.ones(2, 4), bits=4, backend="triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match="backend=triton: Triton is not installed; accepted here: reference"):
        fake_quant(torch.ones(2, 4), bits=4, backend="triton")


def test_references_need_no_triton():
    """In a fresh interpreter in which Triton cannot be imported."""
    program = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch\n"
        "from qbench.hadamard import hadamard as matrix\n"
        "from qbench.kernels import dequant_matmul, fake_quant, hadamard, pack, quantize_token, unpack\n"
        "x = torch.ones(2, 24)\n"
        "run = {'backend': 'reference'}\n"
        "fake_quant(x, bits=4, **run), quantize_token(x, **run), hadamard(x, matrix(12), **run)\n"
        "packed = pack(x.to(torch.int8), 4, **run)\n"
        "unpack(packed, 4, 24, torch.int8, **run), dequant_matmul(x, packed, torch.ones(2, 1), bits=4, **run)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
