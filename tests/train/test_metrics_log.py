"""metrics.jsonl reads like that of one run, also after an interruption."""

import json

from crosslmm_jax.train.reporting.metrics_log import METRICS_FILE, MetricsLog, flatten_scalars, read_metrics


def write(folder, *, resumed_step: int, steps, tensorboard: bool = False) -> None:
    log = MetricsLog(folder, resumed_step=resumed_step, tensorboard=tensorboard)
    for step in steps:
        log.write({"step": step, "loss": 1.0 / step, "gate": {"v2v": {"0": 0.5}}})
    log.close()


def test_lines_after_the_restored_step_are_dropped(tmp_path) -> None:
    write(tmp_path, resumed_step=0, steps=(10, 20, 30))
    write(tmp_path, resumed_step=20, steps=(30, 40))
    assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20, 30, 40]


def test_an_incomplete_line_is_dropped(tmp_path) -> None:
    write(tmp_path, resumed_step=0, steps=(10, 20))
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 30, "lo')
    write(tmp_path, resumed_step=20, steps=(30,))
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20, 30]


def test_a_new_run_starts_a_new_file(tmp_path) -> None:
    write(tmp_path, resumed_step=0, steps=(10,))
    write(tmp_path, resumed_step=0, steps=(5,))
    assert [line["step"] for line in read_metrics(tmp_path)] == [5]


def test_tensorboard_events(tmp_path) -> None:
    write(tmp_path, resumed_step=0, steps=(10,), tensorboard=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"gate/v2v/0" in events.read_bytes()


def test_flatten() -> None:
    assert flatten_scalars({"loss": 1, "gate": {"v2v": {"0": 0.5}}}) == {"loss": 1.0, "gate/v2v/0": 0.5}
