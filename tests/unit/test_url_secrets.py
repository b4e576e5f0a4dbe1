"""Credentials in URLs, and what only looks a little like them."""

from __future__ import annotations

import time

import pytest

from cluster import logs, url_secrets

HEX = "0123456789abcdef" * 2
MIXED = "aB3dE_6gH1jK2mN4pQ5rS7tU8vW9-yZ0"
UUID = "01234567-89ab-cdef-0123-456789abcdef"
TASK = "0x" + "1f" * 32


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:pw@host/db", "postgresql://*@host/db"),
        ("postgresql://me@host/db", "postgresql://*@host/db"),
        ("postgresql://me:p/w?#@host/db", "postgresql://*@host/db"),
        ("redis://:pw@host:6379/0", "redis://*@host:6379/0"),
        ("https://me:p@ss@host/x", "https://*@host/x"),
        ("https://rpc.example/?api_key=abc", "https://rpc.example/?api_key=*"),
        ("https://h.example/a?x=1&token=abc&y=2", "https://h.example/a?x=1&token=*&y=2"),
        ("https://h.example/a?dkey=abc#top", "https://h.example/a?dkey=*#top"),
        ("wss://h.example/?access_token=a%2Fb", "wss://h.example/?access_token=*"),
        ("https://h.example/cb#access_token=abc", "https://h.example/cb#access_token=*"),
        ("GET /metrics?token=abc HTTP/1.1", "GET /metrics?token=* HTTP/1.1"),
        ("https://a.example/x?sig=abc&sv=1", "https://a.example/x?sig=*&sv=1"),
        (
            "https://s3.example/f?X-Amz-Credential=a&X-Amz-Date=b&X-Amz-Signature=c",
            "https://s3.example/f?X-Amz-Credential=*&X-Amz-Date=b&X-Amz-Signature=*",
        ),
        (f"https://main.example/v3/{HEX}", "https://main.example/v3/*"),
        (
            f"'401' for url 'https://main.example/v2/{MIXED}'",
            "'401' for url 'https://main.example/v2/*'",
        ),
        (f"https://go.example/{HEX}/ext/bc/C/rpc", "https://go.example/*/ext/bc/C/rpc"),
        (f"wss://rpc.example/eth/{HEX * 2}", "wss://rpc.example/eth/*"),
        (f"https://rpc.example/near/{UUID}: away", "https://rpc.example/near/*: away"),
        (f"https://rpc.example/chain/{MIXED}", "https://rpc.example/chain/*"),
    ],
)
def test_what_is_secret_is_hidden(text: str, shown: str) -> None:
    found = url_secrets.hide(text, "*")
    assert found == shown
    for secret in ("pw", "abc", HEX, MIXED, UUID):
        assert secret not in found


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:8545/x, and mail to me@example",
        "https://host:8443/@org/package",
        f"https://relay.example/v1/inference_tasks/{TASK}/results",
        f"https://explorer.example/tx/{TASK}",
        "https://hub.example/org/stable-diffusion-v1-5-inpainting-fp16/resolve/main/model.safetensors",
        "https://hub.example/org/Qwen2-VL-72B-Instruct-GPTQ-Int4-2024",
        f"https://hub.example/api/models/org/name/revision/{'ab12' * 10}",
        f"https://hub.example/org/name/resolve/{'ab12' * 10}/config.json",
        "https://host.example/a.safetensors?type=Model&format=SafeTensor&keyword=cat",
        f"a line without one: {HEX}",
        "sqlite:////var/lib/crynux/journal.db",
        "s3://bucket/prefix/models",
    ],
)
def test_what_tells_something_stays(text: str) -> None:
    assert url_secrets.hide(text, "*") == text


def test_log_lines_are_without_them() -> None:
    line = logs.scrub(f"https://a.example/v3/{HEX} then https://b.example/?api_key=abc")
    assert line == "https://a.example/v3/[redacted] then https://b.example/?api_key=[redacted]"


@pytest.mark.parametrize(
    "text",
    [
        "://" + "a:" * 50_000,
        "://a:b" * 20_000,
        "?key" * 25_000,
        "?" + "key" * 30_000,
        "://a/" + "x" * 100_000,
        "://a/v1/" + "x1" * 50_000,
        "://a" + "/xxxxxxxxxxxxxxxxxxxxxxxx" * 4_000,
    ],
    ids=range(7),
)
def test_no_text_takes_long(text: str) -> None:
    began = time.process_time()
    url_secrets.hide(text, "*")
    assert time.process_time() - began < 1.0
