"""Weights in and out: the MODEL folder."""
