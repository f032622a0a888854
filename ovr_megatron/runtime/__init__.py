"""Run a process under ``torchrun``: environment, process groups, devices, seeds, progress and logs."""
