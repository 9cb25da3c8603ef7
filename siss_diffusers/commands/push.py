"""Publish a finished run on the Hugging Face Hub: the model, its card, `unlearning.json` and `evaluation.json`.

The command lists the files first and uploads them in one commit. Checkpoints, logs, the receipt, images and prompts are
never uploaded.
"""

import argparse
from pathlib import Path

from siss_diffusers.parsing import path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `siss push`."""
    parser.add_argument("run", type=path, metavar="DIR", help="The --output_dir of a finished run.")
    parser.add_argument("--hub_model_id", help="The repository; default: the name of DIR, in your own account.")
    parser.add_argument("--hub_token", help="The token for the Hub; default: that of `hf auth login`, or HF_TOKEN.")
    parser.add_argument("--hub_private_repo", action="store_true", help="Make the repository private.")
    parser.add_argument(
        "--evaluation",
        type=path,
        metavar="FILE",
        help="The evaluation.json that `siss evaluate` wrote about this model; default: the one in DIR, if any.",
    )
    parser.add_argument(
        "--base_model", help="Name of the base model on the Hub, if the run loaded it from a local folder."
    )
    parser.add_argument("--dry_run", action="store_true", help="List the files, and upload nothing.")


def main(args: argparse.Namespace) -> None:
    """Check the run, create the repository and upload.

    Raises:
        UsageError: if the run cannot be published or the Hub refuses the repository.
        RunError: if the upload fails.
    """
    # Imported here because `siss --help` imports this module, and huggingface_hub takes a while.
    from siss_diffusers.hub.contents import read_run
    from siss_diffusers.hub.upload import check_repo_id, collect_uploads, create_repository, format_uploads, push_run

    run = Path(args.run)
    repo_id = args.hub_model_id or run.resolve().name
    check_repo_id(repo_id, "--hub_model_id")
    if args.dry_run:
        uploads = collect_uploads(run, repo_id, args.hub_token, args.evaluation, args.base_model)
        print(format_uploads(uploads, run, repo_id))
        print("Nothing was uploaded (--dry_run).")
        return
    # Check the run before the repository is created.
    read_run(run, args.evaluation, args.base_model)
    repo_id = create_repository(repo_id, args.hub_token, args.hub_private_repo)
    print(push_run(run, repo_id, args.hub_token, args.evaluation, args.base_model))
