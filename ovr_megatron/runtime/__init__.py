"""From ``torchrun``'s environment to process groups, devices, seeds, progress and logs."""
