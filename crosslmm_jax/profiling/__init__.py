"""Sizes, FLOPs, memory and timing of the model."""
