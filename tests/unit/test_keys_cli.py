"""`crynux-cluster keys`, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster import keys_cli
from cluster.cli import main
from cluster.identity import Identity
from cluster.keystore import PASSWORD
from tests.unit.test_identity import FIRST, PHRASE

WORD, OTHER_WORD = "correct horse", "battery staple"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_cli, "work", 2**4)
    monkeypatch.setenv(PASSWORD, WORD)


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["keys", *map(str, words)])
    return int(ended.value.code or 0)


def secret_file(folder: Path, text: str) -> Path:
    file = folder / "word"
    file.write_text(text)
    file.chmod(0o600)
    return file


def phrase_file(folder: Path) -> Path:
    file = folder / "phrase"
    file.write_text(PHRASE)
    file.chmod(0o600)
    return file


def test_made_shown_backed_up_and_brought_in_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, backup, again = tmp_path / "key", tmp_path / "backup", tmp_path / "again"
    assert run("new", key) == 0
    assert run("export", key, "--to", backup) == 0
    assert run("import", again, "--from", backup) == 0
    capsys.readouterr()
    shown = []
    for file in (key, again, backup):
        assert run("show", file, "--json", "--accounts", 2) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert shown[0] == shown[1] == shown[2]
    assert [each["role"] for each in shown[0]] == ["treasury", "node", "node"]
    assert len(backup.read_text().split()) == 24
    assert {file.stat().st_mode & 0o777 for file in (key, again, backup)} == {0o600}


def test_no_command_prints_anything_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = phrase_file(tmp_path)
    assert run("import", tmp_path / "key", "--from", source) == 0
    assert run("show", tmp_path / "key") == 0
    assert run("export", tmp_path / "key", "--to", tmp_path / "out") == 0
    word = secret_file(tmp_path, OTHER_WORD)
    account = ("--account", 1, "--new-password-file", word)
    assert run("export", tmp_path / "key", "--to", tmp_path / "one", *account) == 0
    said = "".join(capsys.readouterr())
    assert FIRST[0] in said
    assert "junk" not in said
    assert WORD not in said
    assert OTHER_WORD not in said
    assert (tmp_path / "out").read_text().split() == PHRASE.split()
    assert Identity.load(tmp_path / "one", lambda: OTHER_WORD).address(0) == FIRST[1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("new", "{f}/there"), "never overwritten"),
        (("new", "{f}/key", "--words", "13"), "12, 15, 18, 21 or 24 words"),
        (("show", "{f}/none"), "there is no such file"),
        (("import", "{f}/key", "--from", "{f}/there"), "not a valid BIP-39 phrase"),
        (("export", "{f}/phrase", "--to", "{f}/there"), "never overwritten"),
        (("new", "{f}/key", "--password-file", "{f}/short"), "shorter than 8"),
        (
            ("export", "{f}/phrase", "--to", "{f}/out", "--new-password-file", "{f}/short"),
            "--new-password-file is for --account",
        ),
        # The old password is not taken for the new one.
        (("export", "{f}/phrase", "--to", "{f}/out", "--account", "1"), "--new-password-file"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], line: str
) -> None:
    phrase_file(tmp_path)
    for name, text in (("there", "not a phrase"), ("short", "abc")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    before = sorted(tmp_path.iterdir())
    assert run(*(word.format(f=tmp_path) for word in words)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert line in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there").read_text() == "not a phrase"


def test_the_new_password_is_asked_for_at_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    asked: list[str] = []

    def prompt(words: str, **_options: object) -> str:
        asked.append(words)
        return OTHER_WORD

    monkeypatch.setattr("click.prompt", prompt)
    one = tmp_path / "one"
    assert run("export", phrase_file(tmp_path), "--to", one, "--account", 1) == 0
    assert asked == [f"New password for {one}"]
    assert Identity.load(one, lambda: OTHER_WORD).address(0) == FIRST[1]
