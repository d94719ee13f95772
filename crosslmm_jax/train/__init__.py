"""Training: what learns, how fast, one pure step, checkpoints, and the loop that holds them together."""
