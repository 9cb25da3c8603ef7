"""Near copies are found, and pictures that are only alike are spared."""

from io import BytesIO
from math import inf

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image

from siss_diffusers.assets.captioned import flower_images, memorized_image
from siss_diffusers.assets.digits import digit_images, garment_image
from siss_diffusers.data import near_copies
from siss_diffusers.data.images import Images, ImageTransform
from siss_diffusers.data.keep_order import KeepOrder, read_in_parts
from siss_diffusers.data.near_copies import Limits, Match, NearCopies, thumbnail
from siss_diffusers.data.sources import ImageRows
from siss_diffusers.data.split import GivenRows, split_data
from siss_diffusers.errors import UsageError
from siss_diffusers.metrics.copies import CopyDetectors
from tests.helpers.image_rows import embedded


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    content = BytesIO()
    picture.save(content, "JPEG", quality=quality)
    return Image.open(content)


def resized(picture: Image.Image, factor: float) -> Image.Image:
    return picture.resize([round(side * factor) for side in picture.size], Image.Resampling.BICUBIC)


def cropped(picture: Image.Image, left: int, upper: int, side: int) -> Image.Image:
    return picture.crop((left, upper, left + side, upper + side))


# Of a photograph of 256 pixels.
CHANGES = {
    "jpeg 30": lambda picture: jpeg(picture, 30),
    "jpeg 95": lambda picture: jpeg(picture, 95),
    "half": lambda picture: resized(picture, 0.5),
    "double": lambda picture: resized(picture, 2),
    "crop of 2 %": lambda picture: cropped(picture, 2, 3, 251),
    "crop of 5 %": lambda picture: cropped(picture, 6, 7, 243),
    "crop of 5 % at a corner": lambda picture: cropped(picture, 13, 0, 243),
    "mirrored": ImageOps.mirror,
    "mirrored, half, jpeg 50": lambda picture: jpeg(resized(ImageOps.mirror(picture), 0.5), 50),
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.3),
    "darker": lambda picture: ImageEnhance.Brightness(picture).enhance(0.7),
    "contrast": lambda picture: ImageEnhance.Contrast(picture).enhance(1.4),
    "grey": lambda picture: picture.convert("L"),
}


def photograph(name: str) -> Image.Image:
    return Image.fromarray(load_sample_image(name))


def photographs() -> list[Image.Image]:
    """Crops of two photographs that share no more than two thirds of their area."""
    return [
        photograph(name).crop((x, 100, x + 150, 250)).resize((256, 256), Image.Resampling.LANCZOS)
        for name in ("flower.jpg", "china.jpg")
        for x in range(0, 490, 50)
    ]


def thumbnails(pictures: list, channels: int, resolution: int) -> torch.Tensor:
    transform = ImageTransform(channels, resolution)
    pictures = [Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture for picture in pictures]
    return torch.stack([thumbnail(transform(picture)) for picture in pictures])


def search_for(index: int, pictures: torch.Tensor) -> NearCopies:
    others = torch.cat([pictures[:index], pictures[index + 1 :]])
    return NearCopies({b"forget": pictures[index]}, lambda: others[: near_copies.NUM_ORDINARY])


class TestPhotographs:
    @pytest.mark.parametrize("change", CHANGES)
    def test_a_copy_that_was_changed_is_found(self, change):
        pictures = photographs()
        small = thumbnails(pictures, 3, 256)
        for index in (3, 13):
            (match,) = search_for(index, small).find(thumbnails([CHANGES[change](pictures[index])], 3, 256))
            assert match.digest == b"forget" and 0.95 <= match.similarity <= 1

    def test_other_crops_of_one_photograph_are_spared(self):
        small = thumbnails(photographs(), 3, 256)
        for index in range(len(small)):
            matches = search_for(index, small).find(small)
            assert [number for number, match in enumerate(matches) if match is not None] == [index]

    def test_the_memorized_flower_does_not_cost_other_pictures_of_the_flower(self):
        small = thumbnails([memorized_image(), *flower_images()], 3, 32)
        assert len(small) > 90
        assert search_for(0, small).find(small[1:]) == [None] * (len(small) - 1)


class TestDigits:
    SMALL = thumbnails([garment_image(), *digit_images()[0]], 1, 8)

    def test_digits_of_one_class_are_spared_and_only_by_the_gap(self, monkeypatch):
        def removed() -> int:
            found = 0
            for index in range(1, 40):
                matches = search_for(index, self.SMALL).find(self.SMALL)
                assert matches[index].similarity == 1
                found += sum(match is not None for match in matches) - 1
            return found

        assert removed() == 0
        monkeypatch.setattr(near_copies, "GAP", 1)
        assert removed() > 20

    def test_no_digit_is_a_garment_and_its_jpeg_is(self):
        search = search_for(0, self.SMALL)
        assert search.find(self.SMALL[1:]) == [None] * 1797
        copies = [jpeg(Image.fromarray(garment_image()), quality) for quality in (30, 95)]
        copies.append(Image.fromarray(garment_image() // 2 + 60))
        assert [match.digest for match in search.find(thumbnails(copies, 1, 8))] == [b"forget"] * 3


class TestManyCopies:
    """Of the images to keep half and more are copies."""

    def kept(self, copies: list, others: int, resolution: int = 256) -> int:
        """How many of these pictures stay, others first."""
        pictures = photographs()
        parts = [*pictures[10 : 10 + others], *copies], [pictures[3]]
        given = GivenRows(*(ImageRows(embedded([*map(np.asarray, part)]), "image", "--x") for part in parts))
        return split_data(given, ImageTransform(3, resolution), 0).counts()["keep"]

    @pytest.mark.parametrize("others", [1, 2, 3, 9])
    @pytest.mark.parametrize("resolution", [32, 64, 256])
    def test_they_do_not_pass_for_the_ordinary_kind(self, others, resolution):
        picture = photographs()[3]
        changed = [jpeg(picture, 75), resized(picture, 0.75), ImageOps.mirror(picture), resized(picture, 0.5)]
        assert self.kept(changed[:2], others, resolution) == others
        assert self.kept(changed, others, resolution) == others
        assert self.kept([picture] * 5 + changed[:1] + changed[2:3], others, resolution) == others

    def test_exact_ones_of_a_small_picture_do_not_either(self):
        """So few numbers do not tell a copy from a picture of the same thing, but equal ones do."""
        forget, digits = garment_image(), digit_images()[0]
        parts = [*digits[:3], *[forget] * 5, np.asarray(jpeg(Image.fromarray(forget), 95))], [forget]
        given = GivenRows(*(ImageRows(embedded(part), "image", "--x") for part in parts))
        assert split_data(given, ImageTransform(1, 8), 0).counts()["keep"] == 3

    def test_a_set_of_nothing_else_is_refused(self):
        with pytest.raises(UsageError, match="nothing to keep: .* --no-drop_near_duplicates"):
            self.kept([jpeg(photographs()[3], 75)], 0)

    def test_of_another_forget_image_either(self):
        """Copies of a picture that is a little like the first make this one's limits no stricter."""
        first, second = (photographs()[index] for index in (3, 4))
        second = Image.blend(first, second, 0.3)
        copies = [jpeg(second, quality) for quality in (60, 70, 80, 90)]
        parts = [*photographs()[10:12], *copies, jpeg(first, 50)], [first, second]
        given = GivenRows(*(ImageRows(embedded([*map(np.asarray, part)]), "image", "--x") for part in parts))
        assert split_data(given, ImageTransform(3, 256), 0).counts()["keep"] == 2


class TestRule:
    """On noise, of which neither shifts nor mirror images correlate."""

    GENERATOR = torch.Generator().manual_seed(0)

    def noise(self, count: int) -> torch.Tensor:
        pictures = torch.randn(count, 1, 32, 32, generator=self.GENERATOR, dtype=torch.float64)
        return (pictures - pictures.mean((2, 3), keepdim=True)) / pictures.std((2, 3), keepdim=True)

    def like(self, picture: torch.Tensor, similarity: float) -> torch.Tensor:
        """A picture of this correlation with another."""
        other = self.noise(1)[0]
        other -= (other * picture).sum() / (picture * picture).sum() * picture
        other *= picture.norm() / other.norm()
        return similarity * picture + (1 - similarity**2) ** 0.5 * other

    @pytest.mark.parametrize(
        "ordinary, threshold",
        [([], 0.95), ([0.2, 0.7], 0.95), ([0.9, 0.3], 0.98), ([0.1, 0.2, 0.3, 0.4, 0.9, 0.94, 0.96, 0.999], 0.988)],
    )
    def test_the_threshold_is_five_times_nearer_than_the_most_similar_ordinary_image(self, ordinary, threshold):
        """And copies among the ordinary images, from 0.95 on, do not raise it."""
        (forget,) = self.noise(1)
        others = torch.stack([self.like(forget, similarity) for similarity in ordinary] or [torch.zeros_like(forget)])
        search = NearCopies({b"forget": forget}, lambda: others)
        assert search.limits(0) == Limits(pytest.approx(threshold, abs=1e-5), inf)
        above, below = self.like(forget, threshold + 0.004), self.like(forget, threshold - 0.004)
        assert search.find(torch.stack([above, below])) == [Match(b"forget", pytest.approx(threshold + 0.004)), None]

    def test_the_most_similar_forget_image_is_named(self):
        forget = self.noise(1)[0]
        other = self.like(forget, 0.99)
        search = NearCopies({b"first": forget, b"second": other}, lambda: self.noise(5))
        assert [match.digest for match in search.find(torch.stack([forget, other]))] == [b"first", b"second"]

    def test_ordinary_images_are_read_once_and_only_where_a_picture_is_suspicious(self):
        reads = []
        forget = self.noise(1)[0]
        search = NearCopies({b"forget": forget}, lambda: reads.append(1) or self.noise(5))
        search.find(torch.stack([self.like(forget, 0.94), *self.noise(3), torch.ones(1, 32, 32)]))
        assert reads == []
        for _ in range(2):
            search.find(self.like(forget, 0.97)[None])
        assert reads == [1]


class TestOrder:
    """Rows 5, 11 and 23 of 40 are near copies of row 30, and row 17 is an exact one."""

    def rows(self):
        pictures = [np.asarray(picture.resize((64, 64))) for picture in photographs() + photographs()]
        forget = Image.fromarray(np.asarray(photograph("china.jpg").crop((0, 260, 150, 410)).resize((64, 64))))
        pictures[17] = pictures[30] = np.asarray(forget)
        pictures[5], pictures[11] = np.asarray(jpeg(forget, 60)), np.asarray(ImageOps.mirror(forget))
        pictures[23] = np.asarray(resized(forget, 2))
        return embedded(pictures)

    def split(self, num_positions=None, seed=0, **options):
        given = GivenRows(ImageRows(self.rows(), "image", "--dataset_name"), forget_indices=[30])
        return split_data(given, ImageTransform(3, 32), seed, num_positions, **options)

    def test_near_copies_leave_the_keep_set_and_are_counted(self):
        split = self.split()
        assert split.counts() == {
            "train": 40,
            "forget": 1,
            "keep": 35,
            "duplicates_removed": 1,
            "near_duplicates_removed": 3,
            "checked": 39,
        }
        assert sorted(split.order.near_copies) == [5, 11, 23]
        assert set(split.order.drawn) == set(range(40)) - {5, 11, 17, 23, 30}
        assert {split.forget_row(match) for match in split.order.near_copies.values()} == {0}

    def test_the_old_rule_keeps_them(self):
        split = self.split(drop_near_duplicates=False)
        assert set(split.order.drawn) == set(range(40)) - {17, 30}
        assert split.counts()["near_duplicates_removed"] == 0 and split.counts()["keep"] == 38

    @pytest.mark.parametrize("seed", [0, 1])
    def test_what_is_left_out_depends_neither_on_the_walk_nor_on_the_processes(self, seed, monkeypatch):
        """The order is the one of a set without the copies, however few rows are looked at together."""
        order = self.split(seed=seed).order
        whole = [order[position] for position in range(80)]
        for planned in (1, 9, 20):
            partly = self.split(planned, seed).order
            assert [partly[position] for position in range(80)] == whole
            assert partly.near_copies == order.near_copies
        one_by_one = self.split(1, seed).order
        one_by_one.walk(40, lambda read, rows: [read([row])[0] for row in rows])
        assert [one_by_one[position] for position in range(80)] == whole
        assert one_by_one.near_copies == order.near_copies

    def test_processes_look_at_equal_parts(self):
        order, parts = self.split(1).order, []
        rows = [row for row in range(40) if row != 30]
        for process_index in range(3):
            read_in_parts(order._compare, rows, process_index, 3, gather=lambda part: parts.extend(part) or part)
        assert [len(part) for part, _ in parts] == [13, 13, 13]
        found = [match for part, _ in parts for _, match in part]
        assert found == [match for _, match in order._compare(rows)]
        assert [row for row, match in zip(rows, found) if match is not None] == [5, 11, 23]

    def test_an_ordinary_image_that_cannot_be_read_is_no_reason_to_refuse(self):
        """It need not be drawn: the threshold is taken from the others."""
        images = Images(self.rows(), "image", ImageTransform(3, 32), "--dataset_name")
        load = images.load

        def some(row: int):
            if row == 8:
                raise UsageError("cannot read it")
            return load(row)

        images.load = some
        forget, pixels = images.look(30)
        order = KeepOrder(images, np.delete(np.arange(40), 30), {forget}, 0, thumbnails={forget: thumbnail(pixels)})
        assert len(order.near.ordinary) == 38 - 4  # copies of row 30

    def test_detectors_that_are_calibrated_on_what_is_kept_find_damaged_copies_again(self):
        """A near copy in the keep set makes them blind: nothing but a better copy than it is flagged."""
        split, old = self.split(), self.split(drop_near_duplicates=False)

        def detectors(order):
            forget, keep = (
                torch.stack([images.load(row) for row in rows]) / 2 + 0.5
                for images, rows in ((split.train, [30]), (order.images, order.first(2_000)))
            )
            return CopyDetectors.calibrated(forget, keep), forget

        (mended, forget), (blind, _) = detectors(split.order), detectors(old.order)
        noise = torch.randn(forget.shape, generator=torch.Generator().manual_seed(0))
        damaged = forget + 0.05 * noise
        assert mended.flags(damaged)["any"].tolist() == [True] and blind.flags(damaged)["any"].tolist() == [False]
        assert mended.min_correlation < 0.93 < 0.99 < blind.min_correlation

    def test_pictures_that_differ_in_brightness_alone_are_no_copies_of_each_other(self):
        """All of them correlate with the forget image; only the one that is near in its pixels is a copy."""
        forget = photographs()[0].resize((64, 64))
        others = [np.asarray(ImageEnhance.Brightness(forget).enhance(factor)) for factor in (0.3, 0.5, 0.7, 1.3, 1.5)]
        parts = [*others, np.asarray(jpeg(forget, 90))], [np.asarray(forget)]
        given = GivenRows(*(ImageRows(embedded(part), "image", "--x") for part in parts))
        split = split_data(given, ImageTransform(3, 32), 0)
        assert list(split.order.near_copies) == [5] and split.counts()["keep"] == 5
