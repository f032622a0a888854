"""Benchmarks beside named rivals: ``python tools/bench.py --help``.  They run from a checkout and are not installed."""
