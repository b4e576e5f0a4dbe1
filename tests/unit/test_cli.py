from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from rich.console import Console

import actors  # noqa: F401 (its modules are planted)
import cluster
import devnet  # noqa: F401 (its modules are planted)
import serve_app
from cluster.api_client import ApiClient
from cluster.cli import main
from cluster.config import Config
from cluster.core.errors import ClusterError, ConfigError
from cluster.core.types import GpuState
from cluster.status import (
    AccountStatus,
    ChainView,
    DownloadView,
    GpuClassView,
    GpuStatus,
    IdentityView,
    RelayView,
    Status,
    StoreStatus,
    TaskView,
    Totals,
    judged,
)
from cluster.status_view import cnx, render
from cluster.steering import ClearQuarantine
from tests.unit.fake_nvml import GIB, FakeCard, FakeNvml, error

TASK = "0x" + "ab" * 32
CONFIG = """\
network:
  rpc_url: http://127.0.0.1:8545
  chain_id: 1
  contracts: {task: "0x01", node: "0x02", qos: "0x03"}
  relay_url: http://127.0.0.1:9000
"""
ADDRESS = '"0x5FbDB2315678afecb367f032d93F642f64180aa3"'
STATUS = judged(
    Status(
        version="1",
        config_digest="d",
        now=100.0,
        acting=True,
        epoch=1,
        identity=IdentityView(treasury="0xTreasury"),
        chain=ChainView(reached=True, chain_id=31337, block=5),
        relay=RelayView(reached=False, error="refused"),
        accounts=(
            AccountStatus(
                index=1,
                address="0xNode",
                status="busy",
                gpu_class=GpuClassView(name="Card [red]+docker", vram=8),
                stake=str(400 * 10**18),
                current_task=TASK,
            ),
        ),
        gpus=(
            GpuStatus(
                gpu_id="n/0",
                ray_node="n",
                name="Card",
                vram=8,
                simulated=True,
                state=GpuState.BUSY,
                task=TASK,
                step=3,
                steps=20,
            ),
        ),
        tasks=(
            TaskView(
                commitment=TASK,
                account="0xNode",
                type="SD",
                status="ParametersUploaded",
                stage="answerable",
                progress="running",
                action="Wait: computing",
                gpu_id="n/0",
                seen_at=90.0,
                fee=str(25 * 10**16),
            ),
        ),
        totals=Totals(paid_wei=str(15 * 10**17), tasks={"EndSuccess": 2}),
        problems=("the disk is nearly full",),
    )
)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def transport(handle: Callable[[httpx.Request], httpx.Response]) -> httpx.MockTransport:
    return httpx.MockTransport(handle)


def plant(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    """A stand-in for a module that a verb imports when it is called."""
    module = ModuleType(name)
    for function, value in functions.items():
        setattr(module, function, value)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    monkeypatch.setattr(sys.modules[parent], child, module, raising=False)


@pytest.mark.parametrize(
    "verb",
    [
        (),
        ("up",),
        ("status",),
        ("gpus",),
        ("gpus", "clear"),
        ("devnet",),
        ("devnet", "up"),
        ("devnet", "down"),
        ("devnet", "send"),
        ("devnet", "demo"),
    ],
)
def test_every_verb_has_help(capsys: pytest.CaptureFixture[str], verb: tuple[str, ...]) -> None:
    assert run(*verb, "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: crynux-cluster {' '.join(verb)}".rstrip())
    assert "\b" not in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"crynux-cluster {cluster.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [("fly",), ("up",), ("status", "--ulr", "x"), ("devnet", "x")]
)
def test_what_was_typed_wrong(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert run(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_wrong_configuration_is_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, "cluster.runtime", up=lambda config: 0)
    file = tmp_path / "c.yaml"
    file.write_text(CONFIG)
    assert run("up", "--config", str(file)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"crynux-cluster: {file}: network.contracts.task: expected an address")
    assert run("up", "--config", str(tmp_path / "none.yaml")) == 2


def test_up_passes_the_configuration_and_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Config] = []

    def up(config: Config, source: Path, build_api: Callable[[Config], object]) -> int:
        seen.append(config)
        assert source == file
        assert build_api is serve_app.build
        return 3

    plant(monkeypatch, "cluster.runtime", up=up)
    file = tmp_path / "c.yaml"
    address = "0x5FbDB2315678afecb367f032d93F642f64180aa3"
    for short in ("0x01", "0x02", "0x03"):
        file.write_text(file.read_text() if file.exists() else CONFIG)
        file.write_text(file.read_text().replace(f'"{short}"', f'"{address}"'))
    assert run("up", "-c", str(file)) == 3
    assert seen[0].network.contracts.node == address


@pytest.mark.parametrize(("error", "code"), [(ConfigError, 2), (ClusterError, 1)])
def test_errors_from_below_are_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: type[ClusterError],
    code: int,
) -> None:
    def down(directory: Path) -> None:
        raise error(f"{directory}:\n no devnet here")

    plant(monkeypatch, "devnet.network", down=down)
    assert run("devnet", "down", "--dir", "x") == code
    assert capsys.readouterr().err == "crynux-cluster: x: no devnet here\n"


def test_the_devnet_verbs_pass_what_was_typed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[Any, ...]] = []

    def up(directory: Path, **options: Any) -> None:
        calls.append((directory, options))

    def send(file: Path, directory: Path) -> int:
        calls.append((file, directory))
        return 1

    def demo(output: Path, svg: Path | None) -> int:
        calls.append((output, svg))
        return 0

    plant(monkeypatch, "devnet.network", up=up, send=send)
    plant(monkeypatch, "devnet.demo", main=demo)
    assert run("devnet", "up", "--block-time", "0.5", "--timeout", "20", "--rpc", "http://x") == 0
    file = tmp_path / "tasks.yaml"
    file.write_text("")
    assert run("devnet", "send", str(file)) == 1
    assert run("devnet", "demo", "--output", "out") == 0
    assert calls == [
        (
            Path(".devnet/run"),
            {"block_time": 0.5, "task_timeout": 20, "rpc": "http://x", "models": None},
        ),
        (file, Path(".devnet/run")),
        (Path("out"), None),
    ]


def test_status_is_fetched() -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == "http://h:1/v1/status"
        return httpx.Response(200, json=STATUS.model_dump(mode="json"))

    assert ApiClient("http://h:1/", transport=transport(handle)).get("/v1/status", Status) == STATUS


def test_the_token_goes_along(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("0123456789abcdef\n")

    def handle(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == "Bearer 0123456789abcdef"
        assert request.url.query == b"limit=3"
        return httpx.Response(200, json=[])

    client = ApiClient("http://h", file, transport(handle))
    assert client.raw("/v1/audit", limit=3) == []
    assert "0123" not in repr(client)


def _refuse(_request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused")


@pytest.mark.parametrize(
    ("handle", "says"),
    [
        (_refuse, "nothing answers at http://h"),
        (lambda _: httpx.Response(503, json={"detail": "it is away"}), "it is away"),
        (lambda _: httpx.Response(200, text="<html>"), "isn't JSON"),
        (lambda _: httpx.Response(404, json={"detail": "Not Found"}), "HTTP 404"),
        (lambda _: httpx.Response(200, json=[1]), "no answer of version"),
        (lambda _: httpx.Response(429, json={"detail": "too many"}), "too many"),
    ],
)
def test_a_status_that_cannot_be_had(
    handle: Callable[[httpx.Request], httpx.Response], says: str
) -> None:
    with pytest.raises(ClusterError, match=says) as caught:
        ApiClient("http://h", transport=transport(handle)).get("/v1/status", Status)
    assert not isinstance(caught.value, ConfigError)


@pytest.mark.parametrize(
    ("code", "says"), [(401, "--token-file"), (403, "--token-file"), (404, "^it says so$")]
)
def test_what_was_typed_is_wrong(code: int, says: str) -> None:
    client = ApiClient(
        "http://h",
        transport=transport(lambda _: httpx.Response(code, json={"detail": "it says so"})),
    )
    with pytest.raises(ConfigError, match=says):
        client.raw("/v1/tasks/x")


def test_a_refused_connection_is_one_line_and_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", lambda _self, r: _refuse(r))
    assert run("status", "--url", "http://127.0.0.1:1") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "nothing answers at http://127.0.0.1:1" in err
    assert run("status", "--url", "nonsense") == 2


@pytest.mark.parametrize("as_json", [True, False])
def test_status_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    monkeypatch.setattr(ApiClient, "raw", lambda *_, **__: STATUS.model_dump(mode="json"))
    monkeypatch.setenv("COLUMNS", "160")
    assert run("status", *(["--json"] if as_json else [])) == 0
    out = capsys.readouterr().out
    if as_json:
        assert Status.model_validate_json(out) == STATUS
    else:
        assert "ready" in out


def test_the_tables_hold_what_an_operator_looks_for() -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(STATUS))
    text = console.export_text()
    for word in (
        "chain 31337 at block 5",
        "0xTreasury",
        "the relay is not reached: refused",
        "Card [red]+docker 8 GB",
        "Card 8 GB (simulated)",
        "3/20",
        "0xabababab…",
        "Wait: computing",
        "10.0",
        "0.25",
        "paid 1.5 CNX",
        "2 EndSuccess",
        "slashed 0",
        "problem: the disk is nearly full",
    ):
        assert word in text, word


def test_downloads_and_what_cannot_be_had_are_shown() -> None:
    download = DownloadView(
        model="base:acme/large",
        source="hub",
        done_bytes=1_500_000,
        total_bytes=3_000_000_000,
        bytes_per_second=2_500_000.0,
        seconds_left=1199.4,
        background=False,
    )
    store = StoreStatus(
        ray_node="0123456789ab",
        models=1,
        used_bytes=0,
        downloads=(download,),
        failed={"lora:acme/[red]": "gated"},
        trouble="the store in /m[x] can't be written",
    )
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(STATUS.model_copy(update={"stores": (store,)})))
    text = console.export_text()
    for word in (
        "01234567 ",
        "base:acme/large",
        "1.5 MB of 3.0 GB, 2.5 MB/s",
        "1199 s",
        "lora:acme/[red]",
        "gated",
        "the store in /m[x] can't be written",
    ):
        assert word in text, word


# --- gpus -----------------------------------------------------------------------------------------


def gpus(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None, *options: str) -> int:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setenv("COLUMNS", "160")
    return run("gpus", *options)


def test_gpus_are_listed_as_the_network_will_see_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = FakeCard(uuid="GPU-2222", handle=error("GpuIsLost"))
    hot = FakeCard(name="NVIDIA L4 [x]", temperature=91, uncorrected=2, reasons=0x40)
    bare = FakeCard(
        uuid="GPU-3", uncorrected=error("NotSupported"), corrected=error("NoPermission")
    )
    assert gpus(monkeypatch, FakeNvml(hot, lost, bare), "--platform", "linux") == 0
    out = capsys.readouterr().out.splitlines()
    (first,) = [line for line in out if "GPU-1111" in line]
    (third,) = [line for line in out if "GPU-3" in line]
    assert any(line.startswith("card 1: the card is gone") for line in out)
    for word in ("NVIDIA L4 [x]+linux", "24", "20.0", "91", "2 + 0 corrected", "GPU-1111"):
        assert word in first, word
    assert "thermal slowdown by the card" in first
    assert "corrected" not in third


def test_gpus_in_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus(monkeypatch, FakeNvml(FakeCard(temperature=error("NotSupported"))), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "gpus": [
            {
                "index": 0,
                "name": "NVIDIA GeForce RTX 4090+docker",
                "vram": 24,
                "uuid": "GPU-1111",
                "total_memory": 24 * GIB,
                "free_memory": 20 * GIB,
                "temperature": None,
                "ecc_corrected": 0,
                "ecc_uncorrected": 0,
                "throttling": [],
                "problem": None,
            }
        ]
    }


@pytest.mark.parametrize(
    ("nvml", "why"),
    [
        (None, "nvidia-ml-py is not installed"),
        (FakeNvml(init=error("DriverNotLoaded")), "no NVIDIA driver is loaded"),
        (FakeNvml(), "the driver has no card"),
    ],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_no_gpu_is_said_plainly_and_is_no_failure(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    nvml: FakeNvml | None,
    why: str,
    as_json: bool,
) -> None:
    assert gpus(monkeypatch, nvml, *(["--json"] if as_json else [])) == 0
    out = capsys.readouterr().out
    if as_json:
        found = json.loads(out)
        assert found["gpus"] == []
        out = found["why_none"]
    assert out.startswith("no NVIDIA GPU on this machine: ")
    assert why in out


def test_the_cpu_is_listed_where_it_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpus(monkeypatch, None, "--cpu", "--json") == 0
    (cpu,) = json.loads(capsys.readouterr().out)["gpus"]
    assert (cpu["name"], cpu["uuid"]) == ("CPU+docker", "cpu")
    assert gpus(monkeypatch, FakeNvml(FakeCard()), "--cpu") == 0
    out = capsys.readouterr().out
    assert "CPU+docker" in out
    assert "GPU-1111" in out


def test_a_driver_that_fails_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpus(monkeypatch, FakeNvml(init=error("LibRmVersionMismatch"))) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("crynux-cluster: NVML doesn't start")


def test_clear_passes_what_was_typed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[str, str]] = []

    def perform(config: Config, order: ClearQuarantine) -> str:
        calls.append((config.ray.namespace, order.card))
        if order.card == "nobody":
            raise ConfigError("no card is known as nobody")
        return f"{order.card} is out"

    plant(monkeypatch, "actors.client", perform=perform)
    file = tmp_path / "c.yaml"
    file.write_text(
        CONFIG.replace('"0x01"', ADDRESS).replace('"0x02"', ADDRESS).replace('"0x03"', ADDRESS)
    )
    assert run("gpus", "clear", "node-1", "--config", str(file)) == 0
    assert capsys.readouterr().out == "node-1 is out\n"
    assert run("gpus", "clear", "nobody", "-c", str(file)) == 2
    assert capsys.readouterr().err == "crynux-cluster: no card is known as nobody\n"
    assert calls == [("crynux", "node-1"), ("crynux", "nobody")]
    assert run("gpus", "clear", "node-1") == 2
    assert run("gpus", "clear", "-c", str(file)) == 2


@pytest.mark.parametrize(
    ("wei", "text"), [("0", "0"), ("1", "0"), (str(10**18), "1"), (str(1234 * 10**18), "1,234")]
)
def test_amounts_are_readable(wei: str, text: str) -> None:
    assert cnx(wei) == text
