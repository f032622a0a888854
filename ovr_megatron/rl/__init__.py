"""Stage 2: multimodal PPO (paper, section 3.2).  `training` has the loop, ``__main__`` the command."""
