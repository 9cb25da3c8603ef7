"""Create a repository on the Hub, and upload a finished run to it in one commit."""

import logging
import shlex
import time
from itertools import count
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx, validate_repo_id

from siss_diffusers.errors import RunError, UsageError
from siss_diffusers.hub.card import make_card
from siss_diffusers.hub.contents import Upload, model_uploads, read_run, to_json_bytes


logger = logging.getLogger(__name__)


# The Hub counts requests over five minutes, so a longer wait does not help.
MAX_ATTEMPTS, MAX_WAIT = 4, 300
TEMPORARY_STATUS = (429, 500, 502, 503, 504)


def check_repo_id(repo_id: str, flag: str) -> None:
    """Check the name of a repository.

    Raises:
        UsageError: if it cannot be one; the message names the flag.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"{flag}: {repo_id!r} cannot name a repository ({str(error).splitlines()[0]})")


def explain_hub_error(error: Exception, repo_id: str) -> str:
    """Return what went wrong with a request to the Hub, and what helps."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # huggingface_hub wraps the error of a file that could not be stored
    response = getattr(error, "response", None)
    status = None if response is None else response.status_code
    message = getattr(error, "server_message", None) or str(error).splitlines()[0]
    if status == 401:
        return "the Hub does not know the token (401); give --hub_token or HF_TOKEN, or run `hf auth login`"
    if status == 403:
        return f"the token may not write to {repo_id} (403); use one with write access, or name another repository"
    if status == 404:
        return f"the token sees no repository {repo_id} (404)"
    if status in (409, 412):
        return f"{repo_id} was changed by somebody else at the same time ({status})"
    if status == 429:
        seconds = response.headers.get("retry-after")
        return f"the Hub asks for fewer requests (429); wait {f'{seconds} seconds' if seconds else 'a while'}"
    if status is not None:
        return f"the Hub answered {status}: {message}"
    if isinstance(error, ValueError):
        return f"the Hub does not accept it ({message})"
    return f"the Hub cannot be reached ({type(error).__name__}: {message})"


def create_repository(repo_id: str, token: str | None, private: bool) -> str:
    """Create the repository if it does not exist.

    Returns:
        Its full name, with the name of its owner.

    Raises:
        UsageError: if the token does not allow it, the Hub cannot be reached, or the repository is to be private and
            exists as a public one.
    """
    api = HfApi(token=token)
    try:
        # None means the default of the organisation.
        repo_id = api.create_repo(repo_id, exist_ok=True, private=private or None).repo_id
        is_private = api.repo_info(repo_id).private
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise UsageError(f"cannot publish to {repo_id}: {explain_hub_error(error, repo_id)}")
    if private and not is_private:
        raise UsageError(
            f"--hub_private_repo: {repo_id} exists already, and is public; make it private in its settings, or name"
            " another by --hub_model_id"
        )
    return repo_id


def push_again_command(run: Path, repo_id: str) -> str:
    """Return the command that uploads the run again, in backticks."""
    return f"`siss push {shlex.quote(str(run))} --hub_model_id {repo_id}`"


def push_run(
    run: Path,
    repo_id: str,
    token: str | None,
    evaluation: str | None = None,
    base_model: str | None = None,
) -> str:
    """Print which files are uploaded, write the card beside the run, and upload everything in one commit.

    Args:
        evaluation, base_model: as of `read_run`.

    Returns:
        A sentence with the address of the commit.

    Raises:
        UsageError: as `read_run`.
        RunError: if the upload fails. Then the repository is as it was, and so is the run.
    """
    uploads = collect_uploads(run, repo_id, token, evaluation, base_model)
    print(format_uploads(uploads, run, repo_id))
    card = next(upload.source for upload in uploads if upload.path_in_repo == "README.md")
    try:
        if isinstance(card, bytes):
            (run / "README.md").write_bytes(card)
    except OSError as error:
        (run / "README.md").unlink(missing_ok=True)
        raise RunError(
            f"nothing was uploaded: README.md could not be written ({error.strerror}); free some space and run"
            f" {push_again_command(run, repo_id)}"
        )
    try:
        address = upload_in_one_commit(repo_id, uploads, token)
    except (HfHubHTTPError, httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise RunError(
            f"the upload failed: {explain_hub_error(error, repo_id)}; the run is complete in {run}, upload it again by"
            f" {push_again_command(run, repo_id)}"
        )
    return f"Pushed to {address}"


def upload_in_one_commit(repo_id: str, uploads: list[Upload], token: str | None) -> str:
    """Upload all files in one commit, and try again after errors that pass.

    A file that one attempt has stored is not sent again by the next. If only the answer to a commit was lost, the next
    attempt finds nothing to change.

    Returns:
        The address of the commit.

    Raises:
        HfHubHTTPError: and what else `create_commit` raises, if it is no error that passes, or the last attempt fails.
    """
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
            is_temporary = response is None or response.status_code in TEMPORARY_STATUS
            if not is_temporary or attempt == MAX_ATTEMPTS:
                raise
            retry_after = "" if response is None else response.headers.get("retry-after", "")
            seconds = min(int(retry_after), MAX_WAIT) if retry_after.isdecimal() else 2 ** (attempt - 1)
            logger.warning(f"The upload failed: {explain_hub_error(error, repo_id)}; trying again in {seconds} s")
            time.sleep(seconds)


def format_uploads(uploads: list[Upload], run: Path, repo_id: str) -> str:
    """Return a list of the files that are uploaded with their sizes, and the number of those that are not."""
    width = max(len(upload.path_in_repo) for upload in uploads)
    lines = [f"To {repo_id}, in one commit:"]
    lines += [f"  {upload.path_in_repo:{width}}  {readable_size(upload.size):>9}" for upload in uploads]
    names = {upload.path_in_repo for upload in uploads}
    private = sum(path.is_file() and path.relative_to(run).as_posix() not in names for path in run.rglob("*"))
    # Only their number: one of them may carry the name of a forgotten image.
    lines.append(f"{private} other {'file is' if private == 1 else 'files are'} not uploaded.")
    return "\n".join(lines)


def readable_size(size: int) -> str:
    """Return a number of bytes in the unit that fits it."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def collect_uploads(
    run: Path,
    repo_id: str,
    token: str | None,
    evaluation: str | None = None,
    base_model: str | None = None,
) -> list[Upload]:
    """Return everything that is uploaded of a finished run: the model, the card, and the two JSON files.

    Args:
        evaluation, base_model: as of `read_run`.

    Raises:
        UsageError: as `read_run`.
    """
    report, public_evaluation = read_run(run, evaluation, base_model)
    uploads = model_uploads(run)
    uploads.append(Upload("unlearning.json", to_json_bytes(report)))
    if public_evaluation is not None:
        uploads.append(Upload("evaluation.json", to_json_bytes(public_evaluation)))
    uploads.append(Upload("README.md", make_card(run, repo_id, report, public_evaluation, token)))
    return uploads
