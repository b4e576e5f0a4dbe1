"""What an operator's surroundings lack, found before anything runs: a line each, with its mending.

Each check looks for itself and fails for itself. Nothing is sent, and nothing is changed but that a
journal is made where there is none. What only a cluster can tell (the cards of other machines) is
left to the running operator.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from cluster.chain.network import Contracts
from cluster.chain.rpc import LATEST, Rpc, http_transport
from cluster.config import WEI_PER_CNX, Config
from cluster.core.errors import ChainError, ClusterError, ConfigError, DeviceFault, ModelUnavailable
from cluster.core.types import Address, NodeStatus
from cluster.identity import TREASURY, Identity, password_from
from cluster.inference import devices, nvml
from cluster.journal import Owner, SqlJournal
from cluster.models.store import ModelStore

MOST_SKEW = 60.0
"""Seconds that the relay's clock may differ from ours (protocol.md section 3)."""
LEAST_FREE = 2**30
"""Bytes for results and the journal."""
LOOKED_AT = 64
"""Accounts whose stakes and balances are read, at most."""
REACH_SECONDS = 5.0


class Level(enum.Enum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """`mend` says what to do; empty where nothing is to be done."""

    name: str
    level: Level
    found: str
    mend: str = ""

    def plain(self) -> Mapping[str, str]:
        return asdict(self) | {"level": self.level.value}


def ok(name: str, found: str) -> Check:
    return Check(name, Level.OK, found)


def fail(name: str, found: str, mend: str) -> Check:
    return Check(name, Level.FAIL, found, mend)


def warn(name: str, found: str, mend: str) -> Check:
    return Check(name, Level.WARN, found, mend)


def examine(
    config: Config,
    environment: Mapping[str, str],
    clock: Callable[[], float],
    prompt: Callable[[], str] | None = None,
) -> list[Check]:
    """Every check, in the order in which an operator would mend them."""
    identity, key = check_key(config, environment, prompt)
    found = [key, *check_earnings(config, identity)]
    found += [*check_journal(config, identity, clock), *check_disk(config)]
    found += [check_models(config), check_cards(config), check_ray(config)]
    found += asyncio.run(_network(config, identity, clock))
    return found


async def _network(
    config: Config,
    identity: Identity | None,
    clock: Callable[[], float],
) -> list[Check]:
    found: list[Check] = []
    reached: Rpc | None = None
    for url in (config.network.rpc_url, *config.network.fallback_rpc_urls):
        transport = http_transport(url, REACH_SECONDS)
        rpc = Rpc(transport.send, transport.close)
        check = await check_endpoint(config, rpc, transport.name)
        found.append(check)
        if check.level is Level.OK and reached is None:
            reached = rpc
        else:
            await rpc.close()
    found.append(await check_relay(config, clock))
    if reached is not None:
        with contextlib.suppress(ChainError):
            if identity is not None:
                found.append(await check_balances(config, reached, identity))
        await reached.close()
    return found


def check_key(
    config: Config, environment: Mapping[str, str], prompt: Callable[[], str] | None = None
) -> tuple[Identity | None, Check]:
    settings = config.identity
    if settings.key_file is None:
        return None, fail("key", "none is named", "crynux-cluster keys new FILE makes one")
    try:
        identity = Identity.load(
            settings.key_file, lambda: password_from(settings.password_file, environment, prompt)
        )
    except ConfigError as error:
        return None, fail("key", str(error), "mend the file, or identity in the configuration")
    found = f"{settings.key_file}; its treasury is {identity.address(TREASURY)}"
    if settings.keystore_file is None:
        mend = "crynux-cluster keys import FILE --from PATH encrypts it"
        return identity, warn("key", f"{found}; in plain text", mend)
    return identity, ok("key", found)


def check_earnings(config: Config, identity: Identity | None) -> list[Check]:
    """Whether they go where they can stay."""
    beneficiary = config.fleet.beneficiary
    if identity is None or beneficiary is None:
        return []
    try:
        indexes = range(1, config.identity.accounts + 1)
        config.fleet.check_accounts({index: identity.address(index) for index in indexes})
    except ConfigError as error:
        return [fail("earnings", str(error), "change fleet.beneficiary")]
    return [ok("earnings", f"go to {beneficiary}")]


def check_journal(
    config: Config, identity: Identity | None, clock: Callable[[], float]
) -> list[Check]:
    """Whether it is there for us, can be written, and who acts."""
    try:
        with contextlib.closing(SqlJournal(config.journal.url)) as journal:
            if identity is not None:
                addresses = config.network.contracts.addresses
                treasury = identity.address(TREASURY)
                journal.bind(Owner(config.network.chain_id, *addresses, treasury=treasury))
            holder, seconds = journal.holder(clock())
    except ConfigError as error:
        return [fail("journal", str(error), "mend journal.url, or the database")]
    if holder:
        return [ok("journal", f"written; {holder} holds the lease for {seconds:.0f} s more")]
    return [ok("journal", "can be written; nobody holds the lease")]


def check_disk(config: Config) -> list[Check]:
    spare = int(config.models.spare_gb * 2**30)
    places = [
        ("artifacts.path", config.artifacts.path, LEAST_FREE),
        ("models.root", config.models.root, max(LEAST_FREE, spare)),
    ]
    return [_disk(key, path, least) for key, path, least in places]


def _disk(key: str, path: Path, least: int) -> Check:
    there = next(each for each in (path, *path.parents) if each.exists())
    try:
        free = shutil.disk_usage(there).free
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return fail(key, f"can't write in {there}: {error.strerror}", f"chown it, or change {key}")
    words = f"{path}: {free / 2**30:.1f} GB free"
    if free < least:
        return warn(key, words, f"free some: {least / 2**30:.1f} GB are wanted")
    return ok(key, words)


def check_models(config: Config) -> Check:
    store = ModelStore(config.models.root)
    lacking: list[str] = []
    for ref in sorted(config.models.pinned, key=str):
        try:
            store.find(ref)
        except (ModelUnavailable, ClusterError):
            lacking.append(f"{ref.kind}:{ref.name}")
    if not lacking:
        return ok("models", f"{len(config.models.pinned)} configured, all on this disk")
    words = f"not on this disk: {', '.join(lacking)}"
    if not config.models.sources:
        return fail("models", words, "put them there, or name models.sources")
    return warn("models", words, f"crynux-cluster models fetch {lacking[0]}, or wait for it")


def check_cards(config: Config) -> Check:
    """This machine's; those of others show in the running operator's status."""
    if config.ray.simulated_gpus:
        count = sum(each.count for each in config.ray.simulated_gpus)
        return ok("GPUs", f"{count} simulated ones: a devnet")
    try:
        cards = devices.survey(config.ray.platform)
    except nvml.NoDriver as error:
        if config.ray.address is not None:
            return ok("GPUs", f"none on this machine ({error}); the cluster's machines have theirs")
        return fail("GPUs", str(error), "install the NVIDIA driver; nvidia-smi must list the cards")
    except DeviceFault as error:
        return fail("GPUs", str(error), "look at nvidia-smi and dmesg")
    broken = [card.problem for card in cards if card.device is None]
    usable = [card.device.gpu_class.name for card in cards if card.device is not None]
    if not usable:
        return fail("GPUs", "; ".join(broken) or "the driver has no card", "look at nvidia-smi")
    words = f"{len(usable)}: {', '.join(sorted(set(usable)))}"
    return (
        warn("GPUs", f"{words}; {'; '.join(broken)}", "look at nvidia-smi")
        if broken
        else ok("GPUs", words)
    )


def check_ray(config: Config) -> Check:
    address = config.ray.address
    if address is None or address == "auto":
        return _check_port(config)
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except OSError as error:
        return fail("Ray", f"nothing answers at {address}: {error}", "start it, or ray.address")
    return ok("Ray", f"{address} answers")


def _check_port(config: Config) -> Check:
    host, port = config.serve.host, config.serve.port
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        words = f"{host}:{port} can't be listened on ({error.strerror})"
        return warn("API", words, "the operator is up already, or choose another serve.port")
    return ok("API", f"{host}:{port} is free")


async def check_endpoint(config: Config, rpc: Rpc, name: str) -> Check:
    """One RPC endpoint: reached, of the right chain, with the right contracts on it."""
    title = f"chain at {name}"
    try:
        contracts = Contracts.at(rpc, *config.network.contracts.addresses)
        await contracts.check(rpc, config.network.chain_id)
        head = await rpc.head()
    except ConfigError as error:
        return fail(title, str(error), "mend section network of the configuration")
    except ChainError as error:
        return fail(title, str(error), "check network.rpc_url and the network between")
    return ok(title, f"chain {config.network.chain_id}, block {head.number}, contracts are right")


async def check_relay(config: Config, clock: Callable[[], float]) -> Check:
    url = config.network.relay_url
    try:
        async with httpx.AsyncClient(timeout=REACH_SECONDS, follow_redirects=False) as http:
            before = clock()
            answer = await http.get(f"{url}/v1/now")
            after = clock()
        there = float(answer.json()["data"]["now"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        what = type(error).__name__
        return fail("relay", f"{url}: {what}", "check network.relay_url and the network between")
    skew = there - (before + after) / 2
    if abs(skew) > MOST_SKEW:
        words = f"its clock is {skew:+.0f} s from this machine's, and refuses more than 60"
        return fail("relay", words, "set this machine's clock (chrony, systemd-timesyncd)")
    return ok("relay", f"{url} answers; its clock is {skew:+.1f} s from ours")


async def check_balances(config: Config, rpc: Rpc, identity: Identity) -> Check:
    """The treasury against what all configured accounts may still need of it."""
    fleet, stake = config.fleet, config.network.stake
    count = min(config.identity.accounts, LOOKED_AT)
    treasury = identity.address(TREASURY)
    has, *needs = await asyncio.gather(
        rpc.balance(treasury, LATEST),
        *(_need(config, rpc, identity.address(index)) for index in range(1, count + 1)),
    )
    budget = fleet.stake_budget
    most = count if budget is None else min(count, budget // stake)
    need = sum(sorted(needs)[:most])
    words = f"the treasury {treasury} has {has / WEI_PER_CNX:g} CNX"
    if has >= need:
        return ok("balances", f"{words}; {most} accounts may need {need / WEI_PER_CNX:g} more")
    some = sum(1 for upto in range(1, most + 1) if sum(sorted(needs)[:upto]) <= has)
    return warn(
        "balances",
        f"{words}, enough for {some} of {most} accounts",
        f"send it {(need - has) / WEI_PER_CNX:g} CNX, or lower identity.accounts",
    )


async def _need(config: Config, rpc: Rpc, account: Address) -> int:
    """What the account lacks, in wei, to be joined and to pay for its transactions."""
    contracts = Contracts.at(rpc, *config.network.contracts.addresses)
    block = (await rpc.head()).number
    info, balance = await asyncio.gather(
        contracts.node.info(account, block), rpc.balance(account, LATEST)
    )
    own = config.fleet.gas_target
    if info.status is NodeStatus.QUIT:
        own = type(own)(own + config.network.stake)
    return max(0, own - balance)


def worst(checks: Iterable[Check]) -> Level:
    levels = {check.level for check in checks}
    return next((each for each in (Level.FAIL, Level.WARN) if each in levels), Level.OK)
