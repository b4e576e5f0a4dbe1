"""The policies can fail: templates changed for the worse, one line each, are found out."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.chart.cases import POLICIES, one, rendered, values_of
from tests.chart.charts import CHART, case, merged
from tests.chart.policy.rendered import Policy, Rendered


@dataclass(frozen=True)
class Mutation:
    """In `file`, `old` becomes `new` everywhere; then a policy says `said`."""

    file: str
    old: str
    new: str
    said: str
    name: str = "single-server"
    values: dict[str, Any] = field(default_factory=dict)


SECURITY, HEAD, WORKER = "_helpers.tpl", "_head.tpl", "_worker.tpl"
POLICY, CLUSTER = "networkpolicy.yaml", "raycluster.yaml"

MUTATIONS = {
    "a url in the configmap": Mutation(
        "_config.tpl",
        '"rpc_url_file" (printf "%s/network/rpc" $etc)',
        '"rpc_url" "https://rpc.example/key"',
        "network.rpc_url may hold a key",
    ),
    "a password in the configmap": Mutation(
        "_config.tpl",
        '"relay_url_file" (printf "%s/network/relay" $etc)',
        '"relay_url" "https://user:password@relay.example"',
        "has a user in its URL",
    ),
    "a token in the configmap": Mutation(
        "_config.tpl",
        '(printf "%s/api/token" $etc)',
        '"0123456789abcdef"',
        "serve.token_file isn't the path of a file",
    ),
    "a secret in the environment": Mutation(
        HEAD,
        "- {name: RAY_AUTH_TOKEN_PATH, value: /etc/crynux-cluster/ray/auth_token}",
        "- {name: RAY_AUTH_TOKEN, valueFrom: {secretKeyRef: {name: x, key: auth_token}}}",
        "supervisor: RAY_AUTH_TOKEN comes from elsewhere",
    ),
    "a password in the environment": Mutation(
        SECURITY,
        '"HOME" "/tmp"',
        '"CRYNUX_PASSWORD" "hunter2"',
        "CRYNUX_PASSWORD may be a secret",
    ),
    "a secret of the chart's own": Mutation(
        "serviceaccount.yaml", "kind: ServiceAccount", "kind: Secret", "the chart makes a Secret"
    ),
    "the key for the supervisor": Mutation(
        HEAD,
        "- {name: data, mountPath: /var/lib/crynux-cluster}",
        "- {name: data, mountPath: /var/lib/crynux-cluster}\n"
        "- {name: key, mountPath: /k, readOnly: true}",
        "the key is in ['key', 'ray-head', 'supervisor']",
    ),
    "the key for the workers": Mutation(
        WORKER,
        "    - name: tmp\n      emptyDir",
        "    - name: key\n      secret: {secretName: crynux-key}\n    - name: tmp\n      emptyDir",
        "pod of card: has the key",
    ),
    "the key's secret itself": Mutation(
        HEAD,
        "- {name: key, mountPath: /etc/crynux-cluster/key, readOnly: true}",
        "- {name: key-secret, mountPath: /etc/crynux-cluster/key, readOnly: true}",
        "the key's Secret is in ['key', 'ray-head']",
    ),
    "a key that others read": Mutation(
        HEAD, '-m, "0400"', '-m, "0440"', "the key's copy isn't its user's alone"
    ),
    "a key on disk": Mutation(
        HEAD,
        "- name: key\n  emptyDir: {medium: Memory, sizeLimit: 1Mi}",
        "- name: key\n  emptyDir: {sizeLimit: 1Mi}",
        "the key's copy is on disk",
    ),
    "a secret for everyone": Mutation(HEAD, "defaultMode: 0400", "defaultMode: 0444", "mode 292"),
    "a secret as a whole": Mutation(
        HEAD, "\n  items:\n    - {key: {{ .key }}, path: {{ .path }}}", "", "all of the Secret is"
    ),
    "no limits": Mutation(
        HEAD,
        "limits: {cpu: 500m, memory: 64Mi}",
        "limits: {cpu: 500m}",
        "pod of headgroup, key: no memory in requests or limits",
    ),
    "no bound for /tmp": Mutation(
        WORKER,
        "emptyDir: {sizeLimit: {{ $group.tmp }}}",
        "emptyDir: {}",
        "volume tmp: may grow without bound",
    ),
    "a cache that nothing is asked for": Mutation(
        WORKER,
        "ternary (list $group.tmp $group.cache.size)",
        "ternary (list $group.tmp)",
        "pod of card: its volumes may take more of the disk",
        "a cache that goes",
    ),
    "root": Mutation(SECURITY, "runAsNonRoot: true", "runAsNonRoot: false", "may run as root"),
    "volumes of another group": Mutation(
        SECURITY,
        "fsGroup: {{ .Values.security.group }}",
        "fsGroup: 1000",
        "doesn't run as whom the values say",
        "a user and a group of theirs",
    ),
    "no seccomp": Mutation(SECURITY, "type: RuntimeDefault", "type: Unconfined", "no seccomp"),
    "privileges": Mutation(
        SECURITY,
        "allowPrivilegeEscalation: false",
        "allowPrivilegeEscalation: true",
        "may gain privileges",
    ),
    "capabilities": Mutation(SECURITY, "drop: [ALL]", "add: [SYS_PTRACE]", "keeps capabilities"),
    "the machine's disk": Mutation(
        WORKER, "emptyDir: {sizeLimit: {{ $group.tmp }}}", "hostPath: {path: /tmp}", "is none of"
    ),
    "the machine's network": Mutation(
        SECURITY,
        "enableServiceLinks: false",
        "enableServiceLinks: false\nhostNetwork: true",
        "hostNetwork",
    ),
    "a token of kubernetes": Mutation(
        SECURITY,
        "automountServiceAccountToken: false",
        "automountServiceAccountToken: true",
        "a service account's token is mounted",
    ),
    "a liveness probe that echoes": Mutation(
        SECURITY,
        "livenessProbe:\n  httpGet: {{ $get }}",
        "livenessProbe:\n  exec: {command: [echo, success]}",
        "ray-worker: livenessProbe doesn't ask /api/healthz at 52365",
    ),
    "the supervisor is always ready": Mutation(
        HEAD, "path: /readyz", "path: /healthz", "readinessProbe doesn't ask /readyz at 8000"
    ),
    "an impatient probe": Mutation(
        HEAD,
        "failureThreshold: 18",
        "failureThreshold: 1",
        "supervisor: is ended after 10 s of silence",
    ),
    "a ray that hangs": Mutation(
        SECURITY,
        "  failureThreshold: 12\n  terminationGracePeriodSeconds: 30\n",
        "  failureThreshold: 12\n",
        "a Ray that doesn't answer is asked to leave for long",
    ),
    "a probe of another port": Mutation(
        SECURITY,
        'dashboard-agent-listen-port: "52365"',
        'dashboard-agent-listen-port: "52366"',
        "doesn't ask /api/healthz at 52366",
    ),
    "no time to go": Mutation(
        SECURITY,
        "terminationGracePeriodSeconds: {{ .grace }}",
        "terminationGracePeriodSeconds: 30",
        "pod of card: is ended before its cards are waited for",
    ),
    "too short a wait": Mutation(
        HEAD, "sub (int .grace) 30", "sub (int .grace) 450", "pod of headgroup: waits 150.0 s"
    ),
    "no time to end": Mutation(
        HEAD, "sub (int .grace) 30", "sub (int .grace) 10", "and Ray has ended"
    ),
    "a head that stays": Mutation(
        HEAD, 'list "not-ready" "unreachable"', 'list "not-ready"', "machine that is unreachable"
    ),
    "ray waits for actors": Mutation(
        SECURITY,
        '"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" "0"',
        '"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" "30"',
        "and Ray has ended",
    ),
    "a head that goes first": Mutation(
        "_checks.tpl",
        "if gt (int $group.graceSeconds) (int $.Values.head.graceSeconds)",
        "if false",
        "may compute for 900 s, and the head waits 600 s",
        values={"gpuGroups": [one(graceSeconds=900)]},
    ),
    "cards are not emptied": Mutation(
        HEAD, "- leave", "- status", "its cards are not emptied first"
    ),
    "another namespace of ray": Mutation(
        "_config.tpl",
        '{{- dig "ray" "namespace" "crynux" .Values.config -}}',
        "crynux",
        "asks the coordinator in another namespace",
        "a namespace of ray",
    ),
    "pods on the old image": Mutation(CLUSTER, "type: Recreate", "type: None", "stay on the old"),
    "no token for ray": Mutation(CLUSTER, "mode: token", "mode: disabled", "may run code in it"),
    "ray's mode unsaid": Mutation(
        SECURITY, '  "RAY_AUTH_MODE" "token"\n', "", "RAY_AUTH_MODE isn't set"
    ),
    "logs that go with the container": Mutation(
        SECURITY,
        'no-redirect-output: "true"',
        'no-redirect-output: "false"',
        "what is logged stays in files",
    ),
    "ray's own lines": Mutation(
        SECURITY, '"RAY_BACKEND_LOG_LEVEL" "warning"', '"X" "y"', "Ray logs every step of its own"
    ),
    "workers don't find the head": Mutation(
        CLUSTER,
        "publishNotReadyAddresses: true",
        "publishNotReadyAddresses: false",
        "workers can't find a head that isn't ready",
    ),
    "kuberay's labels": Mutation(
        SECURITY,
        "app.kubernetes.io/component: {{ .component }}",
        "app.kubernetes.io/name: crynux-cluster",
        "KubeRay's head Service would not select it",
    ),
    "the supervisor first": Mutation(
        HEAD, "- name: ray-head", "- name: the-head", "the-head is taken for Ray's container"
    ),
    "a command of the chart's own": Mutation(
        WORKER, "command: [rm, -rf, /tmp/ray]", "command: [ray, start]", "more is run before Ray"
    ),
    "numbers for kuberay": Mutation(
        SECURITY, "num-cpus: {{ .cpus | quote }}", "num-cpus: {{ .cpus }}", "num-cpus isn't text"
    ),
    "processes apart": Mutation(
        HEAD,
        "shareProcessNamespace: true",
        "shareProcessNamespace: false",
        "the supervisor doesn't see Ray's processes",
    ),
    "another secret's token": Mutation(
        HEAD, ".Values.ray.auth.existingSecret | default $name", '"other"', "of another Secret"
    ),
    "another address of ray": Mutation(
        "_config.tpl", "127.0.0.1:6379", "127.0.0.1:6380", "waits for another Ray than it joins"
    ),
    "fewer cards than ray is told of": Mutation(
        WORKER,
        "set $resources.limits $group.gpuResource $group.gpusPerPod",
        "set $resources.limits $group.gpuResource 7",
        "7 cards in limits, 1 wanted",
    ),
    "more cards than there are": Mutation(
        SECURITY, "num-gpus: {{ .gpus | quote }}", 'num-gpus: "4"', "4 cards in num-gpus, 1 wanted"
    ),
    "no simulated cards": Mutation(
        CLUSTER, "crynux-sim|%s+%s|%d", "sim|%s+%s|%d", "are not offered", "simulated cards"
    ),
    "work on the head": Mutation(
        CLUSTER, '(dict "cpus" 0)', '(dict "cpus" 4)', "Ray would place work on it"
    ),
    "an object store beyond /dev/shm": Mutation(
        SECURITY, '"268435456"', '"9268435456"', "is larger than /dev/shm"
    ),
    "the newest image": Mutation(
        SECURITY,
        '{{ $image.tag | default (printf "%s-%s" .root.Chart.AppVersion '
        '(eq .which "head" | ternary "cpu" "cuda")) }}',
        "latest",
        "is no certain version",
    ),
    "a fixed namespace": Mutation(
        "service.yaml", "metadata:", "metadata:\n  namespace: default", "is fixed to namespace"
    ),
    "claims that go": Mutation(
        "claims.yaml", '"keep"', '"delete"', "goes when the release is uninstalled"
    ),
    "claims that nobody mounts": Mutation(
        "claims.yaml", '"%s-data"', '"%s-journal"', "nobody mounts it"
    ),
    "one volume for many": Mutation(
        "_checks.tpl",
        '(ne $cache.accessMode "ReadWriteMany")',
        "false",
        "only one of its pods can mount",
        values={"gpuGroups": [{"name": "card", "replicas": 3}]},
    ),
    "a journal that goes": Mutation(
        HEAD,
        "persistentVolumeClaim: {claimName: {{ $claim.existingClaim",
        "emptyDir: {sizeLimit: 1Gi} # {{ $claim.existingClaim",
        "the journal goes with the pod",
    ),
    "a journal beside the volume": Mutation(
        "_config.tpl",
        '"sqlite:///%s/journal.db" $var',
        '"sqlite:////journal.db"',
        "/journal.db is on no volume",
    ),
    "a test at every install": Mutation(
        "tests/ready.yaml", "helm.sh/hook: test", "helm.sh/hook: pre-install", "at every install"
    ),
    "a test without logs": Mutation(
        "tests/ready.yaml",
        "before-hook-creation",
        "before-hook-creation,hook-succeeded",
        "`helm test --logs` would find it gone",
    ),
    "a budget in percent": Mutation(
        "budgets.yaml",
        "minAvailable: {{ .least }}",
        "minAvailable: 50%",
        "no whole number",
        "budgets",
    ),
    "a budget for what is broken": Mutation(
        "budgets.yaml",
        "  unhealthyPodEvictionPolicy: AlwaysAllow\n",
        "",
        "a pod that isn't ready keeps its machine",
        "budgets",
    ),
    "a budget for nobody": Mutation(
        "budgets.yaml",
        "ray.io/group: {{ .group }}",
        "ray.io/group: x",
        "doesn't select the pods of one group",
        "budgets",
    ),
    "a service for every pod": Mutation(
        "service.yaml", "    ray.io/node-type: head\n", "", "selects ['head', 'worker'], head is"
    ),
    "a service for no port": Mutation(
        "service.yaml", "targetPort: serve", "targetPort: http", "its port leads to None"
    ),
    "another port in the container": Mutation(
        HEAD,
        "containerPort: {{ .Values.api.port }}",
        "containerPort: 8000",
        "its port leads to 8000",
        "another port",
    ),
    "an ingress to nowhere": Mutation(
        "ingress.yaml", "}}-api", "}}-head", "leads to no Service's port", "an ingress"
    ),
    "every pod is scraped": Mutation(
        "podmonitor.yaml",
        "      ray.io/node-type: head\n",
        "",
        "selects ['head', 'worker']",
        "monitored",
    ),
    "nobody's job": Mutation(
        "podmonitor.yaml",
        "jobLabel: app.kubernetes.io/part-of",
        "jobLabel: app.kubernetes.io/instance",
        "the job's name doesn't hold crynux",
        "monitored",
    ),
    "a scrape without the token": Mutation(
        "podmonitor.yaml",
        "if not $.Values.api.openReads",
        "if false",
        "has the credentials {}",
        "monitored",
    ),
    "a test that asks elsewhere": Mutation(
        "tests/ready.yaml", "/readyz", "/healthz", "the test asks http://"
    ),
    "egress for nobody's good": Mutation(
        POLICY, "policyTypes: [Ingress, Egress]", "policyTypes: [Ingress]", "leaves a direction"
    ),
    "the metadata service": Mutation(
        POLICY, "          - 169.254.0.0/16\n", "", "169.254.169.254 may be reached"
    ),
    "private networks": Mutation(POLICY, "          - 10.0.0.0/8\n", "", "10.1.2.3 may be"),
    "private networks by ipv6": Mutation(POLICY, "          - fc00::/7\n", "", "fc00::1 may be"),
    "every port": Mutation(
        POLICY,
        "      ports:\n        - {port: {{ .Values.api.port }}, protocol: TCP}\n  egress:\n",
        "  egress:\n",
        "a rule is for every port",
    ),
    "the test is kept out": Mutation(
        POLICY,
        "              app.kubernetes.io/component: test\n",
        "              x: y\n",
        "the test can't ask",
    ),
    "the port of another": Mutation(
        POLICY,
        "{port: {{ .Values.api.port }}, protocol: TCP}",
        "{port: 8001, protocol: TCP}",
        "not the API's port",
    ),
    "no hub": Mutation(
        POLICY, 'has "hub" $sources', "false", "the hub can't be reached at 8080", "a hub of theirs"
    ),
    "a port for nothing": Mutation(
        POLICY,
        "$ports = concat $ports",
        "$ports = concat (list 22) $ports",
        "22 is open to everyone and nothing",
    ),
    "a mirror's port for everyone": Mutation(
        SECURITY,
        'if not (include "crynux-cluster.private" $url.host)',
        "if true",
        "9000 is open to everyone and nothing",
        "a mirror within",
    ),
    "the world, for a site without it": Mutation(
        POLICY,
        "if not .Values.networkPolicy.workers.public",
        "if false",
        "443 is open to everyone and nothing",
        "nothing public",
    ),
    "no names": Mutation(
        POLICY,
        "- {port: {{ . }}, protocol: UDP}",
        "- {port: 53, protocol: UDP}",
        "no name is resolved",
        "narrow network policies",
    ),
    "rights in kubernetes": Mutation(
        "serviceaccount.yaml",
        "automountServiceAccountToken: false",
        "automountServiceAccountToken: true",
        "its token is mounted",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_template_that_was_changed_for_the_worse_is_found_out(name: str, tmp_path: Path) -> None:
    mutation = MUTATIONS[name]
    chart = tmp_path / CHART.name
    shutil.copytree(CHART, chart)
    file = chart / "templates" / mutation.file
    text = file.read_text(encoding="utf-8")
    assert mutation.old in text
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    values = merged(values_of(mutation.name), mutation.values)
    judged = rendered(case(values, chart=chart), values)
    found: list[str] = []
    for policy in POLICIES:
        lines = _lines(policy, judged)
        found += lines
        if any(mutation.said in line for line in lines):
            FOUND_OUT.setdefault(policy.__name__, set()).add(name)
    assert any(mutation.said in line for line in found), found


FOUND_OUT: dict[str, set[str]] = {}
"""By the policy that found it out."""


def _lines(policy: Policy, judged: Rendered) -> list[str]:
    lines: list[str] = []
    try:
        lines.extend(policy(judged))
    except (ValueError, KeyError, TypeError) as error:
        # It was to be judged by another policy, and is too odd for this one, which fails as well.
        lines.append(f"{policy.__name__} can't read it: {error!r}")
    return lines


def test_every_policy_has_found_something_out() -> None:
    if len(set().union(*FOUND_OUT.values())) < len(MUTATIONS):
        pytest.skip("only some of the mutations were tried")
    assert {policy.__name__ for policy in POLICIES} == FOUND_OUT.keys()
