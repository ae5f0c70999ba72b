"""Where Triton kernels run in tests: on a GPU, or interpreted on the CPU in a process of their own.

TRITON_INTERPRET has to be set before Triton is imported and then holds for the whole process, so the ordinary run
leaves these tests out and `test_interpreted.py` starts a second pytest over this folder with the variable set.
"""

import importlib.util
import os

import pytest
import torch


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The device of a comparison of Triton with the reference."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if request.param == "cuda":
        if interpreting or not torch.cuda.is_available():
            pytest.skip("needs a CUDA device and a process without TRITON_INTERPRET")
        return torch.device("cuda")
    if not interpreting:
        pytest.skip("runs under TRITON_INTERPRET=1: see test_interpreted.py")
    return torch.device("cpu")
