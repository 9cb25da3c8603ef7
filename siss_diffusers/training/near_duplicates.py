"""`near_duplicates.csv`: which images were left out of the keep set as near copies of forget images, for a look."""

import csv
from io import StringIO
from pathlib import Path

from siss_diffusers.data.split import Split
from siss_diffusers.storage.files import NEAR_DUPLICATES, write_text


def write_near_duplicates(folder: Path, split: Split) -> None:
    """Write the names of the near copies, the most doubtful first; remove the file of an earlier run where there are none.

    The file names images, and some of them are to be forgotten: it is readable by its owner only, and never published.
    """
    path, matches = folder / NEAR_DUPLICATES, split.order.near_copies
    if not matches:
        path.unlink(missing_ok=True)
        return
    text = StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "similarity", "forget_file"])
    for row, match in sorted(matches.items(), key=lambda item: (item[1].similarity, item[0])):
        writer.writerow([split.train.name(row), f"{match.similarity:.4f}", split.forget.name(split.forget_row(match))])
    write_text(path, text.getvalue(), mode=0o600)
