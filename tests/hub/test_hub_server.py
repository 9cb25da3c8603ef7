"""The Hub of `hub_server.py` against the clients it stands in for: `huggingface_hub` and diffusers, over HTTP."""

import base64
import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.hub_server import HubServer
from tests.helpers.paths import TINY_MODEL


TOKENS = {"hf_write": "founder", "hf_read": ("founder", "read"), "hf_other": "eve"}
PART_SIZE = 100_000
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
WEIGHTS = bytes(range(256)) * 1200  # 307,200 bytes: four parts
CARD = b"---\nlicense: mit\ntags: [unlearning]\nbase_model: base/tiny\n---\nWhat it is.\n"
PUBLISHED = {
    "README.md": CARD,
    "unlearning.json": b'{"secret": false}',
    "unet/config.json": b"{}",
    "unet/diffusion.safetensors": WEIGHTS,
    "small.bin": b"\x00binary",
}
# One process does it all, in this order. It does not wait between retries, but reports how long it would have.
CLIENT = '''
import hashlib, json, sys, time
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_session, hf_hub_download, snapshot_download

work, report, waits = Path(sys.argv[1]), {}, []
time.sleep = waits.append
writer, reader, other = (HfApi(token=token) for token in ("hf_write", "hf_read", "hf_other"))
anonymous = HfApi(token=False)
published = [CommitOperationAdd(str(path.relative_to(work / "model")), path)
             for path in sorted((work / "model").rglob("*")) if path.is_file()]


def attempt(step, call):
    """What a call returned, or how it failed, and its waits."""
    waits.clear()
    try:
        report[step] = {"value": call()}
    except Exception as error:
        cause = error.__cause__ if type(error) is RuntimeError else error
        response = getattr(cause, "response", None)
        report[step] = {"error": type(error).__name__, "cause": type(cause).__name__, "text": str(error),
                        "status": getattr(response, "status_code", None)}
    report[step]["waits"] = list(waits)


def commit(repo_id, api=writer, files=(("a.safetensors", b"weights"), ("a.txt", b"text")), **kwargs):
    operations = [CommitOperationAdd(path, data) for path, data in files]
    return api.create_commit(repo_id, operations, commit_message="Add", **kwargs).oid


def raw(method, url, **kwargs):
    headers = {"authorization": "Bearer hf_write"}
    return get_session().request(method, url, headers=headers, **kwargs).status_code


attempt("whoami", writer.whoami)
attempt("whoami unknown", HfApi(token="hf_unknown").whoami)
attempt("create", lambda: writer.create_repo("model", private=True).repo_id)
attempt("create again", lambda: writer.create_repo("founder/model", exist_ok=True).repo_id)
attempt("create twice", lambda: writer.create_repo("founder/model"))
attempt("create elsewhere", lambda: writer.create_repo("eve/model"))
attempt("create read-only", lambda: reader.create_repo("founder/other"))
attempt("create anonymously", lambda: anonymous.create_repo("founder/other"))

attempt("publish", lambda: writer.create_commit("founder/model", published, commit_message="Publish").oid)
again = [CommitOperationAdd(operation.path_in_repo, operation.path_or_fileobj) for operation in published]
attempt("unchanged", lambda: writer.create_commit("founder/model", again, commit_message="Again").oid)


def info(api=writer, **kwargs):
    found = api.model_info("founder/model", **kwargs)
    return [found.private, found.sha, found.tags, found.card_data.to_dict(), sorted(s.rfilename for s in found.siblings)]


attempt("info", info)
attempt("info of a commit", lambda: info(revision=report["publish"]["value"]))
attempt("info of no commit", lambda: info(revision="0" * 40))
attempt("info of other", lambda: info(other))
attempt("exists", lambda: [api.repo_exists("founder/model") for api in (writer, reader, other, anonymous)])
attempt("missing", lambda: [api.repo_exists("founder/none") for api in (writer, anonymous)])
attempt("top", lambda: sorted(entry.path for entry in writer.list_repo_tree("founder/model")))
attempt("tree", lambda: {entry.path: [entry.size, entry.lfs and entry.lfs.sha256]
                         for entry in writer.list_repo_tree("founder/model", recursive=True) if hasattr(entry, "size")})


def download(name, api="hf_write", **kwargs):
    return hf_hub_download("founder/model", name, token=api, cache_dir=work / "cache", **kwargs)


attempt("cut", lambda: download("unet/diffusion.safetensors"))
attempt("cached", lambda: download("unet/diffusion.safetensors"))
attempt("absent", lambda: download("absent.txt"))
attempt("private", lambda: download("README.md", "hf_other"))
attempt("snapshot", lambda: snapshot_download("founder/model", token="hf_write", cache_dir=work / "snapshot"))
attempt("upload_folder", lambda: writer.upload_folder(
    repo_id="founder/folder", folder_path=work / "model", allow_patterns=["*.json"], delete_patterns=["old/*"]).oid)

attempt("bad card", lambda: commit("founder/plain", files=[("README.md", b"---\\nbase_model: ../models/x\\n---\\n")]))
attempt("elsewhere", lambda: commit("base/tiny"))
attempt("read-only", lambda: commit("founder/plain", reader))
attempt("unauthorized", lambda: commit("founder/plain", anonymous))
attempt("unknown token", lambda: commit("founder/plain", HfApi(token="hf_unknown")))
attempt("no repository", lambda: commit("founder/none"))
attempt("stale parent", lambda: commit("founder/plain", parent_commit="a" * 40))
head = writer.model_info("founder/plain").sha
attempt("parent", lambda: commit("founder/parent", parent_commit=writer.model_info("founder/parent").sha))

url = writer.endpoint + "/founder/plain.git/info/lfs/objects/batch"
oid, header = hashlib.sha256(b"never sent").hexdigest(), {"key": "header", "value": {"summary": "x", "description": ""}}
good = {"key": "file", "value": {"path": "good.txt", "content": "Z29vZA==", "encoding": "base64"}}
never_sent = {"key": "lfsFile", "value": {"path": "x.bin", "algo": "sha256", "oid": oid, "size": 10}}
asked = {"operation": "upload", "objects": [{"oid": oid, "size": 10}], "hash_algo": "sha256"}
batch = get_session().post(url, json=asked, headers={"authorization": "Bearer hf_write"}).json()
actions = batch["objects"][0]["actions"]
attempt("corrupted", lambda: raw("PUT", actions["upload"]["href"], content=b"other sent"))
attempt("unverified", lambda: raw("POST", actions["verify"]["href"], json={"oid": oid, "size": 10}))
attempt("never sent", lambda: raw("POST", writer.endpoint + "/api/models/founder/plain/commit/main",
                                  content="\\n".join(map(json.dumps, [header, good, never_sent]))))

for fault in sys.argv[2:]:
    attempt(fault, lambda: commit("founder/" + fault))

from diffusers import DDPMPipeline, StableDiffusionPipeline
from safetensors.numpy import save
import numpy

pipeline = lambda: DDPMPipeline.from_pretrained("base/tiny", cache_dir=work / "diffusers")
attempt("from_pretrained", lambda: sum(parameter.numel() for parameter in pipeline().unet.parameters()))
lora = save({"unet.a.lora_A.weight": numpy.ones((2, 2), "float32")})
writer.create_repo("founder/lora")
commit("founder/lora", files=[("pytorch_lora_weights.safetensors", lora)])
attempt("lora", lambda: list(StableDiffusionPipeline.lora_state_dict("founder/lora", cache_dir=work / "lora")[0]))
print(json.dumps(report))
'''
FAULTS = {
    "401": {"method": "POST", "path_pattern": "/401/commit/", "status": 401},
    "403": {"method": "POST", "path_pattern": "/403/commit/", "status": 403},
    "409": {"method": "POST", "path_pattern": "/409/commit/", "status": 409},
    "413": {"method": "POST", "path_pattern": "/413/commit/", "status": 413, "body": b"too much"},
    "429": {"method": "POST", "path_pattern": "/429/commit/", "status": 429, "headers": {"Retry-After": "7"}},
    "429-preupload": {
        "method": "POST", "path_pattern": "/429-preupload/preupload/", "status": 429, "headers": {"Retry-After": "7"},
    },
    "500-batch": {"method": "POST|PUT", "path_pattern": "/500-batch.git/", "status": 500, "times": 2},
    "dropped": {"method": "POST", "path_pattern": "/dropped/commit/", "drop_after": 10},
    "lost": {"method": "POST", "path_pattern": "/lost/commit/", "after_bytes": 0},
}  # fmt: skip


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> SimpleNamespace:
    """What one client saw (`report`) of a Hub, and what the Hub saw of it (`hub`)."""
    work = tmp_path_factory.mktemp("hub")
    for name, data in PUBLISHED.items():
        (work / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (work / "model" / name).write_bytes(data)
    tiny = {path.relative_to(TINY_MODEL).as_posix(): path.read_bytes() for path in TINY_MODEL.rglob("*.*")}
    with HubServer(TOKENS, PART_SIZE) as hub:
        hub.add_repo("base/tiny", tiny)
        hub.add_repo("founder/folder", {"old/stale.json": b"{}", "kept.txt": b"kept"})
        for name in ["plain", "parent", *FAULTS]:
            hub.add_repo(f"founder/{name}", {"first.txt": b"first"})
        hub.fail("GET", "/founder/model/resolve/.*safetensors", after_bytes=1000)
        for fault in FAULTS.values():
            hub.fail(**fault)
        environment = {name: os.environ[name] for name in os.environ if not name.startswith(("HF_", "TRANSFORMERS_"))}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(work / "home"), "OMP_NUM_THREADS": "1"}
        environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", CLIENT, str(work), *FAULTS]
        client = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert client.returncode == 0, client.stderr
        yield SimpleNamespace(hub=hub, work=work, report=json.loads(client.stdout.splitlines()[-1]))


def value(session, step):
    assert "error" not in session.report[step], session.report[step]
    return session.report[step]["value"]


def refused(session, step) -> tuple[str, int | None]:
    return session.report[step]["error"], session.report[step]["status"]


def calls(session, pattern: str) -> list[tuple[str, int | None]]:
    return [(request.method, request.status) for request in session.hub.requests if pattern in request.path]


def paths(session, pattern: str) -> list[str]:
    return [request.path for request in session.hub.requests if pattern in request.path]


def test_tokens(session):
    assert value(session, "whoami")["name"] == "founder"
    assert value(session, "whoami")["auth"]["accessToken"]["role"] == "write"
    assert refused(session, "whoami unknown") == ("HfHubHTTPError", 401)
    assert refused(session, "unknown token") == ("HfHubHTTPError", 401)
    assert refused(session, "unauthorized") == ("RepositoryNotFoundError", 401)
    assert refused(session, "read-only") == refused(session, "elsewhere") == ("HfHubHTTPError", 403)
    assert len(session.hub.commits("founder/plain")) == 1


def test_create_repo(session):
    assert value(session, "create") == value(session, "create again") == "founder/model"
    assert refused(session, "create twice") == ("HfHubHTTPError", 409)
    assert refused(session, "create elsewhere") == refused(session, "create read-only") == ("HfHubHTTPError", 403)
    assert refused(session, "create anonymously") == ("HfHubHTTPError", 401)
    assert not {"eve/model", "founder/other"} & set(session.hub.repos)


def test_one_commit_holds_everything(session):
    first, second = session.hub.commits("founder/model")
    assert (first.message, set(first.files)) == ("initial commit", {".gitattributes"})
    assert (second.message, second.oid) == ("Publish", value(session, "publish"))
    assert session.hub.files("founder/model") == first.files | PUBLISHED
    assert value(session, "unchanged") == second.oid


def test_large_files_go_through_lfs_and_in_parts(session):
    puts = [len(request.body) for request in session.hub.requests if request.method == "PUT"]
    assert sorted(puts[:5]) == [len(b"\x00binary"), len(WEIGHTS) - 3 * PART_SIZE, PART_SIZE, PART_SIZE, PART_SIZE]
    (commit,) = [request for request in session.hub.requests if "/founder/model/commit/" in request.path]
    assert [json.loads(line)["key"] for line in commit.body.splitlines()].count("lfsFile") == 2
    assert not any("xet" in request.path for request in session.hub.requests)


def test_model_info(session):
    private, sha, tags, card, siblings = value(session, "info")
    assert (private, sha, tags) == (True, value(session, "publish"), ["unlearning"])
    assert (card["license"], card["base_model"]) == ("mit", "base/tiny")
    assert siblings == sorted([".gitattributes", *PUBLISHED])
    assert value(session, "info of a commit") == value(session, "info")
    assert refused(session, "info of no commit") == ("RevisionNotFoundError", 404)


def test_private_repository_looks_absent_to_others(session):
    assert value(session, "exists") == [True, True, False, False]
    assert value(session, "missing") == [False, False]
    assert refused(session, "info of other") == ("RepositoryNotFoundError", 404)
    assert session.report["private"]["error"] == "RepositoryNotFoundError"


def test_tree(session):
    assert value(session, "top") == [".gitattributes", "README.md", "small.bin", "unet", "unlearning.json"]
    listed = value(session, "tree")
    assert {name: listed[name][0] for name in PUBLISHED} == {name: len(data) for name, data in PUBLISHED.items()}
    assert {name for name in listed if listed[name][1]} == {"unet/diffusion.safetensors", "small.bin"}


def test_download_survives_a_cut_and_is_cached(session):
    path = Path(value(session, "cut"))
    assert path.read_bytes() == WEIGHTS
    assert value(session, "cached") == str(path)
    assert path.resolve().name == value(session, "tree")["unet/diffusion.safetensors"][1]  # the ETag names the blob
    asked = calls(session, "/founder/model/resolve/main/unet/diffusion")
    assert asked == [("HEAD", 200), ("GET", 200), ("GET", 200), ("HEAD", 200)]
    assert session.report["absent"]["error"] == "RemoteEntryNotFoundError"


def test_snapshot(session):
    folder = Path(value(session, "snapshot"))
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == session.hub.files("founder/model")
    assert folder.name == value(session, "publish")


def test_upload_folder_deletes_and_adds(session):
    assert session.hub.files("founder/folder") == {
        "kept.txt": b"kept", "unlearning.json": PUBLISHED["unlearning.json"], "unet/config.json": b"{}",
    }  # fmt: skip
    assert len(session.hub.commits("founder/folder")) == 2


def test_parent_commit(session):
    assert refused(session, "stale parent") == ("HfHubHTTPError", 412)
    assert value(session, "parent") == session.hub.commits("founder/parent")[-1].oid


def test_card_that_the_hub_refuses(session):
    assert session.report["bad card"]["error"] == "ValueError"
    assert "../models/x" in session.report["bad card"]["text"]


def test_objects_that_do_not_match_or_were_never_sent(session):
    assert value(session, "corrupted") == 400
    assert value(session, "unverified") == 404
    assert value(session, "never sent") == 400
    assert session.hub.files("founder/plain") == {"first.txt": b"first"}  # nor the good file of that commit
    assert refused(session, "no repository") == ("RepositoryNotFoundError", 404)


@pytest.mark.parametrize("status", [401, 403, 409, 413, 429])
def test_commit_is_not_tried_again(session, status):
    assert refused(session, str(status)) == ("HfHubHTTPError", status)
    assert session.report[str(status)]["waits"] == []
    assert len(session.hub.commits(f"founder/{status}")) == 1


def test_faults_before_the_commit_are_ridden_out(session):
    assert session.report["429-preupload"]["waits"] == [8]  # Retry-After and one second
    assert session.report["500-batch"]["waits"] == [1, 2]
    for name in ("429-preupload", "500-batch"):
        assert session.hub.commits(f"founder/{name}")[-1].oid == value(session, name)


def test_cut_connections(session):
    """Both look the same to the client; only one of them made a commit."""
    assert refused(session, "dropped") == refused(session, "lost") == ("RemoteProtocolError", None)
    assert len(session.hub.commits("founder/dropped")) == 1
    assert len(session.hub.commits("founder/lost")) == 2
    (request,) = [request for request in session.hub.requests if "/dropped/commit/" in request.path]
    assert (len(request.body), request.status) == (10, None)


def test_diffusers_loads_from_it(session):
    assert value(session, "from_pretrained") > 0
    assert value(session, "lora") == ["unet.a.lora_A.weight"]
    assert any(path.endswith("model_index.json") for path in paths(session, "/base/tiny/resolve/"))
    assert any(path.endswith(".safetensors") for path in paths(session, "/founder/lora/resolve/"))


def test_uploaded_bytes_hide_nothing(session):
    sent = session.hub.uploaded_bytes()
    assert WEIGHTS in sent  # in one piece, though sent in four
    assert PUBLISHED["unlearning.json"] in sent  # base64 in the commit
    assert b"---\nbase_model: ../models/x\n---\n" in sent  # a JSON string; sent to be validated, and no further
    assert b"authorization: Bearer hf_read" in sent
    assert b"POST /api/models/founder/model/preupload/main" in sent
    assert b"first.txt" not in sent  # what was seeded was not uploaded


def send(hub: HubServer, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, dict]:
    headers = {"Authorization": "Bearer hf_write", "Content-Type": "application/x-ndjson"} | headers
    try:
        with NO_PROXY.open(urllib.request.Request(hub.endpoint + path, body, headers)) as response:
            return response.status, response.read(), dict(response.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def test_ranges():
    """The client asks for one where 10 MB arrived before the cut."""
    with HubServer(TOKENS) as hub:
        hub.add_repo("founder/model", {"a.bin": b"0123456789"}, private=True)
        path = "/founder/model/resolve/main/a.bin"
        status, body, headers = send(hub, path, Range="bytes=4-")
        assert (status, body, headers["Content-Range"]) == (206, b"456789", "bytes 4-9/10")
        assert send(hub, path, Range="bytes=2-3")[:2] == (206, b"23")
        assert send(hub, path, Range="bytes=10-")[0] == 416
        assert send(hub, path)[:2] == (200, b"0123456789")


def test_a_client_that_goes_away_within_a_commit_makes_none():
    """Cut at the end of a line, what arrived is a valid commit of fewer files."""
    with HubServer(TOKENS) as hub:
        hub.add_repo("founder/model", {"a.txt": b"a"})
        body = json.dumps({"key": "header", "value": {"summary": "x", "description": ""}}).encode() + b"\n"
        path = "/api/models/founder/model/commit/main"
        head = f"POST {path} HTTP/1.1\r\nAuthorization: Bearer hf_write\r\nContent-Length: {{}}\r\n\r\n"
        for length, commits in ((len(body) + 1, 1), (len(body), 2)):
            with socket.create_connection(hub.http.server_address) as client:
                client.sendall(head.format(length).encode() + body)
                client.shutdown(socket.SHUT_WR)
                answered = client.makefile("rb").read()
            assert (answered[:15] == b"HTTP/1.1 200 OK", len(hub.commits("founder/model"))) == (commits == 2, commits)


def test_of_many_commits_on_one_parent_one_is_made():
    """The check of a long card, between that of the parent and the commit, takes long enough for all to meet there."""
    card = b"---\ntags:\n" + b"- x\n" * 2_000 + b"---\n"
    path = "/api/models/founder/race/commit/main"
    with HubServer(TOKENS) as hub, ThreadPoolExecutor(16) as pool:
        header = {"summary": "x", "description": "", "parentCommit": hub.add_repo("founder/race", {"a.txt": b"a"})}
        file = {"path": "README.md", "content": base64.b64encode(card).decode(), "encoding": "base64"}
        lines = [{"key": "header", "value": header}, {"key": "file", "value": file}]
        body = "\n".join(map(json.dumps, lines)).encode()
        answered = list(pool.map(lambda _: send(hub, path, body)[0], range(16)))
        assert sorted(answered) == [200] + 15 * [412]
        assert [commit.files for commit in hub.commits("founder/race")] == [
            {"a.txt": b"a"},
            {"a.txt": b"a", "README.md": card},
        ]
        assert len(hub.requests) == 16
        assert send(hub, path, b"{not json")[0] == 400


def test_reset():
    with HubServer(TOKENS) as hub:
        hub.add_repo("founder/model", {"a.txt": b"a"})
        hub.fail("GET", "model", 500, times=2)
        assert send(hub, "/api/models/founder/model")[0] == 500
        hub.reset()
        assert (hub.repos, hub.requests, hub.faults) == ({}, [], [])
        assert send(hub, "/api/models/founder/model")[0] == 404
