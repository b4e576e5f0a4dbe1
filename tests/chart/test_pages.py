"""What the pages on Kubernetes and containers tell people to type, tried as far as it goes."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from cluster.core.types import Timestamp
from cluster.journal import SqlJournal
from tests.chart.cases import SWITCHES, values_of
from tests.chart.charts import (
    CHART,
    EXAMPLES,
    case,
    defaults,
    head,
    merged,
    notes,
    only,
    operator_values,
)
from tests.chart.charts import render as rendered
from tests.chart.policy.containers import pods_are_restricted
from tests.chart.policy.rendered import Rendered, mounted_files
from tests.chart.test_mutations import MUTATIONS
from tests.chart.test_refusals import SCHEMA, nodes
from tests.chart.test_schemas import KUBERNETES, kubernetes_faults
from tests.chart.tools import RELEASES, ROOT

PAGES = {
    name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("kubernetes", "containers", "runbooks")
}
RELEASE, NAMESPACE = "crynux-cluster", "crynux"


def secrets_made() -> dict[str, set[str]]:
    """The Secrets that the page has people make, with their keys."""
    found: dict[str, set[str]] = {}
    for name, rest in re.findall(r"create secret generic (\S+) (.*)", PAGES["kubernetes"]):
        found[name] = set(re.findall(r"--from-file=(\S+)", rest))
    return found


def test_the_secrets_that_are_made_are_those_that_the_simplest_example_names() -> None:
    objects = rendered(case(values_of("single-server"), release=RELEASE, namespace=NAMESPACE))
    made = secrets_made()
    pod = head(objects)
    for container in ("key", "ray-head"):
        for secret, key in mounted_files(pod, container).values():
            if key:
                assert key in made[secret]
    assert made.keys() == {"crynux-key", "crynux-urls", "crynux-api"}


def test_the_token_that_is_made_is_one_line_without_an_end(tmp_path: Path) -> None:
    """The operator strips it, but Prometheus' operator hands the Secret's bytes on, and no header
    may hold a newline."""
    for page in ("kubernetes", "containers"):
        commands = re.findall(r"^openssl .*$", PAGES[page], re.MULTILINE)
        (tmp_path / "secrets").mkdir(exist_ok=True)
        files = {Path(each.rpartition("> ")[2]).name: each for each in commands}
        assert files.keys() == {"password", "token"}, page
        for command in files.values():
            subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
            file = tmp_path / command.rpartition("> ")[2]
            assert re.fullmatch(rb"[0-9a-f]{64}", file.read_bytes()), page


def test_the_key_is_made_with_the_password_that_is_made_before(tmp_path: Path) -> None:
    """What the image is told to do is done here by the program itself."""
    for page, image in (("kubernetes", "0.1.0-cpu"), ("containers", " operator")):
        (command,) = re.findall(rf"^docker .*{image} (keys new .*)$", PAGES[page], re.MULTILINE)
        folder = tmp_path / page
        folder.mkdir()
        (folder / "password").write_text("a" * 64)
        (folder / "password").chmod(0o600)
        words = command.replace("/keys/", f"{folder}/").split()
        subprocess.run([sys.executable, "-m", "cluster.cli", *words], check=True)
        assert set(json.loads((folder / "key.json").read_text())) >= {"crypto", "version"}


def test_helm_is_called_for_one_release_and_its_claim_has_the_name_that_is_told() -> None:
    text = PAGES["kubernetes"] + "".join(file.read_text() for file in EXAMPLES.values())
    calls = re.findall(r"helm (?:install|upgrade|test|uninstall) ([a-z-]+) ", text)
    assert len(calls) >= 4
    assert set(calls) == {RELEASE}
    objects = rendered(case(values_of("single-server"), release=RELEASE, namespace=NAMESPACE))
    claims = {each["metadata"]["name"] for each in objects if each["kind"].endswith("Claim")}
    assert restoring()["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] in claims


def test_helm_waits_longer_for_its_test_than_the_test_for_the_operator() -> None:
    said = notes(case(merged(values_of("single-server"), {"test": {"timeoutSeconds": 900}})))
    (seconds,) = re.findall(r"helm -n gpu test site --logs --timeout (\d+)s", said)
    assert int(seconds) > 900
    (minutes,) = re.findall(r"^helm test .* --timeout (\d+)m$", PAGES["kubernetes"], re.MULTILINE)
    assert int(minutes) * 60 > defaults()["test"]["timeoutSeconds"]


def test_redis_is_emptied_before_what_empties_it_is_deleted() -> None:
    """KubeRay's Job is a copy of the head's pod: it needs the service account and the ConfigMap."""
    text = PAGES["kubernetes"].split("## Uninstall")[1]
    assert 0 < text.index(f"delete raycluster {RELEASE} --wait") < text.index("helm uninstall c")


def test_nothing_is_waited_for_by_kubectl_that_is_not_there_yet() -> None:
    """Right after an install there is no pod: KubeRay has yet to make it."""
    assert "kubectl -n gpu wait" not in notes(case(values_of("single-server")))


def restoring() -> dict[str, Any]:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGES["kubernetes"], re.DOTALL)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def test_the_pod_that_restores_is_one_that_a_restricted_namespace_takes() -> None:
    pod = restoring()
    assert kubernetes_faults(pod, KUBERNETES[-1]) == []
    pod["metadata"]["labels"] = {}
    cluster = only(rendered(case(values_of("single-server"))), "RayCluster")
    # It writes to its volume only, and its root's being writable is nobody's concern.
    writable = defaults()
    writable["security"]["readOnlyRootFilesystem"] = None
    said = pods_are_restricted(Rendered([cluster, pod], writable))
    assert [line for line in said if line.startswith("Pod restore")] == []


def test_the_journal_is_copied_while_it_is_used(tmp_path: Path) -> None:
    (code,) = re.findall(r"-- python -c '(.*?)'\n", PAGES["kubernetes"])
    objects = rendered(case(values_of("single-server")))
    url = operator_values(objects)["journal"]["url"]
    assert url.removeprefix("sqlite:///") in code
    journal = SqlJournal(f"sqlite:///{tmp_path}/journal.db")
    lease = journal.acquire("me", Timestamp(0), 10.0)
    assert lease is not None
    journal.set_cursor(lease, "said", "before")
    here = code.replace("/var/lib/crynux-cluster", str(tmp_path))
    subprocess.run([sys.executable, "-c", here], check=True)
    journal.set_cursor(lease, "said", "after")
    journal.close()
    copy = sqlite3.connect(tmp_path / "backup.db")
    found = copy.execute("SELECT value FROM cursors WHERE key = 'said'").fetchall()
    assert [json.loads(f'"{value}"') for (value,) in found] == ["before"]
    assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_values_that_the_pages_name_exist() -> None:
    known = {path for path, _ in nodes(SCHEMA)}
    known |= {path.removeprefix("gpuGroups[].") for path in known}
    tops = {path.split(".")[0] for path in known} - {"config"}
    ours = {"identity", "network", "journal", "models", "ray"}
    named = re.findall(r"`((?:[a-z]\w*\.)+\w+)(?:: \w+)?`", PAGES["kubernetes"])
    checked = [
        path
        for path in named
        if path.split(".")[0] in tops - ours or path.startswith("config.") or "existing" in path
    ]
    assert len(checked) > 10
    for path in checked:
        assert path in known, path


def test_paths_and_targets_that_the_pages_name_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for text in PAGES.values():
        for target in re.findall(r"`make ([a-z-]+)`", text):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        for path in re.findall(r"`((?:helm|configs|requirements)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), path
        for link in re.findall(r"\]\(([\w-]+\.md)\)", text):
            assert (ROOT / "docs" / link).exists(), link


def test_what_is_told_of_the_tests_is_so() -> None:
    text = PAGES["kubernetes"]
    assert len(SWITCHES) >= 35
    assert len(MUTATIONS) >= 65
    for release in RELEASES.values():
        assert release.version.rsplit(".", 1)[0] in text
    for version in KUBERNETES:
        assert version in text
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["annotations"]["crynux-cluster/ray"].rsplit(".", 1)[0] in text
