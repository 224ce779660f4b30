"""The training loop and what belongs to it: options, schedule, loader, checkpoints and the run log."""
