"""The file: data, styles, scripts and the plotting library put together, with a policy that forbids the network."""

import base64
import hashlib
import json
import re
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from sqlalchemy import make_url

from analysis.report.layers import layers
from analysis.report.results import results
from analysis.report.sections import Shown, sections
from qbench.errors import AssetError
from qbench.store.database import Database

_SCRIPTS = ("core.js", "filter.js", "table.js", "front.js", "pareto.js", "layers.js", "run.js")
_SCRIPTS += ("sections.js", "main.js")


def write_report(
    database: Database, out: Path, store: str, declared: Sequence[Shown] | None = None, allow: Collection[str] = ()
) -> dict[str, Any]:
    """Write the report of `database` to `out`; how many runs and bytes it has.

    `store` is the address to name in it, its password left out. `declared` are the declared tables to show (None:
    nobody looked for any), `allow` the mixtures that other tables footnote instead of refusing them
    (`analysis.claims`). Raises AssetError where the file cannot be written.
    """
    data = report_data(database, store, declared, allow)
    text = page(data)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AssetError(f"--out={out}: {error.strerror}; name a place you can write to") from error
    return {"runs": len(data["ids"]), "bytes": len(text.encode()), "out": str(out)}


def report_data(
    database: Database, store: str, declared: Sequence[Shown] | None = None, allow: Collection[str] = ()
) -> dict[str, Any]:
    """All that the page knows, as JSON values."""
    data = results(database)
    data["layers"] = layers(database, {run_id: index for index, run_id in enumerate(data["ids"])})
    data["sections"] = sections(database, declared, allow)
    data["store"] = make_url(store).render_as_string(hide_password=True)
    data["made"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return data


def page(data: dict[str, Any]) -> str:
    """The HTML text. Scripts are allowed by their digests; styles are allowed, as the plotting library writes its own;
    everything else is forbidden to the page. Raises AssetError where the plotting library is not installed."""
    folder = files("analysis.report")
    library = plotting_library()
    parts = [(folder / "assets" / name).read_text(encoding="utf-8") for name in _SCRIPTS]
    program = '"use strict";\n(() => {\n' + "\n".join(parts) + "\n})();\n"
    style = (folder / "assets" / "report.css").read_text(encoding="utf-8")
    values = {
        "POLICY": (
            f"default-src 'none'; script-src {_digest(library)} {_digest(program)}; "
            f"style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
        ),
        "STYLE": style,
        "DATA": json_for_script(data),
        "LIBRARY": library,
        "PROGRAM": program,
    }
    template = (folder / "assets" / "page.html").read_text(encoding="utf-8")
    # All marks in one pass: what is put in is not searched again, whatever it says.
    return re.sub("%%([A-Z]+)%%", lambda mark: values[mark[1]], template)


def plotting_library() -> str:
    """The source of plotly.js, as the installed package brings it. Raises AssetError where there is none."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise AssetError(
            "qbench report: its figure needs plotly, which is not installed: pip install plotly"
        ) from error
    return get_plotlyjs()


def json_for_script(data: object) -> str:
    """JSON that is safe inside a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
