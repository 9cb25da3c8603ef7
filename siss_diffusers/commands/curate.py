"""Build the image folder to unlearn from: sample a prompt and mark the samples that are the memorized image.

The samples are split into clusters, one of which holds the copies. Writes `images/` with a `metadata.jsonl` of
`file_name`, `text` and `forget`, which `train_siss_sd.py --train_data_dir` reads, and a contact sheet for each prompt to
check by eye. `--flip` and `--move` correct a folder that was made before.
"""

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from siss_diffusers.commands.common import (
    LIST_FORMATS,
    MODEL_FLAG,
    add_model_arguments,
    add_sampling_arguments,
    announce,
    check_same_settings,
    check_unused_folder,
    count_of,
    load_pipeline,
    open_text_to_image_model,
    read_object,
    read_prompts,
    sampling_settings,
    settings_of_samples,
)
from siss_diffusers.commands.curated_folder import (
    draw_contact_sheets,
    image_name,
    load_picture,
    move_by_hand,
    save_picture,
    write_metadata,
)
from siss_diffusers.errors import UsageError
from siss_diffusers.parsing import path, positive_int, unit_float
from siss_diffusers.storage.files import write_json
from siss_diffusers.storage.folders import made_folder


if TYPE_CHECKING:
    from torch import Tensor

# The settings that the samples depend on.
SETTINGS = ("num_images", "seed", "num_inference_steps", "guidance_scale", "resolution", "batch_size", "dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `siss curate`."""
    parser.add_argument(
        "--output_dir", type=path, required=True, help="Where the image folder and the contact sheets go."
    )
    parser.add_argument(
        MODEL_FLAG,
        type=path,
        help="A pipeline that takes prompts, such as Stable Diffusion: a folder, or a name on the Hub.",
    )
    parser.add_argument("--prompts", nargs="+", help="The memorized prompts.")
    parser.add_argument("--prompts_file", type=path, help=f"A list of prompts: {LIST_FORMATS}.")
    parser.add_argument("--prompt_column", help="Its column of prompts; default: that called text, caption or prompt.")
    parser.add_argument("--audit", type=path, help="The folder of a `siss audit`: its flagged prompts are curated.")
    parser.add_argument(
        "--num_images", type=positive_int, default=128, help="Samples of each prompt; default: %(default)s."
    )
    parser.add_argument(
        "--num_clusters", type=positive_int, default=2, help="Clusters of k-means; default: %(default)s."
    )
    parser.add_argument(
        "--reference",
        type=path,
        help="A picture of what was memorized, for a single prompt: the cluster nearest to it is marked. Without it, the"
        " tightest cluster is.",
    )
    parser.add_argument(
        "--feature_extractor",
        type=path,
        help="A TorchScript file of a feature extractor, such as SSCD; default: pixels, as in the SISS paper.",
    )
    parser.add_argument(
        "--feature_size",
        type=positive_int,
        default=288,
        help="Side in pixels that pictures are resized to for it; default: %(default)s.",
    )
    parser.add_argument(
        "--min_silhouette",
        type=unit_float,
        default=0.25,
        help="Refuse a prompt whose clusters have a mean silhouette below this; default: %(default)s.",
    )
    parser.add_argument("--cache_dir", type=path, help="Where downloaded models are kept.")
    by_hand = parser.add_argument_group("correcting a folder by hand")
    by_hand.add_argument("--flip", nargs="+", metavar="FILE", help="Exchange keep and forget for these files.")
    by_hand.add_argument(
        "--move", nargs="+", metavar="SIDE_AND_FILES", help="`forget` or `keep`, and the files to move there."
    )
    add_model_arguments(parser)
    add_sampling_arguments(parser, batch_size=16)


def flagged_prompts(folder: str) -> list[str]:
    """Return the prompts that an audit flagged.

    Raises:
        UsageError: if there is no audit in the folder, or it flagged none.
    """
    file = Path(folder) / "audit.json"
    if not file.exists():
        raise UsageError(f"--audit: no audit.json in {folder}; run `siss audit` first")
    try:
        prompts = [str(row["prompt"]) for row in read_object("--audit", file)["prompts"] if row["flagged"]]
    except (KeyError, TypeError):
        raise UsageError(f"--audit: {file} is not what `siss audit` wrote; run it again")
    if not prompts:
        raise UsageError(f"--audit: no prompt in {folder} is flagged; name the prompts by --prompts")
    return prompts


def check_arguments(args: argparse.Namespace) -> list[str]:
    """Check what needs no model, and return the prompts.

    Raises:
        UsageError: naming the flag.
    """
    if args.pretrained_model_name_or_path is None:
        raise UsageError(f"{MODEL_FLAG} is needed to sample from")
    prompts = read_prompts("--prompts", args.prompts, args.prompts_file, args.prompt_column)
    if args.audit is not None:
        prompts = list(dict.fromkeys([*prompts, *flagged_prompts(args.audit)]))
    if not prompts:
        raise UsageError("nothing to curate: give --prompts, --prompts_file or --audit")
    if args.num_clusters < 2:
        raise UsageError("--num_clusters must be at least 2: one to forget and one to keep")
    if args.num_images <= args.num_clusters:
        raise UsageError("--num_images must be larger than --num_clusters")
    if args.reference is not None and len(prompts) > 1:
        raise UsageError("--reference is for one prompt; curate the others by themselves")
    return prompts


def check_output_dir(output_dir: Path, settings: dict) -> None:
    """Check that the folder is new, or holds an unfinished curation with the same settings.

    Raises:
        UsageError: for anything else.
    """
    file = output_dir / "curation.json"
    if file.exists():
        earlier = read_object("--output_dir", file).get("settings")
        check_same_settings(output_dir, "images of", earlier if isinstance(earlier, dict) else {}, settings)
        if (output_dir / "images" / "metadata.jsonl").exists():
            raise UsageError(
                f"--output_dir: {output_dir} is curated already; correct it by --flip and --move, or name another"
            )
    else:
        check_unused_folder(output_dir)


def main(args: argparse.Namespace) -> None:
    """Run `siss curate`.

    Raises:
        UsageError: for bad input, or if no prompt could be curated.
    """
    from accelerate import PartialState

    output_dir = Path(args.output_dir)
    if args.flip is not None or args.move is not None:
        return move_by_hand(output_dir, args.flip or [], args.move or [])
    prompts = check_arguments(args)
    settings = settings_of_samples(args, SETTINGS) | {"prompts": prompts}
    check_output_dir(output_dir, settings)
    references = [] if args.reference is None else [load_picture(Path(args.reference), "--reference")]
    features = load_features(args.feature_extractor, args.feature_size, args.batch_size)
    with made_folder("--output_dir", output_dir):
        sample_prompts(prompts, args, output_dir, settings)
    if PartialState().is_main_process:
        split_prompts(prompts, references, features, args, output_dir, settings)


def load_features(feature_extractor: str | None, size: int, batch_size: int) -> Callable[["Tensor"], "Tensor"]:
    """Return what maps pictures to features: a network in a TorchScript file, or the pixels without one.

    Raises:
        UsageError: for a file that is no such network.
    """
    from siss_diffusers.metrics.features import extract, load_torchscript, pixel_features

    if feature_extractor is None:
        return pixel_features
    flag = "--feature_extractor"
    return partial(extract, load_torchscript(feature_extractor, flag), size=size, batch_size=batch_size, flag=flag)


def sample_prompts(prompts: Sequence[str], args: argparse.Namespace, output_dir: Path, settings: dict) -> None:
    """Sample the prompts on all processes, into `samples/`. Batches that an interrupted run has made are not made again.

    Raises:
        UsageError: for a model that cannot be used.
    """
    import torch
    from accelerate import PartialState

    from siss_diffusers.curation import sample_prompt
    from siss_diffusers.distributed import on_all_processes, on_main_process
    from siss_diffusers.families.prompts import warn_of_long_prompts

    source, family = open_text_to_image_model(args)
    state, sampling = PartialState(), sampling_settings(args)
    pipeline = load_pipeline(source, family, args.dtype)
    warn_of_long_prompts(family, pipeline, prompts)
    if state.is_main_process:
        for name in ("samples", "images"):
            (output_dir / name).mkdir(parents=True, exist_ok=True)
        write_json(output_dir / "curation.json", {"settings": settings})
    state.wait_for_everyone()

    def files_of(batch: tuple[int, int]) -> list[Path]:
        prompt_index, start = batch
        indices = range(start, min(start + args.batch_size, args.num_images))
        return [output_dir / "samples" / image_name(prompt_index, index) for index in indices]

    def draw_batch(batch: tuple[int, int]) -> None:
        prompt_index, start = batch
        files = files_of(batch)
        seeded = replace(sampling, seed=sampling.seed + start)
        for image, file in zip(sample_prompt(family, pipeline, prompts[prompt_index], len(files), seeded), files):
            # What is no number becomes black, and is left out as broken.
            save_picture(image if image.isfinite().all() else torch.zeros_like(image), file)

    starts = range(0, args.num_images, args.batch_size)
    batches = [(index, start) for index in range(len(prompts)) for start in starts]
    announce(f"Sampling {count_of(len(prompts), 'prompt')}, {count_of(args.num_images, 'sample')} each")
    # Only what is left is shared out: a process without work would wait for the others, and not for ever.
    left = on_main_process(lambda: [batch for batch in batches if not all(file.exists() for file in files_of(batch))])
    on_all_processes(draw_batch, left, "Batches")


def split_prompts(
    prompts: Sequence[str],
    references: Sequence["Tensor"],
    features: Callable[["Tensor"], "Tensor"],
    args: argparse.Namespace,
    output_dir: Path,
    settings: dict,
) -> None:
    """Split the samples of each prompt, and write the image folder, its contact sheets and `curation.json`.

    Raises:
        UsageError: if no prompt could be curated.
    """
    import torch

    from siss_diffusers.curation import Clustering, split_samples
    from siss_diffusers.metrics.broken import broken

    announce(f"Splitting the samples into {args.num_clusters} clusters")
    clustering = Clustering(args.num_clusters, args.min_silhouette, features, args.seed)
    rows, reports = [], []
    for prompt_index, prompt in enumerate(prompts):
        names = [image_name(prompt_index, index) for index in range(args.num_images)]
        # As they were saved, so that an interrupted run arrives at the same clusters.
        pictures = torch.stack([load_picture(output_dir / "samples" / name, "--output_dir") for name in names])
        is_broken = broken(pictures)
        names = [name for name, left_out in zip(names, is_broken.tolist()) if not left_out]
        split = split_samples(pictures[~is_broken], references, clustering)
        report = {
            "prompt": prompt,
            "broken": int(is_broken.sum()),
            "silhouette": split.silhouette,
            "separated": split.separated,
        }
        report |= {"forget": 0, "keep": 0}
        if split.separated:
            forget = split.is_copy.tolist()
            rows += [{"file_name": name, "text": prompt, "forget": mark} for name, mark in zip(names, forget)]
            report |= {"forget": sum(forget), "keep": len(forget) - sum(forget)}
            for name in names:
                shutil.copyfile(output_dir / "samples" / name, output_dir / "images" / name)
        reports.append(report)
    if rows:
        write_metadata(output_dir / "images", rows)
        draw_contact_sheets(output_dir, rows)
    write_json(output_dir / "curation.json", {"settings": settings, "prompts": reports})
    print_reports(reports, args.min_silhouette, output_dir)


def print_reports(reports: list[dict], min_silhouette: float, output_dir: Path) -> None:
    """Print what was marked. Prompts are shown by number only: they may be what has to be forgotten.

    Raises:
        UsageError: if no prompt could be curated.
    """
    from siss_diffusers.metrics.base import NO_PICTURE

    for index, report in enumerate(reports):
        if report["broken"]:
            print(f"prompt {index}: {count_of(report['broken'], 'broken sample')} ({NO_PICTURE}) left out")
        silhouette = "undefined" if report["silhouette"] is None else f"{report['silhouette']:.2f}"
        if report["separated"]:
            print(f"prompt {index}: {report['forget']} to forget, {report['keep']} to keep, silhouette {silhouette}")
        else:
            print(
                f"prompt {index}: its samples do not fall into clusters (silhouette {silhouette}, --min_silhouette"
                f" {min_silhouette}), or all are the same picture; nothing is marked. They are in"
                f" {output_dir / 'samples'}; a --feature_extractor may separate what pixels do not."
            )
    if not any(report["separated"] for report in reports):
        raise UsageError(f"--prompts: no prompt could be curated; look at {output_dir / 'samples'}")
    print(
        f"Check the contact sheets in {output_dir}, correct them by `siss curate --output_dir {output_dir} --flip FILE`,"
        " then run"
    )
    print(f"  accelerate launch train_siss_sd.py --train_data_dir {output_dir / 'images'} ...")
