"""What is rendered: every example file, and a matrix of switches upon the simplest of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from tests.chart.charts import EXAMPLES, Case, defaults, example, merged, render
from tests.chart.policy import containers, network, objects, ray, secrets
from tests.chart.policy.rendered import Policy, Rendered

SIMPLEST = "single-server"
ADDRESS = "0x5FbDB2315678afecb367f032d93F642f64180aa3"
POLICIES: Final[tuple[Policy, ...]] = (
    *secrets.POLICIES,
    *containers.POLICIES,
    *ray.POLICIES,
    *objects.POLICIES,
    *network.POLICIES,
)


def one(**more: Any) -> dict[str, Any]:  # noqa: ANN401 - as the values have them
    """The simplest example's only group, with something else in it."""
    return merged(example(SIMPLEST)["gpuGroups"][0], more)


def configured(**sections: Any) -> dict[str, Any]:  # noqa: ANN401 - as the values have them
    return {"config": sections}


EPHEMERAL = {"kind": "ephemeral", "size": "100Gi"}
SHARED = {"kind": "claim", "size": "1Ti", "accessMode": "ReadWriteMany", "storageClass": "nfs"}
WITHIN = {
    "to": [{"ipBlock": {"cidr": "10.20.0.0/24"}}],
    "ports": [{"port": 9000, "protocol": "TCP"}, {"port": 443, "protocol": "TCP"}],
}
PEER = {"podSelector": {"matchLabels": {"app": "x"}}}

SWITCHES: Final[Mapping[str, Mapping[str, Any]]] = {
    "suspended": {"suspend": True},
    "rolled out again": {"rollout": "after the key was renewed"},
    "a phrase for a key": {"identity": {"kind": "seed", "keyName": "phrase"}},
    "a websocket": {"network": {"wsUrlName": "ws"}},
    "postgresql": {"journal": {"kind": "postgresql", "existingSecret": "db", "urlName": "dsn"}},
    "postgresql and no volume": {
        "journal": {"kind": "postgresql", "existingSecret": "db"},
        "head": {"persistence": {"enabled": False}},
    },
    "a volume of theirs": {"head": {"persistence": {"existingClaim": "theirs"}}},
    "reads are open": {"api": {"existingSecret": "", "openReads": True}},
    "reads are open beside a token": {
        "api": {"openReads": True},
        "monitoring": {"podMonitor": {"enabled": True}},
    },
    "another port": {"api": {"port": 9000}, "service": {"port": 80, "type": "NodePort"}},
    "a token for ray of theirs": {"ray": {"auth": {"existingSecret": "ray-token"}}},
    "redis": {
        "ray": {
            "faultTolerance": {
                "enabled": True,
                "redisAddress": "redis:6379",
                "existingSecret": "redis",
                "usernameName": "user",
            }
        }
    },
    "tokens for models": {
        "models": {
            "huggingface": {"existingSecret": "hf", "tokenName": "hf-token"},
            "civitai": {"existingSecret": "civitai"},
            "s3": {"existingSecret": "s3", "credentialsName": "aws"},
        }
    },
    "links nowhere": configured(models={"sources": ["hub"], "web": {"allow_hosts": ["files"]}}),
    "nothing is fetched": configured(models={"sources": []}),
    "a hub of theirs": configured(models={"hub": {"endpoint": "http://hub.site:8080"}}),
    "a mirror within": configured(
        models={
            "sources": ["mirror"],
            "mirror": {"url": "s3://models/v1", "endpoint": "http://10.20.0.9:9000"},
        }
    )
    | {"networkPolicy": {"workers": {"egress": [WITHIN]}}},
    "nothing public": configured(
        models={"sources": ["hub"], "hub": {"endpoint": "https://hub.site.example"}}
    )
    | {"networkPolicy": {"workers": {"public": False, "egress": [WITHIN]}}},
    "a proxy": configured(models={"proxy": "http://proxy.site:3128"}),
    "a large chain": configured(network={"chain_id": 11155111, "stake": "400.5"}),
    "a namespace of ray": configured(ray={"namespace": "site-2", "platform": "linux"}),
    "no pods": {"gpuGroups": [one(replicas=0)]},
    "pods without a number": {"gpuGroups": [one(replicas=None)]},
    "between bounds": {
        "gpuGroups": [one(replicas=None, minReplicas=2, maxReplicas=6, cache=SHARED)]
    },
    "many cards": {"gpuGroups": [one(gpusPerPod=8, resources=None, shm="8Gi")]}
    | configured(gpu={"host_memory_gb": 1}),
    "a resource of another name": {"gpuGroups": [one(gpuResource="nvidia.com/rtx4090")]},
    "a cache that goes": {"gpuGroups": [one(replicas=3, cache=EPHEMERAL)]}
    | configured(models={"quota_gb": 90}),
    "a cache of theirs": {
        "gpuGroups": [one(replicas=3, cache={"kind": "existingClaim", "existingClaim": "models"})]
    },
    "two groups": {
        "gpuGroups": [one(), one(name="other", gpuResource="amd.com/gpu", labels={"team": "a"})]
    },
    "slots of their own": {
        "gpuGroups": [
            one(gpuName="NVIDIA L4", slots=3),
            one(name="more", gpuName="NVIDIA L4", slots=3),
            one(name="a40", gpuName="NVIDIA A40", slots="auto"),
        ]
    },
    "simulated cards": {
        "gpuGroups": [one(gpusPerPod=2, simulated={"name": "NVIDIA GeForce RTX 4090", "vram": 24})]
    }
    | configured(network={"devnet": True, "chain_id": 31337}, gpu={"host_memory_gb": 1}),
    "placed": {
        "head": {
            "tolerations": [{"key": "k", "operator": "Exists"}],
            "annotations": {"example.org/a": "b: c"},
            "env": [
                {"name": "MALLOC_ARENA_MAX", "value": "2"},
                {"name": "RAY_BACKEND_LOG_LEVEL", "value": "info"},
            ],
        },
        "gpuGroups": [
            one(env=[{"name": "NCCL_DEBUG", "value": "INFO"}], annotations={"a": "1"}, tmp="1Ti")
        ],
        "commonLabels": {"cost-center": "42"},
    },
    "names": {"fullnameOverride": "miner", "nameOverride": "gpu-operator"},
    "a service account of theirs": {"serviceAccount": {"create": False, "name": "theirs"}},
    "the default service account": {"serviceAccount": {"create": False}},
    "no network policies": {"networkPolicy": {"enabled": False}},
    "narrow network policies": {
        "networkPolicy": {
            "apiFrom": [PEER],
            "dnsPorts": [5353],
            "head": {"publicPorts": [443, 8443], "egress": []},
            "workers": {"publicPorts": [8080]},
        }
    },
    "budgets": {"podDisruptionBudget": {"head": True, "workersUnavailable": 2}}
    | {"gpuGroups": [one(replicas=5, cache=SHARED)]},
    "disk of theirs": {
        "head": {"resources": {"limits": {"ephemeral-storage": "30Gi"}}},
        "gpuGroups": [
            one(
                resources={
                    "requests": {"ephemeral-storage": "200Gi"},
                    "limits": {"ephemeral-storage": "250Gi"},
                }
            )
        ],
    },
    "no budgets": {"podDisruptionBudget": {"head": False, "workers": False}},
    "an ingress": {"ingress": {"enabled": True, "host": "crynux.example.org"}},
    "monitored": {
        "monitoring": {
            "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "rules": {"enabled": True},
            "dashboards": {"enabled": True},
        },
        "commonLabels": {"release": "overridden"},
    },
    "digests": {
        "image": {
            "head": {"repository": "r.example:5000/a/b", "digest": "sha256:" + "a" * 64},
            "worker": {"repository": "r/c", "tag": "1"},
            "pullSecrets": ["one", "two"],
        }
    },
    "a root that can be written": {"security": {"readOnlyRootFilesystem": False}},
    "a user and a group of theirs": {"security": {"user": 1000680000, "group": 1000680000}},
}


def values_of(name: str) -> dict[str, Any]:
    """What a person would give."""
    if name in EXAMPLES:
        return example(name)
    return merged(example(SIMPLEST), SWITCHES[name])


NAMES: Final = (*EXAMPLES, *SWITCHES)


def rendered(what: Case, values: Mapping[str, Any]) -> Rendered:
    return Rendered(render(what), merged(defaults(), values))


def problems(found: Rendered) -> Iterator[str]:
    for policy in POLICIES:
        yield from policy(found)
