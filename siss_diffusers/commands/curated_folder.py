"""The folder that `siss curate` writes: its pictures, their `metadata.jsonl` and the contact sheets."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from siss_diffusers.commands.common import count_of
from siss_diffusers.errors import UsageError, describe_error


if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

THUMBNAIL, COLUMNS = 96, 12  # of the contact sheets
SIDES = ("keep", "forget")


def image_name(prompt_index: int, index: int) -> str:
    """Return the name of a sample's file."""
    return f"prompt{prompt_index:03d}_{index:04d}.png"


def open_picture(file: Path, flag: str) -> "Image.Image":
    """Read a picture in three channels.

    Raises:
        UsageError: if it cannot be read.
    """
    from siss_diffusers.data.viewing import read_image, to_channels

    try:
        return to_channels(read_image(file), 3)
    except ValueError as error:
        raise UsageError(f"{flag}: cannot read {file} ({describe_error(error)}); repair or remove it")


def load_picture(file: Path, flag: str) -> "Tensor":
    """Read a picture as `(3, H, W)` in [0, 1].

    Raises:
        UsageError: if it cannot be read.
    """
    from torchvision.transforms.functional import to_tensor

    return to_tensor(open_picture(file, flag))


def save_picture(image: "Tensor", file: Path) -> None:
    """Save a picture `(3, H, W)` in [0, 1] whole or not at all, so that a file that exists need not be made again."""
    from torchvision.transforms.functional import to_pil_image

    temporary = file.with_name(f".{file.name}")
    to_pil_image(image).save(temporary, format="PNG")
    os.replace(temporary, file)


def read_metadata(folder: Path) -> list[dict]:
    """Read the rows of `metadata.jsonl`.

    Raises:
        UsageError: if it is not there, or not what `siss curate` wrote.
    """
    file = folder / "metadata.jsonl"
    if not file.exists():
        raise UsageError(f"--output_dir: no metadata.jsonl in {folder}; run `siss curate` with --prompts first")
    from siss_diffusers.data.text import read_text, split_lines

    try:
        rows = [json.loads(line) for line in split_lines(read_text(file)) if line.strip()]
        for row in rows:
            name, forget = row["file_name"], row["forget"]
            # The name becomes part of other files' names.
            if not name or Path(name).name != name or not isinstance(forget, bool):
                raise ValueError(f"not a file beside it and true or false: {name!r}, {forget!r}")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"--output_dir: {file} is not what `siss curate` wrote ({describe_error(error)}); repair it")
    return rows


def write_metadata(folder: Path, rows: list[dict]) -> None:
    """Write the rows as `metadata.jsonl`, whole or not at all."""
    temporary = folder / ".metadata.jsonl"
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, folder / "metadata.jsonl")


def move_by_hand(output_dir: Path, flip: Sequence[str], move: Sequence[str]) -> None:
    """Move files between keep and forget, and draw the contact sheets again.

    Args:
        flip: files to move to the other side.
        move: a side, and the files to move there; empty for none.

    Raises:
        UsageError: for an unknown side or file, or a file that is named twice. Nothing is changed then.
    """
    rows = read_metadata(output_dir / "images")
    by_name = {row["file_name"]: row for row in rows}
    changes = {}
    if move:
        side, *names = move
        if side not in SIDES or not names:
            raise UsageError("--move takes `forget` or `keep`, then the files to move there")
        changes |= {Path(name).name: side == "forget" for name in names}
    for name in map(os.path.basename, flip):
        if name in changes:
            raise UsageError(f"--flip and --move both name {name}; name it once")
        changes[name] = not by_name[name]["forget"] if name in by_name else None
    unknown = sorted(set(changes) - set(by_name))
    if unknown:
        raise UsageError(f"--flip, --move: {unknown[0]} is not in {output_dir / 'images' / 'metadata.jsonl'}")
    for name, forget in changes.items():
        by_name[name]["forget"] = forget
    write_metadata(output_dir / "images", rows)
    draw_contact_sheets(output_dir, rows)
    print(
        f"{count_of(len(changes), 'image')} moved; {sum(row['forget'] for row in rows)} of {len(rows)} are to forget"
    )


def draw_contact_sheets(output_dir: Path, rows: list[dict]) -> None:
    """Draw the pictures of each prompt with their numbers, those to forget first, framed in red."""
    from PIL import Image, ImageDraw

    for prompt in dict.fromkeys(row["file_name"].partition("_")[0] for row in rows):
        shown = [row for row in rows if row["file_name"].startswith(f"{prompt}_")]
        shown.sort(key=lambda row: not row["forget"])
        cell = THUMBNAIL + 16
        lines = -(-len(shown) // COLUMNS)
        sheet = Image.new("RGB", (COLUMNS * cell, lines * (cell + 10)), "white")
        draw = ImageDraw.Draw(sheet)
        for index, row in enumerate(shown):
            x, y = index % COLUMNS * cell + 8, index // COLUMNS * (cell + 10) + 6
            image = open_picture(output_dir / "images" / row["file_name"], "--output_dir")
            sheet.paste(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC), (x, y))
            if row["forget"]:
                draw.rectangle((x - 3, y - 3, x + THUMBNAIL + 2, y + THUMBNAIL + 2), outline=(220, 30, 30), width=3)
            number = row["file_name"].rpartition("_")[2].removesuffix(".png")
            draw.text((x, y + THUMBNAIL + 3), f"{number} {'forget' if row['forget'] else ''}", fill="black")
        sheet.save(output_dir / f"contact_sheet_{prompt}.png")
