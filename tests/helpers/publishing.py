"""A base model on the Hub of the tests, and `siss push` to it."""

from pathlib import Path

from tests.helpers.forked import Child, Forker
from tests.helpers.hub_server import HubServer


BASE, TOKEN, READ_TOKEN = "base/tiny-sd", "hf_write", "hf_read"
REPO = "founder/forgetful"
BASE_CARD = b"---\nlicense: creativeml-openrail-m\n---\n# A tiny model\n"


def serve_base_model(server: HubServer, folder: Path) -> None:
    server.reset()
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    server.add_repo(BASE, files | {"README.md": BASE_CARD})


def push(forker: Forker, run: Path, *flags: str, token: str = TOKEN) -> Child:
    return forker.run("siss", ["push", str(run), "--hub_token", token, "--hub_model_id", REPO, *flags])


def error_of(child: Child) -> str:
    assert "Traceback" not in child.output, child.output
    (sentence,) = [line for line in child.output.splitlines() if "error: " in line]
    return sentence
