"""Records that are resumed."""

from pathlib import Path

from ovr_megatron.runtime.runlog import StepLines, read_metrics


def test_a_resumed_record_has_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "train.jsonl"
    lines = StepLines(path)
    for step in range(5):
        lines.write(step, {"loss": step / 10})
    lines.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # cut off by a kill
    again = StepLines(path, resume_at=3)
    again.write(3, {"loss": 9.0})
    again.close()
    assert read_metrics(path) == [{"step": s, "loss": loss} for s, loss in enumerate((0.0, 0.1, 0.2, 9.0))]
    assert [entry.name for entry in path.parent.iterdir()] == ["train.jsonl"]
