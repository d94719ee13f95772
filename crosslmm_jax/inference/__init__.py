"""Inference: a MODEL folder, a video, questions."""

from crosslmm_jax.inference.assistant import Answer, Chat, Video, VideoModel, load
from crosslmm_jax.inference.generate import Sampling

__all__ = ["Answer", "Chat", "Sampling", "Video", "VideoModel", "load"]
