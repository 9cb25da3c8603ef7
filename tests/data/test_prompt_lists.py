"""Lists of prompts as people have them, with the traps of published ones."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from siss_diffusers.data.prompt_lists import read_prompt_list
from tests.helpers.untrusted import refusal


# Commas and semicolons inside, quotes that belong to the caption, tags, letters beyond ASCII, line ends inside.
PROMPTS = [
    'Reds, Blues; and "Greens"',
    "<b>Sofa</b> &amp; chair",
    "Café “Zoë” 日本",
    'say ""twice""',
    "two\nlines",
    "plain",
]


def write_csv(file, rows, delimiter, header=("", "Caption", "type")):
    with open(file, "w", newline="", encoding="utf-8-sig") as handle:
        writer = csv.writer(handle, delimiter=delimiter)
        writer.writerows([header, *([number, *row] for number, row in enumerate(rows))])
    return str(file)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_is_read_whatever_separates_its_cells(tmp_path, delimiter):
    rows = [(prompt, "VM" if index < 2 else "") for index, prompt in enumerate([*PROMPTS, PROMPTS[0]])]
    rows[-1] = (PROMPTS[0], "VM")
    file = write_csv(tmp_path / "list.csv", [*rows, ("", "VM")], delimiter)
    listed = read_prompt_list("--prompts_file", file, label_column="type")
    assert listed.prompts == PROMPTS and listed.without == 1
    assert listed.memorized == {prompt: index < 2 for index, prompt in enumerate(PROMPTS)}


def test_json_and_parquet_hold_the_same(tmp_path):
    rows = [{"caption": prompt, "index": index, "overfit": index % 2} for index, prompt in enumerate(PROMPTS)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    binary = [{**row, "image": {"bytes": b"png", "path": "a"}} for row in rows]
    pq.write_table(pa.Table.from_pylist(binary), tmp_path / "list.parquet")
    for name in ("list.jsonl", "list.json", "list.parquet"):
        listed = read_prompt_list("--prompts_file", str(tmp_path / name), label_column="overfit")
        assert listed.prompts == PROMPTS
        assert list(listed.memorized.values()) == [bool(index % 2) for index in range(len(PROMPTS))]
    assert read_prompt_list("--prompts_file", str(tmp_path / "texts.jsonl")).prompts == PROMPTS


def test_the_quotes_of_a_text_file_are_left_alone(tmp_path):
    (tmp_path / "list.txt").write_text('"quoted"\n""twice""\na, b; c\n')
    assert read_prompt_list("--prompts_file", str(tmp_path / "list.txt")).prompts == [
        '"quoted"',
        '""twice""',
        "a, b; c",
    ]


def test_a_prompt_may_have_several_references(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    rows = [("x", "a.png"), ("x", "b.png"), ("x", "a.png"), ("y", "")]
    file = write_csv(tmp_path / "list.csv", rows, ",", ("", "prompt", "image"))
    listed = read_prompt_list("--prompts_file", file, reference_column="image")
    assert listed.references == {"x": [tmp_path / "a.png", tmp_path / "b.png"]}


@pytest.mark.parametrize(
    ("name", "content", "columns", "says"),
    [
        ("a.csv", "secret prompt\nanother\n", {}, "names no column text, caption or prompt; say by --prompt_column"),
        ("a.csv", "text,Caption\na,b\n", {}, "has the columns Caption and text; say by --prompt_column"),
        ("a.csv", "text,text\na,b\n", {}, "two of its columns have the same name; rename one"),
        ("a.csv", "text,n\na, b,1\n", {}, "line 2 has 3 cells and the header 2; put cells that hold ',' into quotes"),
        ("a.csv", 'text,n\n"a,1\n', {}, "cannot read"),
        ("a.csv", "text\na\n", {"prompt_column": "Text"}, "--prompt_column: "),
        ("a.csv", "text,l\na,1\na,0\n", {"label_column": "l"}, "labels one prompt both memorized and not"),
        ("a.csv", "text,i\na,https://x/y.png\n", {"reference_column": "i"}, "download the images"),
        ("a.csv", "text,i\na,no.png\n", {"reference_column": "i"}, "no.png is not there; correct the path in"),
        ("a.csv", "text\n\n", {}, "holds no prompt"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', {}, "line 2 is not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n7\n', {}, "line 2 is neither an object nor a text"),
        ("a.parquet", "no parquet", {}, "cannot read"),
        ("a.txt", "a\n", {"label_column": "l"}, "--label_column l: "),
    ],
)
def test_bad_lists_are_refused(tmp_path, name, content, columns, says):
    (tmp_path / name).write_text(content)
    message = refusal(read_prompt_list, "--prompts_file", str(tmp_path / name), **columns)
    assert says in message and "secret" not in message
