"""Pages that follow the code: settings from the schema, messages that the package can print, links, the navigation."""

import ast
import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml

import ovr_megatron
from ovr_megatron import api
from ovr_megatron.cli import reference, settings
from ovr_megatron.config import defaults
from ovr_megatron.config.reference import settings_page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return FENCED.sub("", page.read_text())


def anchors(page: Path) -> list[str]:
    """The names of the headings of a page, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return [re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    dead = []
    for link in LINK.findall(prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
        # What lies outside of docs/ is no part of the site.
        if page.parent == DOCS and DOCS not in (target, *target.parents):
            dead.append(f"{link} leaves docs/")
    assert dead == []


def test_no_heading_of_a_page_is_there_twice() -> None:
    for page in sorted(DOCS.glob("*.md")):
        assert len(set(anchors(page))) == len(anchors(page)), page.name


def names(entry: object) -> Iterator[str]:
    """The files of an entry of the navigation and of those below it."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, list):
        for inner in entry:
            yield from names(inner)
    elif isinstance(entry, dict):
        yield from names(list(entry.values()))


def test_the_navigation_names_every_page_once() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(names(site["nav"])) == sorted(page.name for page in DOCS.glob("*.md"))


def test_the_start_of_the_site_leads_to_every_page() -> None:
    linked = {link.partition("#")[0] for link in LINK.findall(prose(DOCS / "index.md"))}
    assert {page.name for page in DOCS.glob("*.md")} - linked == {"index.md"}


def test_the_page_of_settings_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    settings.main([])
    printed = capsys.readouterr().out
    assert (DOCS / "settings.md").read_text() == printed, "run: python -m ovr_megatron settings > docs/settings.md"


def test_the_reference_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    reference.main([])
    printed = capsys.readouterr().out
    assert (DOCS / "reference.md").read_text() == printed, "run: python -m ovr_megatron reference > docs/reference.md"


@pytest.mark.parametrize(
    "text",
    [
        "`from ovr_megatron import RL`",
        "SFT.step(chats: Sequence[Conversation] | None=None) -> dict[str, float]",
        "- `rewards`: by source of the rows, functions that grade responses",
        "### ChatModel.sample",
        "- `RuleError`: graders cannot import a function.",
        "- For each chat float64[n] of its n learned tokens",
    ],
)
def test_the_reference_has_calls_arguments_results_and_errors(text: str) -> None:
    assert text in (DOCS / "reference.md").read_text()


def test_every_name_for_programs_is_typed_and_there() -> None:
    tree = ast.parse((ROOT / "ovr_megatron/api.py").read_text())
    typed = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ovr_megatron"):
            typed |= {alias.asname: node.module for alias in node.names}
    assert typed == api.MODULES
    # Heavy ones are imported by tests/test_api.py.
    for name in ("compose", "Sampling", "GraderPool", "GradeRequest", "Verdict"):
        assert getattr(ovr_megatron, name) is getattr(importlib.import_module(api.MODULES[name]), name)
    with pytest.raises(AttributeError, match="has no attribute 'Sft'"):
        print(ovr_megatron.Sft)


def keys(values: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    """The dotted name of each setting below ``values``."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_the_page_has_every_setting_of_every_command() -> None:
    page = settings_page(settings.ROOTS)
    rows = set(re.findall(r"^\| `([\w.\[\]]+)` \|", page, re.MULTILINE))
    uses = set(re.findall(r"^- `([\w.\[\]]+)`:", page, re.MULTILINE))  # `critic.optimizer` has the rows of `optimizer`
    for command, schema in settings.ROOTS.items():
        missing = [key for key in keys(defaults(schema)) if key not in rows and key.rpartition(".")[0] not in uses]
        assert missing == [], command


def test_a_row_of_the_page_has_bounds_choices_and_default() -> None:
    page = settings_page(settings.ROOTS)
    assert "| `run.dir` | text | required | Run folder; a run that ended goes on where it left off. |" in page
    assert "| `run.keep_last` | whole number, 0 (keep all) or more | `0` | Newest checkpoints that stay. |" in page
    assert "| `model.recompute` | `none`, `selective`, `full` | `none` |" in page
    assert "| `critic.parallel` | [`parallel`](#parallel) or `null` |" in page
    assert "| `data.sources` | list of [`data.sources[]`](#datasources) |" in page
    assert "- `critic.optimizer`: `ovr rl`; there `lr` is `5e-06` by default" in page
    assert "opened &lt;think>" in page, "no HTML"


def package_texts() -> str:
    """Every text that the package can print, one a line, with … for what is put in."""
    texts = []
    for path in sorted((ROOT / "ovr_megatron").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                texts.append("".join(map(str, parts)))
    for path in (*(ROOT / "slurm").glob("*.sh"), ROOT / "examples/install.sh"):
        script = re.sub(r'" *\\\n *"', " ", path.read_text())  # a text in two arguments
        texts.append(re.sub(r"\$\{[^}]*\}|\$\([^)]*\)|\$\w+", "…", script))
    return re.sub("…+", "…", "\n".join(texts))


def messages() -> list[str]:
    """The messages that the page on troubleshooting quotes: the first cells of its tables with that heading."""
    quoted = []
    for table in (DOCS / "troubleshooting.md").read_text().split("| message | cause | what to do |\n")[1:]:
        for row in table.split("\n\n")[0].splitlines()[1:]:
            quoted += re.findall(r"^\| `([^`]+)` \|", row) or [f"no message: {row}"]
    return quoted


def test_every_message_of_the_troubleshooting_is_one_of_the_package() -> None:
    assert len(messages()) > 50 and len(set(messages())) == len(messages())
    texts = package_texts()
    assert [message for message in messages() if message.removesuffix("…") not in texts] == []


def test_settings_beside_those_of_other_trainers_are_there() -> None:
    page = settings_page(settings.ROOTS)
    known = set(re.findall(r"^\| `([\w.\[\]]+)` \|", page, re.MULTILINE))
    known |= set(re.findall(r"^- `([\w.\[\]]+)`:", page, re.MULTILINE)) | {"critic.optimizer.lr"}
    for row in re.findall(r"^\| .+ \|$", (DOCS / "coming_from.md").read_text(), re.MULTILINE):
        _, ours, _ = row.strip("|").split("|")
        for text in re.findall(r"`([^`]+)`", ours):
            for word in text.removeprefix("ovr rl ").split():
                name = word.partition("=")[0]
                if "." in name:
                    assert name in known, row


def test_names_of_the_python_interface_are_there() -> None:
    page = (DOCS / "api.md").read_text()
    names = re.findall(r"`(ovr_megatron(?:\.\w+)+)`", page)
    assert len(names) > 15
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_example_of_the_python_interface_runs(capsys: pytest.CaptureFixture[str]) -> None:
    # The scripts before it are run by tests/test_api.py.
    *_, parts, plan = (text.split("```")[0] for text in (DOCS / "api.md").read_text().split("```python\n"))
    exec(compile(parts, "api.md", "exec"), {})
    assert capsys.readouterr().out == "1.0 same number\n[[0, 1], [2, 3]]\n"
    exec(compile(plan, "api.md", "exec"), {})
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["GiB"] * 5


def test_every_number_has_a_command_that_is_there() -> None:
    page = (DOCS / "figures.md").read_text()
    scripts = re.findall(r"`(?:bash )?((?:tests|tools|examples)/[\w./]+)", page)
    assert len(scripts) > 15
    assert [script for script in scripts if not (ROOT / script).exists()] == []


def test_programs_that_start_vllm_may_be_imported_by_its_process() -> None:
    programs = []
    for page in PAGES:
        programs += re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    engines = [program for program in programs if "LLM(" in program]
    assert engines
    for program in engines:
        top_level = [node for node in ast.parse(program).body if not isinstance(node, ast.FunctionDef | ast.If)]
        assert not any("LLM(" in ast.unparse(node) for node in top_level), program
