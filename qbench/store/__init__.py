"""The results database: what a run is worth remembering, and how concurrent sweeps share one file.

`records` holds the values that go in and come out (importable without SQLAlchemy), `schema` the tables,
`owner` who holds a claim, `connect` opening and migrating, `database` the writing side, `queries` the reading
side, `merge` and `export` the ways in and out for other databases and programs, and `environment` the machine and
versions a number was made with. `frame` is the short way to pandas.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

#: Where results go, and are read from, unless told otherwise.
DEFAULT_URL = "sqlite:///results/results.db"


def frame(url: str = DEFAULT_URL, **equals: str | int | float | bool) -> "pd.DataFrame":
    """All results as a pandas frame, one row per metric of every finished run: the view `results`.

    `equals` keeps the rows whose columns have these values: `qbench.store.frame(metric="ppl", bits=4)`. Raises
    AssetError for a database that is missing, SpecError for a column that the view does not have.
    """
    from qbench.store import queries  # not at import: `records` goes without SQLAlchemy
    from qbench.store.database import Database

    with Database(url, create=False) as database:
        return queries.frame(database, **equals)
