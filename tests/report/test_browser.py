"""The page in a browser: pictures are shown, nothing but the boxes scrolls sideways, colours follow dark mode."""

import html
import re
import shutil
import subprocess
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from siss_diffusers.report import write_report


MAGENTA = (255, 0, 255)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEIGHT = 9000

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")


def png(color: tuple[int, int, int], size: tuple[int, int]) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def browse(tmp_path: Path, page: Path, *flags: str) -> str:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def framed(report: Path, width: int) -> Path:
    """A page with the report in a frame, since a window may not be as narrow as a phone. Its title is what it measures:
    the width of the content and of the frame, the widths of the pictures, and the widths of tables that lie outside
    their boxes."""
    frame = report.with_name("frame.html")
    frame.write_text(
        '<body style="margin: 0"><iframe style="border: 0"'
        f' width="{width}" height="{HEIGHT}" srcdoc="{html.escape(report.read_text())}" onload="'
        "const page = this.contentDocument, root = page.documentElement;"
        "document.title = [root.scrollWidth, root.clientWidth,"
        " ...Array.from(page.images, image => image.naturalWidth),"
        " ...Array.from(page.querySelectorAll('table'), table => table.offsetWidth > table.parentNode.offsetWidth ? 1 : 0)"
        "].join(' ')"
        '"></iframe>'
    )
    return frame


@pytest.mark.parametrize("width", [1200, 390])
def test_pictures_are_shown_and_only_boxes_scroll(tmp_path, evaluation, width):
    evaluation |= {f"method {index}": evaluation["unlearned"] for index in range(4)}
    evaluation["settings"]["skipped"]["kid"] = "a_very_long_word" * 20
    report = tmp_path / "report.html"
    pictures = {"base, samples": png(MAGENTA, (320, 160)), "unlearned, samples": png((0, 128, 0), (1500, 60))}
    write_report(report, evaluation, pictures)
    title = re.search(r"<title>(.*?)</title>", browse(tmp_path, framed(report, width), "--dump-dom"))[1]
    assert title.split()[:4] == [str(width), str(width), "320", "1500"]
    shot = tmp_path / "report.png"
    browse(tmp_path, framed(report, width), f"--screenshot={shot}", f"--window-size={max(width, 600)},{HEIGHT}")
    with Image.open(shot) as image:
        colors = {color[:3]: count for count, color in image.crop((0, 0, width, HEIGHT)).getcolors(10**6)}
    assert colors[MAGENTA] > 0.9 * 320 * 160
    assert len(colors) > 50


def test_tables_of_two_models_fit_a_phone(tmp_path, evaluation):
    report = tmp_path / "report.html"
    write_report(report, evaluation)
    title = re.search(r"<title>(.*?)</title>", browse(tmp_path, framed(report, 390), "--dump-dom"))[1]
    width, _, *overflows = title.split()
    assert width == "390" and len(overflows) == 8 and set(overflows) == {"0"}


@pytest.mark.parametrize(("scheme", "dark"), [(0, True), (1, False)])
def test_dark_mode(tmp_path, evaluation, scheme, dark):
    """The paper and the curve have the colours of the scheme."""
    report, shot = tmp_path / "report.html", tmp_path / "report.png"
    write_report(report, evaluation)
    flags = (f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}", f"--window-size=1200,{HEIGHT}")
    browse(tmp_path, report, *flags)
    with Image.open(shot) as image:
        colors = {color[:3]: count for count, color in image.convert("RGB").getcolors(10**6)}
    paper, line = ((0x17, 0x17, 0x16), (0x7D, 0xB2, 0xEE)) if dark else ((0xFC, 0xFC, 0xFA), (0x1F, 0x5F, 0xA8))
    assert max(colors, key=colors.get) == paper
    assert colors.get(line, 0) > 200
