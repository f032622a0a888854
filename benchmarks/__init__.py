"""Benchmarks beside named rivals: ``ovr bench --help``.  They run from a checkout and are not installed."""
