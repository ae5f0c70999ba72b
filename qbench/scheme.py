"""From configuration values to a `Scheme`: every format option checked, and refused where it would change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qbench.errors import SpecError
from qbench.formats import SCALES, Block, Element, Int, RangeFit, TensorFormat
from qbench.formats.named import (
    COMPOSITE,
    FP_BY_BITS,
    TABLES,
    TERNARY,
    activation_format,
    float_element,
)
from qbench.formats.scale import PowerOfTwo
from qbench.formats.scheme import CacheFormat, InputFormat, Override, Scheme

#: Options of the weight format; an override may set each of them.
WEIGHT_KEYS = ("format", "bits", "group_size", "symmetric", "zero_point", "reach", "scale_dtype", "tile", "range")
ACT_KEYS = ("format", "granularity", "group_size", "symmetric", "mode", "calibration", "clip")
CACHE_KEYS = ("format", "layout", "group_size", "residual", "symmetric", "mode")
OVERRIDE_KEYS = ("modules", "blocks", "skip", *WEIGHT_KEYS, "act_bits", "kv_bits")

TERNARY_BITS, FULL_BITS = 1.58, 16
DEFAULT_BITS, DEFAULT_GROUP = 4, 64


def build_scheme(values: Mapping[str, Any]) -> Scheme:
    """The scheme that the configuration describes. Raises SpecError, naming the option."""
    partial = choice("partial_group", values["partial_group"], (True, False))
    weight = weight_format({key: values[key] for key in WEIGHT_KEYS}, partial)
    inputs = input_format(values["act_bits"], values["act"])
    cache = cache_format(values["kv_bits"], values["kv"])
    listed = values["overrides"]
    if not isinstance(listed, list) or not all(isinstance(node, Mapping) for node in listed):
        raise SpecError(
            "overrides", listed, "a list such as [{modules: down_proj, bits: 8}, {blocks: [0, -1], skip: true}]"
        )
    overrides = tuple(_override(node, values, weight, inputs, partial) for node in listed)
    return Scheme(weight=weight, input=inputs, cache=cache, overrides=overrides)


def weight_format(node: Mapping[str, Any], partial: bool) -> TensorFormat | None:
    """None for `format=none` or `bits=16`: weights in full precision."""
    name = node["format"]
    if name == "int" and node["bits"] == FULL_BITS:
        _refuse_given(node, "with bits=16 (weights in full precision)", except_=("format", "bits"))
        return None
    if name == "none":
        _refuse_given(node, "with format=none (weights in full precision)", except_=("format",))
        return None
    if name in COMPOSITE:
        _refuse_given(node, f"with format={name}, which fixes them", except_=("format", "range"))
        fmt = _with_range(COMPOSITE[name], node["range"])
        if isinstance(fmt.scale, PowerOfTwo) and fmt.range.method != "minmax":
            raise SpecError("range.method", fmt.range.method, f"minmax: the standard of {name} fixes its scales")
        return fmt
    bits = node["bits"]
    symmetric = node["symmetric"]
    if name == "int" and bits != TERNARY_BITS:
        bits = DEFAULT_BITS if bits is None else integer("bits", bits, 2, 8, also=f", or {TERNARY_BITS} (ternary)")
        zero, element = _integer_element(node, bits, symmetric)
    else:
        element = TERNARY if name == "int" else _element(name, bits)
        zero = "none"
        for key in ("zero_point", "reach"):
            if node[key] is not None:
                raise SpecError(key, node[key], f"only integers have it (format={name} bits={bits})")
        if symmetric is False:
            raise SpecError("symmetric", False, f"true: format={element.name} has no zero point")
    scale = choice("scale_dtype", node["scale_dtype"] or "float16", SCALES)
    block = _block(node["group_size"], node["tile"])
    if scale == "int8" and (zero != "int" or block.rows != 1 or not block.columns):
        raise SpecError(
            "scale_dtype", scale, "asymmetric integers in groups: integer scales count steps of the row's int8 grid"
        )
    if scale in ("e8m0", "e8m0ceil", "dq8", "e4m3", "int8") and getattr(element, "reach", None) == "full":
        raise SpecError("reach", "full", f"a scale with a sign, which {scale} has not (scale_dtype)")
    if scale in ("e4m3", "dq8") and block == Block(0, 0):
        raise SpecError("scale_dtype", scale, "more than one scale per tensor: set group_size")
    fmt = TensorFormat(element=element, block=block, zero=zero, scale=SCALES[scale])
    fmt = replace(fmt, partial=bool(block.rows > 1 or (partial and block.columns)))
    if element == TERNARY and (node["range"] or {}).get("method") is None:
        fmt = replace(fmt, range=RangeFit(method="absmean"))
        _refuse_range_options(node["range"], "absmean")
        return fmt
    return _with_range(fmt, node["range"])


def _integer_element(node: Mapping[str, Any], bits: int, symmetric: object) -> tuple[str, Int]:
    kind = node["zero_point"]
    if kind is not None:
        kind = choice("zero_point", kind, ("int", "float", "none"))
    if symmetric is None:
        symmetric = kind == "none" or node["reach"] is not None
    symmetric = flag("symmetric", symmetric)
    if symmetric and kind in ("int", "float"):
        raise SpecError("zero_point", kind, "none with symmetric=true: a symmetric grid has no zero point")
    if not symmetric and kind == "none":
        raise SpecError("zero_point", kind, "int or float with symmetric=false")
    if not symmetric and node["reach"] is not None:
        raise SpecError("reach", node["reach"], "symmetric=true: an asymmetric range is covered from end to end")
    reach = choice("reach", node["reach"] or "midpoint", ("midpoint", "narrow", "full"))
    return ("none" if symmetric else kind or "int"), Int(bits, signed=symmetric, reach=reach)


def _element(name: object, bits: object) -> Element:
    """Float or table element; `bits`, where given, must be its own."""
    if name == "fp":
        wanted = DEFAULT_BITS if bits is None else bits
        if wanted not in FP_BY_BITS:
            raise SpecError(
                "bits", bits, f"with format=fp one of {', '.join(map(str, FP_BY_BITS))}; or name the format"
            )
        return float_element(FP_BY_BITS[wanted])
    found = TABLES.get(name) or (float_element(name) if isinstance(name, str) else None)
    if found is None:
        names = ", ".join(["int", "fp", *TABLES, *COMPOSITE, "none"])
        raise SpecError(
            "format", name, f"one of {names}, or a float such as e4m3, e3m2, e2m1, e3m4ieee (E 1-7, M 0-10)"
        )
    if bits is not None and bits != found.bits:
        raise SpecError("bits", bits, f"{found.bits:g}, or leave it out: format={name} has that many")
    return found


def _block(group_size: object, tile: object) -> Block:
    if tile is not None:
        if group_size is not None:
            raise SpecError("tile", tile, "no group_size beside it: a tile is the block that shares a scale")
        if not (isinstance(tile, list) and len(tile) == 2 and all(type(n) is int and n >= 1 for n in tile)):
            raise SpecError("tile", tile, "[rows, columns], such as [128,128]")
        return Block(*tile)
    size = DEFAULT_GROUP if group_size is None else integer("group_size", group_size, -1)
    return {0: Block(0, 0), -1: Block(1, 0)}.get(size, Block(1, size))


def _with_range(fmt: TensorFormat, node: Mapping[str, Any] | None) -> TensorFormat:
    node = node or {}
    if node.get("method") is None:
        _refuse_range_options(node, fmt.range.method)
        return fmt
    method = choice("range.method", node["method"], ("minmax", "mse", "percentile", "absmean"))
    if method == "absmean" and fmt.element != TERNARY:
        raise SpecError("range.method", method, "minmax, mse or percentile: absmean is for ternary weights (bits=1.58)")
    if fmt.zero == "float" and method == "mse":
        raise SpecError("range.method", method, "minmax or percentile: mse shrinks ranges around 0 (zero_point=float)")
    _refuse_range_options(node, method)
    given = {key: node[key] for key in ("norm", "grid", "max_shrink", "percentile") if node.get(key) is not None}
    return replace(fmt, range=RangeFit(method=method, **_range_values(given)))


def _range_values(given: Mapping[str, Any]) -> dict[str, Any]:
    limits = {"norm": (0.1, 10), "grid": (2, 10_000), "max_shrink": (0, 1), "percentile": (50, 100)}
    values = {}
    for key, value in given.items():
        low, high = limits[key]
        kinds = (int,) if key == "grid" else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low < value <= high:
            raise SpecError(f"range.{key}", value, f"a number above {low}, at most {high}")
        values[key] = value if key == "grid" else float(value)
    return values


def _refuse_range_options(node: Mapping[str, Any] | None, method: str) -> None:
    used = {"mse": ("norm", "grid", "max_shrink"), "percentile": ("percentile",)}.get(method, ())
    for key in ("norm", "grid", "max_shrink", "percentile"):
        if (node or {}).get(key) is not None and key not in used:
            raise SpecError(f"range.{key}", node[key], f"nothing: range.method={method} does not use it")


def input_format(bits: object, node: Mapping[str, Any]) -> InputFormat | None:
    """Format of linear inputs; None where neither act_bits nor act.format asks for one."""
    name = node["format"]
    if bits in (None, FULL_BITS) and name is None:
        for key in ACT_KEYS:
            if node[key] is not None:
                raise SpecError(f"act.{key}", node[key], "act_bits or act.format beside it: inputs are not quantized")
        return None
    mode = choice("act.mode", node["mode"] or "dynamic", ("dynamic", "static"))
    static = mode == "static"
    if not static and node["calibration"] is not None:
        raise SpecError("act.calibration", node["calibration"], "act.mode=static: dynamic ranges are not calibrated")
    calibration = choice("act.calibration", node["calibration"] or "minmax", ("minmax", "moving", "histogram"))
    if name in COMPOSITE:
        for key in ("granularity", "group_size", "symmetric", "clip"):
            if node[key] is not None:
                raise SpecError(f"act.{key}", node[key], f"nothing with act.format={name}, which fixes it")
        fmt = activation_format(name)
        if bits not in (None, fmt.bits):
            raise SpecError("act_bits", bits, f"{fmt.bits:g}, or leave it out: act.format={name} has that many")
        if static or fmt.scale.whole or name in ("ternary", "int4in8"):
            raise SpecError(
                "act.format", name, "a format for dynamic activations: int, fp, e4m3, mxfp4, nvfp4, fp8block …"
            )
        return InputFormat(format=fmt)
    symmetric = True if node["symmetric"] is None else flag("act.symmetric", node["symmetric"])
    if name in (None, "int"):
        element: Element = Int(integer("act_bits", DEFAULT_BITS if bits is None else bits, 2, 8), signed=symmetric)
        zero = "none" if symmetric else "int"
    else:
        element, zero = _renamed(lambda: _element(name, bits)), "none"
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
    if bits in (None, FULL_BITS) and name is None:
        for key in CACHE_KEYS:
            if node[key] is not None:
                raise SpecError(f"kv.{key}", node[key], "kv_bits or kv.format beside it: the cache is not quantized")
        return None
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
        element, zero = _renamed(lambda: _element(name, bits), "kv"), "none"
    residual = node["residual"]
    residual = (128 if layout == "kivi" else 0) if residual is None else integer("kv.residual", residual, 0)
    size = node["group_size"]
    if size is not None and (static or integer("kv.group_size", size, 2) < 2):
        raise SpecError("kv.group_size", size, f"kv.layout=kivi or token (now {layout})")

    def fmt(block: Block) -> TensorFormat:
        return TensorFormat(element=element, block=block, zero=zero, scale=SCALES["float16"])

    if layout == "kivi":
        group = 32 if size is None else size
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


def _override(
    node: Mapping[str, Any],
    values: Mapping[str, Any],
    weight: TensorFormat | None,
    inputs: InputFormat | None,
    partial: bool,
) -> Override:
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
        formats["weight"] = weight_format(options, partial)
    if "act_bits" in changes:
        roles.append("input")
        formats["input"] = input_format(changes["act_bits"], values["act"])
    if "kv_bits" in changes:
        if modules is not None:
            raise SpecError(
                "overrides.kv_bits", changes["kv_bits"], "blocks without modules: a cache belongs to a block"
            )
        roles.append("cache")
        formats["cache"] = cache_format(changes["kv_bits"], values["kv"])
    found = Override(**where, roles=tuple(roles), **formats)
    before = {"weight": weight, "input": inputs}
    if modules is not None and modules != "lm_head" and all(formats[r] == before.get(r, ...) for r in roles):
        raise SpecError("overrides", dict(node), "something that differs from the scheme: this changes nothing")
    return found


def nominal_bits(fmt: TensorFormat | None) -> float | None:
    """Bits as people say them: 1.58 for ternary codes, which are packed at 1.6."""
    if fmt is None:
        return None
    return TERNARY_BITS if fmt.element == TERNARY else fmt.bits


def _renamed(build: Any, role: str = "act") -> Element:
    """An element whose errors name the role's own options."""
    try:
        return build()
    except SpecError as error:
        option = {"format": f"{role}.format", "bits": f"{role}_bits"}[error.option]
        raise SpecError(option, error.value, error.accepted) from error


def _refuse_given(node: Mapping[str, Any], why: str, except_: tuple[str, ...]) -> None:
    for key in WEIGHT_KEYS:
        if key in except_ or node[key] is None:
            continue
        if key != "range":
            raise SpecError(key, node[key], f"nothing {why}")
        for option, value in node[key].items():
            if value is not None:
                raise SpecError(f"range.{option}", value, f"nothing {why}")


def integer(option: str, value: object, low: int, high: int | None = None, also: str = "") -> int:
    """`value` if it is an integer from low to high; SpecError otherwise."""
    upper = f" to {high}" if high is not None else " or more"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise SpecError(option, value, f"must be an integer, {low}{upper}{also}")
    return value


def flag(option: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise SpecError(option, value, "must be true or false")
    return value


def choice(option: str, value: object, accepted: Any) -> Any:
    if not isinstance(value, (str, bool)) or value not in accepted:
        raise SpecError(option, value, f"must be one of {', '.join(map(str, accepted))}")
    return value
