"""From any mix of sources to a training set: duplicates, contamination, rules, proxy loss, answers, strata, weights.

Every stage reads the rows of the one before from a JSONL file and writes its own, with a report and a figure; none
holds more of the rows in memory than one chunk, or a few numbers for each.
"""
