"""What an operator's surroundings lack, found before anything runs: a line each, with its mending.

Each check looks for itself and fails for itself. Nothing is sent, and nothing is changed. What only
a cluster can tell (the cards of other machines) is left to the running operator.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

from cluster.chain.network import Contracts
from cluster.chain.rpc import Rpc, http_transport
from cluster.checks import Check, Level, fail, ok, warn
from cluster.config import Config
from cluster.core.errors import ChainError, ClusterError, ConfigError, DeviceFault, ModelUnavailable
from cluster.doctor_journal import check_journal, used_accounts
from cluster.doctor_money import check_money
from cluster.identity import TREASURY, Identity, password_from
from cluster.inference import devices, nvml
from cluster.journal_engine import file_of
from cluster.models.store import ModelStore

MOST_SKEW = 60.0
"""Seconds that the relay's clock may differ from ours (protocol.md section 3)."""
LEAST_FREE = 2**30
"""Bytes for results and the journal."""
REACH_SECONDS = 5.0
OWN_MEMORY = 2
"""GiB of a machine's memory that aren't for models, as the chart counts."""
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


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
    cards, count = check_cards(config)
    found += [check_models(config), cards, *check_memory(config), check_ray(config, environment)]
    found += asyncio.run(_network(config, identity, clock, count))
    return found


async def _network(
    config: Config,
    identity: Identity | None,
    clock: Callable[[], float],
    cards: int | None,
) -> list[Check]:
    found: list[Check] = []
    reached: Rpc | None = None
    for each in config.network.all_endpoints:
        transport = http_transport(each.url, REACH_SECONDS)
        rpc = Rpc(transport.send, transport.close)
        check = await check_endpoint(config, rpc, transport.name)
        found.append(check)
        if check.level is Level.OK and reached is None:
            reached = rpc
        else:
            await rpc.close()
    found.append(await check_relay(config, clock))
    if reached is not None:
        if identity is not None:
            used = used_accounts(config)
            found += await check_money(config, reached, identity, cards, used)
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


def check_disk(config: Config) -> list[Check]:
    spare = int(config.models.spare_gb * 2**30)
    places = [
        ("artifacts.path", config.artifacts.path, LEAST_FREE),
        ("models.root", _store_of(config), max(LEAST_FREE, spare)),
    ]
    journal = file_of(config.journal.url)
    if journal is not None:
        places.append(("journal.url", journal.parent, LEAST_FREE))
    return [_disk(key, path, least) for key, path, least in places]


def _store_of(config: Config) -> Path:
    """What is written of the models: another user may have made it."""
    root = config.models.root
    return ModelStore(root).disk.base if config.models.sources else root


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


def check_cards(config: Config) -> tuple[Check, int | None]:
    """This machine's, and how many the cluster has; None where other machines may have some, which
    show in the running operator's status."""
    if config.ray.simulated_gpus:
        count = sum(each.count for each in config.ray.simulated_gpus)
        return ok("GPUs", f"{count} simulated ones: a devnet"), count
    try:
        cards = devices.survey(config.ray.platform)
    except nvml.NoDriver as error:
        if config.ray.address is not None:
            words = f"none on this machine ({error}); the cluster's machines have theirs"
            return ok("GPUs", words), None
        mend = "install the NVIDIA driver; nvidia-smi must list the cards"
        return fail("GPUs", str(error), mend), None
    except DeviceFault as error:
        return fail("GPUs", str(error), "look at nvidia-smi and dmesg"), None
    usable = [card.device.gpu_class.name for card in cards if card.device is not None]
    check = _check_usable(usable, [card.problem for card in cards if card.problem])
    return check, None if config.ray.address is not None or not usable else len(usable)


def _check_usable(usable: Sequence[str], problems: Sequence[str]) -> Check:
    if not usable:
        return fail("GPUs", "; ".join(problems) or "the driver has no card", "look at nvidia-smi")
    words = f"{len(usable)}: {', '.join(sorted(set(usable)))}"
    if problems:
        told = "; ".join(dict.fromkeys(problems))
        return warn("GPUs", f"{words}; {told}", "look at nvidia-smi")
    return ok("GPUs", words)


def check_memory(config: Config) -> list[Check]:
    """Whether this machine has what its cards are allowed; nothing where none can be used."""
    try:
        cards = () if config.ray.simulated_gpus else devices.list_gpus(config.ray.platform)
    except DeviceFault:
        return []
    if not cards:
        return []
    each = config.gpu.host_memory_gb
    wanted, there = len(cards) * each + OWN_MEMORY, _memory() / 2**30
    words = f"{there:.0f} GiB; {len(cards)} times {each:g} GiB wait for the cards"
    if there < wanted:
        mend = f"lower gpu.host_memory_gb: with {OWN_MEMORY} GiB for the rest they take {wanted:g}"
        return [warn("memory", words, mend)]
    return [ok("memory", words)]


def _memory() -> int:
    """Bytes that this machine has, or this container may take."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = CGROUP_LIMIT.read_text().strip()
    except OSError:
        return there
    return min(there, int(limit)) if limit.isdecimal() else there


def check_ray(config: Config, environment: Mapping[str, str]) -> Check:
    address = config.ray.address
    if address is None:
        return _check_port(config)
    if address == "auto":
        found = _address_here(environment)
        if found is None:
            mend = "ray start on this machine, or name its head in ray.address"
            return fail("Ray", "auto: no Ray cluster is known on this machine", mend)
        return _check_reached(found, "auto: ")
    return _check_reached(address)


def _address_here(environment: Mapping[str, str]) -> str | None:
    """Where Ray itself would look for the cluster that this machine is part of."""
    if given := environment.get("RAY_ADDRESS", ""):
        return given
    written = Path(environment.get("RAY_TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"  # noqa: S108
    try:
        return written.read_text().strip() or None
    except OSError:
        return None


def _check_reached(address: str, how: str = "") -> Check:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
    except (OSError, ValueError) as error:
        words = f"{how}nothing answers at {address}: {error}"
        return fail("Ray", words, "start it, or ray.address")
    return ok("Ray", f"{how}{address} answers")


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
