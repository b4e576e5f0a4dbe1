"""A local hub: as much of the Hugging Face API as its real client asks for, over loopback.

It names small files by git's hash and weights by sha256, leads from `resolve` to another path for
weights as the real one leads to its CDN, and breaks on command (`faults`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from urllib.parse import unquote, urlsplit

from devnet.faulty_http import Answer, FaultyServer

LEGACY = "legacy"


@dataclass
class _Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    head: str = ""
    gated: bool = False
    private: bool = False

    def commit(self, files: Mapping[str, bytes]) -> str:
        text = json.dumps({k: hashlib.sha256(v).hexdigest() for k, v in sorted(files.items())})
        self.head = hashlib.sha1(f"{len(self.commits)}{text}".encode()).hexdigest()  # noqa: S324
        self.commits[self.head] = dict(files)
        return self.head


class Hub(FaultyServer):
    """`token` opens gated and private repositories."""

    def __init__(self, token: str = "hf_secret") -> None:  # noqa: S107 - ours
        super().__init__()
        self.token = token
        self._repos: dict[str, _Repo] = {}
        self._aliases: dict[str, str] = {}

    @property
    def cdn(self) -> str:
        """Another origin, as the real hub's is."""
        return f"http://localhost:{self.port}"

    def add(
        self,
        repo: str,
        files: Path | Mapping[str, bytes],
        *,
        gated: bool = False,
        private: bool = False,
    ) -> str:
        """The commit's id."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes()
                for path in files.rglob("*")
                if path.is_file()
            }
        made = self._repos[repo] = _Repo(gated=gated, private=private)
        return made.commit(files)

    def change(self, repo: str, path: str, content: bytes) -> str:
        """A new commit; what was before is still there under its id."""
        known = self._repos[repo]
        return known.commit(known.commits[known.head] | {path: content})

    def alias(self, old: str, repo: str) -> None:
        """An old name, which leads to the new one."""
        self._aliases[old] = repo

    # --- answers ---------------------------------------------------------------------------------

    def respond(self, method: str, target: str, headers: Mapping[str, str]) -> Answer:
        path = unquote(urlsplit(target).path).lstrip("/")
        authorized = headers.get("Authorization") == f"Bearer {self.token}"
        if path.startswith("cdn/"):
            return self._cdn(path)
        if path.startswith("api/models/"):
            return self._info(path.removeprefix("api/models/"), authorized)
        match = re.fullmatch(r"(.+?)/resolve/([^/]+)/(.+)", path)
        if match:
            return self._resolve(match[1], match[2], match[3], authorized)
        return Answer(HTTPStatus.NOT_FOUND)

    def _open(self, repo: str, authorized: bool) -> _Repo | Answer:
        found = self._repos.get(repo)
        if found is None or (found.private and not authorized):
            # Without a token the hub doesn't say which of the two it is.
            status = HTTPStatus.NOT_FOUND if authorized else HTTPStatus.UNAUTHORIZED
            return Answer(status, headers={"X-Error-Code": "RepoNotFound"})
        return found

    def _info(self, path: str, authorized: bool) -> Answer:
        repo, _, revision = path.partition("/revision/")
        if repo in self._aliases:
            return Answer(307, headers={"Location": f"/api/models/{self._aliases[repo]}"})
        found = self._open(repo, authorized)
        if isinstance(found, Answer):
            return found
        commit = found.head if revision in {"", "main"} else revision
        if commit not in found.commits:
            return Answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        siblings = [_sibling(name, content) for name, content in found.commits[commit].items()]
        said = {"id": repo, "modelId": repo, "sha": commit, "private": found.private,
                "gated": "manual" if found.gated else False, "siblings": siblings}  # fmt: skip
        return Answer(200, json.dumps(said).encode(), {"Content-Type": "application/json"})

    def _resolve(self, repo: str, revision: str, name: str, authorized: bool) -> Answer:
        found = self._open(repo, authorized)
        if isinstance(found, Answer):
            return found
        if found.gated and not authorized:
            return Answer(403, headers={"X-Error-Code": "GatedRepo"})
        commit = found.head if revision == "main" else revision
        if commit not in found.commits:
            return Answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        content = found.commits[commit].get(name)
        if content is None:
            return Answer(404, headers={"X-Error-Code": "EntryNotFound"})
        said = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not name.endswith(".safetensors"):
            return Answer(200, content, said | {"ETag": f'"{_git_sha1(content)}"'})
        sha256 = hashlib.sha256(content).hexdigest()
        said |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
        return Answer(302, headers=said | {"Location": f"{self.cdn}/cdn/{repo}/{commit}/{name}"})

    def _cdn(self, path: str) -> Answer:
        for repo, known in self._repos.items():
            for commit, files in known.commits.items():
                for name, content in files.items():
                    if path == f"cdn/{repo}/{commit}/{name}":
                        tag = hashlib.md5(content).hexdigest()  # noqa: S324
                        return Answer(200, content, {"ETag": f'"{tag}"'})
        return Answer(HTTPStatus.NOT_FOUND)


def _sibling(name: str, content: bytes) -> dict[str, object]:
    said: dict[str, object] = {"rfilename": name, "size": len(content)}
    if name.endswith(".safetensors"):
        sha256 = hashlib.sha256(content).hexdigest()
        lfs = {"sha256": sha256, "size": len(content), "pointerSize": 134}
        return said | {"blobId": _git_sha1(sha256.encode()), "lfs": lfs}
    return said | {"blobId": _git_sha1(content)}


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324
