"""Checkpoints: folders with a manifest written last; save and resume."""
