"""A small but real Hugging Face Hub on loopback: uploads and downloads are tested over HTTP, without a network.

Clients reach it through `HF_ENDPOINT`, which `huggingface_hub` reads when it is imported: set it in a subprocess. There,
`HF_HUB_DISABLE_XET=1` must be set too: where `hf_xet` is installed, the client sends large files through Xet without
asking the server, and only the LFS transfers (basic and multipart) are spoken here.
"""

import base64
import json
import re
import secrets
import sys
import threading
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


ATTRIBUTES = b"*.bin filter=lfs diff=lfs merge=lfs -text\n*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
REASONS = {
    401: "Invalid credentials in Authorization header",
    403: "Forbidden: you must use a write token to upload to a repository.",
    412: "A commit has happened since. Please refresh and try again.",
}
REPO, REVISION = r"(?P<repo_id>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
ROUTES = {  # method and path, to the name of the handler
    r"GET /api/whoami-v2": "whoami",
    r"POST /api/repos/create": "create_repo",
    r"POST /api/validate-yaml": "validate_yaml",
    rf"GET /api/models/{REPO}(?:/revision/{REVISION})?": "model_info",
    rf"GET /api/models/{REPO}/tree/{REVISION}": "tree",
    rf"(?:GET|HEAD) /{REPO}/resolve/{REVISION}/(?P<path>.+)": "resolve",
    rf"POST /api/models/{REPO}/preupload/{REVISION}": "preupload",
    rf"POST /{REPO}\.git/info/lfs/objects/batch": "lfs_batch",
    r"(?:PUT|POST) /storage/(?P<key>.+)": "storage",
    rf"POST /{REPO}\.git/info/lfs/objects/verify": "lfs_verify",
    rf"POST /api/models/{REPO}/commit/main": "commit",
}


@dataclass
class Request:
    """A request as it arrived. `status`: what was answered; None where the body was cut off."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""
    status: int | None = None

    def json(self) -> dict:
        return json.loads(self.body)

    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)


@dataclass(frozen=True)
class Commit:
    oid: str
    message: str
    description: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)
    lfs: dict[str, bytes] = field(default_factory=dict)  # uploaded, whether committed or not

    def commit(self, message: str, description: str, files: dict[str, bytes]) -> str:
        tree = [f"{path} {content_oid(path, data)}" for path, data in sorted(files.items())]
        oid = sha1(repr([[c.oid for c in self.commits], message, description, tree]).encode()).hexdigest()
        self.commits.append(Commit(oid, message, description, files))
        return oid


class Answer(Exception):
    """What is sent back; handlers return it or, to refuse, raise it."""

    def __init__(self, body: bytes | dict | list = b"", status: int = 200, headers: dict[str, str] | None = None):
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status, self.headers = status, headers or {}


def refusal(status: int, message: str, code: str = "", headers: dict[str, str] | None = None, **body) -> Answer:
    """As the Hub words it: `hf_raise_for_status` reads these headers, then `error` in the body."""
    return Answer(
        {"error": message} | body, status, {"X-Error-Message": message, "X-Error-Code": code} | (headers or {})
    )


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith((".safetensors", ".bin")) or size > 10_000)


def content_oid(path: str, data: bytes) -> str:
    """The client compares it with its own, and does not send again what has not changed."""
    return (sha256(data) if is_lfs(path, len(data)) else sha1(b"blob %d\0" % len(data) + data)).hexdigest()


def card_metadata(readme: str) -> dict:
    """The YAML block of a model card; ValueError says what the Hub finds wrong with it."""
    block = re.match(r"---\r?\n(.*?)\r?\n---\s*(\n|$)", readme, re.DOTALL)
    try:
        metadata = dict(yaml.safe_load(block[1])) if block else {}
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(str(error))
    base_models = metadata.get("base_model", [])
    for base_model in base_models if isinstance(base_models, list) else [base_models]:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(base_model)):  # a local path, above all
            raise ValueError(f'"base_model" with value "{base_model}" is not valid. Use a model id from hf.co/models.')
    return metadata


class HubServer:
    """`with HubServer(tokens={"hf_write": "founder", "hf_read": ("founder", "read")}) as hub:`, then `hub.endpoint`.

    LFS objects of more than `part_size` bytes are uploaded in parts. As on the Hub, a repository that a client creates
    begins with a commit of `.gitattributes`; one from `add_repo` holds the given files only.
    """

    def __init__(self, tokens: dict[str, str | tuple[str, str]], part_size: int = 1 << 20):
        self.tokens = {token: (user, "write") if isinstance(user, str) else user for token, user in tokens.items()}
        self.part_size, self.lock = part_size, threading.RLock()
        self.reset()
        self.http = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.http.shutdown()
        self.http.server_close()

    def reset(self) -> None:
        """Forget repositories, requests and faults."""
        with self.lock:
            self.repos: dict[str, Repo] = {}
            self.requests: list[Request] = []
            self.faults: list[tuple] = []  # as in `fail`, one a request
            self.uploads: dict[str, tuple[Repo, str, int, dict[int, bytes]]] = {}

    def add_repo(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> str:
        """Seed a repository; on one that exists, it is somebody else's commit on top. Returns the commit's id."""
        with self.lock:
            repo = self.repos.setdefault(repo_id, Repo(private))
            return repo.commit("Seed", "", (repo.commits[-1].files if repo.commits else {}) | files)

    def commits(self, repo_id: str) -> list[Commit]:
        """Oldest first."""
        with self.lock:
            return list(self.repos[repo_id].commits)

    def files(self, repo_id: str) -> dict[str, bytes]:
        return dict(self.commits(repo_id)[-1].files)

    def fail(
        self,
        method: str,
        path_pattern: str,
        status: int | None = None,
        *,
        times: int = 1,
        headers: dict[str, str] | None = None,
        drop_after: int | None = None,
        after_bytes: int | None = None,
        body: bytes | None = None,
    ) -> None:
        """Let the next `times` requests fail whose method matches and in whose path `path_pattern` is found.

        `status`: answer so (with `headers` and `body`) and do nothing. `drop_after`: read that much of the request's
        body, then cut the connection. `after_bytes`: do what was asked, then cut the connection after that much of the
        answer's body; at 0 nothing is answered, and the client never learns that its commit was made.
        """
        assert [status, drop_after, after_bytes].count(None) == 2, "one of status, drop_after and after_bytes"
        answer = status and refusal(status, REASONS.get(status, HTTPStatus(status).phrase), headers=headers)
        if body is not None:
            answer = Answer(body, status, answer.headers)
        with self.lock:
            self.faults += times * [(method, path_pattern, answer, drop_after, after_bytes)]

    def record(self, request: Request) -> tuple[Answer | None, int | None, int | None]:
        """Keep the request; returns answer, drop_after and after_bytes of the fault that it meets and uses up."""
        with self.lock:
            self.requests.append(request)
            for method, path_pattern, *fault in self.faults:
                if re.fullmatch(method, request.method) and re.search(path_pattern, request.path):
                    self.faults.remove((method, path_pattern, *fault))
                    return tuple(fault)
        return None, None, None

    def uploaded_bytes(self) -> bytes:
        """All that clients sent, for a leak test to search: also what JSON, base64, quoting and parts would hide."""
        with self.lock:
            seen = [data for repo in self.repos.values() for data in repo.lfs.values()]
            for request in self.requests:
                seen += [f"{request.method} {request.path} {unquote(request.path)}".encode(), request.body]
                seen += [f"{name}: {value}".encode() for name, value in request.headers.items()]
                if "json" in request.headers.get("content-type", ""):
                    seen.append(request.body.decode("unicode_escape", "replace").encode("utf-8", "replace"))
                    for run in re.findall(rb"[A-Za-z0-9+/]{4,}={0,2}", request.body):
                        seen.append(base64.b64decode(run[: len(run) // 4 * 4]))
            return b"\n".join(seen)

    def answer(self, request: Request) -> Answer:
        """One request at a time: a commit is made whole or not at all."""
        for pattern, handler in ROUTES.items():
            if match := re.fullmatch(pattern, f"{request.method} {urlsplit(request.path).path}"):
                named = {name: value and unquote(value) for name, value in match.groupdict().items()}
                try:
                    with self.lock:
                        answer = getattr(self, handler)(request, **named)
                    return answer if isinstance(answer, Answer) else Answer(answer)
                except Answer as refused:
                    return refused
                except (ValueError, KeyError) as error:
                    return refusal(400, f"Malformed request: {error!r}")
        return refusal(404, "Sorry, we can't find the page you are looking for.")

    def user(self, request: Request, anonymous: bool = False) -> tuple[str, str]:
        """Name and role; an unknown token is refused everywhere, as on the Hub."""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise refusal(401, REASONS[401])
        if not token and not anonymous:
            raise refusal(401, "Invalid username or password.")
        return self.tokens.get(token, ("", ""))

    def repo(self, request: Request, repo_id: str, write: bool = False) -> Repo:
        """Whoever may not know of a private repository is answered as if there were none.

        On https, the client takes a 401 on a repository's address for RepositoryNotFoundError; on http, it does so
        only with this error code.
        """
        (name, role), owner = self.user(request, anonymous=True), repo_id.split("/")[0]
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and name != owner) or (write and not name):
            message = "Repository not found" if name else "Invalid username or password."
            raise refusal(404 if name else 401, message, "RepoNotFound")
        if write and (name, role) != (owner, "write"):
            raise refusal(403, REASONS[403])
        return repo

    def revision(self, repo: Repo, revision: str | None) -> Commit:
        for commit in reversed(repo.commits):
            if revision in (None, "main", commit.oid):
                return commit
        raise refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def whoami(self, request: Request):
        name, role = self.user(request)
        token = {"displayName": "test", "role": role}
        return {"type": "user", "name": name, "orgs": [], "auth": {"type": "access_token", "accessToken": token}}

    def create_repo(self, request: Request):
        user, asked = self.user(request), request.json()
        namespace = asked.get("organization") or user[0]
        repo_id = f"{namespace}/{asked['name']}"
        if user != (namespace, "write"):
            raise refusal(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        if asked.get("type", "model") != "model":
            raise refusal(400, "Only models are served here")
        if repo_id in self.repos:
            raise refusal(409, "You already created this model repo", url=f"{self.endpoint}/{repo_id}")
        self.repos[repo_id] = Repo(private=asked.get("visibility") == "private")
        self.repos[repo_id].commit("initial commit", "", {".gitattributes": ATTRIBUTES})
        return {"url": f"{self.endpoint}/{repo_id}", "name": repo_id}

    def validate_yaml(self, request: Request):
        try:
            empty = not card_metadata(request.json()["content"])
        except ValueError as error:
            raise Answer({"errors": [{"message": str(error)}]}, 400)
        return {"warnings": [{"message": "empty or missing yaml metadata in repo card"}] if empty else []}

    def model_info(self, request: Request, repo_id: str, revision: str | None):
        repo = self.repo(request, repo_id)
        commit = self.revision(repo, revision)
        card = card_metadata(commit.files.get("README.md", b"").decode())
        info = {"sha": commit.oid, "private": repo.private, "author": repo_id.split("/")[0], "gated": False}
        info |= {"cardData": card, "tags": card.get("tags", [])}
        info |= {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
        info |= {"siblings": [{"rfilename": path} for path in commit.files]}
        return {"id": repo_id} | {key: info[key] for key in info if key in request.query().get("expand", info)}

    def tree(self, request: Request, repo_id: str, revision: str):
        files, entries = self.revision(self.repo(request, repo_id), revision).files, []
        for folder in {name[: slash.start()] for name in files for slash in re.finditer("/", name)}:
            entries.append({"type": "directory", "path": folder, "oid": sha1(folder.encode()).hexdigest(), "size": 0})
        for name, data in files.items():
            entries.append({"type": "file", "path": name, "oid": content_oid(name, data)[:40], "size": len(data)})
            if is_lfs(name, len(data)):
                entries[-1]["lfs"] = {"oid": sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return [entry for entry in entries if request.query()["recursive"] == ["true"] or "/" not in entry["path"]]

    def resolve(self, request: Request, repo_id: str, revision: str, path: str):
        commit = self.revision(self.repo(request, repo_id), revision)
        data, headers = commit.files.get(path), {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if data is None:
            raise refusal(404, "Entry not found", "EntryNotFound", headers)
        headers["ETag"] = f'"{content_oid(path, data)}"'
        if is_lfs(path, len(data)):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
        if not asked:
            return Answer(data, 200, headers)
        start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
        if start >= stop:
            raise Answer(b"", 416, headers | {"Content-Range": f"bytes */{len(data)}"})
        return Answer(data[start:stop], 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def preupload(self, request: Request, repo_id: str, revision: str):
        held, files = self.revision(self.repo(request, repo_id, write=True), revision).files, []
        for path, size in [(asked["path"], asked["size"]) for asked in request.json()["files"]]:
            mode = "lfs" if is_lfs(path, size) else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            files[-1] |= {"oid": content_oid(path, held[path])} if path in held else {}
        return {"files": files}

    def lfs_batch(self, request: Request, repo_id: str):
        """Where to send each object: addresses that need no token, as the signed ones of the Hub's storage."""
        repo, objects = self.repo(request, repo_id, write=True), []
        for oid, size in [(asked["oid"], asked["size"]) for asked in request.json()["objects"]]:
            objects.append({"oid": oid, "size": size})
            if oid in repo.lfs:
                continue  # without actions: nothing to send
            key = secrets.token_hex(16)
            self.uploads[key] = (repo, oid, size, {})
            upload = {"href": f"{self.endpoint}/storage/{key}"}
            if size > self.part_size:
                parts = range(1, -(-size // self.part_size) + 1)
                upload["header"] = {str(part): f"{upload['href']}?part={part}" for part in parts}
                upload["header"]["chunk_size"] = str(self.part_size)
            verify = {"href": f"{self.endpoint}/{repo_id}.git/info/lfs/objects/verify"}
            objects[-1]["actions"] = {"upload": upload, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    def storage(self, request: Request, key: str):
        """PUT of a whole object or of one part; the POST puts the parts together."""
        if key not in self.uploads:
            raise refusal(403, "Request has expired")
        repo, oid, size, parts = self.uploads[key]
        data = request.body
        if "part" in request.query():
            parts[int(request.query()["part"][0])] = data
            return Answer(headers={"ETag": sha1(data).hexdigest()})
        if request.method == "POST":
            sent = [{"partNumber": number, "etag": sha1(parts[number]).hexdigest()} for number in sorted(parts)]
            if request.json()["parts"] != sent:
                raise refusal(400, "Not the parts that were sent")
            data = b"".join(parts[number] for number in sorted(parts))
        if (len(data), sha256(data).hexdigest()) != (size, oid):
            raise refusal(400, "The content does not match its sha256 and size")
        repo.lfs[oid] = data
        return {}

    def lfs_verify(self, request: Request, repo_id: str):
        if request.json()["oid"] not in self.repo(request, repo_id, write=True).lfs:
            raise refusal(404, "LFS object not found")
        return {}

    def commit(self, request: Request, repo_id: str):
        repo = self.repo(request, repo_id, write=True)
        (_, header), *changes = [(item["key"], item["value"]) for item in map(json.loads, request.body.splitlines())]
        head, files = repo.commits[-1], dict(repo.commits[-1].files)
        if not head.oid.startswith(header.get("parentCommit", "")):
            raise refusal(412, REASONS[412])
        for kind, change in changes:
            path = change["path"]
            if {"", ".", "..", ".git"} & set(path.removesuffix("/").split("/")):
                raise refusal(400, f"Invalid path: {path}")
            if kind.startswith("deleted"):
                gone = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
                if not gone:
                    raise refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                files = {name: data for name, data in files.items() if name not in gone}
            elif kind == "lfsFile":
                if len(repo.lfs.get(change["oid"], b"")) != change["size"]:
                    raise refusal(400, f"Your push was rejected: the LFS object of {path} does not exist")
                files[path] = repo.lfs[change["oid"]]
            else:
                files[path] = base64.b64decode(change["content"], validate=True)
                if is_lfs(path, len(files[path])):
                    raise refusal(400, f"Your push was rejected: {path} must be stored with LFS")
        card_metadata(files.get("README.md", b"").decode())
        oid = repo.commit(header["summary"], header["description"], files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{oid}"}


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # with five, the sixth client at once waits a second for its next try
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """A client that goes away is what some tests are about, not something to print."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with kept connections: one whose body is left unread must be closed."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def serve(self) -> None:
        request = Request(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
        (answer, drop_after, after_bytes), length = self.hub.record(request), int(self.headers["Content-Length"] or 0)
        request.body = self.rfile.read(length if drop_after is None else min(length, drop_after))
        if drop_after is not None or len(request.body) < length:  # the client went away: half a commit is none
            self.close_connection = True
            return
        answer = answer or self.hub.answer(request)
        request.status = answer.status
        self.close_connection = self.close_connection or after_bytes is not None
        if after_bytes == 0:
            return
        self.send_response(answer.status)
        for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:after_bytes])

    def log_message(self, *_) -> None:
        """Nothing: the test asserts on `requests`."""

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve
