"""The Hub's HTTP interface on loopback, as far as `huggingface_hub` uses it for models.

Repositories with commits, branches and pull requests; regular files and large ones, which
are stored by SHA-256 and served from another origin; tokens, private repositories, errors as
the Hub words them; and faults on demand: connections cut anywhere, any status code.
"""

import base64
import hashlib
import json
import re
import secrets
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = 10 << 20  # bytes; binary files are stored as large ones whatever their size


def git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class File:
    data: bytes
    lfs: bool
    size: int = -1  # what is claimed, where it differs from the data

    def __post_init__(self):
        self.size = len(self.data) if self.size < 0 else self.size

    @property
    def oid(self):
        return hashlib.sha256(self.data).hexdigest() if self.lfs else git_hash(self.data)


@dataclass
class Repo:
    owner: str
    private: bool = False
    commits: dict = field(default_factory=dict)  # sha -> {path: File}
    refs: dict = field(default_factory=dict)  # branch, tag or refs/pr/n -> sha
    history: list = field(default_factory=list)

    def commit(self, ref, files):
        sha = hashlib.sha1(secrets.token_bytes(20)).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        self.history.append((ref, sha))
        return sha


@dataclass
class Fault:
    """What goes wrong: `times` times, for requests that match.

    cut: "request", half of the request's body is read; "answer", the request is carried out
    but not answered; a number, the answer ends after so many bytes of its body.
    status: Answer with this code and nothing else.
    stays: From then on, nothing gets through.
    """

    request: str  # regular expression on "METHOD /path"
    cut: object = None
    status: int = 0
    times: int = 1
    stays: bool = False


class Refused(Exception):
    def __init__(self, status, code="", message=""):
        self.status, self.code, self.message = status, code, message


class Hub:
    """A server; `with Hub() as hub` runs it in a thread."""

    def __init__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.url, self.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        self.reset()

    def reset(self):
        self.tokens = {"hf_write": ("user", "write"), "hf_read": ("user", "read")}
        self.repos, self.large = {}, {}
        self.faults, self.requests, self.ranges = [], [], []

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def put(self, repo_id, files, ref="main", private=False):
        """Store files as they are, whatever their names; returns the commit."""
        repo = self.repos.setdefault(repo_id, Repo(repo_id.split("/")[0], private))
        made = {
            name: value if isinstance(value, File) else File(value, b"\0" in value)
            for name, value in files.items()
        }
        self.large.update({f.oid: f.data for f in made.values() if f.lfs})
        return repo.commit(ref, made)

    def files(self, repo_id, ref="main"):
        repo = self.repos[repo_id]
        return {name: file.data for name, file in repo.commits[repo.refs[ref]].items()}

    def asked(self, pattern):
        return [line for line in self.requests if re.search(pattern, line)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def handle_any(self):
        hub = self.hub
        line = f"{self.command} {unquote(self.path)}"
        hub.requests.append(line)
        fault = next((f for f in hub.faults if f.times and re.search(f.request, line)), None)
        self.fault = fault
        length = int(self.headers.get("Content-Length") or 0)
        if fault:
            fault.times -= 1
            if fault.stays:
                hub.faults = [Fault(".", cut="request", times=10**6)]
            if fault.cut == "request":
                self.rfile.read(length // 2)
                return self.hang_up()
        self.body = self.rfile.read(length)
        try:
            if fault and fault.status:
                raise Refused(fault.status, message="a fault")
            self.route()
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            body = json.dumps({"error": refused.message}).encode()
            self.send(refused.status, body, {k: v for k, v in headers.items() if v})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, status, body=b"", headers=None):
        if self.fault and self.fault.cut == "answer":
            return self.hang_up()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.fault and isinstance(self.fault.cut, int):
            self.wfile.write(body[: self.fault.cut])
            self.wfile.flush()
            return self.hang_up()
        self.wfile.write(body)
        return None

    def json(self, value, status=200):
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def route(self):
        url = urlsplit(self.path)
        path, self.query = url.path, parse_qs(url.query)
        for method, pattern, handler in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                return handler(self, *map(unquote, match.groups()))
        raise Refused(404, message=f"no route for {self.command} {path}")

    # -- who asks, and for what -------------------------------------------------------------

    def user(self):
        """(name, role) of the token, or (None, None) without one."""
        header = self.headers.get("Authorization")
        if header is None:
            return None, None
        token = header.removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def repo(self, repo_id, write=False):
        user, role = self.user()
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and user != repo.owner):
            # strangers are not told which private repositories exist
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and (user != repo.owner or role != "write"):
            raise Refused(403 if user else 401, message="You don't have the rights")
        return repo

    def revision(self, repo, revision):
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    # -- the account --------------------------------------------------------------------------

    def whoami(self):
        user, role = self.user()
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        self.json({"type": "user", "name": user, "auth": {"accessToken": {"role": role}}})

    def create(self):
        user, role = self.user()
        asked = json.loads(self.body)
        owner = asked.get("organization") or user
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        if owner != user or role != "write":
            raise Refused(403, message=f"You don't have the rights to create under {owner}")
        repo_id = f"{owner}/{asked['name']}"
        if repo_id in self.hub.repos:
            return self.json({"error": "exists", "url": f"{self.hub.url}/{repo_id}"}, 409)
        private = asked.get("visibility") == "private"
        self.hub.put(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return self.json({"url": f"{self.hub.url}/{repo_id}", "id": "1", "name": repo_id})

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        match = re.match(r"\s*---\r?\n(.*?)\n---", content, re.DOTALL)
        try:
            data = yaml.safe_load(match[1]) if match else {}
            errors = [] if isinstance(data, dict) else [{"message": "must be a table"}]
        except yaml.YAMLError as error:
            data, errors = {}, [{"message": str(error)}]
        for entry in (data.get("model-index") or []) if not errors else []:
            if not entry.get("name") or not entry.get("results"):
                errors.append({"message": '"model-index[0]" needs a name and results'})
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        self.json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    # -- reading ------------------------------------------------------------------------------

    def info(self, repo_id, revision="main"):
        repo = self.repo(repo_id)
        sha = self.revision(repo, revision)
        files = [{"rfilename": name} for name in repo.commits[sha]]
        self.json({"id": repo_id, "sha": sha, "private": repo.private, "siblings": files,
                   "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def refs(self, repo_id):
        repo = self.repo(repo_id)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in repo.refs.items()
        ]
        self.json({"branches": branches, "tags": [], "converts": []})

    def tree(self, repo_id, revision):
        repo = self.repo(repo_id)
        entries = []
        for name, file in repo.commits[self.revision(repo, revision)].items():
            entry = {"type": "file", "path": name, "size": file.size, "oid": git_hash(file.data)}
            if file.lfs:
                entry["lfs"] = {"oid": file.oid, "size": file.size, "pointerSize": 130}
            entries.append(entry)
        self.json(entries)

    def resolve(self, repo_id, revision, name):
        repo = self.repo(repo_id)
        sha = self.revision(repo, revision)
        file = repo.commits[sha].get(name)
        if file is None:
            raise Refused(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if not file.lfs:
            return self.send_range(file.data, headers)
        headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(file.size),
                    "Location": f"{self.hub.cdn}/cdn/{file.oid}"}  # fmt: skip
        return self.send(302, b"", headers)

    def serve_large(self, oid):
        if "Authorization" in self.headers:
            raise Refused(400, message="a token was sent to another origin")
        self.send_range(self.hub.large[oid], {"ETag": f'"{oid}"'})

    def send_range(self, data, headers):
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if not asked:
            return self.send(200, data, headers)
        self.hub.ranges.append(asked[0])
        first = int(asked[1])
        if first >= len(data):
            return self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        where = f"bytes {first}-{len(data) - 1}/{len(data)}"
        return self.send(206, data[first:], headers | {"Content-Range": where})

    # -- writing ------------------------------------------------------------------------------

    def branch(self, repo_id, name):
        repo = self.repo(repo_id, write=True)
        if name in repo.refs:
            raise Refused(409, message="Reference already exists")
        repo.refs[name] = repo.refs["main"]
        self.json({})

    def preupload(self, repo_id, revision):
        repo = self.repo(repo_id, write=True)
        files = repo.commits[self.revision(repo, revision)]
        answer = []
        for asked in json.loads(self.body)["files"]:
            binary = b"\0" in base64.b64decode(asked["sample"]) or asked["size"] > LARGE
            known = files.get(asked["path"])
            known = known.oid if known else None
            answer.append({"path": asked["path"], "uploadMode": "lfs" if binary else "regular",
                           "shouldIgnore": False, "oid": known})  # fmt: skip
        self.json({"files": answer})

    def lfs_batch(self, repo_id):
        self.repo(repo_id, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            if wanted["oid"] not in self.hub.large:
                upload = {"href": f"{self.hub.cdn}/lfs/{wanted['oid']}", "header": {}}
                verify = {"href": f"{self.hub.url}/{repo_id}/verify", "header": {}}
                wanted = wanted | {"actions": {"upload": upload, "verify": verify}}
            objects.append(wanted)
        self.json({"transfer": "basic", "objects": objects})

    def store_large(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, message="the body is not what its hash says")
        self.hub.large[oid] = self.body
        self.send(200)

    def verify(self, repo_id):
        self.repo(repo_id, write=True)
        asked = json.loads(self.body)
        stored = self.hub.large.get(asked["oid"])
        if stored is None or len(stored) != asked["size"]:
            raise Refused(404, message="no such object")
        self.json({})

    def commit(self, repo_id, revision):
        repo = self.repo(repo_id, write=True)
        head = self.revision(repo, revision)
        files = dict(repo.commits[head])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                if value.get("parentCommit") not in (None, head):
                    raise Refused(412, message="The branch has moved on")
            elif entry["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Refused(400, message=f"{value['path']} was not uploaded")
                files[value["path"]] = File(self.hub.large[value["oid"]], True)
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        answer = {}
        if "create_pr" in self.query:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
        sha = repo.commit(revision, files)
        self.json(answer | {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}",
                            "commitOid": sha})  # fmt: skip


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", f"/api/models/{REPO}", Handler.info),
    ("GET", f"/api/models/{REPO}/revision/([^/]+)", Handler.info),
    ("GET", f"/api/models/{REPO}/refs", Handler.refs),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)", Handler.tree),
    ("HEAD GET", f"/{REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("HEAD GET", r"/cdn/([0-9a-f]{64})", Handler.serve_large),
    ("POST", f"/api/models/{REPO}/branch/([^/]+)", Handler.branch),
    ("POST", f"/api/models/{REPO}/preupload/([^/]+)", Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", Handler.store_large),
    ("POST", f"/{REPO}/verify", Handler.verify),
    ("POST", f"/api/models/{REPO}/commit/([^/]+)", Handler.commit),
]
