"""The methods of docs/algorithms.md with the settings that the page gives for each."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs/algorithms.md"


def documented_methods() -> dict[str, list[str]]:
    """Return the settings of each row of the page's first table as ``key=value``, without the prefix ``algorithm.``."""
    table = PAGE.read_text().split("| method |")[1].split("\n\n")[0]
    methods = {}
    for line in table.splitlines()[2:]:
        name, _, _, settings = (cell.strip() for cell in line.strip().strip("|").split("|"))
        name = re.sub(r"\s*\(.*\)", "", name)
        methods[name] = re.findall(r"`([^`]*)`", settings)[0].split()
    return methods
