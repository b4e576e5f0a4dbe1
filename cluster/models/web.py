"""Links as a source: one file, or an archive, from wherever the URL leads (Civitai's among them).

The URL has passed the rules of `cluster.models.urls`, and so does every redirect on the way. The
file's name and size are the answer's.
"""

from __future__ import annotations

import email.message
import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import unquote, urlsplit

import httpx2

from cluster.models.http_read import answer_error, opened, retry_after, validator
from cluster.models.refs import ModelRef
from cluster.models.refusals import Refused, Rule
from cluster.models.sources import Absent, Listing, Opened, RemoteFile, promised
from cluster.models.urls import UrlRules, check_link

CIVITAI: Final = ("civitai.com", "civitai.green")
ARCHIVES: Final = (".zip", ".tar", ".tar.gz", ".tgz")
ONE_FILE: Final = "linked.safetensors"
"""Its name on the disk, whatever it has on its host. No convention's name: a task that names none
isn't sure of that file."""
_OF_ONE_FILE: Final = frozenset({"lora", "textual_inversion"})
_COULD_BE_A_PATH: Final = re.compile(r"\.|.*[/\\:]|.{256}", re.DOTALL)


class Web:
    """`civitai_token` is asked for anew each time; None without one."""

    name = "web"

    def __init__(
        self,
        client: httpx2.Client,
        rules: UrlRules,
        civitai_token: Callable[[], str | None] = lambda: None,
        certain: Callable[[str], bool] = lambda _url: False,
    ) -> None:
        """`certain` tells of a URL whether its host's own 404 holds for every node. Of most it
        doesn't: a link's host may be the task creator's own, and answer each node as it likes."""
        self._certain = certain
        self._client = client
        self._rules = rules
        self._civitai_token = civitai_token

    def serves(self, ref: ModelRef) -> bool:
        return ref.is_url

    def list(self, ref: ModelRef) -> Listing:
        """Asks for the first byte, because not every host answers HEAD as it answers GET."""
        url = check_link(ref.name, self._rules)
        own = self._headers(url)
        headers = own | {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
        with promised(str(ref)), self._client.stream("GET", url, headers=headers) as response:
            return self._listing(ref, url, response, anonymous=not own)

    @contextmanager
    def open(
        self, listing: Listing, file: RemoteFile, start: int, stop: int | None
    ) -> Iterator[Opened]:
        with opened(self._client, file, self._headers(file.where), start, stop) as found:
            yield found

    def _headers(self, url: str) -> dict[str, str]:
        host = urlsplit(url).hostname or ""
        token = self._civitai_token() if host.removeprefix("www.") in CIVITAI else None
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _listing(
        self, ref: ModelRef, url: str, response: httpx2.Response, anonymous: bool
    ) -> Listing:
        status = response.status_code
        if status in {404, 410}:
            # Only the host that the link names speaks for itself, one it leads on to may expire;
            # and what it says to a token another token may hear otherwise.
            same = response.url.host == httpx2.URL(url).host
            raise Absent(f"{ref}: {status}", certain=same and anonymous and self._certain(url))
        if status not in {200, 206}:
            raise answer_error(str(ref), status, retry_after(response))
        name = _file_name(response)
        size = _size(response)
        etag = validator(response)
        revision = hashlib.sha256(f"{etag}|{size}".encode()).hexdigest()[:40]
        if name.endswith(ARCHIVES):
            archive = RemoteFile("archive", size, where=url, etag=etag)
            return Listing(self.name, revision, (archive,), archive=True)
        if ref.kind not in _OF_ONE_FILE:
            raise Refused(Rule.FILE_KIND, f"{ref}: a {ref.kind} model by link has to be an archive")
        if not name.endswith(".safetensors"):
            raise Refused(Rule.FILE_KIND, f"{ref}: {ascii(name[:100])} is not a safetensors file")
        # Where the task names it, whoever looks for that name finds it.
        file = RemoteFile(ref.file or ONE_FILE, size, where=url, etag=etag)
        return Listing(self.name, revision, (file,))


def _file_name(response: httpx2.Response) -> str:
    """In lower case, as the answer says it, or as the last URL ends: only its ending is looked at.
    Raises `Refused` for one that could be a path all the same."""
    header = email.message.Message()
    header["Content-Disposition"] = response.headers.get("Content-Disposition", "")[:4096]
    try:
        said = header.get_filename() or unquote(response.url.path.rpartition("/")[2])
    except (TypeError, ValueError, LookupError, AttributeError):
        # The standard library stumbles over what strangers write there.
        raise Refused(Rule.NAME, "a Content-Disposition that can't be read") from None
    if not said.isprintable() or _COULD_BE_A_PATH.match(said):
        raise Refused(Rule.NAME, f"{ascii(said[:100])} is not a plain file's name")
    return said.lower()


def _size(response: httpx2.Response) -> int | None:
    said = response.headers.get("Content-Range", "").rpartition("/")[2]
    if response.status_code == 200:
        said = response.headers.get("Content-Length", "")
    return int(said) if re.fullmatch(r"\d{1,18}", said, re.ASCII) else None
