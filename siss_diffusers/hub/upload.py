"""Create a repository on the Hub and upload to it in one commit."""

import logging
import shlex
import time
from itertools import count
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx, validate_repo_id

from siss_diffusers.errors import RunError, UsageError
from siss_diffusers.hub.card import card_of
from siss_diffusers.hub.contents import Upload, model_files, read_run, to_json


logger = logging.getLogger(__name__)


# The rate limits of the Hub count over five minutes.
MAX_ATTEMPTS, MAX_WAIT = 4, 300


def check_repo_id(repo_id: str, flag: str) -> None:
    """
    Raises:
        UsageError: for what cannot be the name of a repository.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"{flag}: {repo_id!r} cannot name a repository ({str(error).splitlines()[0]})")


def explain(error: Exception, repo_id: str) -> str:
    """What the Hub did not like, and what helps."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # of a file that could not be stored
    response = getattr(error, "response", None)
    status = None if response is None else response.status_code
    message = getattr(error, "server_message", None) or str(error).splitlines()[0]
    if status == 401:
        return "the Hub does not know the token (401); give --hub_token or HF_TOKEN, or run `hf auth login`"
    if status == 403:
        return f"the token may not write to {repo_id} (403); use one with write access, or name another repository"
    if status == 404:
        return f"there is no {repo_id} that this token can see (404)"
    if status in (409, 412):
        return f"{repo_id} was changed by somebody else at the same time ({status})"
    if status == 429:
        seconds = response.headers.get("retry-after")
        return f"the Hub asks for fewer requests (429); wait {f'{seconds} seconds' if seconds else 'a while'}"
    if status is not None:
        return f"the Hub answered {status}: {message}"
    if isinstance(error, ValueError):
        return f"it is not accepted ({message})"
    return f"the Hub cannot be reached ({type(error).__name__}: {message})"


def create_repository(repo_id: str, token: str | None, private: bool) -> str:
    """Create the repository where there is none; its whole name.

    Raises:
        UsageError: where the token does not allow it, the Hub cannot be reached, or a repository that was to be private
            is public.
    """
    api = HfApi(token=token)
    try:
        # None leaves it to the organisation's default.
        repo_id = api.create_repo(repo_id, exist_ok=True, private=private or None).repo_id
        is_private = api.repo_info(repo_id).private
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise UsageError(f"--push_to_hub: {explain(error, repo_id)}")
    if private and not is_private:
        raise UsageError(
            f"--hub_private_repo: {repo_id} is there already, and public; make it private in its settings, or name"
            " another by --hub_model_id"
        )
    return repo_id


def push_again_command(run: Path, repo_id: str) -> str:
    return f"`siss push {shlex.quote(str(run))} --hub_model_id {repo_id}`"


def push(
    run: Path,
    repo_id: str,
    token: str | None,
    evaluation: str | None = None,
    base_model: str | None = None,
) -> str:
    """List what goes up, and upload it in one commit; the address of the repository.

    Raises:
        UsageError: where the folder holds no finished run.
        RunError: where the upload fails; nothing of it is in the repository then, and the run is as it was.
    """
    uploads = collect(run, repo_id, evaluation, base_model, token)
    print(listing(uploads, run, repo_id))
    card = next(upload.source for upload in uploads if upload.path_in_repo == "README.md")
    try:
        if isinstance(card, bytes):
            (run / "README.md").write_bytes(card)
    except OSError as error:
        (run / "README.md").unlink(missing_ok=True)
        raise RunError(
            f"nothing was uploaded: README.md could not be written ({error.strerror}); free some space and push again"
            f" by {push_again_command(run, repo_id)}"
        )
    try:
        address = commit(repo_id, uploads, token)
    except (HfHubHTTPError, httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise RunError(
            f"the upload failed: {explain(error, repo_id)}; the run is whole in {run}, push it again by"
            f" {push_again_command(run, repo_id)}"
        )
    return f"Pushed to {address}"


def commit(repo_id: str, uploads: list[Upload], token: str | None) -> str:
    """All files in one commit. What has been stored by an attempt is not sent again by the next; an attempt whose answer
    was lost makes the next one find nothing to do."""
    for attempt in count(1):
        try:
            return (
                HfApi(token=token)
                .create_commit(
                    repo_id=repo_id,
                    operations=[CommitOperationAdd(upload.path_in_repo, upload.source) for upload in uploads],
                    commit_message="Data unlearning with siss_diffusers",
                )
                .commit_url
            )
        except (HfHubHTTPError, httpx.TransportError) as error:
            response = getattr(error, "response", None)
            passing = response is None or response.status_code in (429, 500, 502, 503, 504)
            if not passing or attempt == MAX_ATTEMPTS:
                raise
            asked = "" if response is None else response.headers.get("retry-after", "")
            seconds = min(int(asked), MAX_WAIT) if asked.isdecimal() else 2 ** (attempt - 1)
            logger.warning(f"The upload failed for now: {explain(error, repo_id)}; trying again in {seconds} s")
            time.sleep(seconds)


def listing(uploads: list[Upload], run: Path, repo_id: str) -> str:
    """What goes up, and how many files stay."""
    width = max(len(upload.path_in_repo) for upload in uploads)
    lines = [f"To {repo_id}, in one commit:"]
    lines += [f"  {upload.path_in_repo:{width}}  {readable_size(upload.size):>9}" for upload in uploads]
    names = {upload.path_in_repo for upload in uploads}
    kept = sum(path.is_file() and path.relative_to(run).as_posix() not in names for path in run.rglob("*"))
    # Not their names: one may be that of a forgotten image.
    lines.append(f"{kept} other {'file stays' if kept == 1 else 'files stay'} here.")
    return "\n".join(lines)


def readable_size(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def collect(
    run: Path, repo_id: str, evaluation: str | None, base_model: str | None, token: str | None
) -> list[Upload]:
    """What of a finished run goes up, the card and the JSON files as they go up.

    Raises:
        UsageError: as `read_run`.
    """
    report, measured = read_run(run, evaluation, base_model)
    uploads = model_files(run)
    uploads.append(Upload("unlearning.json", to_json(report)))
    if measured is not None:
        uploads.append(Upload("evaluation.json", to_json(measured)))
    uploads.append(Upload("README.md", card_of(run, repo_id, report, measured, token)))
    return uploads
