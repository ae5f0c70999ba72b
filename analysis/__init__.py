"""Questions over the rows of a results database: statistics, tables and figures. Reads the database, never a
model."""
