"""Stage 1: the linguistic cold start (paper, section 3.1).  `training` has the loop, ``__main__`` the command."""
