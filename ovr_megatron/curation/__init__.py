"""Prepare a training set from any mix of sources, in stages.

The stages remove duplicates, contamination and rows that break rules, score responses under a small model, collect
answers, stratify and weigh.  Every stage reads the rows of the previous one from a JSONL file and writes its own, with
a report and a figure.  A stage holds in memory no more than one chunk of rows, or a few numbers for each row.
"""
