"""How figures look: one colour and marker per algorithm everywhere, readable in print, without colour and by
everyone.

Colours are those of Okabe and Ito (2008), which remain distinct under the common colour vision deficiencies;
yellow is left out as too faint on white.
"""

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

_BLUE, _ORANGE, _GREEN, _VERMILION, _PURPLE, _SKY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
)


@dataclass(frozen=True)
class Mark:
    """Colour (hex) and matplotlib marker of an algorithm."""

    colour: str
    marker: str


_KNOWN = {"rtn": Mark(_ORANGE, "s"), "gptq": Mark(_BLUE, "o"), "awq": Mark(_GREEN, "^")}
_MARKERS = "DvPX*p<>"
_OTHERS = tuple(Mark(colour, marker) for marker in _MARKERS for colour in (_VERMILION, _PURPLE, _SKY))


def marks(series: Iterable[str]) -> dict[str, Mark]:
    """A different mark for each series ("gptq", "gptq, inputs int8_token") in the colour of its algorithm.

    The first series of an algorithm has the algorithm's mark. When all marks are taken, some stand for several.
    """
    names = sorted(set(series))
    of_algorithm = _algorithm_marks(sorted({_algorithm(name) for name in names}))
    unused, taken, found = dict(of_algorithm), set(of_algorithm.values()), dict[str, Mark]()
    for name in names:
        mark = of_algorithm[_algorithm(name)]
        if unused.pop(_algorithm(name), None) is None:
            others = (Mark(mark.colour, marker) for marker in _MARKERS)
            mark = next((other for other in others if other not in taken), mark)
            taken.add(mark)
        found[name] = mark
    return found


def _algorithm(series: str) -> str:
    return series.partition(",")[0]


def _algorithm_marks(names: Sequence[str]) -> dict[str, Mark]:
    """Known algorithms have their own marks. The others get the mark that their name hashes to, unless another one of
    the same figure has taken it or its colour; colours of known algorithms that are not there come after the rest."""
    found = {name: _KNOWN[name] for name in names if name in _KNOWN}
    for name in (name for name in names if name not in _KNOWN):
        start = int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(_OTHERS)
        turned = (*_OTHERS[start:], *_OTHERS[:start])
        spare = (Mark(known.colour, marker) for known in _KNOWN.values() for marker in _MARKERS)
        candidates = [mark for mark in (*turned, *spare) if mark not in found.values()] or turned
        colours = {mark.colour for mark in found.values()}
        found[name] = next((mark for mark in candidates if mark.colour not in colours), candidates[0])
    return found


def marks_in_order(labels: Sequence[str]) -> dict[str, Mark]:
    """A mark for each label of an axis, the same for the same place; algorithms known by name keep theirs."""
    own = {label: _KNOWN[label.lower()] for label in labels if label.lower() in _KNOWN}
    pairs = zip("osD^vphd", (_BLUE, _ORANGE, _VERMILION, _GREEN, _PURPLE, _SKY, "#333333", "#888888"))
    free = [mark for mark in (Mark(colour, marker) for marker, colour in pairs) if mark not in own.values()]
    others = [label for label in labels if label not in own]
    return own | {label: free[place % len(free)] for place, label in enumerate(others)}


def wrapped(text: str, inches: float, size: float) -> str:
    """`text` in lines of the house's font at `size` points that are at most so wide, broken between words."""
    font, measure = FontProperties(family="sans-serif", size=size), TextToPath().get_text_width_height_descent
    space = measure(" ", font, ismath=False)[0]
    limit = 0.96 * inches * 72  # renderers that fit letters to pixels take a little more
    lines, used = [], float("inf")
    for word in text.split():
        width = measure(word, font, ismath=False)[0]
        if used + space + width > limit:
            lines.append(word)
            used = width
        else:
            lines[-1] += f" {word}"
            used += space + width
    return "\n".join(lines)


def house_style() -> AbstractContextManager[None]:
    """A context in which new figures have the house style; outside it matplotlib is as before."""
    return mpl.rc_context(
        {
            "figure.figsize": (7.0, 4.4),
            "figure.dpi": 150,
            "savefig.dpi": 200,
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#E5E5E5",
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "lines.markersize": 7,
            "legend.frameon": False,
            "text.parse_math": False,  # names may have dollars in them
            "pdf.fonttype": 42,  # text stays text in the PDF
        }
    )
