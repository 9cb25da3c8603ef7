"""Tables of the benchmarks, and the documents that hold them."""

import sys

from tests.helpers.paths import ROOT


sys.path.insert(0, str(ROOT / "benchmarks"))

from tables import replace_tables, table  # noqa: E402


def test_a_table_is_put_between_its_marks(tmp_path):
    document = tmp_path / "README.md"
    document.write_text("a\n<!-- begin main -->\nold\n<!-- end main -->\nb <!-- begin x --><!-- end x -->")
    replace_tables([document], {"main": table(["", "n"], [["one", "1"]]), "absent": "no"})
    lines = ["a", "<!-- begin main -->", "|  | n |", "| --- | --- |", "| one | 1 |", "<!-- end main -->"]
    assert document.read_text().splitlines() == [*lines, "b <!-- begin x --><!-- end x -->"]
