"""The application's calls to the relay: it brings a task's parameters, and fetches its results."""

from __future__ import annotations

from collections.abc import Mapping

import httpx
from eth_account.signers.local import LocalAccount

from cluster.core.errors import RelayError
from cluster.core.types import Commitment
from cluster.relay.signing import sign

EMPTY_ZIP = b"PK\x05\x06" + bytes(18)


class ResultRefused(Exception):
    """The relay doesn't give a result, for a reason of its own: to ask again is of no use."""


class RelayClient:
    """For the application account `account`. Raises `RelayError` and `httpx.HTTPError`."""

    def __init__(self, url: str, account: LocalAccount, http: httpx.AsyncClient) -> None:
        self._base = url.rstrip("/")
        self._account = account
        self._http = http

    async def upload(self, task: Commitment, text: str, *, checkpoint: bool) -> None:
        """Also well when the relay has them already. `checkpoint`: with an empty one."""
        fields = {"task_id_commitment": task, "task_args": text}
        response = await self._http.post(
            self._url(task),
            data={"task_args": text, **await self._proof(fields)},
            files={"checkpoint": EMPTY_ZIP} if checkpoint else None,
        )
        if not response.is_success and _refusal(response) != "Task already uploaded":
            raise RelayError(f"upload: {_refusal(response)}")

    async def result(self, task: Commitment, index: int) -> bytes | None:
        """A result file; None past the last. Raises `ResultRefused` too."""
        fields = {"task_id_commitment": task, "index": str(index)}
        response = await self._http.get(
            f"{self._url(task)}/results/{index}", params=await self._proof(fields)
        )
        if response.is_success:
            return response.content
        if response.status_code != httpx.codes.BAD_REQUEST:
            raise RelayError(f"result: HTTP {response.status_code}")
        if _refusal(response) != "File not found":
            raise ResultRefused(f"result {index}: {_refusal(response)}")
        return None

    def _url(self, task: Commitment) -> str:
        return f"{self._base}/v1/inference_tasks/{task}"

    async def _proof(self, fields: Mapping[str, str]) -> dict[str, str]:
        answer = await self._http.get(f"{self._base}/v1/now")
        at = int(answer.raise_for_status().json()["data"]["now"])
        return {
            "timestamp": str(at),
            "signature": sign(fields, at, "0x" + bytes(self._account.key).hex()),
        }


def _refusal(response: httpx.Response) -> str:
    """The relay's words; the status where it gave none."""
    try:
        message: str = response.json()["data"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"
    return message
