"""Data: rows and their sources, generated puzzles, streams that resume, samples and packs."""
