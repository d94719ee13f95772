"""From a file to the first token and to the last, where a user stands, in one run on one machine.

| file | measures |
|---|---|
| `folder.py` | makes what the others read: clips, and a MODEL folder of random weights at true size |
| `crosslmm_jax/profiling/tasks/ask.py` | new processes of `crosslmm ask`, and one that stays warm |
| `many.py` | questions per second: `answer_many` against one question after the other |
| `peer.py` | the same file and question through LLaVA-OneVision in torch, with its own processor |
| `inputs.py` | `crosslmm data index`, and the first batch of training |

Each is a process of its own, and the report is written after each. Random weights never end an answer here:
the rows of the end tokens in the output head are zero, and the largest of the other logits is above zero. So
an answer has exactly as many tokens as it may have.
"""

from perf.ask.command import main

__all__ = ["main"]
