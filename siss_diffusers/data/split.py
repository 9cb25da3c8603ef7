"""The split of a data set into what to keep and what to forget."""

import logging
from dataclasses import dataclass
from functools import partial

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from siss_diffusers.data.column_values import NoSuchValue
from siss_diffusers.data.forget_set import forget_rows_of, warn_of_marks
from siss_diffusers.data.images import Images, ImageTransform
from siss_diffusers.data.keep_order import KeepOrder, look_at, read_in_parts
from siss_diffusers.data.near_copies import Match
from siss_diffusers.data.sources import ImageRows, load_image_rows
from siss_diffusers.errors import UsageError


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GivenRows:
    """The training set, and what of it is to be forgotten.

    Args:
        train: the training set.
        forget: the forget set, where it is a set of its own.
        forget_indices: rows of `train` to forget, where it is not.
    """

    train: ImageRows
    forget: ImageRows | None = None
    forget_indices: list[int] | None = None


@dataclass(frozen=True)
class DataSource:
    """Where the training set and the forget set come from, under the names of the flags."""

    train_data_dir: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    image_column: str = "image"
    cache_dir: str | None = None
    forget_data_dir: str | None = None
    forget_files: tuple[str, ...] | None = None
    forget_column: str | None = None
    forget_value: str | None = None

    @classmethod
    def of(cls, options: object) -> "DataSource":
        """Take the attributes of the same names from settings or parsed flags."""
        return cls(**{name: getattr(options, name) for name in cls.__dataclass_fields__})

    def check(self) -> None:
        """Refuse two training sets, or none.

        Raises:
            UsageError: naming the flags.
        """
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise UsageError("give the training set by either --train_data_dir or --dataset_name")

    def load(self) -> GivenRows:
        """Load the rows; no image is read.

        Raises:
            UsageError: naming the flag, for what cannot be read, or where nothing says what to forget.
        """
        self.check()
        where = {"column": self.image_column, "cache_dir": self.cache_dir}
        with PartialState().main_process_first():
            if self.train_data_dir is not None:
                train = load_image_rows("--train_data_dir", self.train_data_dir, is_folder=True, **where)
            else:
                config = self.dataset_config_name
                train = load_image_rows(
                    "--dataset_name", self.dataset_name, is_folder=False, config_name=config, **where
                )
            if self.forget_data_dir is not None:
                # A folder of images without metadata has them in `image`, whatever the column of the training set.
                whole = where | {"or_column": "image", "every_file": True}
                forget = load_image_rows("--forget_data_dir", self.forget_data_dir, is_folder=True, **whole)
                if self.forget_data_dir != self.train_data_dir:
                    warn_of_marks(train.rows, "--forget_data_dir")
                return GivenRows(train, forget)
        by_column = (self.forget_column, self.forget_value)
        indices = forget_rows_of(train.rows, train.column, self.forget_files, *by_column, self.train_data_dir)
        if not self.forget_files:
            check_other_splits(train, *by_column)
        if indices is None:
            passed_over = f" (passed over in {train.flag}: {train.passed_over})" if train.passed_over else ""
            raise UsageError(
                "nothing to forget: give --forget_data_dir, --forget_files or --forget_column, or a data set with a"
                f" boolean column `forget`{passed_over}"
            )
        return GivenRows(train, forget_indices=indices)


def check_other_splits(train: ImageRows, column: str | None, value: str | None) -> None:
    """Refuse rows that are marked as to be forgotten in splits that are not used. Rows of a value there, as every class has
    them in its test split, are warned of.

    Args:
        train: the training set.
        column: what says so, `None` for the column `forget`; and its value.

    Raises:
        UsageError: naming the split.
    """
    of_value = []
    for split, other in train.other_splits.items():
        where = f"the split {split}, of which nothing is used"
        try:
            rows = other.load()
            if column is not None:  # a column `forget` beside it says nothing here
                rows = rows.select_columns([name for name in rows.features if name == column])
            found = forget_rows_of(rows, "", None, column, value) if rows.features else None
        except NoSuchValue:
            continue
        except UsageError as error:
            if value is None:
                raise UsageError(f"{error} (in {where})") from error
            logger.warning(f"{error} (in {where})")
            continue
        if found and value is not None:
            of_value.append(f"{len(found)} in the split {split}")
        elif found:
            cure = (
                "give their images as `forget`" if train.flag == "keep" else "give their images by --forget_data_dir"
            )
            raise UsageError(
                f"{train.flag}: {len(found)} rows to forget are in {where}; move them to the split train, or {cure}"
            )
    if of_value:
        logger.warning(
            f"{train.flag}: of the rows with --forget_value {value}, those of the split train are forgotten; nothing is"
            f" used of the others ({', '.join(of_value)})"
        )


@dataclass(frozen=True)
class Split:
    """What to keep and what to forget.

    Args:
        train: the training set, which `order` has the numbers of.
        forget: the images to forget.
        order: the images to keep, in the order in which they are drawn.
        forget_digests: of the pixels of each image to forget.
    """

    train: Images
    forget: Images
    order: KeepOrder
    forget_digests: list[bytes]

    def counts(self) -> dict[str, int]:
        """Return the numbers of images for `unlearning.json`."""
        return {"train": len(self.train), "forget": len(self.forget), **self.order.counts()}

    def forget_row(self, match: Match) -> int:
        """Return the number of the first forget image that a near copy is similar to."""
        return self.forget_digests.index(match.digest)


def split_data(
    given: GivenRows,
    transform: ImageTransform,
    seed: int,
    num_positions: int | None = None,
    max_keep: int | None = None,
    drop_near_duplicates: bool = True,
) -> Split:
    """Split a training set; copies of images to forget leave the keep set.

    Args:
        num_positions: how far the order of the images to keep is checked; None: every image.
        max_keep: use only so many images of the keep set.
        drop_near_duplicates: whether near copies leave the keep set, too, or exact ones only.

    Raises:
        UsageError: for a set that is empty, or an image that is needed and cannot be used.
    """
    train = given.train.images(transform)
    candidates = np.arange(len(train))
    if given.forget is not None:
        forget = given.forget.images(transform)
    else:
        forget = train.select(given.forget_indices)
        candidates = np.delete(candidates, given.forget_indices)
    if len(forget) == 0:
        raise UsageError("the forget set is empty; check --forget_data_dir, --forget_column and --forget_value")

    state = PartialState()
    for rows in (given.train, given.forget):
        if state.is_main_process and rows is not None and rows.passed_over:
            logger.warning(f"{rows.flag}: passed over {rows.passed_over}")
    in_parts = partial(
        read_in_parts,
        process_index=state.process_index,
        num_processes=state.num_processes,
        gather=gather_object if state.num_processes > 1 else list,
    )
    if given.forget_indices is None:
        looks = in_parts(partial(look_at, forget), range(len(forget)))
    else:
        looks = in_parts(partial(look_at, train), given.forget_indices)
    forget.refuse_several_pictures()
    thumbnails = dict(looks)
    order = KeepOrder(train, candidates, set(thumbnails), seed, max_keep, thumbnails if drop_near_duplicates else None)
    order.walk(len(train) if num_positions is None else num_positions, in_parts)
    if len(order.drawn) == 0:
        raise UsageError(
            "nothing to keep: every image of the training set is in the forget set, or a copy of one; widen"
            " --train_data_dir, or keep near copies by --no-drop_near_duplicates"
        )
    return Split(train, forget, order, [digest for digest, _ in looks])
