"""What lies in a folder: images, metadata, and anything else. Nothing is left out in silence."""

import os
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from PIL import Image

from siss_diffusers.data.metadata import METADATA_FILES
from siss_diffusers.data.viewing import RAW_SUFFIXES, image_formats, open_image
from siss_diffusers.errors import UsageError, describe_error


# What systems and tools leave behind. None of it was given.
LITTER_FOLDERS = frozenset(
    "__macosx __pycache__ @eadir $recycle.bin lost+found .git .svn .hg .cache .huggingface .ipynb_checkpoints .thumbnails"
    " .trash .trashes .spotlight-v100 .fseventsd .documentrevisions-v100 .temporaryitems".split()
) | {"system volume information"}
LITTER_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "icon\r", "dataset_infos.json"}
TEXTS_ABOUT_A_FOLDER = {"readme", "license", "licence", "citation", "copying", "notice", "authors", "changelog"}
APPLE_DOUBLE = b"\0\5\x16\7"  # what macOS writes as ._a.png beside a.png, under the suffix of an image
ARCHIVES = frozenset(".zip .tar .tgz .gz .bz2 .xz .zst .7z .rar".split())
DATA_SUFFIXES = (".parquet", ".arrow", ".tar", ".zip")
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".xlsx", ".yaml", ".yml", ".bak")
# Formats that Pillow opens and cannot decode.
NOT_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
# Pictures that nothing here reads.
NOT_READ = RAW_SUFFIXES | set(".heic .heif .hif .jxl .jxr .svg .pdf .eps .ai .xcf .mp4 .mov .webm .mkv .avi".split())
NUM_EXAMPLES = 3


@dataclass
class FolderFiles:
    """The files below a folder, as absolute paths in their order.

    Args:
        root: the folder.
        images: files with the suffix of an image.
        metadata: `metadata.jsonl`, `metadata.csv` and `metadata.parquet`.
        hidden: pictures by their suffix whose names, or folders' names, begin with a dot.
        above: links to folders that hold this one.
        litter: texts about the folder, other hidden files, and what systems leave behind.
        others: anything else.
    """

    root: str
    images: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    above: list[str] = field(default_factory=list)
    litter: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def examples(self, paths: Sequence[str]) -> str:
        """Return the first few of these files, by their names below the folder."""
        names = [os.path.relpath(path, self.root) for path in paths[:NUM_EXAMPLES]]
        return ", ".join(names) + (f" and {len(paths) - NUM_EXAMPLES} more" if len(paths) > NUM_EXAMPLES else "")

    def beside(self, folder: str) -> "FolderFiles":
        """Return the files that do not lie in one of the folders here."""
        inside = os.path.join(self.root, folder, "")
        kinds = (self.images, self.metadata, self.hidden, self.above, self.litter, self.others)
        return FolderFiles(self.root, *([path for path in paths if not path.startswith(inside)] for paths in kinds))


def require_folder(flag: str, folder: str) -> None:
    """Refuse what is no folder.

    Raises:
        UsageError: naming the flag, and what to do with a file.
    """
    if os.path.isfile(folder):
        suffix = suffix_of(folder)
        cure = "name the folder that it lies in"
        if suffix in ARCHIVES:
            cure = "unpack it, and name the folder"
        elif suffix in DATA_SUFFIXES and flag == "--train_data_dir":
            cure = "name the folder that it lies in by --dataset_name"
        elif suffix in DATA_SUFFIXES and flag != "--dataset_name":
            cure = "save its images as files, and name their folder"
        raise UsageError(f"{flag}: {folder} is a file and no folder; {cure}")
    if not os.path.isdir(folder):
        raise UsageError(f"{flag}: no folder {folder or repr(folder)}")


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of the formats that Pillow decodes."""
    formats = set(image_formats()) - NOT_DECODED
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def suffix_of(path: str) -> str:
    """Return the suffix of a file in small letters; a name that begins with its only dot has none."""
    return os.path.splitext(path)[1].lower()


def list_folder(flag: str, folder: str, every_file: bool = False) -> FolderFiles:
    """List the files below a folder. Links are followed; what several links lead to is listed once.

    Args:
        every_file: list what is in folders of litter, too.

    Raises:
        UsageError: naming the flag, for a folder below it that cannot be read, and for a name that is no text.
    """
    files = FolderFiles(os.path.realpath(folder))
    # Folders behind links come last, so that files have their names without links where they have one.
    pending, linked = deque([(files.root, False, False)]), deque()
    seen = set()
    while pending or linked:
        path, is_hidden, is_litter = pending.popleft() if pending else linked.popleft()
        real = os.path.realpath(path)
        if real in seen:
            continue
        if real != files.root and files.root.startswith(os.path.join(real, "")):
            files.above.append(path)
            continue
        seen.add(real)
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    hidden = is_hidden or entry.name.startswith(".")
                    litter = is_litter or entry.name.lower() in LITTER_FOLDERS
                    if not is_folder(entry):
                        sort_file(files, entry.name, entry.path, hidden, is_litter)
                    elif every_file or not litter:
                        (linked if entry.is_symlink() else pending).append((entry.path, hidden, litter))
        except OSError as error:
            raise UsageError(f"{flag}: cannot read the folder {path} ({describe_error(error)}); make it readable")
    for paths in (files.images, files.metadata, files.hidden, files.above, files.litter, files.others):
        paths.sort()
        for path in paths:
            if not path.isascii() and not is_text(path):
                raise UsageError(f"{flag}: the name of {ascii(path)} is not valid UTF-8; rename it")
    return files


def is_folder(entry: os.DirEntry) -> bool:
    """Tell whether an entry of a folder is a folder; a link that leads to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_text(path: str) -> bool:
    """Tell whether the name of a file is valid UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def sort_file(files: FolderFiles, name: str, path: str, is_hidden: bool, is_litter: bool) -> None:
    """Add a file where it belongs. Most are images, so these come first."""
    dot = name.rfind(".")
    suffix = name[dot:].lower() if dot > 0 else ""
    if suffix in image_suffixes() and not is_hidden and not is_litter:
        files.images.append(path)
        return
    lower = name.lower()
    stem = lower[: len(lower) - len(suffix)]
    is_text_about_it = stem in TEXTS_ABOUT_A_FOLDER and suffix in ("", ".md", ".txt", ".rst")
    if is_litter or lower in LITTER_FILES or is_text_about_it:
        files.litter.append(path)
    elif is_hidden:
        (files.hidden if suffix in image_suffixes() | NOT_READ else files.litter).append(path)
    elif lower in METADATA_FILES:
        files.metadata.append(path)
    else:
        files.others.append(path)


def is_image(path: str) -> bool:
    """Tell whether Pillow knows a file as an image; only its header is read."""
    try:
        with open_image(path):
            return True
    except Exception:  # of any kind, for Pillow does not say of which
        return False


def holds_pictures(path: str) -> bool:
    """Tell whether a file is a picture, or an archive, by its suffix or by what is in it."""
    try:
        if os.path.isfile(path):  # a pipe would never end
            with open(path, "rb") as file:
                if file.read(len(APPLE_DOUBLE)) == APPLE_DOUBLE:
                    return False
    except OSError:
        pass  # a picture by its name is one all the same
    return suffix_of(path) in image_suffixes() | NOT_READ | ARCHIVES or is_image(path)


def refuse_archives(flag: str, files: FolderFiles) -> None:
    """Refuse archives, which may hold images.

    Raises:
        UsageError: naming the first.
    """
    for path in files.others:
        if suffix_of(path) in ARCHIVES:
            raise UsageError(f"{flag}: {path} lies in the folder and is an archive; unpack it, or remove it")


def describe_passed_over(files: FolderFiles, unlisted: Sequence[str] = (), elsewhere: Sequence[str] = ()) -> str:
    """Return how many files of what kind are not used; empty if all are.

    Args:
        unlisted: images that the metadata do not list.
        elsewhere: images that the metadata list in a column that is not used.
    """
    parts = []
    if files.others:
        kinds = Counter(suffix_of(path) or "without suffix" for path in files.others)
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
        # Tables first: one of them may say what the images are.
        names = files.examples(sorted(files.others, key=lambda path: suffix_of(path) not in TABLES))
        parts.append(f"{len(files.others)} files that are no images by their suffix ({counts}: {names})")
    if files.hidden:
        parts.append(f"{len(files.hidden)} hidden images")
    if files.above:
        parts.append(f"{len(files.above)} links to folders that hold this one ({files.examples(files.above)})")
    if unlisted:
        parts.append(f"{len(unlisted)} images that the metadata do not list ({files.examples(unlisted)})")
    if elsewhere:
        parts.append(f"{len(elsewhere)} images of other columns of the metadata ({files.examples(elsewhere)})")
    return ", ".join(parts)
