"""What the tests of the TUF client share: a repository that can be spoiled at will, served over
HTTP on loopback, and a device that is `tuf-client`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import subprocess
import threading
import types
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

CLIENT = Path(__file__).with_name("tuf-client")
TOP = ("root", "targets", "snapshot", "timestamp")


class Repository:
    """The documents of a repository, its keys, and the files that are served below `/`.

    A change is seen by clients once its role is published; every publication but a role's first
    raises the role's version. What lies in `files` may be changed at will. `asked` are the requests
    so far, as paths without `.json`. With `hashed`, hash and length of metadata are listed too.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.signers: dict[str, list[CryptoSigner]] = {}
        self.expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=30)
        self.hashed = False
        self.root = Root(expires=self.expires, consistent_snapshot=True)
        self.timestamp = Timestamp(expires=self.expires)
        self.snapshot = Snapshot(expires=self.expires)
        self.targets = Targets(expires=self.expires)
        self.documents: dict[str, Any] = {role: getattr(self, role) for role in TOP}
        self._published: set[str] = set()
        for role in TOP:
            self.add_key(role)
        self.publish("targets", "snapshot", "timestamp", "root")
        self.first_root = self.files["/metadata/1.root.json"]

    def add_key(
        self, role: str, signer: CryptoSigner | None = None, delegator: str = "root"
    ) -> CryptoSigner:
        """Let one more key sign for `role`, which will do so from now on."""
        signer = signer or CryptoSigner.generate_ed25519()
        self.documents[delegator].add_key(signer.public_key, role)
        self.signers.setdefault(role, []).append(signer)
        return signer

    def rotate_keys(self, *roles: str) -> None:
        """Give each of these roles a new key in place of all that it had."""
        for role in roles:
            for keyid in list(self.root.roles[role].keyids):
                self.root.revoke_key(keyid, role)
            self.signers[role] = []
            self.add_key(role)

    def delegate(
        self,
        delegator: str,
        name: str,
        paths: list[str] | None = None,
        *,
        terminating: bool = False,
        expires: datetime | None = None,
    ) -> None:
        """Let `delegator` delegate `paths` to the role `name`, with a key of its own."""
        parent = self.documents[delegator]
        parent.delegations = parent.delegations or Delegations({}, {})
        role = DelegatedRole(name, [], 1, terminating, paths or ["*"])
        parent.delegations.roles[name] = role
        self.documents.setdefault(name, Targets(expires=expires or self.expires))
        self.add_key(name, delegator=delegator)

    def add_target(
        self, path: str, data: bytes, role: str = "targets", hashes: list[str] | None = None
    ) -> TargetFile:
        """Sign for a file in `role`, and serve it below each of its hashes."""
        target = TargetFile.from_data(path, data, hashes or ["sha256"])
        self.documents[role].targets[path] = target
        folder, slash, name = path.rpartition("/")
        for digest in target.hashes.values():
            self.files[f"/targets/{folder}{slash}{digest}.{name}"] = data
        return target

    def publish(self, *roles: str) -> None:
        """Sign and serve these roles, in this order; each is listed where its version belongs."""
        for role in roles:
            document = self.documents[role]
            if role in self._published:
                document.version += 1
            self._published.add(role)
            metadata = Metadata(document)
            for signer in self.signers[role]:
                metadata.sign(signer, append=True)
            self.serve(role, metadata.to_bytes())
            if role == "snapshot":
                self.timestamp.snapshot_meta = self._listed(role)
            elif role not in TOP or role == "targets":
                self.snapshot.meta[f"{role}.json"] = self._listed(role)

    def publish_all(self, *roles: str) -> None:
        """Publish these roles, and the three that must follow any change."""
        self.publish(*(dict.fromkeys([*roles, "targets", "snapshot", "timestamp"])))

    def address(self, role: str) -> str:
        """Where the newest file of `role` is served."""
        number = "" if role == "timestamp" else f"{self.documents[role].version}."
        return f"/metadata/{number}{quote(role, '')}.json"

    def serve(self, role: str, data: bytes) -> None:
        self.files[self.address(role)] = data

    def file(self, role: str) -> bytes:
        """The newest file of `role`."""
        return self.files[self.address(role)]

    def spoil(self, role: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the newest file of `role` without signing it anew."""
        content = json.loads(self.file(role))
        change(content)
        self.serve(role, json.dumps(content).encode())

    def _listed(self, role: str) -> MetaFile:
        data = self.file(role)
        if not self.hashed:
            return MetaFile(self.documents[role].version)
        sha256 = hashlib.sha256(data).hexdigest()
        return MetaFile(self.documents[role].version, len(data), {"sha256": sha256})


@functools.cache
def tuf_client() -> types.ModuleType:
    """The client's program as a module: processes for all its runs would take minutes."""
    loader = SourceFileLoader("tuf_client", str(CLIENT))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


class Device:
    """A device that was set up with the repository's first root, or with `root`."""

    def __init__(self, folder: Path, url: str, root: bytes) -> None:
        self.metadata, self.targets, self._url = folder / "metadata", folder / "targets", url
        self.metadata.mkdir(parents=True)
        self.targets.mkdir()
        (folder / "given.json").write_bytes(root)
        assert self.run("init", str(folder / "given.json")) == 0

    def run(self, *words: str) -> int:
        """Run the client; a crash, which is no refusal, fails the test."""
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = tuf_client().main(["--metadata-dir", str(self.metadata), *words])
        self.said = said.getvalue()
        return code

    def run_apart(self, *words: str, before: tuple[str, ...] = ()) -> int:
        """The same in a process of its own, as the public suite does, started by `before`."""
        command = [*before, str(CLIENT), "--metadata-dir", str(self.metadata), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        self.said = done.stderr
        return done.returncode

    def refresh(self, *options: str) -> int:
        return self.run(*self.asking(*options))

    def asking(self, *options: str) -> tuple[str, ...]:
        """The words of a refresh."""
        return ("--metadata-url", f"{self._url}/metadata", *options, "refresh")

    def download(self, *paths: str, options: tuple[str, ...] = ()) -> int:
        names = [word for path in paths for word in ("--target-name", path)]
        places = ["--target-base-url", f"{self._url}/targets/", "--target-dir", str(self.targets)]
        url = f"{self._url}/metadata/"
        return self.run("--metadata-url", url, *names, *places, *options, "download")

    def trusted(self) -> dict[str, int]:
        """The version of each role that the device holds for proven, by its file's name."""
        return {
            path.name.removesuffix(".json"): json.loads(path.read_bytes())["signed"]["version"]
            for path in self.metadata.glob("*.json")
        }

    def held(self) -> list[bytes]:
        """What was downloaded, the oldest first."""
        paths = sorted(self.targets.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return [path.read_bytes() for path in paths]


@pytest.fixture
def repository() -> Repository:
    return Repository()


@pytest.fixture
def repository_url(repository: Repository) -> Iterator[str]:
    """The url of a server on loopback that serves the repository's files."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            repository.asked.append(self.path.removesuffix(".json"))
            data = repository.files.get(self.path)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def new_device(
    tmp_path: Path, repository: Repository, repository_url: str
) -> Callable[..., Device]:
    """`new_device(root=...)` sets one more device up."""
    count = iter(range(100))

    def make(root: bytes | None = None) -> Device:
        folder = tmp_path / f"device-{next(count)}"
        return Device(folder, repository_url, root or repository.first_root)

    return make


@pytest.fixture
def device(new_device: Callable[..., Device]) -> Device:
    return new_device()
