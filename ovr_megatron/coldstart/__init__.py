"""Supervised fine-tuning (SFT); with the recipes ``cold_start_*`` the linguistic cold start of the paper (section 3.1).

``training.py``: the loop; ``validation.py``: the loss on rows that are not trained; ``__main__.py``: the command.
"""
