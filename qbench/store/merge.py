"""Merging one results database into another, so that nothing is lost and doing it twice changes nothing.

Every attempt at a key was claimed once, by an owner text that no other claim shares: it says whether an attempt is
already there. Of several attempts at one key one counts; the others stay, superseded, with their own environment.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, insert, select, update

from qbench.errors import AssetError
from qbench.store import schema
from qbench.store.database import Database

Row = Mapping[str, Any]

_RANK = {"failed": 0, "running": 1, "done": 2}
# Which columns tell two rows of one run apart.
_SAME: Mapping[str, tuple[str, ...]] = {
    "artifact": ("kind", "path", "sha256"),
    "failure": ("spec_key", "error_type", "message", "created"),
}
_SAME_NOISE = ("family", "spec_key", "name", "component", "environment_id", "created")


@dataclass(kw_only=True)
class Merged:
    """What a merge did. `added` attempts at keys were new here, `present` were here before, `running` ones were left
    where they are worked on; `replaced` keys now count by the newcomer, `kept` new attempts are superseded by what was
    here, `measurements` came along (of them `shared` also to the counting run of equal weights), as did `anchors` of
    sources that had none here. `different` lists keys whose two finished runs have different weights."""

    added: int = 0
    present: int = 0
    running: int = 0
    replaced: int = 0
    kept: int = 0
    measurements: int = 0
    shared: int = 0
    noise: int = 0
    anchors: int = 0
    different: list[str] = field(default_factory=list)


def merge(target: Database, source: Database) -> Merged:
    """Bring every finished or failed attempt of `source` into `target`; `source` stays as it is.

    A transaction per key: sweeps that write to `target` meanwhile wait for moments only, and a merge that was
    interrupted is completed by another.

    Of two attempts at one key, done counts before running before failed, and of equals the one that was here. Where
    both are done and their weights the same to the bit (`codes_sha256`), the counting run also gets the other's
    measurements that it lacks. A run that is being worked on is left out: its claim is no result.
    """
    found = Merged()
    with source.read() as reading:
        with target.write() as writing:
            environments = _environments(reading, writing)
            found.noise = _merge_noise(reading, writing, environments)
            found.anchors = _merge_anchors(reading, writing)
        by_key: dict[str, list[Row]] = {}
        for row in _rows(reading, schema.run):
            by_key.setdefault(row["key"], []).append(row)
        for key, attempts in by_key.items():
            with target.write() as writing:
                _merge_key(reading, writing, key, attempts, environments, found)
    return found


def source_url(name: str, target: str) -> str:
    """The address of the database called `name` (a file or an address); AssetError if it is the target itself."""
    url = name if "://" in name else f"sqlite:///{name}"
    if _identity(url) == _identity(target):
        raise AssetError(f"{name}: is the database to merge into; name another one")
    return url


def _identity(url: str) -> str:
    prefix = "sqlite:///"
    return str(Path(url.removeprefix(prefix)).expanduser().resolve()) if url.startswith(prefix) else url


def _rows(connection: Connection, table: Table, **equals: object) -> list[Row]:
    conditions = [table.c[name] == value for name, value in equals.items()]
    return list(connection.execute(select(table).where(*conditions).order_by(*table.primary_key)).mappings())


def _without(row: Row, *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def _environments(reading: Connection, writing: Connection) -> dict[int, int]:
    """Ids of environments there -> here. The hash says which are the same."""
    table = schema.environment
    here = {row["hash"]: row["id"] for row in _rows(writing, table)}
    ids = {}
    for row in _rows(reading, table):
        if row["hash"] not in here:
            here[row["hash"]] = _inserted(writing, table, _without(row, "id"))
        ids[row["id"]] = here[row["hash"]]
    return ids


def _inserted(connection: Connection, table: Table, values: Mapping[str, Any]) -> int:
    return connection.execute(insert(table).values(dict(values))).inserted_primary_key[0]


def _merge_key(
    reading: Connection,
    writing: Connection,
    key: str,
    attempts: Sequence[Row],
    environments: Mapping[int, int],
    found: Merged,
) -> None:
    run = schema.run
    ids: dict[int, int] = {}  # of attempts: there -> here
    here = _rows(writing, run, key=key)
    by_owner = {row["owner"]: row for row in here}
    counting = next((row for row in here if row["superseded_by"] is None), None)
    ended = [row for row in attempts if row["status"] != "running"]
    found.running += len(attempts) - len(ended)
    if not ended:
        return
    there = {row["id"] for row in ended}
    # The one that counts there comes first. What a running attempt superseded counts as long as that is left out.
    heads = [row for row in ended if row["superseded_by"] not in there - {row["id"]}]
    head = heads[-1] if heads else ended[-1]
    new: list[Row] = []
    for row in [head, *(row for row in ended if row is not head)]:
        known = by_owner.get(row["owner"])
        if known is None:
            values = _without(row, "id") | {"environment_id": environments[row["environment_id"]]}
            # At most one row per key counts, at every moment: all but the first begin superseded.
            values["superseded_by"] = None if counting is None else counting["id"]
            ids[row["id"]] = _inserted(writing, run, values)
            new.append(row)
            if counting is None:
                counting = values | {"id": ids[row["id"]]}
        else:
            ids[row["id"]] = known["id"]
            if known["status"] == "running":  # a copy that was taken while the run was being worked on
                ending = _without(row, "id", "key", "superseded_by", "environment_id")
                writing.execute(update(run).where(run.c.id == known["id"]).values(ending))
                if counting is not None and counting["id"] == known["id"]:
                    counting = {**counting, **ending}
        _copy_children(reading, writing, row["id"], ids[row["id"]], environments, found)
    found.added += len(new)
    found.present += len(ended) - len(new)
    for row in new:  # the order in which attempts superseded each other there
        successor = ids.get(row["superseded_by"])
        if row is not head and successor not in (None, ids[row["id"]]):
            writing.execute(update(run).where(run.c.id == ids[row["id"]]).values(superseded_by=successor))
    kept = _decide(writing, key, counting, head, ids[head["id"]], found)
    found.kept += kept and head in new


def _decide(writing: Connection, key: str, counting: Row, head: Row, head_id: int, found: Merged) -> bool:
    """Which of the attempt that counts here and the one that counts there does from now on; whether it is the one
    here."""
    run = schema.run
    if counting["id"] == head_id:
        return False
    if _RANK[head["status"]] > _RANK[counting["status"]]:
        writing.execute(update(run).where(run.c.id == counting["id"]).values(superseded_by=head_id))
        writing.execute(update(run).where(run.c.id == head_id).values(superseded_by=None))
        found.replaced += 1
        return False
    if head["status"] == counting["status"] == "done":
        if head["codes_sha256"] == counting["codes_sha256"]:
            found.shared += _copy_measurements(writing, writing, head_id, counting["id"], None)
        else:
            found.different.append(key)
    return True


def _copy_children(
    reading: Connection, writing: Connection, there: int, here: int, environments: Mapping[int, int], found: Merged
) -> None:
    found.measurements += _copy_measurements(reading, writing, there, here, environments)
    if not _rows(writing, schema.layer_metric, run_id=here):  # they are stored once, when a run ends
        _insert_many(writing, schema.layer_metric, _rows(reading, schema.layer_metric, run_id=there), here)
    for table in (schema.artifact, schema.failure):
        names = _SAME[table.name]
        held = {tuple(row[name] for name in names) for row in _rows(writing, table, run_id=here)}
        rows = _rows(reading, table, run_id=there)
        _insert_many(writing, table, (row for row in rows if tuple(row[name] for name in names) not in held), here)


def _insert_many(connection: Connection, table: Table, rows: Iterable[Row], run_id: int) -> None:
    values = [_without(row, "id") | {"run_id": run_id} for row in rows]
    if values:
        connection.execute(insert(table), values)


def _copy_measurements(
    reading: Connection, writing: Connection, there: int, here: int, environments: Mapping[int, int] | None
) -> int:
    """Copy the metrics, with their samples, that run `here` lacks; how many they were. Each keeps the environment that
    it was measured in; `environments` has ids there -> here, or is None within one database."""
    (run,) = _rows(reading, schema.run, id=there)
    held = {(row["spec_key"], row["name"]) for row in _rows(writing, schema.metric, run_id=here)}
    copied = 0
    for row in _rows(reading, schema.metric, run_id=there):
        if (row["spec_key"], row["name"]) in held:
            continue
        place = row["environment_id"] or run["environment_id"]
        place = place if environments is None else environments[place]
        values = _without(row, "id") | {"run_id": here, "environment_id": place}
        metric_id = _inserted(writing, schema.metric, values)
        for sample in _rows(reading, schema.sample, metric_id=row["id"]):
            writing.execute(insert(schema.sample).values({**sample, "metric_id": metric_id}))
        copied += 1
    return copied


def _merge_noise(reading: Connection, writing: Connection, environments: Mapping[int, int]) -> int:
    held = {tuple(row[name] for name in _SAME_NOISE) for row in _rows(writing, schema.noise)}
    rows = [
        _without(row, "id") | {"environment_id": environments[row["environment_id"]]}
        for row in _rows(reading, schema.noise)
    ]
    missing = [row for row in rows if tuple(row[name] for name in _SAME_NOISE) not in held]
    if missing:
        writing.execute(insert(schema.noise), missing)
    return len(missing)


def _merge_anchors(reading: Connection, writing: Connection) -> int:
    held = {row["source"] for row in _rows(writing, schema.anchor)}
    missing = [_without(row, "id") for row in _rows(reading, schema.anchor) if row["source"] not in held]
    if missing:
        writing.execute(insert(schema.anchor), missing)
    return len(missing)
