"""A plan for people: a table, a page with a chart, what loggers get."""
