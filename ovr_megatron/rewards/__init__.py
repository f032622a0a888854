r"""Rewards: the last ``\boxed{}`` of a response against a reference answer, graded in killable workers."""
