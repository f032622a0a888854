"""Stage 1: the linguistic cold start (paper, section 3.1).  ``training.py``: the loop; ``__main__.py``: the command."""
