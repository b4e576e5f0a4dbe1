"""What README and docs name must exist: commands, options, configuration keys, files, targets."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.cli import cli
from cluster.config import Config
from devnet.tasks import load_tasks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def commands(text: str) -> Iterator[str]:
    """Every `crynux-cluster …` in code, without what a comment says behind it."""
    code = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line.split("#")[0].strip() for block in code for line in block.splitlines()]
    lines += re.findall(r"`(crynux-cluster[^`]*)`", text)
    return (line for line in lines if line.startswith("crynux-cluster"))


def check_command(line: str) -> None:
    """Raises `click.UsageError` where the command line could not be meant."""
    command: click.Command = cli
    words = shlex.split(line)[1:]
    context = click.Context(command, info_name="crynux-cluster")
    while words and isinstance(command, click.Group):
        if words[0].startswith("-"):  # the group's own, which does something by itself too
            break
        found = command.get_command(context, words[0])
        if found is None:
            raise click.UsageError(f"no such command: {words[0]}")
        command, words = found, words[1:]
        context = click.Context(command, parent=context)
    if words:
        command.make_parser(context).parse_args(args=words)


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, field


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    for line in commands(page.read_text(encoding="utf-8")):
        check_command(line)


def test_a_wrong_command_would_be_noticed() -> None:
    for wrong in ("crynux-cluster upp", "crynux-cluster devnet up --blocktime 1"):
        with pytest.raises(click.UsageError):
            check_command(wrong)


def table() -> dict[str, str]:
    """The README's configuration table: key to default."""
    section = README.split("## Configuration")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([a-z_.]+)` \| ([^|]*) \|", section, re.MULTILINE)
    return {key: default.strip() for key, default in rows}


def shown(field: FieldInfo) -> str:
    """A default as the table writes it."""
    default = field.default
    if field.is_required():
        return "required"
    if default is None or isinstance(default, bool):
        return yaml.safe_dump(default).split()[0]
    if default == ():
        return "none"
    if isinstance(default, tuple):
        return ", ".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def test_the_configuration_table_is_complete_and_has_the_defaults() -> None:
    assert table() == {key: shown(field) for key, field in keys(Config)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_named_in_the_text_exist(page: Path) -> None:
    known = {key for key, _ in keys(Config)}
    sections = {key.split(".")[0] for key in known}
    for name in re.findall(r"`([a-z]+(?:\.[a-z_]+)+)`", page.read_text(encoding="utf-8")):
        if name.split(".")[0] in sections and not name.endswith((".md", ".py", ".yaml", ".json")):
            assert name in known, f"{page.name} names {name}"


def test_files_and_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z]+)\b", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    named = re.findall(r"`((?:configs|cluster|docs|devnet|actors)/[\w./-]*)`", README)
    named += re.findall(r"\]\((docs/[^)]+)\)", README)
    assert named
    for path in named:
        assert (ROOT / path).exists(), path


def test_the_example_tasks_are_tasks() -> None:
    tasks = load_tasks(ROOT / "configs" / "devnet-tasks.yaml")
    assert {end for task in tasks for end in task.expected_end} == {"EndSuccess", "EndAborted"}
