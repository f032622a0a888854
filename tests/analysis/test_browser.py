"""The report in a real browser: it opens, its filters work, nothing overflows, nothing that a model says is run."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from ovr_megatron.analysis.browser import _response_files, even_indices
from ovr_megatron.analysis.experiment import read_experiment
from ovr_megatron.analysis.report import write_report
from ovr_megatron.evaluation.behaviours import BEHAVIOURS
from ovr_megatron.model.tiny import make_tiny_model
from tests.analysis import screenshots

pytestmark = pytest.mark.skipif(screenshots.CHROMIUM is None, reason="no Chromium; on Debian: apt install chromium")

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'></pre>\u2028&amp;"
LONG = "W" * 400  # no place to break


@pytest.fixture(scope="module")
def chromium():
    with screenshots.chromium() as browser:
        yield browser


class Opened:
    """A report in the browser, and whatever went wrong there."""

    def __init__(self, browser, path: Path, width: int = 1000, **looks):
        self.page = browser.new_page(viewport={"width": width, "height": 900}, **looks)
        self.wrong, self.asked = [], []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.wrong.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def choose(self, name, option):
        self.page.select_option(f"#browse-{name}", label=option)

    @property
    def count(self):
        return self.page.inner_text("#browse-count")

    def settle(self):
        self.page.wait_for_selector("#browse-list[aria-busy=false]", state="attached")  # texts come from files

    def cards(self):
        self.settle()
        return self.page.locator("#browse-list .rollout").all_inner_texts()


def _answers(folder: Path, model: str, rows: list[dict]) -> None:
    common = {"sample": None, "source": "visual", "question": "What is the sum?", "reference": "8", "options": []}
    common |= {"metric": "boxed", "stopped": True, "reason": "same number"}
    told = [common | {"index": i, "id": f"v{i}", "tokens": 10} | row for i, row in enumerate(rows)]
    lines = [json.dumps(row, ensure_ascii=False) for row in told]
    (folder / "eval" / model / "visual.responses.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def report(finished_dir, tmp_path_factory):
    """A report, to be left as it is, over 480 rollouts and four responses of an evaluation, one of them hostile."""
    experiment_dir = tmp_path_factory.mktemp("a_run_with_a_long_name_that_has_no_place_to_break") / "experiment"
    shutil.copytree(finished_dir, experiment_dir)
    rows = [
        {"response": "Wait, that is wrong. I look at the image again.\n\\boxed{8}", "correct": True},
        {"response": "\\boxed{7}", "correct": False, "tokens": 4},
        {"response": ATTACK + LONG, "correct": False, "tokens": 5000, "question": ATTACK, "stopped": False},
        {"response": "\\boxed{8}", "correct": True, "tokens": 3},
    ]
    _answers(experiment_dir, "rl", rows)
    return write_report(read_experiment(experiment_dir))


def test_the_page_opens_and_its_filters_work(report, chromium):
    page = Opened(chromium, report)
    assert page.count == "1 to 10 of 484"
    assert "All 484 responses" in page.page.inner_text("main")
    page.choose("from", "RL on Visual puzzles")
    assert page.count == "1 to 4 of 4"
    page.choose("behaviour", "Visual reflection")
    [card] = page.cards()
    assert "I look at the image again." in card and "Backtracking" in card and "reward 1" in card
    assert page.page.locator("#browse-list .response .act").count() >= 1
    page.choose("behaviour", "All")
    page.choose("verdict", "Wrong")
    page.page.fill("#browse-least", "1000")
    [card] = page.cards()
    assert ATTACK.replace("\u2028", "") in card.replace("\u2028", "") and "cut off" in card
    page.choose("from", "Rollouts")
    assert page.count == "None fits" and page.cards() == []
    page.page.fill("#browse-least", "")
    assert page.count == "1 to 10 of 240"
    page.choose("source", "text")
    page.choose("order", "Last to first")
    assert "iteration 59" in page.cards()[0]
    page.page.click("#browse-next")
    assert page.count == "11 to 20 of 120"
    again = Opened(chromium, report)
    again.page.goto(page.page.url)
    again.page.reload()  # what was chosen is in the address
    assert again.count == "11 to 20 of 120" and again.cards() == page.cards()
    assert not page.wrong and not again.wrong
    assert all(address.startswith(("file:", "data:")) for address in page.asked)


def test_a_card_is_the_same_in_both_parts(bare_dir, chromium, tmp_path):
    """What the page itself shows of a rollout and what it loads from a file; behaviours are marked in the latter."""
    run = bare_dir / "rl"
    make_tiny_model(tmp_path / "model")
    (run / "companions").mkdir()
    shutil.copy(tmp_path / "model/tokenizer.json", run / "companions")
    ids = Tokenizer.from_file(str(tmp_path / "model/tokenizer.json")).encode("So <b>5 €</b>\nis").ids
    path = run / "rollouts/000059.jsonl"
    rows = [json.loads(line) | {"number": n, "sample": 0} for n, line in enumerate(path.read_text().splitlines())]
    rows = [rows[0] | {"stopped": False, "verdict": "not equal"}, rows[5]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"index": np.array([[row["number"], 0, len(ids)] for row in rows]), "tokens": np.array(2 * ids, np.int32)}
    columns["logprobs"] = np.log(np.linspace(0.05, 0.95, 2 * len(ids))).astype(np.float32)
    columns["advantages"] = np.linspace(-1, 1, 2 * len(ids)).astype(np.float32)
    path.with_suffix("").mkdir()
    save_file(columns, path.with_suffix("") / "0.safetensors")
    page = Opened(chromium, write_report(read_experiment(bare_dir)))
    page.choose("from", "Rollouts")
    page.choose("order", "Last to first")
    page.settle()
    read = """cards => cards.map(card => [card.className, ...[".prompt", ".response", ".note"].map(
        part => card.querySelector(part).innerHTML)])"""
    moment = 'h3:text-is("Late: iteration 59") ~ .rollout'
    own = page.page.eval_on_selector_all(moment, read)
    loaded = page.page.eval_on_selector_all("#browse-list .rollout", read)[:2]
    assert sorted(own) == sorted([*card[:3], card[3].replace("RL, iteration 59 · ", "")] for card in loaded)
    assert 'class="unlikely down3" title="advantage -1.000, probability 0.050"' in own[1][2] + own[0][2]
    assert "not equal" in own[1][3] + own[0][3] and not page.wrong


def test_images_of_prompts_are_shown(report, chromium):
    page = Opened(chromium, report)
    page.choose("from", "Rollouts")
    page.choose("source", "visual")
    page.cards()
    widths = page.page.eval_on_selector_all("#browse-list img", "all => all.map(image => image.naturalWidth)")
    assert widths == [56] * 10 and not page.wrong


@pytest.mark.parametrize("width", [360, 700, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows(report, chromium, width, scheme):
    page = Opened(chromium, report, width, color_scheme=scheme)
    for group in ("RL on Visual puzzles", "Rollouts"):
        page.choose("from", group)
        assert page.cards()
        outside = page.page.evaluate(
            """[...document.querySelectorAll("main *:not(.scroll *):not(pre *)")].filter(node => {
                 const box = node.getBoundingClientRect();
                 return box.width && (box.right > innerWidth + 1 || box.left < -1);
               }).map(node => node.outerHTML.slice(0, 80))"""
        )
        assert outside == []
        wide, room = page.page.evaluate("[document.scrollingElement.scrollWidth, window.innerWidth]")
        assert wide <= room
    paper = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 300) == (scheme == "dark")


@pytest.fixture
def bare_dir(experiment_dir):
    """An experiment with nothing to draw, which takes most of the time."""
    for part in ("base", "cold_start", "rl/metrics", "eval"):
        shutil.rmtree(experiment_dir / part)
    (experiment_dir / "eval/rl").mkdir(parents=True)
    return experiment_dir


def test_texts_that_are_not_there_are_named(bare_dir, chromium):
    _answers(bare_dir, "rl", [{"response": "\\boxed{8}", "correct": True}])
    report = write_report(read_experiment(bare_dir))
    for path in (report.parent / "report_files").glob("rl@visual_*.js"):
        path.unlink()
    page = Opened(chromium, report)
    page.choose("from", "RL on visual")
    page.settle()
    assert "keep the folder report_files beside this page" in page.page.inner_text("#browse-list")


def test_twenty_thousand_rollouts(bare_dir, chromium, record_property):
    told = "Wait, that is wrong. Let me look at the image again, row by row. " * 4
    for iteration in range(250):
        row = {"iteration": iteration, "prompt": "Add the red digits.", "response": told + "\\boxed{8}", "answer": "8"}
        row |= {"source": "visual", "tokens": 200, "stopped": True, "advantage_mean": 0.1, "image": None}
        lines = (json.dumps(row | {"number": n, "sample": 0, "reward": float(n % 2)}) for n in range(80))
        (bare_dir / f"rl/rollouts/{iteration:06d}.jsonl").write_text("\n".join(lines) + "\n")
    report = write_report(read_experiment(bare_dir))
    size = report.stat().st_size
    assert size < 20e6
    page = Opened(chromium, report)
    assert "16,000 of 20,000 responses, evenly sampled" in page.page.inner_text("main")
    assert page.count == "1 to 10 of 16,000"
    opened = page.page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    page.choose("verdict", "Wrong")
    assert page.count == "1 to 10 of 8,000" and len(page.cards()) == 10 and not page.wrong
    print(f"\n20,000 rollouts: page of {size / 1e6:.1f} MB, open after {opened / 1000:.2f} s")


def test_a_report_that_is_written_again_reads_what_is_new(bare_dir):
    write_report(read_experiment(bare_dir))
    folder = bare_dir / "report_files"
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.js")}
    last = bare_dir / "rl/rollouts/000059.jsonl"
    last.write_text(last.read_text().replace("Add the red", "Count the red"))
    (bare_dir / "rl/rollouts/000058.jsonl").unlink()
    write_report(read_experiment(bare_dir))
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.js")}
    assert set(before) - set(after) == {"rollouts_000058_0.js"}
    assert [name for name in after if before[name] != after[name]] == ["rollouts_000059_0.js"]


def test_what_a_judge_counts_takes_the_place_of_the_wording(bare_dir):
    rows = [{"response": "Wait, that is wrong.", "correct": True}, {"response": None, "correct": False}]
    rows += [{"response": "Nothing.", "correct": True}]
    _answers(bare_dir, "rl", rows)

    def bits():
        write_report(read_experiment(bare_dir))
        index = json.loads((bare_dir / "report_files/index.json").read_text())
        return [facts[3] for facts in index["rl@visual"]["rows"]]

    names = list(BEHAVIOURS)
    assert bits() == [1 << names.index("backtracking"), 0, 0]
    part = {"traces": 2, "behaviours": {}, "transfer": {}, "file": "visual.responses.jsonl"}
    told = {"judge": "J", "approximation": False, "missing": {}, "checkpoints": {"rl": part}}
    (bare_dir / "behaviours").mkdir()
    (bare_dir / "behaviours/behaviours.json").write_text(json.dumps(told))
    counts = [dict.fromkeys(names, 0), dict.fromkeys(names, 0) | {"verification": 2}]
    lines = [json.dumps({"checkpoint": "rl", "id": "v", "counts": count}) + "\n" for count in counts]
    (bare_dir / "behaviours/counts.jsonl").write_text("".join(lines))
    assert bits() == [0, 0, 1 << names.index("verification")]


def test_of_a_very_long_run_not_every_iteration_is_shown(bare_dir):
    rollouts = bare_dir / "rl/rollouts"
    text = (rollouts / "000000.jsonl").read_text()
    for iteration in range(60, 2500):
        (rollouts / f"{iteration:06d}.jsonl").write_text(text)
    files = [file for file in _response_files(read_experiment(bare_dir)) if file.group == "Rollouts"]
    assert sum(file.max_responses for file in files) <= 16_000 and len(files) == 2000


def test_an_even_sample():
    assert even_indices(5, 9) == [0, 1, 2, 3, 4]
    assert even_indices(10, 4) == [0, 2, 5, 7]
    assert even_indices(0, 3) == []
