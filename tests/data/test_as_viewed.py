"""Pictures are read as a viewer shows them: upright, on white, at their own brightness."""

import io
import logging
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from siss_diffusers.auditing import load_training_images
from siss_diffusers.commands.curated_folder import open_picture
from siss_diffusers.data import viewing
from siss_diffusers.data.images import ImageTransform
from siss_diffusers.data.memory import rows_of
from siss_diffusers.data.viewing import read_image
from tests.data.test_untrusted_pictures import one_image
from tests.helpers.untrusted import refusal


ORIENTATION = 274


def photo(width: int = 12, height: int = 8) -> Image.Image:
    """Of no symmetry."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def pixels(content: bytes, channels: int = 3) -> np.ndarray:
    return np.asarray(viewing.to_channels(read_image(content), channels))


def digest(content: bytes, channels: int = 3) -> bytes:
    return one_image(content, channels).digest(0)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


class TestOrientation:
    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
    def test_each_is_turned_as_exif_transpose_does(self, kind, orientation):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = saved(photo(), kind, exif=exif(orientation), **options)
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            expected = ImageOps.exif_transpose(image)
        assert expected.size == ((8, 12) if orientation > 4 else (12, 8))
        assert np.array_equal(pixels(content), np.asarray(expected))

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
    def test_of_every_kind_of_pixel(self, mode):
        upright = photo().convert("L") if mode == "I;16" else photo().convert(mode)
        if mode == "I;16":
            upright = Image.fromarray(np.asarray(upright).astype(np.uint16) * 257)
        turned = saved(upright.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif(6))
        assert digest(turned) == digest(saved(upright, "PNG"))

    def test_it_is_applied_once(self):
        viewed = read_image(saved(photo(), "PNG", exif=exif(6)))
        assert np.array_equal(np.asarray(viewing.as_viewed(viewed)), np.asarray(viewed))

    def test_damaged_tags_are_none(self):
        content = saved(photo(), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
        assert np.array_equal(pixels(content), np.asarray(photo()))

    def test_the_tensor_the_audit_and_the_contact_sheet_see_it(self, tmp_path):
        upright = photo(8, 8)
        (tmp_path / "a").mkdir()
        upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a" / "phone.png", exif=exif(6))
        upright.save(tmp_path / "plain.png")
        transform = ImageTransform(3, 8)
        assert torch.equal(
            transform(read_image(tmp_path / "a" / "phone.png")), transform(read_image(tmp_path / "plain.png"))
        )
        training = load_training_images(str(tmp_path / "a"), 8)
        torch.testing.assert_close(
            training.pictures[0] * 255, torch.tensor(np.asarray(upright)).permute(2, 0, 1) * 1.0
        )
        assert np.array_equal(np.asarray(open_picture(tmp_path / "a" / "phone.png", "--x")), np.asarray(upright))

    def test_pictures_in_memory_too(self, tmp_path):
        photo().save(tmp_path / "phone.jpg", exif=exif(8), quality=100)
        opened = rows_of([Image.open(tmp_path / "phone.jpg")], "forget").images(ImageTransform(3, 8))
        assert opened.digest(0) == digest((tmp_path / "phone.jpg").read_bytes())
        assert opened.open(0).size == (8, 12)


class TestTransparency:
    def cut_out(self, mode: str) -> tuple[Image.Image, dict]:
        """The left half is a picture; what lies under the right half is hidden."""
        alpha = np.zeros((8, 8), np.uint8)
        alpha[:, :4] = 255
        levels = Image.fromarray(np.random.default_rng(1).integers(0, 200, (8, 8), np.uint8))
        if mode in ("LA", "RGBA"):
            image = levels.convert(mode[:-1])
            image.putalpha(Image.fromarray(alpha))
            return image, {}
        masked = np.where(alpha == 255, np.asarray(levels), 250).astype(np.uint8)
        if mode == "I;16":
            return Image.fromarray(masked.astype(np.uint16) * 257), {"transparency": 250 * 257}
        image = Image.fromarray(masked)
        return image.convert(mode), {"transparency": (250, 250, 250) if mode == "RGB" else 250}

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("mode", ["LA", "RGBA", "L", "RGB", "P", "I;16"])
    def test_a_cut_out_is_the_same_picture_on_white(self, mode, channels):
        image, options = self.cut_out(mode)
        content = saved(image, "PNG", **options)
        expected = np.asarray(self.cut_out("LA")[0].convert("L")).copy()
        expected[:, 4:] = 255
        seen = pixels(content, channels)
        assert np.array_equal(seen if channels == 1 else seen[..., 0], expected)
        assert digest(content, channels) == digest(saved(Image.fromarray(expected), "PNG"), channels)

    def test_half_transparent_is_half_white(self):
        assert pixels(saved(Image.new("RGBA", (8, 8), (100, 0, 200, 51)), "PNG"))[0, 0].tolist() == [224, 204, 244]

    def test_opaque_is_as_it_was(self):
        assert np.array_equal(pixels(saved(photo().convert("RGBA"), "PNG")), np.asarray(photo()))

    def test_it_is_said_once(self, caplog):
        caplog.set_level(logging.INFO)
        viewing.tell_of_white.cache_clear()
        read_image(saved(photo().convert("RGBA"), "PNG"))
        assert not caplog.messages
        for _ in range(2):
            read_image(saved(self.cut_out("LA")[0], "PNG"))
        assert caplog.messages == ["Transparent pictures are composed on white"]


GREY = np.arange(0, 256, 4, np.uint8).reshape(8, 8)


class TestBrightness:
    @pytest.mark.parametrize(
        ("levels", "kind"),
        [
            (GREY.astype(np.uint16) * 257, "PNG"),
            (GREY.astype(np.uint16) << 8, "TIFF"),
            (GREY.astype(">u2") * 257, "TIFF"),
            (GREY.astype(np.int32), "TIFF"),
            (GREY.astype(np.int32) * 257, "TIFF"),
            (GREY.astype(np.float32) / 255, "TIFF"),
            (GREY.astype(np.float32), "TIFF"),
            (GREY.astype(np.float32) * 257, "TIFF"),
        ],
    )
    @pytest.mark.parametrize("channels", [1, 3])
    def test_a_copy_with_more_bits_is_an_exact_duplicate(self, levels, kind, channels):
        content = saved(Image.fromarray(levels), kind)
        seen = pixels(content, channels)
        assert np.array_equal(seen if channels == 1 else seen[..., 2], GREY)
        assert digest(content, channels) == digest(saved(Image.fromarray(GREY), "PNG"), channels)

    @pytest.mark.parametrize("levels", [GREY.astype(np.uint32) * 0x01010101, GREY.astype(np.uint32) << 24])
    def test_unsigned_levels_of_the_whole_range(self, levels):
        """Pillow writes them as signed ones, so the tag is set by hand."""
        content = saved(Image.fromarray(levels), "TIFF")
        tag = struct.pack("<HHIHH", 339, 3, 1, 2, 0)
        assert content.count(tag) == 1
        assert np.array_equal(pixels(content.replace(tag, struct.pack("<HHIHH", 339, 3, 1, 1, 0)), 1), GREY)

    def test_a_dark_portable_graymap_stays_dark(self):
        content = b"P5 8 8 65535\n" + (GREY.astype(">u2")).tobytes()
        assert pixels(content, 1).max() == 0

    def test_the_bits_are_kept_when_asked(self):
        levels = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
        tensor = ImageTransform(1, 8, preserve_input_precision=True)(
            read_image(saved(Image.fromarray(levels), "TIFF"))
        )
        torch.testing.assert_close(tensor[0], torch.from_numpy(levels) * 2 - 1, atol=2e-5, rtol=0)

    @pytest.mark.parametrize(
        "levels",
        [[-1.0, 1.0], [0.0, 1e6], [0.0, float("nan")], [0.0, float("inf")], [0.0, 3.0], [-5, 200], [0, 1 << 24]],
    )
    def test_where_nothing_says_what_is_white_it_is_refused(self, levels, tmp_path):
        dtype = np.int32 if isinstance(levels[0], int) else np.float32
        Image.fromarray(np.resize(np.array(levels, dtype), (8, 8))).save(tmp_path / "a.tiff")
        message = refusal(one_image(str(tmp_path / "a.tiff")).digest, 0)
        assert "a.tiff" in message and "its levels run from" in message and "8 or 16 bits" in message
        message = refusal(rows_of, [Image.open(tmp_path / "a.tiff")], "forget")
        assert message.startswith("forget[0] cannot be read (its levels")


def test_digests_of_plain_pictures_are_those_of_earlier_checkpoints():
    """BLAKE2b of the size and the RGB bytes."""
    assert digest(saved(Image.fromarray(GREY), "PNG")).hex() == "c0e45ccdf2246d6cfc2c6370dab19b3c"
    assert digest(saved(photo(), "BMP")).hex() == "a9714a05da8b3eb1b203551b981b85d6"
