"""Rotations by short names, and a rotated source's model with all its weights."""

import copy

from qbench.structure.blocks import find_blocks
from qbench.structure.rotation import Rotation

OFF = {"residual": None, "values": False, "online_down": False, "online_o": "none"}
EVERYTHING = {"residual": "hadamard", "values": True, "online_down": True, "online_o": "heads", "keys": True}


def rotation(**options):
    """Nothing but what is asked for."""
    return Rotation(**{**OFF, **options})


def whole_model(source):
    """A copy of the source's model that holds its blocks' weights."""
    model = copy.deepcopy(source.model)
    for index, block in enumerate(find_blocks(model)[1]):
        rotated = dict(source.block(index).named_parameters())
        own = dict(block.named_parameters())
        assert own.keys() == rotated.keys()
        for name, parameter in own.items():
            assert parameter.dtype == rotated[name].dtype
            parameter.data = rotated[name].data
    return model
