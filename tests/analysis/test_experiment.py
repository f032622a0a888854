import json
import shutil

import pytest

from ovr_megatron.analysis.experiment import ExperimentError, read_experiment


def test_a_finished_experiment_misses_nothing(experiment_dir):
    experiment = read_experiment(experiment_dir)
    assert list(experiment.stages) == ["base", "cold_start", "rl"]
    assert next(iter(experiment.sets.items())) == ("visual", "Visual puzzles")
    assert experiment.missing == []
    assert experiment.exported == (experiment_dir / "export" / "average").resolve()


def test_what_is_not_there_yet_is_named(experiment_dir):
    for part in ("eval/average", "export", "cold_start/metrics"):
        shutil.rmtree(experiment_dir / part)
    metrics = experiment_dir / "rl" / "metrics" / "train.jsonl"
    metrics.write_text("\n".join(metrics.read_text().splitlines()[:13]) + '\n{"step": 13, "rew')
    experiment = read_experiment(experiment_dir)
    assert experiment.missing == [
        "Cold start: no metrics yet.",
        "RL: 13 of 60 iterations done.",
        "Evaluation: nothing yet of Average.",
        "Export: no final model yet.",
    ]
    assert experiment.score("average", "visual") is None
    assert experiment.score("rl", "visual")["correct"] == 441


def test_without_an_average_the_rl_model_is_the_final_one(experiment_dir):
    shutil.rmtree(experiment_dir / "export" / "average")
    assert read_experiment(experiment_dir).exported == (experiment_dir / "export" / "rl").resolve()


@pytest.mark.parametrize(("name", "read_as"), [("rl", "rl"), ("cold_start", "cold_start")])
def test_a_single_run_folder_is_an_experiment_of_one_stage(experiment_dir, name, read_as):
    experiment = read_experiment(experiment_dir / name)
    assert list(experiment.stages) == [read_as]
    assert experiment.stages[read_as].done == experiment.stages[read_as].total > 0


def test_other_problem_sets_follow_the_miniatures_own(experiment_dir):
    score = json.loads((experiment_dir / "eval" / "rl" / "visual.json").read_text())
    (experiment_dir / "eval" / "rl" / "aime.json").write_text(json.dumps(score))
    assert list(read_experiment(experiment_dir).sets) == ["visual", "text", "caption", "aime"]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ExperimentError, match=r"nowhere: there is no such folder"):
        read_experiment(tmp_path / "nowhere")
    with pytest.raises(ExperimentError, match=r"neither a run folder \(config\.yaml\) nor an experiment"):
        read_experiment(tmp_path)


def test_a_broken_result_is_named(experiment_dir):
    (experiment_dir / "eval" / "rl" / "visual.json").write_text('{"greedy": ')
    with pytest.raises(ExperimentError, match=r"rl/visual\.json: is not JSON"):
        read_experiment(experiment_dir)
