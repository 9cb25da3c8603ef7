"""The split of a data set into what to keep and what to forget."""

import argparse
from functools import partial

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from siss_diffusers.data.forget_set import forget_rows_of
from siss_diffusers.data.images import Images, ImageTransform
from siss_diffusers.data.keep_order import KeepOrder, digest_images
from siss_diffusers.data.sources import load_image_rows
from siss_diffusers.errors import UsageError


def split_data(
    args: argparse.Namespace,
    transform: ImageTransform,
    accelerator: Accelerator,
    num_positions: int | None = None,
    max_keep: int | None = None,
) -> tuple[Images, Images, KeepOrder, list[bytes]]:
    """What to keep and what to forget, by the flags of `add_unlearning_arguments`.

    Args:
        num_positions: how far the order of the images to keep is checked; None: every image.
        max_keep: use only so many images of the keep set.

    Returns:
        The training set, the forget set, the order of what to keep of the former, and the digests of the latter.

    Raises:
        UsageError: for a set that is empty, or an image that is needed and cannot be used.
    """
    train_flag = "--train_data_dir" if args.train_data_dir else "--dataset_name"
    with accelerator.main_process_first():
        rows = load_image_rows(args, train_flag, args.train_data_dir)
        forget_rows = None
        if args.forget_data_dir is not None:
            forget_rows = load_image_rows(args, "--forget_data_dir", args.forget_data_dir)
    train = Images(rows, args.image_column, transform, train_flag)

    candidates = np.arange(len(train))
    if forget_rows is not None:
        forget = Images(forget_rows, "image", transform, "--forget_data_dir")
    else:
        forget_indices = forget_rows_of(
            rows, args.image_column, args.forget_files, args.forget_column, args.forget_value, args.train_data_dir
        )
        if forget_indices is None:
            raise UsageError(
                "nothing to forget: give --forget_data_dir, --forget_files or --forget_column, or a data set with a"
                " boolean column `forget`"
            )
        forget = train.select(forget_indices)
        candidates = np.delete(candidates, forget_indices)
    if len(forget) == 0:
        raise UsageError("the forget set is empty; check --forget_data_dir, --forget_column and --forget_value")

    digest = partial(
        digest_images,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        gather=gather_object if accelerator.num_processes > 1 else list,
    )
    forget_digests = digest(train, forget_indices) if forget_rows is None else digest(forget, range(len(forget)))
    order = KeepOrder(train, candidates, set(forget_digests), args.seed, max_keep)
    order.walk(len(train) if num_positions is None else num_positions, digest)
    if len(order.drawn) == 0:
        raise UsageError(
            "nothing to keep: every image of the training set is in the forget set; widen --train_data_dir"
        )
    return train, forget, order, forget_digests
