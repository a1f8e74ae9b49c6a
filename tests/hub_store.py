"""What a Hub keeps: repositories with commits, branches and pull requests, objects by their hashes, a log, faults."""

import hashlib
import threading
from dataclasses import dataclass, field
from pathlib import Path

LARGE = (".safetensors", ".bin", ".pth")


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
    """What goes wrong: a status code, or 'reset', 'stall', 'truncate', 'flip' of a body; times -1 is always."""

    method: str
    path: str
    kind: int | str
    times: int = 1


def git_blob(content):
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Store:
    """The state of a server, which the test that owns it may read and plant."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # by sha256 (large) or git's sha1 (small)
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int]] = []
        self.headers: list[tuple[str, dict]] = []
        self.asked: list[dict] = []  # of repositories to create
        self.lock = threading.RLock()
        self.stalled = threading.Event()  # set when the server stops

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
