"""From configuration values to the format of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qbench.checks import choice, flag, integer
from qbench.errors import SpecError
from qbench.formats import SCALES, Block, Element, Int, RangeFit, TensorFormat
from qbench.formats.named import COMPOSITE, FP_BY_BITS, TABLES, TERNARY, float_element
from qbench.formats.scale import PowerOfTwo

#: Options of the weight format; an override may set each of them.
WEIGHT_KEYS = ("format", "bits", "group_size", "symmetric", "zero_point", "reach", "scale_dtype", "tile", "range")
RANGE_KEYS = ("method", "norm", "grid", "max_shrink", "percentile", "share")

TERNARY_BITS, FULL_BITS = 1.58, 16
DEFAULT_BITS, DEFAULT_GROUP = 4, 64


def weight_format(node: Mapping[str, Any], partial: bool, zero_point: str = "int") -> TensorFormat | None:
    """None for `format=none` or `bits=16`: weights in full precision. zero_point: of asymmetric integers, where the
    node leaves it open."""
    name = node["format"]
    if not isinstance(name, str):
        raise SpecError("format", name, "a name such as int, fp, e3m2, nf4, mxfp4, nvfp4")
    if name == "int" and node["bits"] == FULL_BITS:
        _refuse_given(node, "with bits=16 (weights in full precision)", except_=("format", "bits"))
        return None
    if name == "none":
        _refuse_given(node, "with format=none (weights in full precision)", except_=("format",))
        return None
    if name in COMPOSITE:
        _refuse_given(node, f"with format={name}, which fixes them", except_=("format", "range"))
        fmt = _with_range(COMPOSITE[name], node["range"])
        fmt = replace(fmt, partial=fmt.partial or (partial and fmt.block.columns > 0))
        if isinstance(fmt.scale, PowerOfTwo) and fmt.range.method != "minmax":
            raise SpecError("range.method", fmt.range.method, f"minmax: the standard of {name} fixes its scales")
        return fmt
    bits = node["bits"]
    symmetric = node["symmetric"]
    if name == "int" and bits != TERNARY_BITS:
        bits = DEFAULT_BITS if bits is None else integer("bits", bits, 2, 8, also=f", or {TERNARY_BITS} (ternary)")
        zero, element = _integer_element(node, bits, symmetric, zero_point)
    else:
        element = TERNARY if name == "int" else element_named(name, bits)
        zero = "none"
        for key in ("zero_point", "reach"):
            if node[key] is not None:
                raise SpecError(
                    key, node[key], f"format=int of 2 to 8 bits beside it: format={element.name} has no such option"
                )
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
    if partial and (node["tile"] is not None or not block.columns):
        raise SpecError("partial_group", True, "false: only groups of a row can leave a rest that needs allowing")
    fmt = replace(fmt, partial=partial or block.rows > 1)
    if element == TERNARY and (node["range"] or {}).get("method") is None:
        fmt = replace(fmt, range=RangeFit(method="absmean"))
        _refuse_range_options(node["range"], "absmean")
        return fmt
    return _with_range(fmt, node["range"])


def _integer_element(node: Mapping[str, Any], bits: int, symmetric: object, default: str) -> tuple[str, Int]:
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
    return ("none" if symmetric else kind or default), Int(bits, signed=symmetric, reach=reach)


def element_named(name: object, bits: object, others: tuple[str, ...] = (*COMPOSITE, "none")) -> Element:
    """Float or table element; `bits`, where given, must be its own. others: names that are no elements."""
    if name == "fp":
        wanted = DEFAULT_BITS if bits is None else bits
        if not isinstance(wanted, int) or wanted not in FP_BY_BITS:
            raise SpecError(
                "bits", bits, f"with format=fp one of {', '.join(map(str, FP_BY_BITS))}; or name the format"
            )
        return float_element(FP_BY_BITS[wanted])
    found = (TABLES.get(name) or float_element(name)) if isinstance(name, str) else None
    if found is None:
        names = ", ".join(dict.fromkeys(["int", "fp", *TABLES, *others]))
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
    method = choice("range.method", node["method"], ("minmax", "mse", "percentile", "share", "absmean"))
    if method == "absmean" and fmt.element != TERNARY:
        raise SpecError("range.method", method, "minmax, mse or percentile: absmean is for ternary weights (bits=1.58)")
    if fmt.zero == "float" and method == "mse":
        raise SpecError("range.method", method, "minmax or percentile: mse shrinks ranges around 0 (zero_point=float)")
    _refuse_range_options(node, method)
    if method == "share" and node.get("share") is None:
        raise SpecError("range.share", None, "with range.method=share: the share of each range to keep, such as 0.9")
    given = {key: node[key] for key in RANGE_KEYS[1:] if node.get(key) is not None}
    return replace(fmt, range=RangeFit(method=method, **_range_values(given)))


def _range_values(given: Mapping[str, Any]) -> dict[str, Any]:
    limits = {"norm": (0.1, 10), "grid": (1, 10_000), "max_shrink": (0, 1), "percentile": (50, 100), "share": (0, 1)}
    values = {}
    for key, value in given.items():
        low, high = limits[key]
        kinds = (int,) if key == "grid" else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low < value <= high:
            raise SpecError(f"range.{key}", value, f"a number above {low}, at most {high}")
        values[key] = value if key == "grid" else float(value)
    return values


def _refuse_range_options(node: Mapping[str, Any] | None, method: str) -> None:
    used = {"mse": ("norm", "grid", "max_shrink"), "percentile": ("percentile",), "share": ("share",)}.get(method, ())
    for key in RANGE_KEYS[1:]:
        if (node or {}).get(key) is not None and key not in used:
            raise SpecError(f"range.{key}", node[key], f"nothing: range.method={method} does not use it")


def nominal_bits(fmt: TensorFormat | None) -> float | None:
    """Bits as people say them: 1.58 for ternary codes, which are packed at 1.6."""
    if fmt is None:
        return None
    return TERNARY_BITS if fmt.element == TERNARY else fmt.bits


def _refuse_given(node: Mapping[str, Any], why: str, except_: tuple[str, ...]) -> None:
    for key in WEIGHT_KEYS:
        if key in except_ or node[key] is None:
            continue
        if key != "range":
            raise SpecError(key, node[key], f"nothing {why}")
        for option, value in node[key].items():
            if value is not None:
                raise SpecError(f"range.{option}", value, f"nothing {why}")
