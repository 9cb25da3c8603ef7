"""Names of files as systems write them: a letter with an accent is one character or two, and looks the same."""

import os
import unicodedata
from collections.abc import Sequence
from functools import cached_property


def composed(text: str) -> str:
    """Return a text with one character for a letter with an accent."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


class NamesOnDisk:
    """Finds paths that may be written with other characters for the same letters.

    Args:
        usual: paths that there are.
        others: more of them, which are rarely asked for.
    """

    def __init__(self, usual: Sequence[str], others: Sequence[str] = ()) -> None:
        self.usual = frozenset(usual)
        self.others = frozenset(others)
        self._real_folders: dict[str, str] = {}

    @cached_property
    def by_composed(self) -> dict[str, str]:
        return {composed(path): path for paths in (self.others, self.usual) for path in paths if not path.isascii()}

    def on_disk(self, path: str) -> str:
        """Return a path as it is on the disk; one that is not there as it is."""
        if path.isascii() or path in self.usual or path in self.others:
            return path
        return self.by_composed.get(composed(path), path)

    def real_folder(self, path: str) -> str:
        """Return the path of a folder without links; of a folder that many files are in, it is looked up once."""
        if path not in self._real_folders:
            self._real_folders[path] = os.path.realpath(path)
        return self._real_folders[path]
