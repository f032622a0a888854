"""What a run folder refuses, what it keeps of former configurations, and which folder is locked."""

from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from omegaconf import OmegaConf

from ovr_megatron.config import ColdStartConfig, ConfigError, ParallelConfig, RLConfig, build, defaults
from ovr_megatron.launch import RECIPES
from ovr_megatron.runtime import distributed, run_folder
from ovr_megatron.runtime.lock import RunFolderError
from ovr_megatron.runtime.run_folder import CRITIC, LEARNING, PPO, REHEARSAL, REPLAY, ROLLOUTS, SFT


def recipe(schema: type, name: str, *overrides: str) -> ColdStartConfig | RLConfig:
    values = OmegaConf.load(RECIPES / f"{name}.yaml")
    values.pop("defaults")
    return build(schema, OmegaConf.merge(defaults(schema), values, OmegaConf.from_dotlist(list(overrides))))


def settings(run: Path, kind: str) -> ColdStartConfig | RLConfig:
    if kind == SFT:
        return recipe(ColdStartConfig, "tiny_cold_start", f"run.dir={run}", "model.path=m")
    only = {PPO: "all", ROLLOUTS: "rollout", LEARNING: "train", CRITIC: "critic", REHEARSAL: "rehearsal"}[kind]
    more = ["rollouts_from=elsewhere"] if only in ("train", "critic") else []
    return recipe(RLConfig, "tiny_rl", f"run.dir={run}", "model.path=m", f"only={only}", *more)


@pytest.fixture(scope="module", autouse=True)
def group() -> None:
    distributed.start(ParallelConfig(), seed=1, threads=1)
    assert dist.get_rank() == 0


KINDS = (SFT, PPO, ROLLOUTS, LEARNING, CRITIC)


@pytest.mark.parametrize("job", [*KINDS, REHEARSAL, REPLAY])
@pytest.mark.parametrize("there", KINDS)
def test_a_job_works_in_folders_of_its_own_stage(tmp_path: Path, there: str, job: str) -> None:
    run_folder.record(settings(tmp_path, there), tmp_path)
    guests = {REHEARSAL: (PPO, ROLLOUTS, LEARNING, CRITIC), REPLAY: (PPO, LEARNING, CRITIC)}
    if job == there or there in guests.get(job, ()):
        run_folder.enter(tmp_path, job, is_main=True)
        return
    with pytest.raises(ConfigError, match=rf"folder of another job \({there}, this one is {job}\)"):
        run_folder.enter(tmp_path, job, is_main=True)


@pytest.mark.parametrize("text", ["stages: [build, test]\n", "a: [", "just words", "\x00"])
def test_a_configuration_that_is_no_run_s_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml .*choose another run\.dir"):
        run_folder.enter(tmp_path, PPO, is_main=True)
    assert (tmp_path / "config.yaml").read_text() == text


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(RunFolderError, match=rf"{folder} cannot be made or written to \(.*; choose another folder"):
            run_folder.enter(folder, PPO, is_main=True)


def test_every_former_configuration_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = [
        ((), ""),
        ((), ""),
        (
            ("optimizer.lr=3e-4", "model.dtype=bfloat16"),
            "model.dtype float32 -> bfloat16; optimizer.lr 0.0002 -> 0.0003",
        ),
        (("data.pack_tokens=4096", "data.sources=[{path: a.jsonl}]"), 'data.sources [{"path": "puzzle:'),
    ]
    texts = []
    for overrides, said in changes:
        config = recipe(RLConfig, "tiny_rl", f"run.dir={tmp_path}", "model.path=m", *overrides)
        run_folder.record(config, tmp_path)
        texts.append((tmp_path / "config.yaml").read_text())
        out = capsys.readouterr().out
        assert said in out and bool(said) == ("settings changed" in out), out
    assert "data.pack_tokens 2304 -> 4096" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.1.yaml", "config.2.yaml", "config.yaml"]
    assert [(tmp_path / f"config.{number}.yaml").read_text() for number in (1, 2)] == texts[1:3]
    assert yaml.safe_load(texts[3])["data"]["pack_tokens"] == 4096


def test_an_evaluation_in_a_run_folder_takes_the_run_s_lock(tmp_path: Path) -> None:
    run = tmp_path / "rl"
    run.mkdir()
    run_folder.record(settings(run, PPO), run)
    for inside in (".", "evaluation/step_000002", "checkpoints/step_000002"):
        assert run_folder.run_folder_of(run / inside) == run
    for outside in ("eval/after", "../other"):
        assert run_folder.run_folder_of(run / outside) == (run / outside).resolve()


def test_a_run_does_not_learn_from_its_own_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is run\.dir: the run would replace what it learns from"):
        recipe(RLConfig, "tiny_rl", f"run.dir={tmp_path}", "model.path=m", "only=train", f"rollouts_from={tmp_path}/")
