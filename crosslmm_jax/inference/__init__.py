"""Inference: a MODEL folder, a video, questions."""

from crosslmm_jax.inference.assistant import Answer, Chat, Video, VideoModel, load
from crosslmm_jax.inference.commands import ask, chat
from crosslmm_jax.inference.figure import draw_frame
from crosslmm_jax.inference.generate import Generation, Sampling, generate

__all__ = [
    "Answer",
    "Chat",
    "Generation",
    "Sampling",
    "Video",
    "VideoModel",
    "ask",
    "chat",
    "draw_frame",
    "generate",
    "load",
]
