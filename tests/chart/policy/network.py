"""Who talks to whom: selectors, ports, and which addresses may be reached."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from tests.chart.charts import (
    Object,
    Pod,
    head,
    matches,
    name_of,
    of_kind,
    only,
    operator_values,
    pods,
)
from tests.chart.policy.rendered import Policy, Rendered

PRIVATE: Final = (
    "10.1.2.3",
    "100.64.0.1",
    "127.0.0.1",
    "169.254.169.254",
    "172.16.0.1",
    "192.168.1.1",
    "198.18.0.1",
    "0.0.0.0",  # noqa: S104
    "224.0.0.1",
    "255.255.255.255",
    "::1",
    "fc00::1",
    "fd12::1",
    "fe80::1",
    "ff02::1",
)


# --- selectors and ports --------------------------------------------------------------------------


def _selected(found: Rendered, selector: Mapping[str, Any]) -> list[Pod]:
    return [pod for pod in pods(found.objects) if matches(selector, pod.labels)]


def selectors_match_the_pods_that_are_meant(found: Rendered) -> Iterator[str]:
    wanted: list[tuple[Object, Mapping[str, Any], str]] = []
    for each in of_kind(found.objects, "Service"):
        wanted.append((each, {"matchLabels": each["spec"]["selector"]}, "head"))
    for each in of_kind(found.objects, "PodMonitor"):
        wanted.append((each, each["spec"]["selector"], "head"))
    for each in of_kind(found.objects, "NetworkPolicy"):
        role = {"head": "head", "workers": "worker", "test": "other"}
        meant = role[each["metadata"]["name"].rsplit("-", 1)[1]]
        wanted.append((each, each["spec"]["podSelector"], meant))
    for each, selector, role_meant in wanted:
        roles = {pod.role for pod in _selected(found, selector)}
        if roles != {role_meant}:
            yield f"{name_of(each)}: selects {sorted(roles)}, {role_meant} is meant"
    for each in of_kind(found.objects, "PodDisruptionBudget"):
        if len(_selected(found, each["spec"]["selector"])) != 1:
            yield f"{name_of(each)}: doesn't select the pods of one group"


def _ports(chosen: Sequence[Pod]) -> dict[str, int]:
    return {
        port["name"]: port["containerPort"]
        for pod in chosen
        for container in pod.containers
        for port in container.get("ports", ())
    }


def ports_lead_somewhere(found: Rendered) -> Iterator[str]:
    """From Ingress to Service to container to what the operator listens at."""
    api = operator_values(found.objects)["serve"]["port"]
    services = {each["metadata"]["name"]: each for each in of_kind(found.objects, "Service")}
    for each in services.values():
        there = _ports(_selected(found, {"matchLabels": each["spec"]["selector"]}))
        for port in each["spec"]["ports"]:
            if there.get(port["targetPort"]) != api:
                yield f"{name_of(each)}: its port leads to {there.get(port['targetPort'])}"
    for each in of_kind(found.objects, "PodMonitor"):
        there = _ports(_selected(found, each["spec"]["selector"]))
        for endpoint in each["spec"]["podMetricsEndpoints"]:
            if there.get(endpoint["port"]) != api:
                yield f"{name_of(each)}: scrapes another port than the API's"
    for each in of_kind(found.objects, "Ingress"):
        if not all(_has_port(services, backend) for backend in _backends(each)):
            yield f"{name_of(each)}: leads to no Service's port"
    yield from _test_asks_the_service(found, services)


def _backends(ingress: Object) -> Iterator[Mapping[str, Any]]:
    for rule in ingress["spec"]["rules"]:
        yield from (path["backend"]["service"] for path in rule["http"]["paths"])


def _has_port(services: Mapping[str, Object], backend: Mapping[str, Any]) -> bool:
    service = services.get(backend["name"], {"spec": {"ports": ()}})
    return backend["port"]["name"] in [port["name"] for port in service["spec"]["ports"]]


def _test_asks_the_service(found: Rendered, services: Mapping[str, Object]) -> Iterator[str]:
    urls = [
        urlsplit(word)
        for each in of_kind(found.objects, "Pod")
        for word in each["spec"]["containers"][0]["command"]
        if word.startswith("http")
    ]
    for url in urls:
        service = services.get(url.hostname or "")
        ports = [] if service is None else [port["port"] for port in service["spec"]["ports"]]
        if url.port not in ports or url.path != "/readyz":
            yield f"the test asks {url.geturl()}"
    if not urls:
        yield "there is no test that asks /readyz"


# --- NetworkPolicies ------------------------------------------------------------------------------


def _policy(found: Rendered, name: str) -> Mapping[str, Any] | None:
    for each in of_kind(found.objects, "NetworkPolicy"):
        if each["metadata"]["name"].endswith(f"-{name}"):
            spec: Mapping[str, Any] = each["spec"]
            return spec
    return None


def network_policies_are_complete(found: Rendered) -> Iterator[str]:
    if not found.values["networkPolicy"]["enabled"]:
        return
    for each in of_kind(found.objects, "NetworkPolicy"):
        if each["spec"].get("policyTypes") != ["Ingress", "Egress"]:
            yield f"{name_of(each)}: leaves a direction open"
        for rule in (*each["spec"].get("ingress", ()), *each["spec"].get("egress", ())):
            yield from _rule_is_narrow(found, each, rule)
    for pod in pods(found.objects):
        if not any(
            matches(each["spec"]["podSelector"], pod.labels)
            for each in of_kind(found.objects, "NetworkPolicy")
        ):
            yield f"{pod.name}: no NetworkPolicy is for it"


def _rule_is_narrow(found: Rendered, policy: Object, rule: Mapping[str, Any]) -> Iterator[str]:
    peers = rule.get("to", rule.get("from"))
    if not peers:
        yield f"{name_of(policy)}: a rule is for everyone"
        return
    own = {"ray.io/cluster": only(found.objects, "RayCluster")["metadata"]["name"]}
    to_own = all(each.get("podSelector", {}).get("matchLabels") == own for each in peers)
    if not rule.get("ports") and not to_own:
        yield f"{name_of(policy)}: a rule is for every port"
    wide = [each["ipBlock"] for each in peers if each.get("ipBlock", {}).get("cidr") in WIDE]
    for address in map(ipaddress.ip_address, PRIVATE if wide else ()):
        if any(_allows(block, address) for block in wide):
            yield f"{name_of(policy)}: {address} may be reached"


WIDE: Final = frozenset({"0.0.0.0/0", "::/0"})
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _allows(block: Mapping[str, Any], address: Address) -> bool:
    inside = address in ipaddress.ip_network(block["cidr"])
    return inside and not any(
        address in ipaddress.ip_network(each) for each in block.get("except", ())
    )


def the_api_is_reached_by_whom_it_must(found: Rendered) -> Iterator[str]:
    """At its port, by the test and by whom the values name; and the test may ask it."""
    policy = _policy(found, "head")
    if policy is None:
        return
    port = operator_values(found.objects)["serve"]["port"]
    (test,) = (pod for pod in pods(found.objects) if pod.role == "other")
    rules = [rule for rule in policy["ingress"] if rule.get("ports")]
    if [each["port"] for rule in rules for each in rule["ports"]] != [port]:
        yield "NetworkPolicy of the head: not the API's port, or more than that"
    peers = [each for rule in rules for each in rule["from"]]
    here = [each for each in peers if "namespaceSelector" not in each and "podSelector" in each]
    if not any(matches(each["podSelector"], test.labels) for each in here):
        yield "NetworkPolicy of the head: the test can't ask"
    for each in found.values["networkPolicy"]["apiFrom"]:
        if each not in peers:
            yield f"NetworkPolicy of the head: {each} can't ask"
    asked = [
        (peer, port["port"])
        for rule in (_policy(found, "test") or {"egress": []})["egress"]
        for peer in rule["to"]
        for port in rule["ports"]
    ]
    labels = head(found.objects).labels
    if not any(p == port and matches(peer.get("podSelector", {}), labels) for peer, p in asked):
        yield "NetworkPolicy of the test: it can't ask the head"


def _public_ports(policy: Mapping[str, Any]) -> set[int]:
    return {
        port["port"]
        for rule in policy["egress"]
        if any(each.get("ipBlock", {}).get("cidr") in WIDE for each in rule["to"])
        for port in rule["ports"]
    }


def _all_ports(policy: Mapping[str, Any]) -> set[int]:
    return {port["port"] for rule in policy["egress"] for port in rule.get("ports", ())}


def _port(url: str) -> int:
    parts = urlsplit(url if "://" in url else f"tcp://{url}")
    return parts.port or {"http": 80, "https": 443}[parts.scheme]


SITE: Final = (".svc", ".local", ".localdomain", ".internal", ".lan", ".home.arpa")


def _is_private(url: str) -> bool:
    """By its name, as far as a name tells it."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith(SITE)


def _sources(found: Rendered) -> Iterator[tuple[str, str]]:
    """Where models are looked for, by the operator's configuration: what, and its URL."""
    models = operator_values(found.objects).get("models", {})
    sources = models.get("sources", ["mirror", "hub", "web"])
    if "hub" in sources:
        yield "the hub", models.get("hub", {}).get("endpoint", "https://huggingface.co")
    if "web" in sources:
        for port in models.get("web", {}).get("ports", [80, 443]):
            yield f"links at {port}", f"http://any.example:{port}"
    if "mirror" in sources and models.get("mirror", {}).get("url"):
        yield "the mirror", models["mirror"].get("endpoint", "https://s3.amazonaws.com")
    if "proxy" in models:
        yield "the proxy", models["proxy"]


def what_the_configuration_names_can_be_reached(found: Rendered) -> Iterator[str]:
    """What is public, by a rule for public addresses; what is private, by a rule of the values,
    whose peers nobody knows here, and by no other."""
    policy = _policy(found, "workers")
    if policy is None:
        return
    given = found.values["networkPolicy"]["workers"]
    public = _public_ports(policy)
    wanted = set(given["publicPorts"]) if given["public"] else set()
    for what, url in _sources(found):
        within = _is_private(url) or not given["public"]
        if _port(url) not in (_all_ports(policy) if within else public):
            yield f"NetworkPolicy of the workers: {what} can't be reached at {_port(url)}"
        if not within:
            wanted.add(_port(url))
    for port in sorted(public - wanted):
        yield f"NetworkPolicy of the workers: {port} is open to everyone and nothing is there"
    for port in sorted(wanted - public):
        yield f"NetworkPolicy of the workers: {port} isn't open"


def the_head_reaches_what_the_values_name(found: Rendered) -> Iterator[str]:
    policy = _policy(found, "head")
    if policy is None:
        return
    values = found.values["networkPolicy"]["head"]
    if _public_ports(policy) != set(values["publicPorts"]):
        yield "NetworkPolicy of the head: other public ports than the values say"
    for rule in values["egress"]:
        if rule not in policy["egress"]:
            yield f"NetworkPolicy of the head: {rule} is missing"
    for name in ("head", "workers", "test"):
        ports = {
            (port["port"], port["protocol"])
            for rule in (_policy(found, name) or {"egress": ()})["egress"]
            for port in rule.get("ports", ())
        }
        asked = found.values["networkPolicy"]["dnsPorts"]
        if not {(port, kind) for port in asked for kind in ("UDP", "TCP")} <= ports:
            yield f"NetworkPolicy of the {name}: no name is resolved"


# --- Prometheus -----------------------------------------------------------------------------------


def prometheus_is_let_in(found: Rendered) -> Iterator[str]:
    """With the API's token unless reads are open, and under the name that the rules look for."""
    for each in of_kind(found.objects, "PodMonitor"):
        (pod,) = _selected(found, each["spec"]["selector"])
        if "crynux" not in pod.labels.get(each["spec"].get("jobLabel", ""), ""):
            yield f"{name_of(each)}: the job's name doesn't hold crynux"
        (endpoint,) = each["spec"]["podMetricsEndpoints"]
        credentials = endpoint.get("authorization", {}).get("credentials", {})
        api = found.values["api"]
        wanted = (
            {} if api["openReads"] else {"name": api["existingSecret"], "key": api["tokenName"]}
        )
        if credentials != wanted:
            yield f"{name_of(each)}: has the credentials {credentials}"
        if endpoint["path"] != "/metrics":
            yield f"{name_of(each)}: scrapes {endpoint['path']}"
        targets = [each["targetLabel"] for each in endpoint.get("relabelings", ())]
        if "cluster" not in targets:
            yield f"{name_of(each)}: the dashboards choose by a label cluster"


POLICIES: Final[tuple[Policy, ...]] = (
    selectors_match_the_pods_that_are_meant,
    ports_lead_somewhere,
    network_policies_are_complete,
    the_api_is_reached_by_whom_it_must,
    what_the_configuration_names_can_be_reached,
    the_head_reaches_what_the_values_name,
    prometheus_is_let_in,
)
