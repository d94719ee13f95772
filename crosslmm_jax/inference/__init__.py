"""Inference: load a MODEL folder, watch a video, ask questions.

assistant   `load`, and what it returns: `VideoModel` -> `Video` -> `Chat`, `Answer`
compiled    the compiled programs of answering, with static shapes
generate    sampling, and the loop over tokens on the device
prepare     weights in the form that inference reads
commands    `crosslmm ask` and `crosslmm chat`
figure      T2V attention drawn over frames
"""

from crosslmm_jax.inference.assistant import Answer, Chat, Video, VideoModel, load
from crosslmm_jax.inference.commands import ask, chat
from crosslmm_jax.inference.figure import draw_frame
from crosslmm_jax.inference.generate import Generation, Sampling, generate

__all__ = [
    "Answer", "Chat", "Generation", "Sampling", "Video", "VideoModel", "ask", "chat", "draw_frame",
    "generate", "load",
]  # fmt: skip
