"""The results database: what a run is worth remembering, and how concurrent sweeps share one file.

`records` holds the values that go in and come out (importable without SQLAlchemy), `schema` the tables,
`owner` who holds a claim, `connect` opening and migrating, `database` the writing side, `queries` the reading
side and `environment` the machine and versions a number was made with.
"""
