"""A source of few rows, whose epochs end within a short run."""

import json
from pathlib import Path


def questions_source(folder: Path, is_main: bool, count: int = 7) -> str:
    """Return the setting of a source of ``count`` rows of text, which the main rank writes into ``folder``."""
    path = folder / "questions.jsonl"
    if is_main:
        lines = []
        for index in range(count):
            message = {"role": "user", "content": f"Say {index}."}
            lines.append(json.dumps({"messages": [message], "answer": "1"}) + "\n")
        path.write_text("".join(lines))
    return f"data.sources=[{{path: '{path}', name: text}}]"
