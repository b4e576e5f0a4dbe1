"""`crynux-cluster keys`: the operator's one key, made, brought in, looked at and backed up."""

from __future__ import annotations

import json
from pathlib import Path

import click

key_file = click.argument("file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE")
password_file = click.option(
    "--password-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Holds the keystore's password; else CRYNUX_PASSWORD does, or it is asked for.",
)


@click.group(short_help="Make, import, show and export the operator's key.")
def keys() -> None:
    """Make, import, show and export the operator's key.

    One key is the whole identity: the treasury and all node accounts are derived from it
    (m/44'/60'/0'/0/i, the treasury is 0). FILE is an encrypted keystore (V3); show and export read
    a file with a BIP-39 phrase as well. Files are made readable by their owner only, and never
    overwritten.
    """


@keys.command("new")
@key_file
@password_file
@click.option("--words", default=24, show_default=True, help="Of the phrase: 12, 15, 18, 21 or 24.")
def keys_new(file: Path, password_file: Path | None, words: int) -> None:
    """Make a new key, in an encrypted keystore at FILE."""
    from cluster import keys_cli

    click.echo(keys_cli.new(file, password_file, words))


@keys.command("import")
@key_file
@password_file
@click.option(
    "--from",
    "source",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    required=True,
    help="A file with a BIP-39 phrase or a V3 keystore; - reads one from stdin.",
)
@click.option(
    "--source-password-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Holds the password of the keystore that is imported, if it is one.",
)
def keys_import(
    file: Path, password_file: Path | None, source: Path, source_password_file: Path | None
) -> None:
    """Bring a phrase or another keystore into an encrypted keystore at FILE.

    A keystore that holds one private key makes that account the treasury; the node accounts are
    derived with it for a seed.
    """
    from cluster import keys_cli

    click.echo(keys_cli.bring(file, password_file, source, source_password_file))


@keys.command("show")
@key_file
@password_file
@click.option("--accounts", default=8, show_default=True, help="How many node accounts.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def keys_show(file: Path, password_file: Path | None, accounts: int, as_json: bool) -> None:
    """Show addresses and public keys; nothing secret."""
    from cluster import keys_cli

    found = keys_cli.show(file, password_file, accounts)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for each in found:
        words = f"{each['index']:>4}  {each['role']:<8}  {each['address']}"
        click.echo(f"{words}  {each['public_key']}")


@keys.command("export")
@key_file
@password_file
@click.option(
    "--to",
    "target",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="A new file, readable by its owner only.",
)
@click.option("--account", type=click.IntRange(min=0), help="Only this account, as a V3 keystore.")
@click.option(
    "--new-password-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Holds the password of the keystore that --account makes; else it is asked for.",
)
def keys_export(
    file: Path,
    password_file: Path | None,
    target: Path,
    account: int | None,
    new_password_file: Path | None,
) -> None:
    """Write the phrase to a new file, for a backup; or one account's key, for a wallet."""
    from cluster import keys_cli

    click.echo(keys_cli.export(file, password_file, target, account, new_password_file))
