"""What the project measures about itself, for docs/results. In a clone: `python -m perf NAME [options]`.

| file | holds |
|---|---|
| `__main__.py` | the list of commands |
| `command.py` | what all commands share |
| `measure.py` | a measuring command: its options, and its report with bars, goals and the paper's figures |
| `bars.py`, `figure.py`, `figure_long_video.py` | bars, goals, the paper's numbers, figures |
| `report.py` | the same for a report that was measured before |
| `peers.py` | ours and peers of torch in one run |
| `ask/` | from a file to an answer: new and warm processes, many questions, a peer, the input |
| `attention.py` | the model's attentions one by one, with every backend |
| `scaling.py` | several devices and one |
| `long_video.py` | prefills up to what the device holds |
| `precision.py` | the errors of 8 bits, on frames of real videos |
| `clips.py` | frames of videos, and clips that are made |
| `decode_speed.py`, `decode_speed_files.py` | our video reader, decord and OpenCV |
| `input_throughput.py` | frames per second of the input pipeline |
| `index_scale.py` | an index over the number of rows |

A measuring command is a module with `run(record)`, which `crosslmm_jax.profiling` runs in one process per
system. The package imports nothing of this folder, and the wheel does not hold it.
"""
