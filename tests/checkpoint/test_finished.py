"""A finished run is known by its files alone."""

from dataclasses import replace

import pytest

from ovr_megatron.checkpoint.finished import planned_steps, report_finished
from ovr_megatron.checkpoint.manifest import write_manifest
from ovr_megatron.config import ColdStartConfig, ModelConfig, RLConfig, RunConfig, StageConfig, save


def checkpoint(run, step):
    folder = run / "checkpoints" / f"step_{step:06d}"
    (folder / "policy").mkdir(parents=True)
    (folder / "policy/model.safetensors").write_bytes(b"weights")
    write_manifest(folder, step, {"state": {}})
    return folder


@pytest.fixture
def config(tmp_path):
    return ColdStartConfig(run=RunConfig(dir=str(tmp_path)), model=ModelConfig(path="m"), steps=4)


def test_a_run_is_finished_at_its_last_whole_checkpoint(config, tmp_path, capsys):
    assert not report_finished(config)
    checkpoint(tmp_path, 2)
    assert not report_finished(config)
    last = checkpoint(tmp_path, 4)
    assert report_finished(config)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "finished: all 4 steps are done; for another run give another run.dir, to go on more steps"
    assert second == f"sft: {last}"
    assert not report_finished(replace(config, steps=5))
    (last / "policy/model.safetensors").write_bytes(b"half")
    assert not report_finished(config), "a checkpoint that was cut off is none"


def test_the_steps_of_epochs_are_those_that_the_run_wrote_down(config, tmp_path):
    asked = replace(config, steps=0)
    assert planned_steps(asked) == 0
    save(replace(asked, steps=7), tmp_path / "config.yaml")
    assert planned_steps(asked) == 7
    assert planned_steps(replace(asked, epochs=6)) == 0, "another number of epochs has other steps"


def test_half_of_the_system_is_never_finished_by_a_checkpoint(tmp_path):
    stages = [StageConfig(until=900, max_tokens=9000)]
    config = RLConfig(run=RunConfig(dir=str(tmp_path)), model=ModelConfig(path="m"), curriculum=stages, iterations=3)
    checkpoint(tmp_path, 3)
    assert report_finished(config)
    assert not report_finished(replace(config, only="rollout"))


def test_settings_that_a_finished_run_did_not_have_are_named(config, tmp_path, capsys):
    save(config, tmp_path / "config.yaml")
    checkpoint(tmp_path, 4)
    assert report_finished(config)
    assert report_finished(replace(config, steps=0)), "a run of epochs stores their number of steps"
    assert "no effect" not in capsys.readouterr().out
    assert report_finished(replace(config, model=ModelConfig(path="other"), steps=3))
    assert (
        "these settings are not those of the run and have no effect: model.path m -> other; steps 4 -> 3\n"
        in capsys.readouterr().out
    )


def test_the_folder_of_another_stage_is_not_finished(config, tmp_path):
    stages = [StageConfig(until=900, max_tokens=9000)]
    rl = RLConfig(run=config.run, model=config.model, curriculum=stages, iterations=3)
    checkpoint(tmp_path, 4)
    save(rl, tmp_path / "config.yaml")
    assert report_finished(rl)
    assert not report_finished(config), "the start of the run refuses the folder"
