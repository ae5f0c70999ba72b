"""The report: one HTML file that holds the results, draws them and needs no network.

`results` and `layers` read the database into plain values, `page` puts them, the styles, the scripts in `assets/` and
the plotting library (plotly.js, out of the installed package `plotly`) into one file. Names in a database are not to be
trusted: the values travel as JSON that cannot end its script element, and the scripts write text, never markup.
"""
