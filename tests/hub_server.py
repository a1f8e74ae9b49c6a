"""A strict Hugging Face Hub on the loopback interface, for the protocol that huggingface_hub speaks.

Files are small (git blobs) or large (LFS or Xet objects, which a second listener serves as the CDN does, from another
origin). It checks every hash and size, refuses commits that name unknown objects, and asks for tokens. Faults can be
planted by method and path.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import yaml
from hub_store import LARGE, RefusedError, Repo, Store
from hub_wire import Wire
from hub_xet import XetRoutes, XetStore

from timm_eca.cards import HUB_LICENSES

WRITER, READER = "hf_writer", "hf_reader"


class Hub(Store):
    """The server; a context manager that stops it."""

    def __init__(self):
        super().__init__()
        self.xet = XetStore()
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
        self.stalled.set()
        for listener in self.listeners:
            listener.shutdown()
            listener.server_close()


ROUTES = (
    ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    ("GET", r"/cdn/([0-9a-f]{64})", "cdn"),
    ("GET", r"/api/models/([^/]+/[^/]+)", "info"),
    ("GET", r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", "info"),
    ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "branch"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/([^/]+/[^/]+)/([0-9a-f]{64})", "lfs_put"),
    ("POST", r"/lfs/([^/]+/[^/]+)/verify", "lfs_verify"),
    ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
)


class Handler(XetRoutes, Wire):
    hub: Hub
    routes = ROUTES + XetRoutes.routes

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
        headers = {"X-Repo-Commit": oid, "ETag": f'"{digest}"'} | self.named(path)
        if len(digest) == 40:
            return self.answer(content, 200, headers, fault)
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        if digest in self.hub.xet.hash_of:
            route = f"{self.hub.url}/api/models/{repo_id}/xet-read-token/{oid}"
            headers |= {"X-Xet-Hash": self.hub.xet.hash_of[digest], "X-Xet-Refresh-Route": route}
        headers |= {"Location": f"{self.hub.cdn_url}/cdn/{digest}?for={repo_id}&file={path}", "Content-Length": "0"}
        self.answer(b"", 302, headers)

    def cdn(self, digest, body, fault):
        if "Authorization" in self.headers:
            raise RefusedError(400, "the CDN must not see a token")
        name = parse_qs(urlsplit(self.path).query)["file"][0]
        self.ranged(self.hub.objects[digest], fault, self.named(name))

    def named(self, path):
        return {"Content-Disposition": f'inline; filename="{path}";'}

    def info(self, repo_id, revision="main", *, body, fault):
        repo = self.readable(repo_id)
        oid = repo.resolve(revision)
        self.answer({"id": repo_id, "sha": oid, "siblings": [], "private": repo.private, "tags": []})

    # Writing

    def create(self, body, fault):
        self.writer()
        asked = json.loads(body)
        self.hub.asked.append(asked)
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

    def branch(self, repo_id, name, body, fault):
        repo = self.writable(repo_id)
        if name in repo.refs or name.startswith("refs/"):
            raise RefusedError(409, "Reference already exists, or is none of a branch")
        repo.refs[name] = repo.resolve(json.loads(body).get("startingPoint", "main"))
        self.answer({})

    def validate_yaml(self, body, fault):
        text = json.loads(body)["content"]
        front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        card = yaml.safe_load(front[1]) if front else {}
        errors = []
        if card.get("license") not in HUB_LICENSES:
            errors.append({"message": '"license" must be one of those that the Hub knows'})
        if not re.fullmatch(r"[a-z0-9.+-]+", card.get("license_name", "none")):
            errors.append({"message": '"license_name" must be an identifier'})
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
