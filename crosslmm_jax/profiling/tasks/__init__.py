"""What a measuring process does: each module has `run(record)`.

| file | measures |
|---|---|
| `prefill.py` | pixels on the device and a prompt, to the first logits |
| `decode.py` | tokens generated in one loop |
| `train.py` | one step of stage 2 |
| `encoder.py` | the vision encoder alone |
| `ask.py` | from a file to an answer, in new processes and in a warm one |
"""

__all__ = ["ask", "decode", "encoder", "prefill", "train"]
