"""The doctor's look at the journal: which version's and whose it is, who acts, and who is stopped.

It only looks. A journal that isn't there is not made, and one of an older version stays as it is:
the operator may be running with it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from cluster.checks import Check, fail, ok, warn
from cluster.config import Config
from cluster.core import standing
from cluster.core.errors import ConfigError
from cluster.identity import TREASURY, Identity
from cluster.journal import HOST, STANDING, Owner, SqlJournal
from cluster.journal_engine import file_of
from cluster.journal_tables import metadata
from cluster.journal_upgrades import SCHEMA

_NAME = "journal"
_WRITABLE = "chown the file and those beside it, or give the database's user the right"
# Not what holds in this session, which only looks.
_ONLY_READS = text(
    "SELECT pg_is_in_recovery() OR reset_val = 'on' FROM pg_settings "
    "WHERE name = 'default_transaction_read_only'"
)
_MAY_WRITE = text(
    "SELECT relname FROM pg_class WHERE relname = ANY(:names) AND relkind = 'r' AND "
    "NOT (has_table_privilege(oid, 'INSERT') AND has_table_privilege(oid, 'UPDATE')) LIMIT 1"
)


def check_journal(
    config: Config, identity: Identity | None, clock: Callable[[], float]
) -> list[Check]:
    try:
        if not _is_there(config):
            return [_none_yet()]
        with contextlib.closing(SqlJournal(config.journal.url, look_only=True)) as journal:
            return _look(journal, config, identity, clock())
    except ConfigError as error:
        return [fail(_NAME, str(error), "mend journal.url, or the database")]
    except DBAPIError as error:
        return [fail(_NAME, f"it can't be read: {error.orig}", "mend the database")]


def used_accounts(config: Config) -> tuple[int, ...]:
    """The indices of accounts that were ever assigned, as far as that can be read."""
    with contextlib.suppress(ConfigError, DBAPIError):
        if _is_there(config):
            with contextlib.closing(SqlJournal(config.journal.url, look_only=True)) as journal:
                return tuple(each.index for each in journal.assignments())
    return ()


def _is_there(config: Config) -> bool:
    """What can't be told of a server shows when it is asked."""
    file = file_of(config.journal.url)
    return file is None or file.exists()


def _none_yet() -> Check:
    return ok(_NAME, "none yet: it is made as the operator starts")


def _look(
    journal: SqlJournal, config: Config, identity: Identity | None, now: float
) -> list[Check]:
    schema = journal.schema()
    if schema is None:
        return [_none_yet()]
    if not schema.isdecimal() or int(schema) > int(SCHEMA):
        words = f"it has schema {schema}, this version needs {SCHEMA}"
        return [fail(_NAME, words, "use the version that wrote it, or a newer one")]
    if identity is not None:
        addresses = config.network.contracts.addresses
        treasury = identity.address(TREASURY)
        journal.check_owner(Owner(config.network.chain_id, *addresses, treasury=treasury))
    found = [_lease(journal, now)]
    if (why := _not_writable(journal, config)) is not None:
        found.insert(0, fail(_NAME, f"it can't be written: {why}", _WRITABLE))
    if schema != SCHEMA:
        words = f"it has schema {schema}: this version makes it {SCHEMA} as the operator starts"
        found.insert(0, warn(_NAME, words, "there is no way back for an older version: copy it"))
    if stopped := _stopped(journal):
        mend = "see why (crynux-cluster status), then crynux-cluster fleet clear ADDRESS"
        found.append(warn("accounts", "; ".join(stopped), mend))
    return found


def _not_writable(journal: SqlJournal, config: Config) -> str | None:
    """Why; None where it can be. Nothing is written to find out."""
    file = file_of(config.journal.url)
    if file is not None:
        beside = (file, *(file.with_name(f"{file.name}-{each}") for each in ("wal", "shm")))
        locked = [each.name for each in beside if each.exists() and not os.access(each, os.W_OK)]
        return f"{locked[0]} is another's" if locked else None
    with journal.read() as connection:
        if connection.execute(_ONLY_READS).scalar():
            return "the server, or this user of it, only reads"
        names = [table.name for table in metadata.sorted_tables]
        table = connection.execute(_MAY_WRITE, {"names": names}).scalar()
    return None if table is None else f"its user may not write to {table}"


def _lease(journal: SqlJournal, now: float) -> Check:
    holder, seconds = journal.holder(now)
    if not holder:
        return ok(_NAME, "nobody holds the lease")
    host = journal.cursor(HOST) or ""
    there = f" on {host}" if host else ""
    words = f"{holder}{there} holds the lease for {seconds:.0f} s more"
    if host in {"", socket.gethostname()}:
        return ok(_NAME, words)
    mend = "an operator that is started here waits for it: stop that one, or change journal.url"
    return warn(_NAME, words, mend)


def _stopped(journal: SqlJournal) -> list[str]:
    """Accounts that serve no more until the operator has seen to them."""
    slashed = [f"{account} was slashed" for account in sorted(journal.slashed_accounts())]
    standings = {
        account: standing.parsed(text) for account, text in journal.cursors(STANDING).items()
    }
    held = [f"{account}: {each.held}" for account, each in sorted(standings.items()) if each.held]
    return slashed + held
