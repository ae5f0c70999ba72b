"""What learning at a block costs beyond the block itself: three more of it and what a minibatch needs."""

from dataclasses import replace

import pytest
import torch

from qbench.formats import uniform
from qbench.formats.scheme import Scheme
from qbench.stages.range_omniquant import OmniQuant
from qbench.stages.round_autoround import AutoRound
from qbench.stages.round_tesseraq import TesseraQ
from tests.stages.learning import BOTH, learning_view
from tests.stages.live import Live

WIDE = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 8}
GROUPS = Scheme(weight=uniform(2, 64, False))
# Two steps at least: an optimizer's moments are there from the first on. Of TesseraQ's shares the authors' largest.
STAGES = {
    "omniquant": (OmniQuant(epochs=1), 2.1),
    "omniquant without let": (OmniQuant(epochs=1, let=False), 1.5),
    "autoround": (AutoRound(iters=2, batch_size=1), 2.5),
    "tesseraq": (TesseraQ(iterations=2, thresholds="0.75 0.5", batch_size=1), 3),
}


def _peak(count, scheme, stage=None):
    """Bytes of tensors beside the block and the streams, most at a time, in float32 blocks; without a stage: of one
    forward and backward of a sequence."""
    view = learning_view("llama", scheme, batch=count, length=8, **WIDE)
    view = replace(view, generator=torch.Generator().manual_seed(0))
    given = [*view.block.parameters(), *view.data.inputs, *view.data.targets]
    with Live(given) as live:
        if stage is None:
            hidden = view.data.inputs[0][:1].clone().requires_grad_()
            view.data.student({}, hidden).sum().backward()
        else:
            stage.apply(view)
    return live.peak / sum(4 * value.numel() for value in view.block.parameters())


@pytest.mark.parametrize("scheme", [BOTH, GROUPS], ids=["rows", "groups"])
@pytest.mark.parametrize(("stage", "blocks"), STAGES.values(), ids=STAGES)
def test_memory_is_that_of_three_blocks_and_a_minibatch(stage, blocks, scheme):
    assert blocks <= 3
    assert _peak(2, scheme, stage) <= blocks + _peak(2, scheme)


@pytest.mark.parametrize("stage", [STAGES["omniquant"][0], STAGES["autoround"][0]], ids=["omniquant", "autoround"])
def test_memory_does_not_grow_with_the_sequences(stage):
    assert _peak(2, BOTH, stage) == pytest.approx(_peak(6, BOTH, stage), rel=0.02)
