"""Data sets that somebody else wrote: nothing outside of them is read."""

import json
import os
import zipfile
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

import train_siss_unconditional
from siss_diffusers.data.sources import check_image_paths, load_image_rows
from siss_diffusers.errors import UsageError
from tests.helpers.commands import assert_refused
from tests.helpers.pictures import write_images
from tests.helpers.untrusted import code, refusal


pytestmark = pytest.mark.usefixtures("no_network", "no_waiting")


def load(folder: Path, by_name: bool = False, column: str = "image", **values: str) -> datasets.Dataset:
    """As both scripts do, by --train_data_dir or by --dataset_name."""
    flag, cache_dir = "--dataset_name" if by_name else "--train_data_dir", str(folder.parent / "cache")
    return load_image_rows(flag, str(folder), column, is_folder=not by_name, cache_dir=cache_dir).rows


def write_metadata(file: Path, rows: list[dict]) -> None:
    table = pa.Table.from_pylist(rows)
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".csv":
        pyarrow.csv.write_csv(table, file)
    else:
        pyarrow.parquet.write_table(table, file)


class TestDataSets:
    @pytest.fixture
    def folder(self, tmp_path):
        image = np.zeros((8, 8, 3), np.uint8)
        write_images(tmp_path, {"outside.png": image})
        return write_images(tmp_path / "set", {"a.png": image, "b.png": image})

    @pytest.mark.parametrize("metadata", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
    @pytest.mark.parametrize(
        "name",
        [
            *("../outside.png", "x/../../outside.png", "..\\outside.png", "OUTSIDE", "file://OUTSIDE"),
            *("http://127.0.0.1:9/a.png", "hf://datasets/x/y/a.png", "zip://a.png::http://127.0.0.1:9/a.zip"),
        ],
    )
    def test_a_file_name_outside_of_the_folder_is_refused(self, folder, metadata, name):
        name = name.replace("OUTSIDE", str(folder.parent / "outside.png"))
        write_metadata(folder / metadata, [{"file_name": "a.png"}, {"file_name": name}])
        message = refusal(load, folder)
        assert message.startswith("--train_data_dir: ") and name in message and "file_name" in message

    def test_of_several_columns_of_files_each_is_checked(self, folder):
        write_metadata(folder / "metadata.jsonl", [{"file_name": "a.png", "mask_file_name": "../outside.png"}])
        assert "'../outside.png'" in refusal(load, folder)

    def test_pictures_of_other_columns_are_not_decoded(self, folder):
        """They would be with every row, and there is no mask."""
        rows = [{"file_name": "a.png", "mask_file_name": "no.png", "text": "x", "tags": ["y"], "forget": True}]
        write_metadata(folder / "metadata.jsonl", rows)
        rows = load(folder)
        assert set(rows.column_names) == {"image", "text", "tags", "forget"} and rows[0]["text"] == "x"

    def test_the_script_says_so_in_a_sentence(self, folder, tmp_path, capfd, base_args):
        write_metadata(folder / "metadata.jsonl", [{"file_name": "../outside.png"}])
        flags = base_args | {"--train_data_dir": str(folder), "--forget_files": "a.png", "--cache_dir": str(tmp_path)}
        with mock.patch.dict(os.environ, {"HF_DATASETS_CACHE": str(tmp_path)}):
            del flags["--cache_dir"]
            assert_refused(train_siss_unconditional.main, flags, "'../outside.png'", tmp_path, capfd)

    @pytest.mark.parametrize("content", ["", "{", "[1]", '{"text": "x"}', '{"file_name": 5}', "\0\ufffe"])
    def test_metadata_that_is_none(self, folder, content):
        (folder / "metadata.jsonl").write_text(content)
        assert "--train_data_dir" in refusal(load, folder)

    @pytest.mark.parametrize("name", [None, ""])
    def test_a_row_without_an_image(self, folder, name):
        write_metadata(folder / "metadata.jsonl", [{"file_name": "a.png"}, {"file_name": name}])
        assert "row 1 has no image" in refusal(load, folder)

    def test_an_archive(self, folder):
        with zipfile.ZipFile(folder / "more.zip", "w") as archive:
            archive.write(folder / "a.png", "c.png")
        assert "more.zip lies in the folder and is an archive; unpack it" in refusal(load, folder)

    def test_links_may_lead_anywhere(self, folder, tmp_path):
        (folder / "c.png").symlink_to(tmp_path / "outside.png")
        (tmp_path / "link").symlink_to(folder)
        write_metadata(folder / "metadata.jsonl", [{"file_name": "c.png"}])
        for by_name in (False, True):
            (row,) = load(tmp_path / "link", by_name)
            assert Path(row["image"]["path"]).resolve() == tmp_path / "outside.png"

    @pytest.mark.parametrize("by_name", [False, True])
    def test_a_loading_script_is_not_run(self, folder, marker, by_name):
        (folder / "set.py").write_text(code(marker))
        if by_name:
            assert "scripts are no longer supported" in refusal(load, folder, by_name)
            assert "scripts are no longer supported" in refusal(load, folder / "set.py", by_name)
        else:
            assert len(load(folder)) == 2

    @pytest.mark.parametrize(
        "declared",
        [
            *('data_files: "../*.png"', 'data_files: ["a.png", "OUTSIDE"]', "data_dir: ../", "data_dir: /"),
            'data_files: [{split: train, path: ["a.png", "http://127.0.0.1:9/b.png"]}]',
            'data_files: [{split: train, path: "hf://datasets/x/y/*.png"}]',
        ],
    )
    @pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
    def test_a_card_names_no_files_outside(self, folder, card, declared):
        """Of these, `datasets` would read the local ones and request the others."""
        config = f"configs:\n- config_name: default\n  {declared}\n"
        config = config.replace("OUTSIDE", str(folder.parent / "outside.png"))
        (folder / card).write_text(f"---\n{config}---\n" if card == "README.md" else config)
        message = refusal(load, folder, True)
        assert f"{folder / card} names" in message and "outside" in message and message.startswith("--dataset_name")

    def test_a_card_with_files_within_is_read_and_one_with_code_is_not(self, folder, marker):
        card = "---\nconfigs:\n- config_name: default\n  data_files: a.png\n---\n"
        (folder / "README.md").write_text(card)
        assert len(load(folder, True)) == 1
        (folder / "README.md").write_text(f"---\nx: !!python/object/apply:os.system [touch {marker}]\n---\n")
        assert "README.md" in refusal(load, folder, True)

    @pytest.mark.parametrize(
        "path",
        [
            *("OUTSIDE", "../outside.png", "http://127.0.0.1:9/a.png", "set/../../a.png"),
            *(
                "TABLE/../outside.png",
                "TABLE/link/../outside.png",
            ),  # the second would be read beside the link's target
        ],
    )
    def test_a_table_names_no_files_outside(self, folder, path, monkeypatch):
        """Its card says that a text is the path of an image."""
        monkeypatch.chdir(folder)
        table = folder.parent / "table"
        table.mkdir()
        (table / "README.md").write_text(
            "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n---\n", encoding="utf-8"
        )
        (table / "link").symlink_to(folder)
        path = path.replace("OUTSIDE", str(folder.parent / "outside.png")).replace("TABLE", str(table))
        (table / "data.jsonl").write_text(json.dumps({"image": path}))
        assert f"{path} lies outside of the data set" in refusal(load, table, True)
        (table / "data.jsonl").write_text(json.dumps({"image": str(table / "a.png")}))
        assert len(load(table, True)) == 1

    def test_a_million_paths_are_not_looked_at_one_by_one(self):
        paths = [f"/set/{index}.png" for index in range(1_000_000)]
        cells = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), pa.array(paths)], ["bytes", "path"])
        rows = datasets.Dataset(pa.table({"image": cells}))
        with mock.patch("os.path.abspath", wraps=os.path.abspath) as looked_at:
            check_image_paths(rows, "image", "--train_data_dir", ["/set"])
        assert looked_at.call_count < 10
        assert "/set/0.png lies outside" in refusal(check_image_paths, rows, "image", "--train_data_dir", ["/se"])

    @pytest.mark.parametrize("name", ["", "no/such/folder/there", "a" * 5_000, "http://127.0.0.1:9/a", "a\nb", "."])
    def test_names_of_nothing(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for flag, is_folder in (("--train_data_dir", True), ("--dataset_name", False)):
            with pytest.raises(UsageError, match=flag):
                load_image_rows(flag, name, "image", is_folder=is_folder, cache_dir=str(tmp_path))
