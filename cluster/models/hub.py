"""The Hugging Face hub as a source: listed by its own client, read by plain ranged requests.

The revision is pinned as it is listed: every file is then read at that commit, so a model that is
changed meanwhile is never put together from two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import httpx2
from huggingface_hub import HfApi, ModelInfo, constants, set_client_factory
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)

from cluster.models.http_read import answer_error, opened, retry_after
from cluster.models.refs import ModelRef
from cluster.models.selection import needed
from cluster.models.settings import HUB
from cluster.models.sources import (
    Absent,
    Denied,
    Listing,
    Opened,
    RemoteFile,
    SourceDown,
    promised,
)

LIST_SECONDS: Final = 30.0
_COMMIT: Final = re.compile(r"[0-9a-f]{40}", re.ASCII)
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NAME: Final = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)


class Hub:
    """`token` is asked for anew each time, so a changed secret is taken up; None without one.

    `certain`: the endpoint is the hub itself, not a copy that may lack what the hub has, and what
    it hasn't got may be reported. What it says to a token never is: of what is private, and not for
    this token, it says 404 as well.
    """

    name = "hub"

    def __init__(
        self,
        make_client: Callable[[], httpx2.Client],
        endpoint: str = HUB,
        token: Callable[[], str | None] = lambda: None,
        certain: bool = False,
    ) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._token = token
        self._certain = certain
        self._client = make_client()
        # Its own client too goes through what guards addresses, and asks nobody but the endpoint:
        # with its telemetry it would also ask the default one what kinds of agents there are.
        set_client_factory(make_client)
        constants.HF_HUB_DISABLE_TELEMETRY = True

    def serves(self, ref: ModelRef) -> bool:
        return not ref.is_url

    def list(self, ref: ModelRef) -> Listing:
        with promised(f"the hub doesn't answer for {ref}"):
            return self._listing(ref, self._asked(ref))

    def _asked(self, ref: ModelRef) -> ModelInfo:
        token = self._token()
        api = HfApi(endpoint=self._endpoint, token=token or False)
        try:
            return api.model_info(ref.name, files_metadata=True, timeout=LIST_SECONDS)
        except GatedRepoError as error:
            raise Denied(f"{ref} is gated on the hub") from error
        except DisabledRepoError as error:
            raise Denied(f"{ref} is disabled on the hub") from error
        except RepositoryNotFoundError as error:
            raise self._not_found(ref, error, anonymous=not token) from error
        except HfHubHTTPError as error:
            response = error.response
            raise answer_error(str(ref), response.status_code, retry_after(response)) from error
        except HFValidationError as error:
            raise Absent(f"{ref}: not a hub's id") from error

    def _listing(self, ref: ModelRef, info: ModelInfo) -> Listing:
        revision, name = info.sha, info.id
        siblings = {
            file.rfilename: file for file in info.siblings or () if isinstance(file.rfilename, str)
        }
        if not (_is(_COMMIT, revision) and _is(_NAME, name)):
            raise SourceDown(f"the hub's answer for {ref} is none")
        files = []
        for path in needed(ref, siblings.keys()):
            file = siblings[path]
            lfs = file.lfs
            size, sha256, git_sha1 = file.size, None, file.blob_id
            if lfs is not None:
                size, sha256, git_sha1 = lfs.size, lfs.sha256, None
            known = _is(_SHA256, sha256) if lfs is not None else _is(_COMMIT, git_sha1)
            if type(size) is not int or size < 0 or not known:
                raise SourceDown(f"the hub's answer for {ref} is none: {path}")
            where = f"{self._endpoint}/{name}/resolve/{revision}/{path}"
            files.append(RemoteFile(path, size, sha256, git_sha1, where))
        return Listing(self.name, str(revision), tuple(files))

    @contextmanager
    def open(
        self, listing: Listing, file: RemoteFile, start: int, stop: int | None
    ) -> Iterator[Opened]:
        token = self._token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with opened(self._client, file, headers, start, stop) as found:
            yield found

    def _not_found(
        self, ref: ModelRef, error: RepositoryNotFoundError, anonymous: bool
    ) -> Absent | Denied:
        """Without a token the hub may say 401 both of what doesn't exist and of what is private."""
        if error.response.status_code in {404, 410}:
            return Absent(f"{ref} is not on the hub", certain=self._certain and anonymous)
        return Denied(f"{ref}: the hub says {error.response.status_code}")


def _is(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
