"""Sources of few rows, whose epochs end within a short run."""

import json
from pathlib import Path

from ovr_megatron.data.schema import Message, Row, TextPart


class NumberedRows:
    """Rows whose id and text are their number."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Row:
        message = Message("user", (TextPart(str(index)),))
        return Row((message,), answer="1", id=str(index), where=f"rows:{index}")


def questions_source(folder: Path, is_main: bool, count: int = 7) -> str:
    """Return the setting of a source of ``count`` rows of text, which the main rank writes into ``folder``."""
    path = folder / "questions.jsonl"
    if is_main:
        lines = []
        for index in range(count):
            message = {"role": "user", "content": f"Say {index}."}
            # The runs have rules for both.
            source = ("image", "text")[index % 2]
            lines.append(json.dumps({"messages": [message], "answer": "1", "source": source}) + "\n")
        path.write_text("".join(lines))
    return f"data.sources=[{{path: '{path}'}}]"
