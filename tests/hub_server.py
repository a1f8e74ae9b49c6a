"""A strict Hugging Face Hub on the loopback interface, for the protocol that huggingface_hub speaks.

Repositories with commits, branches and pull requests; files small (git blobs) and large (LFS objects, which a second
listener serves as the CDN does, from another origin). It checks every hash and size, refuses commits that name
unknown objects, and asks for tokens. Faults can be planted by method and path.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"
LARGE = (".safetensors", ".bin", ".pth")
MAX_BODY = 256 << 20


class RefusedError(Exception):
    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict = field(default_factory=dict)  # oid -> {path: digest}
    refs: dict = field(default_factory=dict)
    pulls: int = 0

    def commit(self, ref, files):
        oid = hashlib.sha1(f"{len(self.commits)}{ref}{sorted(files.items())}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid

    def resolve(self, revision):
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


@dataclass
class Fault:
    """What goes wrong: a status code, or 'reset', 'truncate', 'flip' of a body; times -1 is always."""

    method: str
    path: str
    kind: int | str
    times: int = 1


def git_blob(content):
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Hub:
    """The server; a context manager that stops it. State may be read and planted by the test that owns it."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # by sha256 (large) or git's sha1 (small)
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int]] = []
        self.headers: list[tuple[str, dict]] = []
        self.lock = threading.RLock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.listeners = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.cdn_url = (f"http://127.0.0.1:{s.server_port}" for s in self.listeners)

    def __enter__(self):
        for listener in self.listeners:
            listener.daemon_threads = True
            threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        for listener in self.listeners:
            listener.shutdown()
            listener.server_close()

    def fault(self, method, path, kind, times=1):
        self.faults.append(Fault(method, path, kind, times))

    def take_fault(self, method, path):
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.path in path and fault.times:
                    fault.times -= 1
                    return fault.kind
        return None

    def put(self, repo_id, folder, **kwargs):
        """Commit the files of a folder to main, past the network."""
        repo = self.repos.setdefault(repo_id, Repo(**kwargs))
        files = {path.name: self.store(path.name, path.read_bytes()) for path in Path(folder).iterdir()}
        return repo.commit("main", files)

    def store(self, name, content):
        digest = hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else git_blob(content)
        self.objects[digest] = content
        return digest

    def files(self, repo_id, revision="main"):
        repo = self.repos[repo_id]
        return {path: self.objects[digest] for path, digest in repo.commits[repo.resolve(revision)].items()}

    def count(self, *methods):
        return Counter(method for method, *_ in self.log if method in methods)


ROUTES = [
    ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    ("GET", r"/cdn/([0-9a-f]{64})", "cdn"),
    ("GET", r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", "revision"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/([^/]+/[^/]+)/([0-9a-f]{64})", "lfs_put"),
    ("POST", r"/lfs/([^/]+/[^/]+)/verify", "lfs_verify"),
    ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, *_):
        pass

    def handle_any(self):
        self.close_connection = True  # a stopped server must not live on in open connections
        path = urlsplit(self.path).path
        try:
            fault = self.hub.take_fault(self.command, self.path)
            body = self.read_body()
            if isinstance(fault, int):
                raise RefusedError(fault, "planted")
            if fault == "reset" and self.command in ("PUT", "POST"):
                self.note(0)
                return self.reset()
            for methods, pattern, name in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in methods.split("|"):
                    return getattr(self, name)(*map(unquote, match.groups()), body=body, fault=fault)
            raise RefusedError(404, f"no such route: {self.command} {path}")
        except RefusedError as refused:
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
            self.answer({"error": refused.message}, refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815

    def read_body(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        if length > MAX_BODY:
            raise RefusedError(413, "too large")
        return self.rfile.read(length)

    def note(self, status):
        with self.hub.lock:  # before answering: the client may be gone, the test looking, right after it
            self.hub.log.append((self.command, self.path, status))
            self.hub.headers.append((self.path, dict(self.headers)))

    def answer(self, content, status=200, headers=None, fault=None):
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.note(status)
        self.send_response(status)
        headers = {"Content-Length": str(len(payload)), "Connection": "close"} | (headers or {})
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "flip":
            middle = len(payload) // 2
            payload = payload[:middle] + bytes([payload[middle] ^ 1]) + payload[middle + 1 :]
        if fault in ("reset", "truncate"):
            self.wfile.write(payload[: len(payload) // 2])
            self.wfile.flush()
            return self.reset() if fault == "reset" else None
        self.wfile.write(payload)

    def reset(self):
        """End the connection with RST rather than FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.wfile = self.rfile = open("/dev/null", "r+b", buffering=0)  # noqa: SIM115

    # Who may do what

    def token(self):
        value = self.headers.get("Authorization", "")
        token = value.removeprefix("Bearer ") if value.startswith("Bearer ") else None
        if value and token not in (WRITER, READER):
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return token

    def readable(self, repo_id):
        repo, token = self.hub.repos.get(repo_id), self.token()
        if repo is None or (repo.private and token is None):
            raise RefusedError(401 if token is None else 404, "Repository not found", "RepoNotFound")
        if repo.gated and token != WRITER:
            raise RefusedError(403, f"Access to model {repo_id} is restricted", "GatedRepo")
        return repo

    def writer(self):
        token = self.token()
        if token is None:
            raise RefusedError(401, "Invalid username or password.")
        if token != WRITER:
            raise RefusedError(403, "Forbidden: you must use a write token to upload to a repository.")

    def writable(self, repo_id):
        self.writer()
        return self.readable(repo_id)

    # Reading

    def resolve(self, repo_id, revision, path, body, fault):
        repo = self.readable(repo_id)
        oid = repo.resolve(revision)
        digest = repo.commits[oid].get(path)
        if digest is None:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        content = self.hub.objects[digest]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{digest}"'}
        if len(digest) == 40:
            return self.answer(content, 200, headers, fault)
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        headers |= {"Location": f"{self.hub.cdn_url}/cdn/{digest}?for={repo_id}", "Content-Length": "0"}
        self.answer(b"", 302, headers)

    def cdn(self, digest, body, fault):
        if "Authorization" in self.headers:
            raise RefusedError(400, "the CDN must not see a token")
        content = self.hub.objects[digest]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.answer(content, 200, {}, fault)
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        if start >= len(content):
            raise RefusedError(416, "out of range")
        where = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
        self.answer(content[start : end + 1], 206, where, fault)

    def revision(self, repo_id, revision, body, fault):
        oid = self.readable(repo_id).resolve(revision)
        self.answer({"id": repo_id, "modelId": repo_id, "sha": oid, "siblings": [], "private": False, "tags": []})

    # Writing

    def create(self, body, fault):
        self.writer()
        asked = json.loads(body)
        if not asked.get("organization"):
            raise RefusedError(400, "an organization is needed")
        repo_id = f"{asked['organization']}/{asked['name']}"
        with self.hub.lock:
            status = 409 if repo_id in self.hub.repos else 200
            if status == 200:
                private = bool(asked.get("private")) or asked.get("visibility") == "private"
                repo = self.hub.repos[repo_id] = Repo(private=private)
                repo.commit("main", {".gitattributes": self.hub.store(".gitattributes", b"*.safetensors lfs\n")})
        self.answer({"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}, status)

    def validate_yaml(self, body, fault):
        text = json.loads(body)["content"]
        front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        errors = [] if front and "license:" in front[1] else [{"message": "no front matter with a license"}]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo_id, revision, body, fault):
        repo = self.writable(repo_id)
        files = repo.commits[repo.resolve(revision)]
        answers = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in files:
                answer["oid"] = files[file["path"]]
            answers.append(answer)
        self.answer({"files": answers})

    def lfs_batch(self, repo_id, body, fault):
        self.writable(repo_id)
        asked = json.loads(body)
        if asked.get("hash_algo") != "sha256" or "basic" not in asked["transfers"]:
            raise RefusedError(422, "sha256 and basic transfers only")
        answers = []
        for item in asked["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                verify = {"href": f"{self.hub.url}/lfs/{repo_id}/verify"}
                upload = {"href": f"{self.hub.cdn_url}/lfs/{repo_id}/{item['oid']}"}
                answer["actions"] = {"upload": upload, "verify": verify}
            answers.append(answer)
        self.answer({"transfer": "basic", "objects": answers})

    def lfs_put(self, repo_id, oid, body, fault):
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusedError(400, "the body's sha256 is not the object's name")
        self.hub.objects[oid] = body
        self.answer({})

    def lfs_verify(self, repo_id, body, fault):
        self.writable(repo_id)
        item = json.loads(body)
        stored = self.hub.objects.get(item["oid"])
        if stored is None or len(stored) != item["size"]:
            raise RefusedError(404, "object not stored, or of another size")
        self.answer({})

    def commit(self, repo_id, revision, body, fault):
        self.writable(repo_id)
        lines = [json.loads(line) for line in body.splitlines() if line]
        if not lines or lines[0]["key"] != "header" or not lines[0]["value"].get("summary"):
            raise RefusedError(400, "a commit starts with its header")
        with self.hub.lock:
            repo = self.hub.repos[repo_id]
            parent = repo.resolve(revision)
            if lines[0]["value"].get("parentCommit", parent) != parent:
                raise RefusedError(412, "the branch has moved on")
            files = dict(repo.commits[parent])
            for line in lines[1:]:
                self.apply(files, line["key"], line["value"])
            ref = revision
            pull = parse_qs(urlsplit(self.path).query).get("create_pr") == ["1"]
            if pull:
                repo.pulls += 1
                ref = f"refs/pr/{repo.pulls}"
            oid = repo.commit(ref, files)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"}
        self.answer(answer | ({"pullRequestUrl": f"{self.hub.url}/{repo_id}/discussions/{repo.pulls}"} if pull else {}))

    def apply(self, files, key, value):
        if key == "file":
            if value["path"].endswith(LARGE) or value["encoding"] != "base64":
                raise RefusedError(400, f"{value['path']} must be an LFS object")
            content = base64.b64decode(value["content"], validate=True)
            files[value["path"]] = self.hub.store(value["path"], content)
        elif key == "lfsFile":
            stored = self.hub.objects.get(value["oid"])
            if value["algo"] != "sha256" or stored is None or len(stored) != value["size"]:
                raise RefusedError(400, f"{value['path']} names an object that is not stored")
            files[value["path"]] = value["oid"]
        elif key == "deletedFile":
            del files[value["path"]]
        else:
            raise RefusedError(400, f"unknown operation {key}")
