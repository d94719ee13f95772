"""Inference: load a MODEL folder, watch a video, ask questions.

load        from a MODEL folder to a `VideoModel`
assistant   `VideoModel` -> `Video` -> `Chat`, `Answer`
watching    media, decoded and encoded
stream      a video that has not ended
many        many questions about many videos
scoring     how probable given answers are
replies     tokens to texts, and when an answer ends
shapes      the static shapes of all programs
compiled    the programs
generate    sampling, and the loop over tokens on the device
devices     the mesh
prepare     weights in the form that inference reads
commands    `crosslmm ask` and `crosslmm chat`
figure      T2V attention drawn over frames
"""

from crosslmm_jax.inference.assistant import Answer, Chat, Video, VideoModel
from crosslmm_jax.inference.commands import ask, ask_many, chat
from crosslmm_jax.inference.figure import draw_frame
from crosslmm_jax.inference.generate import Generation, RowSettings, Sampling, generate
from crosslmm_jax.inference.load import load
from crosslmm_jax.inference.many import Item, answer_many, answers_as_ready
from crosslmm_jax.inference.replies import AnswerOptions, Options
from crosslmm_jax.inference.scoring import score_options
from crosslmm_jax.inference.stream import Stream
from crosslmm_jax.inference.watching import Medium

__all__ = [
    "Answer", "AnswerOptions", "Chat", "Generation", "Item", "Medium", "Options", "RowSettings", "Sampling",
    "Stream", "Video", "VideoModel", "answer_many", "answers_as_ready", "ask", "ask_many", "chat",
    "draw_frame", "generate", "load", "score_options",
]  # fmt: skip
