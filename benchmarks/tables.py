"""Tables in Markdown, and the documents that hold them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def replace_tables(documents: Iterable[Path], tables: Mapping[str, str]) -> None:
    """Replace what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`, for each table that a document has."""
    for document in documents:
        text = document.read_text()
        for name, content in tables.items():
            begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
            pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
            text = re.sub(pattern, lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)  # noqa: B023
        document.write_text(text)
