"""One file per schema change, named by its revision; files that were ever released are never edited."""
