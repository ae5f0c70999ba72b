"""From configuration values to a `Scheme`: every format option checked, and refused where it would change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qbench.checks import choice, flag, integer
from qbench.errors import SpecError
from qbench.formats import SCALES, Block, Element, Int, RangeFit, TensorFormat
from qbench.formats.named import COMPOSITE, activation_format
from qbench.formats.scheme import HEAD, CacheFormat, InputFormat, Override, Scheme
from qbench.scheme_weights import (
    DEFAULT_BITS,
    DEFAULT_GROUP,
    FULL_BITS,
    RANGE_KEYS,
    WEIGHT_KEYS,
    element_named,
    weight_format,
)

ACT_KEYS = ("format", "granularity", "group_size", "symmetric", "mode", "calibration", "clip")
CACHE_KEYS = ("format", "layout", "group_size", "residual", "symmetric", "mode")
OVERRIDE_KEYS = ("modules", "blocks", "skip", *WEIGHT_KEYS, "act_bits", "kv_bits")


#: Whole formats whose scales can be fitted token by token.
ACT_COMPOSITE = tuple(name for name in COMPOSITE if name.startswith("mx") or name in ("nvfp4", "fp8block"))


def build_scheme(values: Mapping[str, Any], zero_point: str = "int") -> Scheme:
    """The scheme that the configuration describes; zero_point: what the algorithm takes where that is left open.

    Raises SpecError, naming the option.
    """
    _check_nodes(values)
    partial = flag("partial_group", values["partial_group"])
    weight = weight_format({key: values[key] for key in WEIGHT_KEYS}, partial, zero_point)
    inputs = input_format(values["act_bits"], values["act"])
    cache = cache_format(values["kv_bits"], values["kv"])
    listed = values["overrides"]
    if not isinstance(listed, list) or not all(isinstance(node, Mapping) for node in listed):
        raise SpecError(
            "overrides", listed, "a list such as [{modules: down_proj, bits: 8}, {blocks: [0, -1], skip: true}]"
        )
    overrides = tuple(_override(node, values, partial, zero_point) for node in listed)
    return Scheme(weight=weight, input=inputs, cache=cache, overrides=overrides)


def input_format(bits: object, node: Mapping[str, Any]) -> InputFormat | None:
    """Format of linear inputs; None where neither act_bits nor act.format asks for one."""
    name = node["format"]
    if bits == FULL_BITS:
        return None  # switched off, whatever a scheme says
    if bits is None and name is None:
        for key in ACT_KEYS:
            if node[key] is not None:
                raise SpecError(f"act.{key}", node[key], "act_bits or act.format beside it: inputs are not quantized")
        return None
    mode = choice("act.mode", node["mode"] or "dynamic", ("dynamic", "static"))
    static = mode == "static"
    if not static and node["calibration"] is not None:
        raise SpecError("act.calibration", node["calibration"], "act.mode=static: dynamic ranges are not calibrated")
    calibration = choice("act.calibration", node["calibration"] or "minmax", ("minmax", "moving", "histogram"))
    _require_name("act.format", name)
    if name in COMPOSITE:
        for key in ("granularity", "group_size", "symmetric", "clip"):
            if node[key] is not None:
                raise SpecError(f"act.{key}", node[key], f"nothing with act.format={name}, which fixes it")
        fmt = activation_format(name)
        if bits not in (None, fmt.bits):
            raise SpecError("act_bits", bits, f"{fmt.bits:g}, or leave it out: act.format={name} has that many")
        if static:
            raise SpecError("act.mode", "static", f"dynamic: act.format={name} has scales for parts of a token")
        if name not in ACT_COMPOSITE:
            raise SpecError("act.format", name, f"one of int, fp, {', '.join(ACT_COMPOSITE)}, or a float such as e4m3")
        return InputFormat(format=fmt)
    symmetric = True if node["symmetric"] is None else flag("act.symmetric", node["symmetric"])
    if name in (None, "int"):
        element: Element = Int(integer("act_bits", DEFAULT_BITS if bits is None else bits, 2, 8), signed=symmetric)
        zero = "none" if symmetric else "int"
    else:
        element, zero = _renamed(lambda: element_named(name, bits, ACT_COMPOSITE)), "none"
        if not symmetric:
            raise SpecError("act.symmetric", False, f"true: act.format={name} has no zero point")
    default = "tensor" if static else "token"
    granularity = choice("act.granularity", node["granularity"] or default, ("token", "tensor", "group", "channel"))
    if static and granularity not in ("tensor", "channel"):
        raise SpecError(
            "act.granularity", granularity, "tensor or channel with act.mode=static: tokens are not known yet"
        )
    if not static and granularity in ("tensor", "channel"):
        raise SpecError(
            "act.granularity",
            granularity,
            "token or group with act.mode=dynamic: a scale over tokens would make a token depend on later ones "
            "(act.mode=static has tensor and channel)",
        )
    if granularity != "group" and node["group_size"] is not None:
        raise SpecError("act.group_size", node["group_size"], f"act.granularity=group beside it (now {granularity})")
    if granularity == "group":
        size = integer("act.group_size", DEFAULT_GROUP if node["group_size"] is None else node["group_size"], 2)
        block = Block(1, size)
    else:
        block = {"token": Block(1, 0), "tensor": Block(0, 0), "channel": Block(0, 1)}[granularity]
    fmt = TensorFormat(element=element, block=block, zero=zero, scale=SCALES["float32"])
    clip = node["clip"]
    if clip is not None:
        if static or isinstance(clip, bool) or not isinstance(clip, (int, float)) or not 0 < clip <= 1:
            raise SpecError("act.clip", clip, "a share of the dynamic range above 0, at most 1 (act.mode=dynamic)")
        if clip != 1:
            fmt = replace(fmt, range=RangeFit(method="share", share=float(clip)))
    if static and calibration == "histogram" and granularity != "tensor":
        raise SpecError("act.calibration", calibration, "minmax or moving with act.granularity=channel")
    return InputFormat(format=fmt, static=static, calibration=calibration)


def cache_format(bits: object, node: Mapping[str, Any]) -> CacheFormat | None:
    """Format of cached keys and values; None where neither kv_bits nor kv.format asks for one."""
    name = node["format"]
    if bits == FULL_BITS:
        return None
    if bits is None and name is None:
        for key in CACHE_KEYS:
            if node[key] is not None:
                raise SpecError(f"kv.{key}", node[key], "kv_bits or kv.format beside it: the cache is not quantized")
        return None
    _require_name("kv.format", name)
    mode = choice("kv.mode", node["mode"] or "dynamic", ("dynamic", "static"))
    static = mode == "static"
    layouts = ("tensor", "head", "channel") if static else ("kivi", "token")
    layout = choice("kv.layout", node["layout"] or ("tensor" if static else "kivi"), layouts)
    symmetric = False if node["symmetric"] is None else flag("kv.symmetric", node["symmetric"])
    if name in (None, "int"):
        element: Element = Int(integer("kv_bits", DEFAULT_BITS if bits is None else bits, 2, 8), signed=symmetric)
        zero = "none" if symmetric else "float" if layout == "kivi" else "int"
    else:
        if node["symmetric"] is False:
            raise SpecError("kv.symmetric", False, f"true: kv.format={name} has no zero point")
        element, zero = _renamed(lambda: element_named(name, bits, ()), "kv"), "none"
    residual = node["residual"]
    residual = (128 if layout == "kivi" else 0) if residual is None else integer("kv.residual", residual, 0)
    size = node["group_size"]
    if size is not None and static:
        raise SpecError("kv.group_size", size, f"kv.layout=kivi or token (now {layout})")
    if size is not None:
        integer("kv.group_size", size, 2)

    def fmt(block: Block) -> TensorFormat:
        return TensorFormat(element=element, block=block, zero=zero, scale=SCALES["float16"])

    if layout == "kivi":
        group = 32 if size is None else size
        if node["residual"] is None and residual % group:
            raise SpecError("kv.group_size", group, f"a divisor of kv.residual={residual}, or another kv.residual")
        if residual == 0 or residual % group:
            raise SpecError(
                "kv.residual",
                residual,
                f"a positive multiple of kv.group_size={group}: keys are quantized that many tokens at a time",
            )
        key, value = fmt(Block(group, 1)), fmt(Block(1, group))
    elif layout == "token":
        key = value = fmt(Block(1, size or 0))
    else:
        key = value = fmt(Block(0, 1) if layout == "channel" else Block(0, 0))
    return CacheFormat(
        key=key, value=value, residual=residual, static=static, across_heads=layout == "tensor", layout=layout
    )


def _override(node: Mapping[str, Any], values: Mapping[str, Any], partial: bool, zero_point: str) -> Override:
    """One entry of `overrides`: the scheme's own options with this entry's in their place."""
    unknown = sorted(set(node) - set(OVERRIDE_KEYS))
    if unknown:
        raise SpecError(f"overrides.{unknown[0]}", node[unknown[0]], f"one of {', '.join(OVERRIDE_KEYS)}")
    modules, blocks = node.get("modules"), node.get("blocks")
    if modules is not None and (not isinstance(modules, str) or not modules):
        raise SpecError("overrides.modules", modules, 'a pattern of dotted names such as down_proj or "mlp.*"')
    if blocks is not None and not (isinstance(blocks, list) and blocks and all(type(b) is int for b in blocks)):
        raise SpecError("overrides.blocks", blocks, "a list of block numbers such as [0,-1]")
    if modules is None and blocks is None:
        raise SpecError("overrides", dict(node), "modules or blocks: what it applies to")
    if modules is not None and modules.split(".")[0] == HEAD:
        for key in ("blocks", "act_bits"):
            if node.get(key) is not None:
                raise SpecError(f"overrides.{key}", node[key], "nothing beside modules=lm_head, which is no block's")
    if "range" in node:
        _check_range("overrides.range", node["range"])
    where = {"modules": modules, "blocks": None if blocks is None else tuple(blocks)}
    changes = {key: value for key, value in node.items() if key not in ("modules", "blocks", "skip")}
    if node.get("skip") is not None:
        if not flag("overrides.skip", node["skip"]) or changes:
            raise SpecError("overrides.skip", node["skip"], "true and nothing beside it but modules and blocks")
        return Override(**where, roles=("weight", "input"))
    if not changes:
        raise SpecError("overrides", dict(node), "something to change: skip: true, bits, format, act_bits, …")
    roles, formats = [], {}
    changed = {key: changes[key] for key in WEIGHT_KEYS if key in changes}
    if changed:
        kept = {} if "format" in changed else {key: values[key] for key in WEIGHT_KEYS}
        options = {"format": "int"} | dict.fromkeys(WEIGHT_KEYS[1:]) | kept | changed
        roles.append("weight")
        formats["weight"] = weight_format(options, partial, zero_point)
    if "act_bits" in changes:
        roles.append("input")
        formats["input"] = input_format(_or_full(changes["act_bits"]), values["act"])
    if "kv_bits" in changes:
        if modules is not None:
            raise SpecError(
                "overrides.kv_bits", changes["kv_bits"], "blocks without modules: a cache belongs to a block"
            )
        roles.append("cache")
        formats["cache"] = cache_format(_or_full(changes["kv_bits"]), values["kv"])
    return Override(**where, roles=tuple(roles), **formats)


def _or_full(bits: object) -> object:
    """An override that says `act_bits: null` means full precision there."""
    return FULL_BITS if bits is None else bits


def _check_nodes(values: Mapping[str, Any]) -> None:
    """`act=8` replaces a group of options by a number: refuse that before anything looks into it."""
    _check_range("range", values["range"])
    for name, keys in (("act", ACT_KEYS), ("kv", CACHE_KEYS)):
        if not isinstance(values[name], Mapping):
            accepted = ", ".join(f"{name}.{key}" for key in keys)
            raise SpecError(name, values[name], f"{name}_bits for the bits, or one of {accepted}")


def _check_range(option: str, node: object) -> None:
    if not isinstance(node, Mapping) or set(node) - set(RANGE_KEYS):
        raise SpecError(option, node, f"options of its own: {', '.join(f'range.{key}' for key in RANGE_KEYS)}")


def _require_name(option: str, name: object) -> None:
    if name is not None and not isinstance(name, str):
        raise SpecError(option, name, "a name such as int, fp, e4m3")


def _renamed(build: Any, role: str = "act") -> Element:
    """An element whose errors name the role's own options."""
    try:
        return build()
    except SpecError as error:
        option = {"format": f"{role}.format", "bits": f"{role}_bits"}[error.option]
        raise SpecError(option, error.value, error.accepted) from error
