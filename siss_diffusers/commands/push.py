"""Publish a finished run on the Hugging Face Hub: the model, its card, `unlearning.json` and `evaluation.json`.

What goes up is chosen by name, listed before it goes, and goes in one commit. Checkpoints, logs, the receipt, images and
prompts stay where they are.
"""

import argparse
from pathlib import Path

from siss_diffusers.hub.contents import read_run
from siss_diffusers.hub.upload import check_repo_id, collect, create_repository, listing, push


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="DIR", help="The --output_dir of a finished run.")
    parser.add_argument("--hub_model_id", help="The repository; default: DIR's name, under your own.")
    parser.add_argument("--hub_token", help="The token for the Hub; default: that of `hf auth login`, or HF_TOKEN.")
    parser.add_argument("--hub_private_repo", action="store_true", help="Make the repository private.")
    parser.add_argument(
        "--evaluation",
        metavar="FILE",
        help="The evaluation.json that `siss evaluate` wrote about this model; default: the one in DIR, if any.",
    )
    parser.add_argument(
        "--base_model", help="Name of the base model on the Hub, where the run took it from a local folder."
    )
    parser.add_argument("--dry_run", action="store_true", help="List what would go up, and upload nothing.")


def main(args: argparse.Namespace) -> None:
    run = Path(args.run)
    repo_id = args.hub_model_id or run.resolve().name
    check_repo_id(repo_id, "--hub_model_id")
    if args.dry_run:
        uploads = collect(run, repo_id, args.evaluation, args.base_model, args.hub_token)
        print(listing(uploads, run, repo_id))
        print("Nothing was uploaded (--dry_run).")
        return
    read_run(run, args.evaluation, args.base_model)  # what is wrong with it is said before anything is created
    repo_id = create_repository(repo_id, args.hub_token, args.hub_private_repo)
    print(push(run, repo_id, args.hub_token, args.evaluation, args.base_model))
