"""Of a folder every file is used, counted as passed over, or named in a refusal."""

import json
import os
import unicodedata
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from siss_diffusers.auditing import load_training_images
from siss_diffusers.commands.audit_prompts import read_captions
from siss_diffusers.data.captions import load_captions
from siss_diffusers.data.images import ImageTransform
from siss_diffusers.data.sources import ImageRows, load_image_rows
from siss_diffusers.data.split import DataSource, split_data
from siss_diffusers.errors import UsageError
from tests.helpers.untrusted import BOUNDED, refusal


def picture(number: int, mode: str = "RGB") -> Image.Image:
    levels = np.random.default_rng(number).integers(0, 256, (8, 8, len(mode) if mode != "P" else 3), np.uint8)
    return Image.fromarray(levels.squeeze(), "RGB" if mode == "P" else mode).convert(mode)


def write(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / name, Path(name).suffix[1:] if "." in Path(name).name[1:] else "PNG")
    return folder


def write_lines(folder: Path, *lines: dict) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def forget_set(folder: Path) -> ImageRows:
    return load_image_rows("--forget_data_dir", str(folder), "image", is_folder=True, every_file=True)


def keep_set(folder: Path, by_name: bool = False) -> ImageRows:
    flag = "--dataset_name" if by_name else "--train_data_dir"
    cache = str(folder.parent / "cache")
    return load_image_rows(flag, str(folder), "image", is_folder=not by_name, cache_dir=cache)


def names_of(rows: ImageRows, folder: Path) -> list[str]:
    return [os.path.relpath(cell["path"], os.path.realpath(folder)) for cell in rows.rows["image"]]


SPLIT_LIKE = [
    "a.png",
    "test/b.png",
    "train_station.png",
    "training/c.png",
    "val-1.png",
    "x/train/d.png",
    "z/dev/e.png",
]


@pytest.mark.parametrize("load", [forget_set, keep_set, lambda folder: keep_set(folder, by_name=True)])
def test_names_of_splits_are_names(load, tmp_path):
    folder = write(tmp_path / "f", *SPLIT_LIKE)
    rows = load(folder)
    assert names_of(rows, folder) == SPLIT_LIKE and rows.passed_over == ""


def test_of_a_data_set_whose_folders_are_splits_train_is_read_and_the_others_are_counted(tmp_path):
    folder = write(tmp_path / "f", "train/a.png", "train/test_b.png", "test/c.png", "validation/d.png")
    rows = keep_set(folder, by_name=True)
    assert names_of(rows, folder) == ["train/a.png", "train/test_b.png"]
    assert rows.passed_over == "the split test (1 images), the split validation (1 images)"
    assert len(keep_set(folder).rows) == 4


def test_rows_to_forget_in_another_split_are_refused(tmp_path):
    (tmp_path / "f").mkdir()
    for split, marks in (("train", [True, False]), ("test", [False, True])):
        cells = pa.array([{"bytes": png_bytes(number), "path": None} for number in range(2)])
        pyarrow.parquet.write_table(pa.table({"image": cells, "forget": marks}), tmp_path / "f" / f"{split}.parquet")
    card = (
        "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: forget\n    dtype: bool\n---\n"
    )
    (tmp_path / "f" / "README.md").write_text(card)
    source = DataSource(dataset_name=str(tmp_path / "f"), cache_dir=str(tmp_path / "cache"))
    assert "1 rows to forget are in the split test" in refusal(source.load)


def png_bytes(number: int) -> bytes:
    content = BytesIO()
    picture(number).save(content, "PNG")
    return content.getvalue()


def test_rows_are_in_the_order_of_their_paths_with_classes_as_labels(tmp_path):
    """As `datasets` orders them: checkpoints of earlier versions resume."""
    names = ["B/1.png", "a b/x.png", "a-b/1.png", "a/1.png", "b/1.png", "b/10.png", "b/2.png"]
    rows = keep_set(write(tmp_path / "f", *reversed(names)))
    assert names_of(rows, tmp_path / "f") == names
    assert rows.rows.features["label"].names == ["B", "a", "a b", "a-b", "b"]
    assert rows.rows["label"] == [0, 2, 3, 1, 4, 4, 4]
    write(tmp_path / "f", "top.png")
    assert "label" not in keep_set(tmp_path / "f").rows.features


class TestForgetSet:
    def test_a_rare_format_and_a_name_without_suffix_are_read(self, tmp_path):
        folder = write(tmp_path / "f", "a.avif", "b.png", "c.webp", "d")
        (folder / "e.jpg_large").write_bytes((folder / "b.png").read_bytes())
        assert names_of(forget_set(folder), folder) == ["a.avif", "b.png", "c.webp", "d", "e.jpg_large"]

    @pytest.mark.parametrize("name", ["c.heic", "c.mp4", "notes.txt", "sub/c.pdf", "old_metadata.csv"])
    def test_what_is_no_image_is_refused_by_name(self, name, tmp_path):
        folder = write(tmp_path / "f", "a.png", "sub/b.png")
        (folder / name).write_bytes(b"something else")
        message = refusal(forget_set, folder)
        assert message.startswith("--forget_data_dir: 1 files") and name in message
        assert f"1 {Path(name).suffix}" in keep_set(folder).passed_over

    @pytest.mark.parametrize("name", [".c.png", ".hidden/c.png"])
    def test_a_hidden_image_is_refused_by_name(self, name, tmp_path):
        folder = write(tmp_path / "f", "a.png", name)
        assert f"hidden and would not be read ({name})" in refusal(forget_set, folder)
        assert keep_set(folder).passed_over == "1 hidden images"

    @pytest.mark.parametrize(
        "name", ["README.md", "LICENSE", "Thumbs.db", ".DS_Store", "desktop.ini", "._a.png", ".git/x", "@eaDir/t.jpg"]
    )
    def test_litter_is_not_what_was_given(self, name, tmp_path):
        folder = write(tmp_path / "f", "a.png")
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7")
        assert names_of(forget_set(folder), folder) == ["a.png"]

    def test_images_that_the_metadata_do_not_list_are_refused(self, tmp_path):
        folder = write(tmp_path / "f", "a.png", "b.png", "sub/c.png")
        write_lines(folder, {"file_name": "a.png", "text": "x"})
        message = refusal(forget_set, folder)
        assert "2 of 3 images to forget are not in metadata.jsonl (b.png, sub/c.png)" in message
        rows = keep_set(folder)
        assert names_of(rows, folder) == ["a.png"]
        assert rows.passed_over == "2 images that the metadata do not list (b.png, sub/c.png)"
        write_lines(folder, {"file_name": "a.png"}, {"file_name": "./b.png"}, {"file_name": "sub\\c.png"})
        assert len(forget_set(folder).rows) == 3

    def test_metadata_in_one_of_two_folders(self, tmp_path):
        folder = write(tmp_path / "f", "a/1.png", "b/2.png")
        write_lines(folder / "a", {"file_name": "1.png", "text": "x"})
        assert "b/2.png" in refusal(forget_set, folder) and "a/metadata.jsonl" in refusal(forget_set, folder)
        write_lines(folder / "b", {"file_name": "2.png", "text": 7})
        rows = forget_set(folder)
        assert names_of(rows, folder) == ["a/1.png", "b/2.png"] and rows.rows["text"] == ["x", "7"]

    def test_two_kinds_of_metadata_in_a_folder(self, tmp_path):
        folder = write(tmp_path / "f", "a.png")
        write_lines(folder, {"file_name": "a.png"})
        (folder / "metadata.csv").write_text("file_name\na.png\n")
        assert "holds two files of metadata" in refusal(keep_set, folder)

    def test_a_file_that_is_not_there_is_refused(self, tmp_path):
        folder = write(tmp_path / "f", "a.png")
        write_lines(folder, {"file_name": "a.png"}, {"file_name": "gone.png"})
        images = forget_set(folder).images(ImageTransform(3, 8))
        assert "gone.png (it is not there" in refusal(images.digest, 1)

    def test_folders_behind_links_are_read_once(self, tmp_path):
        write(tmp_path / "elsewhere", "b.png")
        folder = write(tmp_path / "f", "a.png", "real/c.png")
        (folder / "loop").symlink_to(folder)
        (folder / "real" / "loop").symlink_to(folder / "real")
        (folder / "again").symlink_to(folder / "real")
        (folder / "link").symlink_to(tmp_path / "elsewhere")
        (folder / "link2").symlink_to(tmp_path / "elsewhere")
        assert names_of(forget_set(folder), folder) == ["a.png", "link/b.png", "real/c.png"]
        (folder / "above").symlink_to(tmp_path)
        assert "above leads to a folder that holds" in refusal(forget_set, folder)

    @pytest.mark.parametrize("suffix", ["gif", "tiff", "webp", "png"])
    def test_a_file_of_several_pictures_is_refused(self, suffix, tmp_path):
        """Only the first would be forgotten. In the keep set the first is used."""
        keep = write(tmp_path / "keep", "a.png")
        for folder in (keep, tmp_path / "forget"):
            folder.mkdir(exist_ok=True)
            picture(5).save(folder / f"b.{suffix}", save_all=True, append_images=[picture(6), picture(7)])
        source = DataSource(train_data_dir=str(keep), forget_data_dir=str(tmp_path / "forget"))
        message = refusal(split_data, source.load(), ImageTransform(3, 8), seed=0)
        assert f"b.{suffix} holds 3 pictures" in message and message.startswith("--forget_data_dir")
        picture(9).save(tmp_path / "forget" / f"b.{suffix}")
        split = split_data(source.load(), ImageTransform(3, 8), seed=0, drop_near_duplicates=False)
        assert split.counts()["keep"] == 2

    def test_only_the_forget_set_is_so_strict(self, tmp_path, caplog):
        keep = write(tmp_path / "keep", "a.png", "b.png")
        (keep / "a.txt").write_text("x")
        forget = write(tmp_path / "forget", "train.png")
        source = DataSource(train_data_dir=str(keep), forget_data_dir=str(forget))
        split = split_data(source.load(), ImageTransform(3, 8), seed=0)
        counts = {
            "train": 2,
            "forget": 1,
            "keep": 1,
            "duplicates_removed": 1,
            "near_duplicates_removed": 0,
            "checked": 2,
        }
        assert split.counts() == counts
        assert (
            "--train_data_dir: passed over 1 files that are no images by their suffix (1 .txt: a.txt)" in caplog.text
        )


class TestMetadata:
    def captions(self, folder: Path, content: bytes | str, name: str = "metadata.jsonl") -> list[str]:
        write(folder, "a.png", "b.png")
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        rows = keep_set(folder)
        return load_captions(rows.images(ImageTransform(3, 8)), "text").to_pylist()

    LINES = '{"file_name": "a.png", "text": "one\u2028two"}\n{"file_name": "b.png", "text": "2015-05-01"}\n'

    @pytest.mark.parametrize(
        "content",
        [
            *(LINES.encode(), b"\xef\xbb\xbf" + LINES.encode(), LINES.replace("\n", "\r\n").encode()),
            *(LINES.replace("\n", "\r").encode(), LINES.encode("utf-16"), LINES.replace("\n", "\n\n").encode()),
        ],
    )
    def test_lines_as_editors_write_them(self, content, tmp_path):
        assert self.captions(tmp_path / "f", content) == ["one\u2028two", "2015-05-01"]

    @pytest.mark.parametrize(
        ("first", "second", "expected"),
        [
            *(("7", "42", ["7", "42"]), ('"x"', "7", ["x", "7"]), ("true", '"x"', ["true", "x"])),
            *(('["p", "q"]', '"r"', ["p", "r"]), ('["p"]', "[3]", ["p", "3"]), ('""', '"x"', ["", "x"])),
            *(('"NA"', '"null"', ["NA", "null"]), ("1.50", '"x"', ["1.50", "x"]), ("7", "2.0", ["7", "2.0"])),
            *(("1", "2.5", ["1", "2.5"]), ("1e5", "2.5", ["1e5", "2.5"]), ("[1, 3]", "[2.5]", ["1", "2.5"])),
            *(("0.1", "3.25", ["0.1", "3.25"]), ("12345678901234567890", "1.0", ["12345678901234567890", "1.0"])),
        ],
    )
    def test_captions_are_as_they_are_written(self, first, second, expected, tmp_path):
        content = f'{{"file_name": "a.png", "text": {first}}}\n{{"file_name": "b.png", "text": {second}}}'
        assert self.captions(tmp_path / "f", content) == expected

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ('file_name,text\na.png,""\nb.png,"x, y"\n', ["", "x, y"]),
            ("\ufefffile_name,text\r\na.png,007\r\nb.png,NA\r\n", ["007", "NA"]),
            ("file_name;text\na.png;x, y\nb.png;true\n", ["x, y", "true"]),
            ("file_name\ttext\na.png\tone\u2028two\nb.png\t2015-05-01\n", ["one\u2028two", "2015-05-01"]),
            (',file_name,text\n0,a.png,"x ""y"""\n1,b.png,"p\nq"\n', ['x "y"', "p\nq"]),
        ],
    )
    def test_tables_of_commas(self, content, expected, tmp_path):
        assert self.captions(tmp_path / "f", content, "metadata.csv") == expected

    def test_an_empty_cell_is_no_caption(self, tmp_path):
        with pytest.raises(UsageError, match="1 of 2 images have no caption"):
            self.captions(tmp_path / "f", 'file_name,text\na.png,""\nb.png,\n', "metadata.csv")

    def test_parquet(self, tmp_path):
        folder = write(tmp_path / "f", "a.png", "b.png")
        table = pa.table({"file_name": ["b.png", "a.png"], "text": pa.array(["y", "x"]).dictionary_encode()})
        pyarrow.parquet.write_table(table, folder / "metadata.parquet")
        rows = keep_set(folder)
        assert names_of(rows, folder) == ["b.png", "a.png"] and rows.rows["text"] == ["y", "x"]

    def test_the_audit_reads_captions_in_lists_and_numbers(self, tmp_path):
        folder = write(tmp_path / "f", "train.png", "b.png", "c.png")
        lines = [{"file_name": name, "text": text} for name, text in (("train.png", ["p", "q"]), ("b.png", 7))]
        write_lines(folder, *lines, {"file_name": "c.png", "text": None})
        assert read_captions(str(folder), "text", str(tmp_path / "cache")) == ["p", "q", "7"]

    def test_numbers_are_as_written_however_far_apart_they_stand(self, tmp_path):
        """In lines that are not read at a time, and in several files of metadata."""
        folder = write(tmp_path / "f", "a/a.png", "b/b.png")
        write_lines(folder / "a", *({"file_name": "a.png", "text": 1} for _ in range(20_000)))
        with (folder / "a" / "metadata.jsonl").open("a") as file:
            file.write('{"file_name": "a.png", "text": 2.5}')
        write_lines(folder / "b", {"file_name": "b.png", "text": 7})
        assert set(keep_set(folder).rows["text"]) == {"1", "2.5", "7"}

    def test_many_lines_keep_their_order(self, tmp_path):
        """More than are read at a time, the kind of whose values changes."""
        folder = write(tmp_path / "f", "a.png")
        lines = [
            {"file_name": "a.png", "text": number if number < 30_000 else str(number)} for number in range(45_000)
        ]
        write_lines(folder, *lines)
        assert keep_set(folder).rows["text"][:] == list(map(str, range(45_000)))


def test_the_audit_compares_with_every_image(tmp_path):
    folder = write(tmp_path / "f", "test/a.png", "train.avif", "x.png")
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "link").symlink_to(folder)
    (tmp_path / "g" / "a.heic").write_bytes(b"?")
    training = load_training_images(str(tmp_path / "g"), 8)
    assert training.names == ["link/test/a.png", "link/train.avif", "link/x.png"]
    assert "1 .heic" in training.passed_over


# Names that tools take for something else, on purpose.
PARTS = st.sampled_from(
    ["train", "test", "a", "dev", "x train-1", "Ünï", "data", "metadata", "__x", "file, name", "p.q", "[0-9]*"]
    + [unicodedata.normalize("NFD", "é"), ".hidden", ".Trash", "lost+found", "notice"]
)
SUFFIXES = st.sampled_from(
    [".png", ".PNG", ".jpg", ".webp", ".tiff", ".bmp", ".gif", ".avif", "", ".heic", ".txt", ".dat", ".dng"]
)
MODES = st.sampled_from(["RGB", "L", "RGBA", "LA", "P"])
KINDS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".webp": "WEBP",
    ".avif": "AVIF",
}


@st.composite
def folders(draw):
    """Files by their names: a mode and an orientation, or None for what is no image; the column of metadata that lists
    each, if any; and whether all is behind a link."""
    files = {}
    for _ in range(draw(st.integers(1, 6))):
        path = "/".join(draw(st.lists(PARTS, min_size=1, max_size=3))) + draw(SUFFIXES)
        if not any(path.startswith(f"{other}/") or other.startswith(f"{path}/") for other in files):
            is_image = draw(st.booleans()) or Path(path).suffix.lower() in (".png", ".jpg")
            files[path] = (draw(MODES), draw(st.integers(1, 8))) if is_image else None
    listed = draw(st.none() | st.lists(st.sampled_from(sorted(files)), unique=True, min_size=1))
    columns = st.sampled_from(["file_name"] * 5 + ["mask_file_name"])
    return files, None if listed is None else {name: draw(columns) for name in listed}, draw(st.booleans())


def is_out_of_sight(name: str) -> bool:
    """Whether people do not see a file, or systems have it."""
    parts = name.lower().split("/")
    return any(part.startswith(".") or part == "lost+found" for part in parts) or parts[-1] in ("notice", "notice.txt")


def may_be_refused(name: str, kind: tuple | None, listed: dict[str, str] | None) -> bool:
    unlisted = listed is not None and listed.get(name) != "file_name"
    return kind is None or unlisted or is_out_of_sight(name) or name.endswith((".dng", "metadata.txt"))


def write_file(file: Path, number: int, kind: tuple[str, int] | None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if kind is None:
        file.write_bytes(b"no image")
        return
    format_ = KINDS.get(file.suffix.lower(), "PNG")
    image, exif = picture(number, kind[0]), Image.Exif()
    exif[274] = kind[1]
    if format_ in ("JPEG", "BMP", "AVIF", "GIF"):
        image = image.convert("RGB")
    image.save(file, format_, exif=exif)


def plainly_decoded(file: Path) -> torch.Tensor:
    with Image.open(file) as image:
        image.load()
        upright = ImageOps.exif_transpose(image).convert("RGBA")
    white = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    return torch.from_numpy(np.array(white)).permute(2, 0, 1) / 127.5 - 1


@settings(BOUNDED, max_examples=150)
@given(folders())
def test_every_file_is_used_or_named_in_a_refusal(tmp_path_factory, folder):
    files, listed, behind_a_link = folder
    root = tmp_path_factory.mktemp("folder") / "train"
    for number, (name, kind) in enumerate(files.items()):
        write_file(root / name, number, kind)
    if behind_a_link:
        (root.parent / "real").symlink_to(root)
        (root.parent / "linked").mkdir()
        (root.parent / "linked" / "test").symlink_to(root)
    if listed is not None:
        # In the letters of another system.
        write_lines(root, *({listed[name]: unicodedata.normalize("NFC", name)} for name in listed))
    given_folder = root.parent / "linked" if behind_a_link else root
    try:
        rows = forget_set(given_folder)
        images = rows.images(ImageTransform(3, 8))
        tensors = {Path(cell["path"]).resolve(): images.load(row) for row, cell in enumerate(rows.rows["image"])}
    except UsageError as error:
        unused = [name for name, kind in files.items() if may_be_refused(name, kind, listed)]
        if not any(files.values()) and "there are no images" in str(error):
            return
        if listed is not None and set(listed.values()) == {"mask_file_name"} and "has no image column" in str(error):
            return
        assert any(name in str(error) for name in unused) and str(error).startswith("--forget_data_dir: ")
        return
    images = {name for name, kind in files.items() if kind is not None}
    assert set(tensors) == {root.resolve() / name for name in images}
    assert all(is_out_of_sight(name) for name in set(files) - images)
    for file, tensor in tensors.items():
        torch.testing.assert_close(tensor, plainly_decoded(file))
    if not any(Path(name).suffix.lower() in KINDS for name in images):
        return
    kept = keep_set(given_folder).images(ImageTransform(3, 8))
    for row in range(len(kept)):
        torch.testing.assert_close(kept.load(row), plainly_decoded(Path(kept.rows[row]["image"]["path"])))
