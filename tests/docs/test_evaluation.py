"""The table of figures in docs/evaluation.md is made from the entries of the metrics."""

from siss_diffusers.metrics import METRICS, PROBES
from tests.helpers.paths import ROOT


def figures_table() -> str:
    """Return the table of everything that `siss evaluate` measures."""
    rows = ["| key in `evaluation.json` | figure | what it says |", "|---|---|---|"]
    for entry in (*METRICS.values(), *PROBES.values()):
        rows.append(f"| `{entry.key}` | {entry.label} | {entry.explanation} |")
    return "\n".join(rows)


def test_the_table_of_figures_is_that_of_the_entries():
    page = (ROOT / "docs" / "evaluation.md").read_text()
    written = page.split("<!-- begin figures -->\n")[1].split("\n<!-- end figures -->")[0]
    expected = figures_table()
    assert written == expected, f"replace the table in docs/evaluation.md by\n\n{expected}"
