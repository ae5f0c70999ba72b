"""A filled table with what `analysis.claims` has to say of it: footnotes at the cells that deviate."""

from collections.abc import Collection
from dataclasses import replace

from analysis import claims
from analysis.tables.declared import FilledTable
from qbench.store import queries
from qbench.store.database import Database


def checked(
    database: Database, table: FilledTable, *, varied: Collection[str] = (), allow: Collection[str] = ()
) -> FilledTable:
    """The table with footnotes; EvaluationError where its cells must not stand in one (`claims.check`).

    `varied` names what rows and columns vary on purpose. A cell of several measurements is checked as that many.
    """
    wanted = [each for row in table.declared.cells for cell in row for each in cell.wanted]
    runs = {row.id: row for row in database.find(key for each in wanted for key in (each.key, each.baseline)).values()}
    metrics: dict[int, list] = {}
    for metric in queries.metrics(database, table.run_ids):
        metrics.setdefault(metric.run_id, []).append(metric)
    cells: list[claims.Cell] = []
    places: list[tuple[int, int]] = []
    for i, row in enumerate(table.rows):
        for j, cell in enumerate(row.cells):
            if cell.state != "done" or cell.info is None:
                continue
            where = " / ".join(filter(None, (*row.labels, *table.declared.columns[j])))
            for run_id in cell.run_ids:
                measured = [
                    metric
                    for metric in metrics.get(run_id, [])
                    if metric.name == cell.info.name and metric.spec_key in cell.spec_keys
                ]
                for metric in measured or [None]:
                    task = "" if metric is None else f" {metric.task}"
                    column = f"{' / '.join(table.declared.columns[j])} {cell.info.name}{task}"
                    cells.append(claims.Cell(where=where, run=runs[run_id], metric=metric, column=column))
                    places.append((i, j))
    found = claims.check(database, cells, varied=varied, allow=allow)
    notes: dict[tuple[int, int], list[str]] = {}
    of_all = []
    for each in found.footnotes:
        where = {places[number] for number in each.cells}
        if where == set(places):
            of_all.append(each.text)
            continue
        for place in where:
            notes.setdefault(place, []).append(each.text)
    rows = [
        replace(
            row,
            cells=tuple(replace(cell, notes=(*cell.notes, *notes.get((i, j), ()))) for j, cell in enumerate(row.cells)),
        )
        for i, row in enumerate(table.rows)
    ]
    return replace(table, rows=tuple(rows), notes=(*table.notes, *of_all))
