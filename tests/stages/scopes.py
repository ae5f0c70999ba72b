"""A block's view with sample and statistics, and what a search's loss is by its definition: the transformed layers
written into a copy of the model, their inputs rounded by hooks, the whole model run."""

import copy

import torch

from qbench.calibration.extremes import Extremes
from qbench.calibration.statistics import AbsMax, AbsMean, Hessian
from qbench.engine.passes import StructureCache, embed
from qbench.engine.probe import Probe
from qbench.engine.source import MemorySource
from qbench.formats import SCALES, Block, Int, TensorFormat
from qbench.formats.scheme import InputFormat
from qbench.stages.base import BlockView
from qbench.structure.blocks import capture_calls, find_blocks
from tests.architectures import tiny_model, tokens

STATISTICS = (AbsMax, AbsMean, Extremes, Hessian)


def inputs_of(bits, *, static):
    """Symmetric integers, one scale per tensor (static) or per token; the extremes lie on a code, not between two."""
    block = Block(0, 0) if static else Block(1, 0)
    fmt = TensorFormat(element=Int(bits, signed=True, reach="narrow"), block=block, scale=SCALES["float32"])
    return InputFormat(format=fmt, static=static)


@torch.no_grad()
def loud(name, seed=0, dtype=torch.float32, **overrides):
    """A model some of whose channels carry large values and some (where norms have biases) lie far from 0, and
    calibration tokens."""
    model, config = tiny_model(name, seed=seed, dtype=dtype, **overrides)
    for path, parameter in model.named_parameters():
        if "norm" in path or "ln_" in path:
            parameter[3::7] *= 8
            if path.endswith("bias"):
                parameter[5::9] += 6
    return model, tokens(config, batch=4, length=16, seed=seed)


@torch.no_grad()
def view_of(model, calibration, weight, inputs=None, *, index=0):
    """The view of block `index` whose sample is all of the calibration tokens."""
    source = MemorySource(model)
    hidden, calls = capture_calls(model, calibration[:2])
    block = source.block(index)
    structure = StructureCache().structure(block, calls[index], hidden, folds=True)
    stream = embed(source, model, calibration)
    for earlier in range(index):
        stream.advance(source.block(earlier), earlier)
    probe = Probe.observe(block, index, stream, list(range(len(calibration))))
    statistics = {
        group.index: {kind: kind(group.in_features, torch.device("cpu")) for kind in STATISTICS}
        for group in structure.groups
    }

    def observe(group, x):
        for statistic in statistics[group.index].values():
            statistic.update(x)

    stream.observe(block, index, structure, observe)
    refs = [ref for group in structure.groups for ref in group.weights]
    return BlockView(
        block=block,
        structure=structure,
        groups=structure.groups,
        formats={ref.name: weight for ref in refs},
        inputs={} if inputs is None else {ref.name: inputs for ref in refs},
        statistics=statistics,
        scopes=probe.scopes(block, structure),
        where=f"block {index}",
    )


def by_name(view, name):
    """The group of the weight called `name` and that fold."""
    group = next(g for g in view.structure.groups if any(ref.name == name for ref in g.weights))
    return group, next((f for f in view.structure.folds if group.index in (f.group, *f.extra_groups)), None)


def rounded_inputs(x, bits, *, static):
    """x [..., in] on symmetric grids of 2^bits - 2 steps between -max|x| and max|x|, by tensor or token, float64."""
    x = x.double()
    largest = x.abs().max() if static else x.abs().amax(-1, keepdim=True)
    scale = largest / (2 ** (bits - 1) - 1)
    return scale * (x / scale.where(scale > 0, 1.0)).round()


@torch.no_grad()
def loss_by_definition(model, calibration, index, names, scope, *, scale, shift=None, weights=None, inputs=None):
    """Mean over tokens of the squared change of an output when the linear modules `names` of block `index` read
    inputs((x - shift) / scale) and hold weights(W scale), their biases taking W shift.

    scope: the module whose output is compared; "module<" compares its first input; None: the modules' own outputs,
    summed.
    """
    clean, _ = _outputs(model, calibration, index, names, scope)
    changed = copy.deepcopy(model)
    for name in names:
        module = find_blocks(changed)[1][index].get_submodule(name)
        original = module.weight.detach().clone()
        value = (original if weights is None else weights(original * scale) / scale).double() * scale.double()
        module.weight.copy_(value)
        if shift is not None:
            module.bias += original @ shift

        def before(_, args):
            x = args[0] if shift is None else args[0] - shift
            x = x / scale
            return ((x if inputs is None else inputs(x)).to(args[0].dtype), *args[1:])

        module.register_forward_pre_hook(before)
    found, count = _outputs(changed, calibration, index, names, scope)
    return sum((f - c).double().square().sum().item() for f, c in zip(found, clean, strict=True)) / count


def _outputs(model, calibration, index, names, scope):
    block, seen = find_blocks(model)[1][index], []
    if scope is not None and scope.endswith("<"):
        module = block.get_submodule(scope[:-1])
        handles = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))]
    else:
        paths = names if scope is None else [scope]
        handles = [
            block.get_submodule(path).register_forward_hook(
                lambda *call: seen.append((call[2][0] if isinstance(call[2], tuple) else call[2]).clone())
            )
            for path in paths
        ]
    model(calibration)
    for handle in handles:
        handle.remove()
    return seen, calibration.numel()


def state_of(view):
    """Everything in a view that a stage could spoil, copied."""
    statistics = {(i, k): v.value().clone() for i, kinds in view.statistics.items() for k, v in kinds.items()}
    outputs = {(i, c.module): c.output.clone() for i, calls in view.scopes.items() for c in calls}
    return {**copy.deepcopy(view.block.state_dict()), **statistics, **outputs}


def same_state(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
