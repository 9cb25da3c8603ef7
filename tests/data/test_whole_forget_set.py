"""What was given to forget is forgotten or refused, also under names and in places where nobody looks for images."""

import json
import os
import unicodedata

import datasets
import pytest
from diffusers import DDPMPipeline
from PIL import Image

from siss_diffusers.api import unlearn
from siss_diffusers.auditing import load_training_images
from siss_diffusers.commands.audit_prompts import read_captions
from siss_diffusers.data.captions import load_captions
from siss_diffusers.data.images import ImageTransform
from siss_diffusers.data.memory import rows_of
from siss_diffusers.data.split import DataSource
from siss_diffusers.errors import UsageError
from tests.data.test_folders import forget_set, keep_set, names_of, picture, png_bytes, write, write_lines
from tests.helpers.paths import TINY_MODEL
from tests.helpers.untrusted import refusal


def rows(*marks: bool) -> datasets.Dataset:
    cells = [{"bytes": png_bytes(number), "path": None} for number in range(len(marks))]
    features = datasets.Features(image=datasets.Image(), forget=datasets.Value("bool"), text=datasets.Value("string"))
    texts = [f"text {number}" for number in range(len(marks))]
    return datasets.Dataset.from_dict({"image": cells, "forget": list(marks), "text": texts}, features)


class TestSavedSets:
    """Folders of `save_to_disk`."""

    @pytest.fixture
    def folder(self, tmp_path):
        datasets.DatasetDict(train=rows(True, False), test=rows(False, True, True)).save_to_disk(tmp_path / "d")
        return tmp_path / "d"

    def test_a_set_to_forget_has_no_splits(self, folder):
        assert "holds the splits train and test (3 rows), and only train would be read" in refusal(forget_set, folder)
        rows(True, True).save_to_disk(folder.parent / "e")
        assert len(forget_set(folder.parent / "e").rows) == 2

    @pytest.mark.parametrize("flag", ["dataset_name", "train_data_dir"])
    def test_rows_to_forget_in_another_split_are_refused(self, folder, flag):
        source = DataSource(**{flag: str(folder)})
        assert f"--{flag}: 2 rows to forget are in the split test" in refusal(source.load)
        datasets.DatasetDict(train=rows(True, False), test=rows(False)).save_to_disk(folder.parent / "e")
        given = DataSource(**{flag: str(folder.parent / "e")}).load()
        assert given.forget_indices == [0] and given.train.passed_over == "the split test (1 rows)"

    def test_the_cure_for_python_is_one_that_it_takes(self, folder):
        message = refusal(unlearn, DDPMPipeline.from_pretrained(TINY_MODEL), keep=str(folder))
        assert message.startswith("keep: 2 rows to forget are in the split test")
        assert message.endswith("or give their images as `forget`")

    def test_the_audit_names_the_other_splits(self, folder, capsys):
        assert read_captions(str(folder), "text", None) == ["text 0", "text 1"]
        assert "passed over the split test (3 rows)" in capsys.readouterr().out

    @pytest.mark.parametrize("name", ["extra.png", "sub/extra.heic", ".extra.png", ".Trash/x.png", "notes.txt"])
    def test_what_lies_beside_is_refused_and_counted(self, tmp_path, name):
        rows(True, True).save_to_disk(tmp_path / "e")
        (tmp_path / "e" / name).parent.mkdir(exist_ok=True)
        picture(5).save(tmp_path / "e" / name, "PNG")
        assert f"1 files lie in {tmp_path}/e beside what save_to_disk wrote" in refusal(forget_set, tmp_path / "e")
        if "Trash" not in name:
            assert keep_set(tmp_path / "e").passed_over == f"1 files beside what save_to_disk wrote ({name})"

    def test_a_second_saved_set_beside_the_first(self, tmp_path):
        rows(True, True).save_to_disk(tmp_path / "e")
        rows(True).save_to_disk(tmp_path / "e" / "other")
        assert "other/data-00000-of-00001.arrow" in refusal(forget_set, tmp_path / "e")

    def test_results_of_map_and_a_readme_are_no_second_set(self, tmp_path):
        rows(True, True).save_to_disk(tmp_path / "e")
        (tmp_path / "e" / "README.md").write_text("about it")
        (tmp_path / "e" / "cache-1234.arrow").write_bytes(b"")
        assert len(forget_set(tmp_path / "e").rows) == 2

    @pytest.mark.parametrize("spoil", [lambda file: file.unlink(), lambda file: file.write_text("{")])
    def test_a_split_that_is_missing_matters_where_it_may_say_what_to_forget(self, folder, spoil, tmp_path):
        spoil(folder / "test" / "state.json")
        assert keep_set(folder).passed_over == "the split test (which cannot be loaded)"
        source = DataSource(train_data_dir=str(folder), forget_data_dir=str(write(tmp_path / "f", "a.png")))
        assert len(source.load().train.rows) == 2
        message = refusal(DataSource(dataset_name=str(folder)).load)
        assert "state.json is missing or not what save_to_disk wrote" in message and "in the split test" in message
        spoil(folder / "train" / "state.json")
        assert "train/state.json is missing" in refusal(keep_set, folder)

    def test_the_audit_says_that_it_compares_with_files(self, folder):
        assert "is a data set of save_to_disk" in refusal(load_training_images, str(folder), 8)


class TestSplitsOfFolders:
    @pytest.fixture
    def folder(self, tmp_path):
        folder = write(tmp_path / "d", "train/a.png", "train/b.png", "test/c.png", "test/d.png")
        write_lines(folder / "train", {"file_name": "a.png", "forget": True, "who": "anna"}, {"file_name": "b.png"})
        write_lines(folder / "test", {"file_name": "c.png", "forget": True, "who": "anna"}, {"file_name": "d.png"})
        return folder

    def test_rows_to_forget_in_another_split_are_refused(self, folder):
        source = DataSource(dataset_name=str(folder))
        assert "--dataset_name: 1 rows to forget are in the split test" in refusal(source.load)
        assert len(DataSource(train_data_dir=str(folder)).load().forget_indices) == 2

    def test_rows_of_a_value_in_another_split_are_warned_of_once(self, folder, caplog):
        """A class has some in every test split."""
        write(folder, "val/e.png", "val/f.png", "dev/g.png")
        write_lines(folder / "val", {"file_name": "e.png", "who": "Anna"}, {"file_name": "f.png", "who": "anna "})
        write_lines(folder / "dev", {"file_name": "g.png", "who": "ben"})
        chosen = {"forget_column": "who", "forget_value": "anna"}
        assert DataSource(dataset_name=str(folder), **chosen).load().forget_indices == [0]
        (warning,) = [text for text in caplog.messages if "those of the split train are forgotten" in text]
        assert warning.endswith("nothing is used of the others (1 in the split test)")
        assert (
            "'anna' may mean 'Anna' or 'anna ' in the column `who`; write it exactly (in the split val" in caplog.text
        )
        assert "dev" not in caplog.text and caplog.text.count("The column `forget` marks") == 1
        assert len(DataSource(train_data_dir=str(folder), **chosen).load().forget_indices) == 2

    @pytest.mark.parametrize("name", ["test/more.7z", "test/metadata.csv", "notes.txt", "test/metadata.jsonl"])
    def test_what_is_wrong_elsewhere_stops_no_run_that_does_not_look_there(self, folder, name, tmp_path):
        (folder / name).write_text("[")
        rows = keep_set(folder, by_name=True)
        assert len(rows.rows) == 2 and rows.passed_over.startswith("the split test (2 images)")
        assert (name in rows.passed_over) == ("metadata" not in name)
        source = DataSource(dataset_name=str(folder), forget_data_dir=str(write(tmp_path / "f", "a.png")))
        assert len(source.load().train.rows) == 2
        message = refusal(DataSource(dataset_name=str(folder)).load)
        assert "in the split test" in message and ("notes" in name or name[5:] in message)

    def test_marks_there_that_are_neither_yes_nor_no_are_refused(self, folder):
        write_lines(folder / "test", {"file_name": "c.png", "forget": "anna"}, {"file_name": "d.png", "forget": "ben"})
        message = refusal(DataSource(dataset_name=str(folder)).load)
        assert "--forget_value is needed" in message and "in the split test" in message


class TestNamesOfNothing:
    @pytest.mark.parametrize(
        "name",
        [
            ".secret",
            ".png",
            ".trash/b.png",
            ".cache/x/b",
            "lost+found/b.png",
            "sub/@eaDir/b.jpg",
            "notice",
            "Thumbs.db",
        ],
    )
    def test_an_image_under_a_name_of_the_system_is_refused(self, name, tmp_path):
        folder = write(tmp_path / "f", "a.png")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(7).save(folder / name, "PNG")
        message = refusal(forget_set, folder)
        assert message.startswith("--forget_data_dir: 1 images or archives to forget are hidden") and name in message
        assert names_of(keep_set(folder), folder) == ["a.png"]

    @pytest.mark.parametrize("name", [".b.heic", ".more.zip", ".b.png", ".git/b.heic"])
    def test_a_hidden_file_that_cannot_be_read_is_refused(self, name, tmp_path):
        folder = write(tmp_path / "f", "a.png")
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be read")
        assert f"({name})" in refusal(forget_set, folder)

    def test_what_the_systems_leave_is_none(self, tmp_path):
        folder = write(tmp_path / "f", "a.png")
        for name in ("._a.heic", ".git/HEAD", ".gitignore", "__MACOSX/._a.png", ".cache/huggingface/x.metadata"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"\0\5\x16\7 of the system")
        assert names_of(forget_set(folder), folder) == ["a.png"]

    def test_a_raw_file_is_not_its_preview(self, tmp_path):
        folder = write(tmp_path / "f", "a.png")
        picture(3).save(folder / "b.dng", "TIFF")
        assert "cannot be read as images (b.dng)" in refusal(forget_set, folder)
        assert "1 .dng: b.dng" in keep_set(folder).passed_over
        write_lines(folder, {"file_name": "b.dng"})
        assert "camera's raw file" in refusal(keep_set(folder).images(ImageTransform(3, 8)).open, 0)

    def test_links_to_nowhere(self, tmp_path):
        folder = write(tmp_path / "f", "a.png")
        (folder / "loop.png").symlink_to(folder / "loop.png")
        images = forget_set(folder).images(ImageTransform(3, 8))
        assert "loop.png (it is not there" in refusal(images.open, 1)
        (folder / "loop.png").unlink()
        (folder / "above").symlink_to(tmp_path)
        assert refusal(forget_set, folder).endswith("remove the link")
        assert keep_set(folder).passed_over == "1 links to folders that hold this one (above)"


class TestMetadata:
    @pytest.mark.parametrize("column", ["original_file_name", "mask_file_name"])
    def test_an_image_of_another_column_is_not_forgotten(self, column, tmp_path):
        folder = write(tmp_path / "f", "0.png", "1.png")
        write_lines(folder, {"file_name": "0.png", column: "1.png"})
        message = refusal(forget_set, folder)
        assert "1 of 2 images to forget are in a column of metadata.jsonl that is not used (1.png)" in message
        assert keep_set(folder).passed_over == "1 images of other columns of the metadata (1.png)"
        write_lines(folder, {"file_name": "0.png", column: "1.png"}, {"file_name": "1.png"})
        assert names_of(forget_set(folder), folder) == ["0.png", "1.png"]

    def test_images_to_forget_that_are_marked_as_to_be_kept(self, tmp_path):
        folder = write(tmp_path / "f", "a.png", "b.png", "c.png")
        lines = [{"file_name": "a.png", "forget": True}, {"file_name": "b.png"}]
        write_lines(folder, *lines, {"file_name": "c.png", "forget": False})
        assert "its column `forget` says no of 1 images (c.png)" in refusal(forget_set, folder)
        write_lines(folder, *lines, {"file_name": "c.png", "forget": "yes"})
        assert len(forget_set(folder).rows) == 3

    def test_the_column_of_images_is_that_of_the_training_set_where_there_is_one(self, tmp_path):
        keep, forget = write(tmp_path / "keep", "a.png"), write(tmp_path / "forget", "b.png")
        for folder, name in ((keep, "a.png"), (forget, "b.png")):
            write_lines(folder, {"img_file_name": name})
        source = DataSource(train_data_dir=str(keep), forget_data_dir=str(forget), image_column="img")
        assert source.load().forget.column == "img"
        (forget / "metadata.jsonl").unlink()
        assert source.load().forget.column == "image"

    def test_a_hidden_image_that_is_listed_is_not_passed_over(self, tmp_path):
        folder = write(tmp_path / "f", "a.png", ".b.png", "c")
        write_lines(folder, {"file_name": "a.png"}, {"file_name": ".b.png"}, {"file_name": "c"})
        assert len(keep_set(folder).rows) == 3 and keep_set(folder).passed_over == ""

    @pytest.mark.parametrize("form", ["NFC", "NFD"])
    def test_an_accent_is_one_character_or_two(self, form, tmp_path):
        other = {"NFC": "NFD", "NFD": "NFC"}[form]
        on_disk, written = (unicodedata.normalize(way, "é ö.png") for way in (form, other))
        folder = write(tmp_path / "f", on_disk, "a.png")
        write_lines(folder, {"file_name": written}, {"file_name": "a.png"})
        assert names_of(forget_set(folder), folder) == [on_disk, "a.png"]
        source = DataSource(train_data_dir=str(folder), forget_files=(written,))
        assert source.load().forget_indices == [0]
        if os.path.exists(folder / written):
            pytest.skip("this disk takes both for one name")
        picture(9).save(folder / written)  # then they are two files
        write_lines(folder, {"file_name": written}, {"file_name": "a.png"}, {"file_name": on_disk})
        assert names_of(forget_set(folder), folder) == [written, "a.png", on_disk]
        assert source.load().forget_indices == [0]

    @pytest.mark.parametrize("through_a_link", [False, True])
    def test_an_absolute_path_within_the_folder_is_taken(self, through_a_link, tmp_path):
        folder = write(tmp_path / "f", "a.png", "sub/b.png")
        (tmp_path / "link").symlink_to(folder)
        root = tmp_path / "link" if through_a_link else folder
        write_lines(folder, *({"file_name": str(root / name)} for name in ("a.png", "sub/b.png")))
        assert names_of(forget_set(folder), folder) == ["a.png", "sub/b.png"]

    def test_an_address_is_called_one(self, tmp_path):
        folder = write(tmp_path / "f", "a.png")
        write_lines(folder, {"file_name": "https://example.org/a.png"})
        assert "which is an address, and nothing is downloaded from it" in refusal(keep_set, folder)

    @pytest.mark.parametrize("name", ["x/y/z/metadata.json", "x/y/metadata.json", "x/metadata.json"])
    def test_misnamed_metadata_are_found_at_any_depth(self, name, tmp_path):
        """Below a training set they may be those of photo albums, and are named."""
        folder = write(tmp_path / "f", "x/y/z/a.png")
        (folder / name).write_text("[]")
        assert "is not read under this name" in refusal(forget_set, folder)
        for by_name in (False, True):
            rows = keep_set(folder, by_name)
            assert len(rows.rows) == 1 and f"(1 .json: {name})" in rows.passed_over

    @pytest.mark.parametrize("name", ["_metadata.jsonl", "metadata.jsonl.bak", "labels.csv"])
    def test_a_file_that_may_say_what_to_forget_is_named(self, name, tmp_path):
        folder = write(tmp_path / "f", "a.png")
        (folder / name).write_text(json.dumps({"file_name": "a.png", "forget": True}))
        (folder / "a.dat").write_text("x")
        message = refusal(DataSource(train_data_dir=str(folder)).load)
        assert message.startswith("nothing to forget") and name in message
        assert name in refusal(forget_set, folder)

    @pytest.mark.parametrize("blank", ["\n", "\r\n\r\n", " \t\n"])
    def test_a_table_that_begins_with_a_blank_line(self, blank, tmp_path):
        folder = write(tmp_path / "f", "a.png")
        (folder / "metadata.csv").write_bytes(f"{blank}file_name,text\na.png,x\n".encode())
        assert keep_set(folder).rows["text"] == ["x"]

    def test_objects_are_called_objects(self, tmp_path):
        folder = write(tmp_path / "f", "a.png", "b.png")
        lines = [{"file_name": name, "text": {"en": "x"}, "forget": {"who": "anna"}} for name in ("a.png", "b.png")]
        write_lines(folder, *lines)
        images = keep_set(folder).images(ImageTransform(3, 8))
        assert "--caption_column 'text' holds objects (en)" in refusal(load_captions, images, "text")
        assert "'forget' holds" in refusal(DataSource(train_data_dir=str(folder)).load)


class TestWhatIsNoFolder:
    @pytest.mark.parametrize(
        "name, flag, cure",
        [
            ("a.png", "--train_data_dir", "name the folder that it lies in"),
            ("a.zip", "--train_data_dir", "unpack it"),
            ("a.parquet", "--train_data_dir", "by --dataset_name"),
            ("a.parquet", "--dataset_name", "name the folder that it lies in"),
            ("a.zip", "--dataset_name", "unpack it"),
        ],
    )
    def test_a_file(self, name, flag, cure, tmp_path):
        (tmp_path / name).write_bytes(b"x")
        message = refusal(keep_set, tmp_path / name, flag == "--dataset_name")
        assert message.startswith(f"{flag}: {tmp_path / name} is a file and no folder; ") and cure in message

    @pytest.mark.parametrize("name", ["data.parquet", "sub/data-00000-of-00001.arrow", "data.jsonl"])
    def test_a_folder_of_data(self, name, tmp_path):
        (tmp_path / "f" / name).parent.mkdir(parents=True)
        (tmp_path / "f" / name).write_bytes(b"x")
        message = refusal(keep_set, tmp_path / "f")
        assert "there are no images in" in message and message.endswith("name a data set by --dataset_name")


def test_the_audit_says_of_which_files_it_sees_one_picture(tmp_path):
    folder = write(tmp_path / "f", "a.png")
    Image.Image.save(picture(5), folder / "b.gif", save_all=True, append_images=[picture(6)])
    assert (
        "all but the first picture of 1 files that hold several (b.gif)"
        in load_training_images(str(folder), 8).passed_over
    )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("suffix", ["gif", "tiff"])
def test_the_audit_refuses_a_damaged_second_picture_in_a_sentence(suffix, tmp_path):
    """Wherever the file ends."""
    file = tmp_path / f"a.{suffix}"
    picture(5, "L").save(file, save_all=True, append_images=[picture(6, "L"), picture(7, "L")])
    content = file.read_bytes()
    refused = 0
    for length in range(len(content) // 3, len(content)):
        file.write_bytes(content[:length])
        try:
            load_training_images(str(tmp_path), 8)
        except UsageError as error:
            assert f"cannot read {file} (" in str(error)
            refused += 1
    assert 0 < refused


def test_a_picture_whose_file_was_closed_is_refused(tmp_path):
    picture(5).save(tmp_path / "a.gif", save_all=True, append_images=[picture(6)])
    closed = Image.open(tmp_path / "a.gif")
    closed.close()
    assert "forget[0] cannot be read (Operation on closed image)" in refusal(
        rows_of, [closed], "forget", every_file=True
    )
