"""Pictures that somebody else wrote are tensors, or refused by name."""

import os
import struct
import zlib
from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

from siss_diffusers.auditing import load_training_images
from siss_diffusers.data.images import Images, ImageTransform
from siss_diffusers.errors import UsageError
from tests.helpers.untrusted import BOUNDED, refusal


pytestmark = pytest.mark.usefixtures("no_network", "no_waiting")


def png(width: int, height: int, *chunks: bytes, rows: bytes = b"") -> bytes:
    """Of one grey level a pixel; `chunks` are kind and content."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [header, *chunks, b"IDAT" + zlib.compress(rows), b"IEND"]
    framed = [struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def one_image(source: str | bytes, channels: int = 3, **transform: bool) -> Images:
    cell = {"bytes": None, "path": source} if isinstance(source, str) else {"bytes": source, "path": None}
    transform = ImageTransform(channels, resolution=8, center_crop=True, **transform)
    rows = datasets.Dataset.from_dict({"image": [cell]}, datasets.Features(image=datasets.Image(decode=False)))
    return Images(rows, "image", transform, "--train_data_dir")


def noise(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)).convert(mode)


BOMBS = {
    "a header of 50,000 x 50,000": png(50_000, 50_000),
    "a compressed text": png(8, 8, b"zTXtx\0\0" + zlib.compress(bytes(100_000_000)), rows=bytes(72)),
    "a compressed profile": png(8, 8, b"iTXtx\0\1\0\0\0" + zlib.compress(bytes(100_000_000)), rows=bytes(72)),
    "no bytes": b"",
    "a text": b"not a picture",
    "a drawing": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "half a JPEG": encoded(noise(), "JPEG")[:400],
    "half a PNG": encoded(noise(), "PNG")[:200],
}


class TestPictures:
    @pytest.mark.parametrize("case", BOMBS)
    def test_what_is_no_picture_is_refused_by_name(self, case, tmp_path):
        file = tmp_path / "bad.png"
        file.write_bytes(BOMBS[case])
        for use in ("load", "digest"):
            message = refusal(getattr(one_image(str(file)), use), 0)
            assert message.startswith(f"--train_data_dir: cannot read {file} (") and "repair or remove" in message
        assert str(file) in refusal(load_training_images, str(tmp_path), 8)
        if "half" not in case:  # of these the header is whole
            assert str(file) in refusal(one_image(str(file)).all_square)

    def test_a_line_of_pixels_is_refused_before_it_is_resized(self, tmp_path):
        """A few kilobytes that would be 200 GB at a resolution of 512."""
        image = one_image(png(1, 1_000_000, rows=bytes(2_000_000)))
        image.transform = ImageTransform(3, resolution=512)
        assert "cannot use image 0: 1 x 1000000 pixels are too narrow" in refusal(image.digest, 0)

    def test_a_pipe_and_a_folder_are_not_opened(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        (tmp_path / "folder.png").mkdir()
        for name in ("pipe.png", "folder.png", "none.png"):
            for use in (lambda image: image.digest(0), lambda image: image.all_square()):
                assert f"{name} (it is not there, or no regular file)" in refusal(use, one_image(str(tmp_path / name)))
        assert "no regular file" in refusal(load_training_images, str(tmp_path), 8)

    def test_postscript_is_not_run(self, tmp_path, marker, monkeypatch):
        """Pillow would have Ghostscript run it."""
        script = tmp_path / "gs"
        script.write_text(f"#!/bin/sh\ntouch {marker}\n")
        script.chmod(0o755)
        monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(script))
        file = tmp_path / "a.png"
        file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
        assert "cannot identify" in refusal(one_image(str(file)).digest, 0)
        assert "cannot identify" in refusal(load_training_images, str(tmp_path), 8)

    @pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
    def test_of_many_frames_the_first_is_read(self, kind):
        frames = [Image.new("RGB", (8, 8), (index % 256, index // 256, 0)) for index in range(1_000)]
        animated = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert (one_image(animated).load(0) == -1).all()

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I", "F"])
    def test_every_kind_of_pixel_is_a_tensor(self, mode, channels):
        levels = np.linspace(0, 60_000, 120).reshape(12, 10)
        dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}.get(mode)
        grey = noise("L").convert("RGB")
        picture = grey.convert(mode) if dtype is None else Image.fromarray(levels.astype(dtype))
        options = {"transparency": 3} if mode == "P" else {}
        kinds = ["TIFF"] if mode in ("CMYK", "YCbCr", "LAB", "I;16B", "I", "F") else ["PNG"]
        kinds += ["JPEG"] if mode == "CMYK" else []
        for kind in kinds:
            for exact in (False, True):
                images = one_image(encoded(picture, kind, **options), channels, preserve_input_precision=exact)
                try:
                    check_picture(images)
                except UsageError as error:  # rounding has made it coloured
                    assert channels == 1 and mode in ("CMYK", "YCbCr", "LAB") and "colours" in str(error)

    @BOUNDED
    @given(st.data())
    def test_damaged_files_are_pictures_or_refused(self, data):
        kind = data.draw(st.sampled_from(["PNG", "JPEG"]))
        content = bytearray(WHOLE[kind])
        for position, value in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)))):
            content[position] = value
        content = bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
        images = one_image(
            content, data.draw(st.sampled_from([1, 3])), preserve_input_precision=data.draw(st.booleans())
        )
        try:
            check_picture(images)
        except UsageError as error:
            assert str(error).startswith("--train_data_dir: cannot ") and len(str(error).splitlines()) == 1


STRIPES = Image.fromarray(np.repeat([0, 255, 100], 4).astype(np.uint8)[:, None].repeat(10, axis=1))
WHOLE = {kind: encoded(STRIPES, kind) for kind in ("PNG", "JPEG")}


def check_picture(images: Images) -> None:
    tensor, channels = images.load(0), images.transform.channels
    assert tensor.shape == (channels, 8, 8) and tensor.dtype == torch.float32
    assert tensor.isfinite().all() and -1 <= tensor.min() and tensor.max() <= 1
    assert len(images.digest(0)) == 16
