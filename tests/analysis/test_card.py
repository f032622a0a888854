"""The model card: what stands in the run folder, and nothing of the machine."""

import yaml

from ovr_megatron.analysis.card import render_card, write_card
from ovr_megatron.analysis.experiment import read_experiment


def test_the_card_tells_recipe_data_and_scores(experiment_dir):
    config = {
        "iterations": 60,
        "prompts": 128,
        "responses": 2,
        "algorithm": {"estimator": "gae"},
        "optimizer": {"lr": 2e-4},
        "model": {"dtype": "float32", "path": "/home/somebody/models/base"},
        "curriculum": [{"until": 50, "max_tokens": 24576}, {"until": 60, "max_tokens": 49152}],
        "data": {
            "sources": [
                {"path": "/home/somebody/data/math|500.json", "weight": 3.0},
                {"path": "puzzle:digits?form=image", "weight": 1.0, "name": "digits"},
            ]
        },
    }
    (experiment_dir / "rl/config.yaml").write_text(yaml.safe_dump(config))
    (experiment_dir / "rl/layers.txt").write_text("Transformer Engine 2.14.0\n")
    experiment = read_experiment(experiment_dir)
    path = write_card(experiment, experiment.exported)
    text = path.read_text()
    assert path == experiment.exported / "README.md" and text == render_card(experiment, experiment.exported.name)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "transformers" and "open-vision-reasoner" in front["tags"]
    assert "somebody" not in text
    assert "| math\\|500.json | 75.0% |" in text and "| digits | 25.0% |" in text
    assert "| `layers` | Transformer Engine 2.14.0 |" in text
    assert "| `algorithm.estimator` | gae |" in text and "60 iterations done." in text
    assert "24,576 tokens until iteration 50, 49,152 tokens until iteration 60" in text
    assert "| Visual puzzles (500) | 0.0% (" in text and "| 64.2% (" in text
    assert "Cognitive behaviours" not in text, "nothing was counted"
    assert "torchrun -m ovr_megatron rl --config-dir rl --config-name config run.dir=NEW" in text
    assert "--data visual=puzzle:visual --limit 500 --max-tokens 96 --out eval" in text


def test_what_was_not_run_is_said(experiment_dir):
    for path in (experiment_dir / "eval/rl").glob("*.json"):
        path.unlink()
    assert "| not run |" in render_card(read_experiment(experiment_dir), "average")
