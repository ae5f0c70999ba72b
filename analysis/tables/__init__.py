"""One file per table; a table is a pandas frame with a caption, and a function that renders it for a
terminal."""
