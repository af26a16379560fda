"""A stand-in for the Hub on this machine: the part of its HTTP API that huggingface_hub calls to push and to load models."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


USER = "someone"
TOKEN = "hf_" + "a" * 34

# The Hub decides by the suffix, and keeps large files apart from git.
LARGE_FILES = (".safetensors", ".bin", ".model", ".spm", ".gguf")


@dataclass
class Commit:
    """One state of a repository."""

    sha: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """A model repository: commits by hash, and the refs that point at them."""

    name: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def resolve(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    def commit(self, ref: str, title: str, files: dict[str, bytes]) -> Commit:
        """Replace the files that a ref points at."""
        sha = hashlib.sha1(f"{self.name} {ref} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, title, files)
        self.refs[ref] = sha
        return self.commits[sha]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content."""
        return self.commits[self.refs.get(revision, revision)].files


class HubServer(ThreadingHTTPServer):
    """
    Serves on a free port of this machine while the `with` block runs.

    Attributes:
        repositories: by `owner/name`.
        objects: contents of large files by SHA-256, as uploaded before a commit names them.
        requests: method and path of everything that was asked.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def storage_url(self) -> str:
        """Where large files are fetched: another host by its name, as on the Hub, so that no token is sent there."""
        return f"http://localhost:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Refused(Exception):
    """An answer other than success, with the code by which huggingface_hub tells what is missing."""

    def __init__(self, status: int, message: str, code: str | None = None, sha: str | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message}
        if code is not None:
            self.headers["X-Error-Code"] = code
        if sha is not None:
            self.headers["X-Repo-Commit"] = sha


MODEL = r"/api/models/(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)"
REVISION = r"/(?P<revision>[^/]+)"
# Method, path and name of the handler's method; the first match answers.
ROUTES = [
    (method, re.compile(path + "$"), name)
    for method, path, name in (
        ("GET", "/api/whoami-v2", "whoami"),
        ("POST", "/api/repos/create", "create_repository"),
        ("POST", "/api/validate-yaml", "validate_yaml"),
        ("GET", MODEL, "model_info"),
        ("GET", MODEL + "/refs", "list_refs"),
        ("GET", MODEL + "/revision" + REVISION, "model_info"),
        ("GET", MODEL + "/tree" + REVISION + "(?:/(?P<folder>.+))?", "tree"),
        ("POST", MODEL + "/paths-info" + REVISION, "paths_info"),
        ("POST", MODEL + "/branch" + REVISION, "create_branch"),
        ("POST", MODEL + "/preupload" + REVISION, "preupload"),
        ("POST", MODEL + "/commit" + REVISION, "commit"),
        ("POST", r"/(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", r"/lfs/(?P<oid>\w+)/verify", "lfs_verify"),
        ("PUT", r"/lfs/(?P<oid>\w+)", "lfs_upload"),
        ("GET", r"/lfs/(?P<oid>\w+)", "lfs_download"),
        ("GET", r"/(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)/resolve" + REVISION + "/(?P<path>.+)", "resolve"),
    )
]


class Handler(BaseHTTPRequestHandler):
    """One request: finds its route, checks the token and answers."""

    protocol_version = "HTTP/1.1"
    # Headers and body go out in two writes, which the kernel would otherwise hold back for 40 ms each time.
    disable_nagle_algorithm = True
    server: HubServer

    def log_message(self, *_):
        """Say nothing: the server keeps a list of what was asked."""

    def answer(self):
        self.__dict__.pop("body", None)
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.server.requests.append(f"{self.command} {unquote(url.path)}")
        method = "GET" if self.command == "HEAD" else self.command
        # Read whatever happens: what is left of a body would be taken for the next request.
        length = len(self.body)
        try:
            for wanted, pattern, name in ROUTES:
                if wanted == method and (match := pattern.match(url.path)):
                    arguments = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                    with self.server.lock:
                        getattr(self, name)(**arguments)
                    return
            raise Refused(404, f"nothing here answers {method} {url.path} with {length} bytes")
        except Refused as error:
            self.reply(error.status, json.dumps({"error": str(error)}).encode(), **error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    @cached_property
    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def json(self) -> Any:
        return json.loads(self.body)

    def reply(self, status: int, content: bytes = b"", **headers: str | int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reply_json(self, value: Any, status: int = 200) -> None:
        self.reply(status, json.dumps(value).encode(), Content_Type="application/json")

    @property
    def signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def need_token(self) -> None:
        if not self.signed_in:
            raise Refused(401, "Invalid username or password.")

    def repository(self, owner: str, name: str) -> Repository:
        found = self.server.repositories.get(f"{owner}/{name}")
        if found is None or (found.private and not self.signed_in):
            # The Hub does not tell strangers which private repositories exist.
            raise Refused(404 if self.signed_in else 401, "Repository not found", "RepoNotFound")
        return found

    def revision_of(self, repository: Repository, revision: str) -> Commit:
        commit = repository.resolve(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def whoami(self) -> None:
        self.need_token()
        self.reply_json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create_repository(self) -> None:
        self.need_token()
        asked = self.json()
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repositories:
            self.reply_json({"error": "You already created this model repo", "url": url}, status=409)
            return
        self.server.repositories[name] = Repository(name, private=asked.get("visibility") == "private")
        self.reply_json({"url": url, "name": name, "id": name})

    def validate_yaml(self) -> None:
        content = self.json()["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, flags=re.DOTALL)
        errors, warnings = [], []
        try:
            data = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            data = None
            errors.append({"message": str(error)})
        if not data and not errors:
            warnings.append({"message": "empty or missing yaml metadata in repo card"})
        for key, kind in {"tags": list, "license": str, "pipeline_tag": str, "library_name": str}.items():
            if data and data.get(key) is not None and not isinstance(data[key], kind):
                errors.append({"message": f'"{key}" must be {kind.__name__}'})
        self.reply_json({"errors": errors, "warnings": warnings}, status=400 if errors else 200)

    def model_info(self, owner: str, name: str, revision: str = "main") -> None:
        repository = self.repository(owner, name)
        commit = self.revision_of(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self.reply_json(
            {"id": repository.name, "sha": commit.sha, "private": repository.private, "tags": [], "siblings": siblings}
        )

    def list_refs(self, owner: str, name: str) -> None:
        refs = self.repository(owner, name).refs
        branches = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha}
            for ref, sha in refs.items()
            if not ref.startswith("refs/")
        ]
        self.reply_json({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if path.endswith(LARGE_FILES):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def tree(self, owner: str, name: str, revision: str, folder: str = "") -> None:
        commit = self.revision_of(self.repository(owner, name), revision)
        prefix = f"{folder}/" if folder else ""
        inside = {path: content for path, content in commit.files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries = []
        for path, content in sorted(inside.items()):
            child, _, rest = path.removeprefix(prefix).partition("/")
            if not rest or recursive:
                entries.append(self.entry(path, content))
            elif not any(entry["path"] == prefix + child for entry in entries):
                entries.append({"type": "directory", "path": prefix + child, "size": 0, "oid": git_hash(b"")})
        self.reply_json(entries)

    def paths_info(self, owner: str, name: str, revision: str) -> None:
        commit = self.revision_of(self.repository(owner, name), revision)
        paths = parse_qs(self.body.decode())["paths"]
        self.reply_json([self.entry(path, commit.files[path]) for path in paths if path in commit.files])

    def create_branch(self, owner: str, name: str, revision: str) -> None:
        self.need_token()
        repository = self.repository(owner, name)
        if revision in repository.refs:
            raise Refused(409, f"Reference already exists: {revision}")
        start = self.revision_of(repository, self.json().get("startingPoint") or "main")
        repository.refs[revision] = start.sha
        self.reply_json({}, status=201)

    def preupload(self, owner: str, name: str, revision: str) -> None:
        self.need_token()
        present = self.revision_of(self.repository(owner, name), revision).files
        answers = []
        for file in self.json()["files"]:
            path = file["path"]
            large = path.endswith(LARGE_FILES)
            answers.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            if path in present:
                content = present[path]
                answers[-1]["oid"] = hashlib.sha256(content).hexdigest() if large else git_hash(content)
        self.reply_json({"files": answers})

    def lfs_batch(self, owner: str, name: str) -> None:
        self.need_token()
        self.repository(owner, name)
        objects = []
        for asked in self.json()["objects"]:
            objects.append({"oid": asked["oid"], "size": asked["size"]})
            if asked["oid"] not in self.server.objects:
                href = f"{self.server.url}/lfs/{asked['oid']}"
                objects[-1]["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        self.reply_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, f"{oid} is not the hash of what arrived")
        self.server.objects[oid] = self.body
        self.reply(200)

    def lfs_verify(self, oid: str) -> None:
        if len(self.server.objects.get(oid, b"")) != self.json()["size"]:
            raise Refused(404, f"{oid} has not arrived")
        self.reply_json({})

    def lfs_download(self, oid: str) -> None:
        if "Authorization" in self.headers:
            raise Refused(400, "A token was sent to the storage of large files.")
        self.send_content(self.server.objects[oid], ETag=f'"{oid}"')

    def commit(self, owner: str, name: str, revision: str) -> None:
        self.need_token()
        repository = self.repository(owner, name)
        parent = self.revision_of(repository, revision)
        files, title = dict(parent.files), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                title = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refused(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.server.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, f"a commit cannot have {operation['key']} here")
        pull_request = "create_pr" in self.query
        ref = f"refs/pr/{1 + sum(ref.startswith('refs/pr/') for ref in repository.refs)}" if pull_request else revision
        commit = repository.commit(ref, title, files)
        url = f"{self.server.url}/{repository.name}"
        self.reply_json(
            {
                "success": True,
                "commitOid": commit.sha,
                "commitUrl": f"{url}/commit/{commit.sha}",
                "pullRequestUrl": f"{url}/discussions/{ref.rpartition('/')[2]}" if pull_request else None,
            }
        )

    def resolve(self, owner: str, name: str, revision: str, path: str) -> None:
        commit = self.revision_of(self.repository(owner, name), revision)
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound", sha=commit.sha)
        content = commit.files[path]
        if not path.endswith(LARGE_FILES):
            self.send_content(content, ETag=f'"{git_hash(content)}"', X_Repo_Commit=commit.sha)
            return
        oid = hashlib.sha256(content).hexdigest()
        self.server.objects.setdefault(oid, content)
        self.reply(
            302,
            Location=f"{self.server.storage_url}/lfs/{oid}",
            X_Repo_Commit=commit.sha,
            X_Linked_Etag=f'"{oid}"',
            X_Linked_Size=len(content),
        )

    def send_content(self, content: bytes, **headers: str) -> None:
        """All of a file, or the range of it that is asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            self.reply(200, content, Accept_Ranges="bytes", **headers)
            return
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
        self.reply(206, content[start : end + 1], **headers)


def git_hash(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
