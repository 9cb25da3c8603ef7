"""Build the image folder to unlearn from: sample a prompt, split the samples into clusters, mark the memorized one.

Writes `images/` with a `metadata.jsonl` of `file_name`, `text` and `forget`, which `train_siss_sd.py --train_data_dir`
reads as it is, and a contact sheet for each prompt to check by eye. `--flip` and `--move` correct a folder made before.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from siss_diffusers.commands.common import (
    add_sampling_arguments,
    load_resolution,
    load_stable_diffusion,
    on_all_processes,
    read_prompts,
    read_state,
    sample_batch,
    warn_of_long_prompts,
)
from siss_diffusers.data.images import read_image, to_channels
from siss_diffusers.errors import UsageError, describe_error
from siss_diffusers.families.stable_diffusion import check_stable_diffusion
from siss_diffusers.flags import positive_int, unit_float
from siss_diffusers.metrics.clusters import memorized_cluster, split_clusters
from siss_diffusers.metrics.features import extract, load_torchscript, pixel_features
from siss_diffusers.storage.files import write_json


# What the samples depend on; with another value of any of these they would be others.
SETTINGS = ("num_images", "seed", "num_inference_steps", "guidance_scale", "resolution", "batch_size", "dtype")
THUMBNAIL, COLUMNS = 96, 12  # of the contact sheets
SIDES = ("keep", "forget")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", required=True, help="Where the image folder and the contact sheets go.")
    parser.add_argument(
        "--pretrained_model_name_or_path", help="A Stable Diffusion pipeline: a folder, or on the Hub."
    )
    parser.add_argument("--prompts", nargs="+", help="The memorized prompts.")
    parser.add_argument("--prompts_file", help="A text file with a prompt on each line.")
    parser.add_argument("--audit", help="The folder of a `siss audit`: its flagged prompts are curated.")
    parser.add_argument("--num_images", type=positive_int, default=128, help="Samples of each prompt; default: 128.")
    parser.add_argument("--num_clusters", type=positive_int, default=2, help="Clusters of k-means; default: 2.")
    parser.add_argument(
        "--reference",
        help="A picture of what was memorized, for one prompt: the cluster nearest to it is marked. Without it the"
        " tightest is.",
    )
    parser.add_argument(
        "--feature_extractor",
        help="A TorchScript file of a feature extractor, such as SSCD; default: pixels, as in the SISS paper.",
    )
    parser.add_argument(
        "--feature_size", type=positive_int, default=288, help="Pictures are resized to it for that; default: 288."
    )
    parser.add_argument(
        "--min_silhouette",
        type=unit_float,
        default=0.25,
        help="Refuse a prompt whose clusters have a mean silhouette below this; default: 0.25.",
    )
    parser.add_argument("--cache_dir", help="Where downloaded models are kept.")
    correct = parser.add_argument_group("correcting a folder by hand")
    correct.add_argument("--flip", nargs="+", metavar="FILE", help="Exchange keep and forget for these files.")
    correct.add_argument(
        "--move", nargs="+", metavar="SIDE_AND_FILES", help="`forget` or `keep`, and the files to move there."
    )
    add_sampling_arguments(parser, batch_size=16)


def image_name(prompt_index: int, index: int) -> str:
    return f"prompt{prompt_index:03d}_{index:04d}.png"


def open_picture(file: Path, flag: str) -> Image.Image:
    """In three channels.

    Raises:
        UsageError: where it cannot be read.
    """
    try:
        return to_channels(read_image(file), 3)
    except ValueError as error:
        raise UsageError(f"{flag}: cannot read {file} ({describe_error(error)}); repair or remove it")


def load_picture(file: Path, flag: str) -> Tensor:
    """`(3, H, W)` in [0, 1].

    Raises:
        UsageError: where it cannot be read.
    """
    from torchvision.transforms.functional import to_tensor

    return to_tensor(open_picture(file, flag))


def save_picture(image: Tensor, file: Path) -> None:
    """Whole or not at all, so that what is there need not be made again."""
    from torchvision.transforms.functional import to_pil_image

    temporary = file.with_name(f".{file.name}")
    to_pil_image(image).save(temporary, format="PNG")
    os.replace(temporary, file)


def read_metadata(folder: Path) -> list[dict]:
    file = folder / "metadata.jsonl"
    if not file.exists():
        raise UsageError(f"--output_dir: no metadata.jsonl in {folder}; run `siss curate` with --prompts first")
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        for row in rows:
            name, forget = row["file_name"], row["forget"]
            # The name becomes part of other files' names.
            if not name or Path(name).name != name or not isinstance(forget, bool):
                raise ValueError(f"not a file beside it and true or false: {name!r}, {forget!r}")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"--output_dir: {file} is not what `siss curate` wrote ({describe_error(error)}); repair it")
    return rows


def write_metadata(folder: Path, rows: list[dict]) -> None:
    temporary = folder / ".metadata.jsonl"
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, folder / "metadata.jsonl")


def correct(args: argparse.Namespace) -> None:
    """`--flip` and `--move`."""
    output_dir = Path(args.output_dir)
    rows = read_metadata(output_dir / "images")
    by_name = {row["file_name"]: row for row in rows}
    changes = {}
    if args.move is not None:
        side, *names = args.move
        if side not in SIDES or not names:
            raise UsageError("--move takes `forget` or `keep`, then the files to move there")
        changes |= {Path(name).name: side == "forget" for name in names}
    for name in args.flip or []:
        name = Path(name).name
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
    print(f"{len(changes)} images moved; {sum(row['forget'] for row in rows)} of {len(rows)} are to forget")


def draw_contact_sheets(output_dir: Path, rows: list[dict]) -> None:
    """One a prompt: the pictures to forget, framed in red, before those to keep, each with its number."""
    prompts = list(dict.fromkeys(row["file_name"].partition("_")[0] for row in rows))
    for prompt in prompts:
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


def flagged_prompts(folder: str) -> list[str]:
    file = Path(folder) / "audit.json"
    if not file.exists():
        raise UsageError(f"--audit: no audit.json in {folder}; run `siss audit` first")
    try:
        prompts = [str(row["prompt"]) for row in read_state("--audit", file)["prompts"] if row["flagged"]]
    except (KeyError, TypeError):
        raise UsageError(f"--audit: {file} is not what `siss audit` wrote; run it again")
    if not prompts:
        raise UsageError(f"--audit: no prompt in {folder} is flagged; name the prompts by --prompts")
    return prompts


def check_arguments(args: argparse.Namespace) -> tuple[list[str], dict]:
    """The prompts, and what the samples depend on.

    Raises:
        UsageError: naming the flag.
    """
    if args.pretrained_model_name_or_path is None:
        raise UsageError("--pretrained_model_name_or_path is needed to sample from")
    prompts = read_prompts("--prompts", args.prompts, args.prompts_file)
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
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings |= {"model": args.pretrained_model_name_or_path, "prompts": prompts}
    file = Path(args.output_dir) / "curation.json"
    if file.exists():
        found = read_state("--output_dir", file).get("settings")
        found = found if isinstance(found, dict) else {}
        differing = [name for name in settings if found.get(name) != settings[name]]
        if differing:
            raise UsageError(
                f"--output_dir: {args.output_dir} holds images of another {', '.join(differing)}; name another folder"
            )
        if (Path(args.output_dir) / "images" / "metadata.jsonl").exists():
            raise UsageError(
                f"--output_dir: {args.output_dir} is curated already; correct it by --flip and --move, or name another"
            )
    elif Path(args.output_dir).exists() and (
        not Path(args.output_dir).is_dir() or any(Path(args.output_dir).iterdir())
    ):
        raise UsageError(f"--output_dir: {args.output_dir} is not empty and holds no curation; name another folder")
    return prompts, settings


def main(args: argparse.Namespace) -> None:
    from accelerate import PartialState

    if args.flip is not None or args.move is not None:
        return correct(args)
    prompts, settings = check_arguments(args)
    reference = None if args.reference is None else load_picture(Path(args.reference), "--reference")
    extractor = None
    if args.feature_extractor is not None:
        extractor = load_torchscript(args.feature_extractor, "--feature_extractor")
    name, flag = args.pretrained_model_name_or_path, "--pretrained_model_name_or_path"
    check_stable_diffusion(name, flag, cache_dir=args.cache_dir)
    load_resolution(args, name, flag)
    output_dir, state = Path(args.output_dir), PartialState()
    samples_dir, images_dir = output_dir / "samples", output_dir / "images"
    pipeline = load_stable_diffusion(args, name, flag)
    warn_of_long_prompts(pipeline, prompts)
    if state.is_main_process:
        for folder in (samples_dir, images_dir):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / "curation.json", {"settings": settings})
    state.wait_for_everyone()

    def sample(batch: tuple[int, int]) -> None:
        """One batch of a prompt's samples, unless an interrupted run has made it."""
        prompt_index, start = batch
        indices = range(start, min(start + args.batch_size, args.num_images))
        files = [samples_dir / image_name(prompt_index, index) for index in indices]
        if not all(file.exists() for file in files):
            images = sample_batch(pipeline, [prompts[prompt_index]] * len(files), args, args.seed + start)
            for image, file in zip(images, files):
                save_picture(image, file)

    starts = range(0, args.num_images, args.batch_size)
    on_all_processes(sample, [(index, start) for index in range(len(prompts)) for start in starts], "Batches")
    if not state.is_main_process:
        return

    def features_of(pictures: Tensor) -> Tensor:
        if extractor is None:
            return pixel_features(pictures)
        return extract(
            extractor,
            pictures,
            size=args.feature_size,
            batch_size=args.batch_size,
            flag="--feature_extractor",
        )

    rows, reports = [], []
    for prompt_index, prompt in enumerate(prompts):
        names = [image_name(prompt_index, index) for index in range(args.num_images)]
        # As they were saved, so that an interrupted run goes on to the same clusters.
        pictures = torch.stack([load_picture(samples_dir / name, "--output_dir") for name in names])
        features = features_of(pictures)
        labels, silhouette = split_clusters(features, args.num_clusters, args.seed)
        # Where all clusters but one are single pictures, k-means has only set outliers apart.
        sizes = labels.bincount()
        separated = silhouette is not None and silhouette >= args.min_silhouette and int((sizes > 1).sum()) > 1
        report = {"prompt": prompt, "silhouette": silhouette, "separated": separated, "forget": 0, "keep": 0}
        if separated:
            reference_features = None
            if reference is not None:
                resized = torch.nn.functional.interpolate(
                    reference[None], pictures.shape[-2:], mode="bilinear", antialias=True, align_corners=False
                )
                reference_features = features_of(resized)[0]
            memorized = memorized_cluster(features, labels, reference_features)
            forget = (labels == memorized).tolist()
            rows += [{"file_name": name, "text": prompt, "forget": mark} for name, mark in zip(names, forget)]
            report |= {"forget": sum(forget), "keep": len(forget) - sum(forget)}
            for name in names:
                shutil.copyfile(samples_dir / name, images_dir / name)
        reports.append(report)
    if rows:
        write_metadata(images_dir, rows)
        draw_contact_sheets(output_dir, rows)
    write_json(output_dir / "curation.json", {"settings": settings, "prompts": reports})
    print_reports(reports, args)


def print_reports(reports: list[dict], args: argparse.Namespace) -> None:
    """By numbers, for the prompts may be what has to be forgotten.

    Raises:
        UsageError: where no prompt could be curated.
    """
    output_dir = Path(args.output_dir)
    for index, report in enumerate(reports):
        silhouette = "undefined" if report["silhouette"] is None else f"{report['silhouette']:.2f}"
        if report["separated"]:
            print(f"prompt {index}: {report['forget']} to forget, {report['keep']} to keep, silhouette {silhouette}")
        else:
            print(
                f"prompt {index}: its samples do not fall into clusters (silhouette {silhouette}, --min_silhouette"
                f" {args.min_silhouette}), or all are the same picture; nothing is marked. They are in {output_dir / 'samples'}; a"
                " --feature_extractor may separate what pixels do not."
            )
    if not any(report["separated"] for report in reports):
        raise UsageError(f"--prompts: no prompt could be curated; look at {output_dir / 'samples'}")
    print(
        f"Check the contact sheets in {output_dir}, correct by `siss curate --output_dir {output_dir} --flip FILE`, then"
    )
    print(f"  accelerate launch train_siss_sd.py --train_data_dir {output_dir / 'images'} ...")
