"""Push the result of a run."""

import argparse
import logging
from pathlib import Path

from accelerate import Accelerator

from siss_diffusers.errors import Interrupted
from siss_diffusers.hub.upload import check_repo_id, create_repository, push_again_command, push_run
from siss_diffusers.training.engines import on_main_process
from siss_diffusers.training.signals import StopSignal


logger = logging.getLogger(__name__)


def prepare_repository(args: argparse.Namespace, accelerator: Accelerator) -> str | None:
    """Create the repository of --push_to_hub, for a token that does not work must not show after the training.

    Raises:
        UsageError: on every process, naming the flag.
    """
    if not args.push_to_hub:
        return None
    repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
    check_repo_id(repo_id, "--hub_model_id")
    return on_main_process(accelerator, lambda: create_repository(repo_id, args.hub_token, args.hub_private_repo))


def finish(args: argparse.Namespace, accelerator: Accelerator, stop_signal: StopSignal, repo_id: str | None) -> None:
    """After the result is saved: publish it, unless a signal asked to stop.

    Raises:
        Interrupted: where one did.
        RunError: where the upload fails.
    """
    stop_signal.close()
    output_dir = Path(args.output_dir)
    accelerator.end_training()
    if repo_id is not None and accelerator.is_main_process:
        if stop_signal.received is not None:
            print(
                f"Saved, but not pushed because a signal came first; push it by {push_again_command(output_dir, repo_id)}"
            )
            raise Interrupted(stop_signal.received)
        logger.info(push_run(output_dir, repo_id, args.hub_token))
