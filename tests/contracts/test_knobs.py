"""Every option of every stage, perturbed, changes the result or is refused."""

from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import torch

from qbench.engine.loop import Recipe
from qbench.engine.passes import run_pass
from qbench.engine.rotated import rotated
from qbench.engine.source import MemorySource
from qbench.errors import SpecError
from qbench.formats import uniform
from qbench.formats.scheme import Scheme
from qbench.stages.base import Kind
from qbench.stages.pipeline import build_pipeline, stage_types
from tests.architectures import tiny_model, tokens
from tests.contracts.test_stages import GROUPS, QUICK, SCHEMES

TYPES = stage_types()
PER_CHANNEL = Scheme(weight=uniform(bits=3, group_size=-1, symmetric=False))

#: Values next to the default, where doubling or negating it would not do.
OTHER: dict[tuple[str, str], object] = {
    ("awq_scale", "n_grid"): 7,
    ("awq_clip", "max_shrink"): 0.9,
    ("duquant", "sample_tokens"): 3,
    ("gptaq", "block_size"): 16,
    ("gptaq", "scale_source"): "original",
    ("gptq", "block_size"): 16,
    ("gptq", "scale_source"): "original",
    ("hqq", "beta"): 1.0,
    ("hqq", "iterations"): 1,
    ("hqq", "round_zero"): True,
    ("hqq", "kappa"): 3.0,
    ("magr", "alpha"): 0.1,
    ("magr", "alpha_group"): 0.1,
    ("magr", "beta"): 0.7,
    ("mse_clip", "max_shrink"): 0.05,
    ("normtweaking", "distance"): "mse",
    ("normtweaking", "lr_scale"): 5.0,
    ("omniquant", "let_init"): "identity",
    ("osplus", "n_grid"): 350,
    ("osplus", "smallest_threshold"): 2.0,
    ("autoround", "batch_size"): 2,
    ("autoround", "lr"): 0.01,
    ("autoround", "minmax_lr"): 0.01,
    ("percentile_clip", "percentile"): 80.0,
    ("tesseraq", "thresholds"): "0.5 0.25",
    ("tesseraq", "scale_lr"): 0.05,
}

#: What else has to be set for an option to matter: options of the stage, and the scheme, model or pipeline.
WITH: dict[tuple[str, str], dict[str, object]] = {
    ("gptq", "static_groups"): {"act_order": True},
    ("gptq", "block_size"): {"scale_source": "stale"},
    ("gptaq", "static_groups"): {"act_order": True},
    ("gptaq", "block_size"): {"scale_source": "stale"},
    ("omniquant", "lwc_lr"): {"keep_best": False},
    ("omniquant", "autocast"): {"keep_best": False},
}
SCHEME: dict[tuple[str, str], Scheme] = {
    ("magr", "alpha"): PER_CHANNEL,
    ("magr", "beta"): PER_CHANNEL,
}


def _digest(name: str, options: dict[str, object], scheme: Scheme, model: str) -> str:
    """Of the codes, and of every parameter and metric that is no time."""
    nodes = [{"stage": name, **options}]
    if TYPES[name].kind < Kind.ROUND:
        nodes.append({"stage": "rtn"})
    elif TYPES[name].kind > Kind.ROUND:
        nodes.insert(0, {"stage": "rtn"})
    pipeline = build_pipeline(nodes)
    pipeline.check(scheme.weights, scheme)
    network, config = tiny_model(model, intermediate_size=32) if model == "llama" else tiny_model(model)
    with torch.no_grad():
        for path, parameter in network.named_parameters():
            if "norm" in path or "ln_" in path:
                parameter[3::7] *= 8
            elif name == "hqq":
                parameter *= 5  # residuals beyond the shrinkage threshold
    calibration = tokens(config, batch=5, length=16, seed=1)
    recipe = Recipe(pipeline, scheme)
    source = rotated(MemorySource(network), recipe, calibration)
    result = run_pass(source, recipe, calibration)
    total = sum(
        (value.double() * torch.arange(1, value.numel() + 1).view(value.shape).double().sin()).sum().item()
        for value in result.weights.tensors.values()
    )
    return f"{result.ledger.codes_sha256} {total!r}"


def _digest_or_refusal(
    name: str, options: dict[str, object], scheme: Scheme, model: str
) -> tuple[str | None, str | None]:
    try:
        return _digest(name, options, scheme, model), None
    except SpecError as error:
        return None, str(error)


KNOBS = [(name, option.name) for name in sorted(TYPES) for option in fields(TYPES[name])]


def _other(name: str, option: str, value: object) -> object:
    if (name, option) in OTHER:
        return OTHER[name, option]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value * 2 if value else 3
    if isinstance(value, float):
        return value * 2 if 0 < value < 0.5 else value / 2 if value else 0.25
    choices = get_args(get_type_hints(TYPES[name])[option])
    others = [choice for choice in choices if choice != value and not isinstance(choice, type)]
    assert others, f"no other value known for {name}.{option}={value!r}"
    return others[-1]


@pytest.mark.parametrize(("name", "option"), KNOBS, ids=[".".join(knob) for knob in KNOBS])
def test_an_option_changes_the_result_or_is_refused(name, option):
    base = {**QUICK.get(name, {}), **WITH.get((name, option), {})}
    value = base.get(option, TYPES[name].options()[option])
    scheme = SCHEME.get((name, option), SCHEMES.get(name, Scheme(weight=GROUPS)))
    model = MODEL.get((name, option), "llama")
    before, _ = _digest_or_refusal(name, base, scheme, model)
    after, refusal = _digest_or_refusal(name, {**base, option: _other(name, option, value)}, scheme, model)
    assert before is not None
    if refusal is not None:
        assert option in refusal or (name, option) in REFUSED_BY_OTHERS
        return
    if (name, option) in SPEED_ONLY:
        assert after == before
    else:
        assert after != before


MODEL: dict[tuple[str, str], str] = {
    ("osplus", "shift"): "opt",
    ("omniquant", "shift"): "opt",
}
#: Options that say how something is computed, not what: they must not change a bit on the CPU.
SPEED_ONLY: set[tuple[str, str]] = set()
REFUSED_BY_OTHERS: set[tuple[str, str]] = set()
