"""Every transform leaves the function of a block alone, on every architecture on which it applies, and says why where
it does not."""

import pytest
import torch

from qbench.engine.loop import FUNCTION_TOLERANCE, Recipe, Streams, quantize_block
from qbench.engine.passes import StructureCache, embed
from qbench.engine.source import MemorySource
from qbench.errors import StructureError
from qbench.formats import uniform
from qbench.formats.scheme import Scheme
from qbench.stages.base import Kind
from qbench.stages.pipeline import build_pipeline, stage_types
from qbench.structure.blocks import capture_calls
from tests.architectures import ARCHITECTURES, tiny_model, tokens
from tests.contracts.test_stages import INPUTS, QUICK

TRANSFORMS = [name for name, kind in sorted(stage_types().items()) if kind.kind == Kind.TRANSFORM] + ["omniquant"]
SCHEME = Scheme(weight=uniform(bits=8, group_size=-1, symmetric=False), input=INPUTS)

#: Architectures whose norms stand behind the weights, so that nothing can be folded into what feeds these.
NORMS_BEHIND = {"olmo2"}
REFUSED = dict.fromkeys(("smoothquant", "osplus"), NORMS_BEHIND)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_leaves_the_function_alone_or_says_why_not(name, architecture):
    if architecture in REFUSED.get(name, ()):
        with pytest.raises(StructureError, match=r"block 0: \w+ has no norm whose output a scale could be moved to"):
            _function_error(name, architecture)
    else:
        assert _function_error(name, architecture) <= FUNCTION_TOLERANCE[torch.float32]


@torch.no_grad()
def _function_error(name: str, architecture: str) -> float:
    model, config = tiny_model(architecture)
    for path, parameter in model.named_parameters():
        if "norm" in path or "ln_" in path:
            parameter[3::7] *= 8  # large channels, so that there is something to transform
    pipeline = build_pipeline([{"stage": name, **QUICK.get(name, {})}, {"stage": "rtn"}])
    pipeline.check(SCHEME.weights, SCHEME)
    source, calibration = MemorySource(model), tokens(config, batch=4, length=16, seed=1)
    hidden, calls = capture_calls(model, calibration[:2])
    structure = StructureCache().structure(source.block(0), calls[0], hidden, folds=True)
    stream = embed(source, model, calibration, range(1, 5))
    streams = Streams(full=stream.copy(), quantized=stream.copy() if pipeline.trains else None)
    before = source.block(0)
    block = source.block(0)
    finished = quantize_block(block, structure, 0, 1, Recipe(pipeline, SCHEME), streams)
    errors = [value for _, metric, value in finished.metrics if metric == f"{name}_function_error"]
    if not errors:  # no fold that it uses: then nothing but rounding happened
        assert all(
            torch.allclose(parameter, dict(before.named_parameters())[path], atol=0.05 * parameter.abs().max())
            for path, parameter in block.named_parameters()
        )
        return 0.0
    return max(errors)
