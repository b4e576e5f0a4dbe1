"""Every value of the chart."""

from __future__ import annotations

from helm.schema.kinds import (
    KEY,
    LABEL,
    MEMORY,
    NAME,
    Schema,
    choice,
    every,
    flag,
    key_in,
    labels,
    maybe,
    notes,
    obj,
    ref,
    secret,
    text,
    whole,
)
from helm.schema.kubernetes import definitions, placement, volume
from helm.schema.operator import SLOTS, operator_config


def image(about: str) -> Schema:
    return obj(
        about,
        repository=maybe(
            "Where it was pushed. Required.",
            r"^[a-z0-9]+([._:/-][a-z0-9]+|__[a-z0-9]+|-{2,}[a-z0-9]+)*$",
        ),
        tag=maybe("Its tag.", r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"),
        digest=maybe("Its digest, taken instead of the tag.", r"^sha256:[0-9a-f]{64}$"),
    )


def group() -> Schema:
    replicas = "Pods, where their number is fixed."
    return obj(
        "A type of GPU node: pods that are alike.",
        ("name",),
        name=text("Its name.", r"^[a-z]([a-z0-9-]{0,18}[a-z0-9])?$", 20),
        replicas=whole(replicas, 0, 1000),
        minReplicas=whole("Pods at the least, with which it begins; for who scales them.", 0, 1000),
        maxReplicas=whole("Pods at the most.", 0, 1000),
        gpuResource=text(
            "As the device plugin calls the cards.",
            r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?/[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$",
        ),
        gpusPerPod=whole("Whole cards of each pod.", 1, 16),
        gpuName=text("The driver's name for the cards, where slots are given.", most=80),
        slots={
            "description": "Accounts for each card, or auto; else config.fleet.slots_per_gpu.",
            **SLOTS,
        },
        simulated=obj(
            "Cards that compute on the CPU instead; devnets only.",
            ("name", "vram"),
            name=text("The driver's name for the card.", r"^[A-Za-z0-9 ._()-]+$", 80, 1),
            vram=whole("Whole GB.", 1, 1024),
        ),
        runtimeClassName=maybe("The pods' runtime class, such as nvidia.", NAME),
        resources=ref("Besides the cards.", "resources"),
        shm=text("Size of /dev/shm; counts as memory.", r"^[1-9][0-9]*(Gi|Ti)$", 16),
        tmp=text("Size of /tmp.", MEMORY, 16),
        graceSeconds=whole(
            "Until a pod that goes alone is ended; longer than a task.", 240, 86_400
        ),
        cache=obj(
            "Where the models are.",
            kind=choice(
                "A claim that the chart makes and keeps, one of yours, or gone with the pod.",
                "claim",
                "existingClaim",
                "ephemeral",
            ),
            **volume("Its size"),
        ),
        **placement(),
    )


def schema() -> Schema:
    token = key_in("the token")
    found = obj(
        "Values of the chart crynux-cluster.",
        **{
            "global": {
                "description": "What Helm hands to every subchart; not used.",
                "type": "object",
            },
            "nameOverride": maybe("Instead of the chart's name.", r"^[a-z]([a-z0-9-]*[a-z0-9])?$"),
            "fullnameOverride": maybe(
                "Instead of release and chart name.", r"^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$"
            ),
            "commonLabels": labels("Further labels of everything."),
            "image": obj(
                "The images, made from the project's Dockerfile.",
                head=image("The head's: without CUDA."),
                worker=image("The workers': with CUDA."),
                pullPolicy=choice("When they are pulled.", "IfNotPresent", "Always", "Never"),
                pullSecrets=every("Secrets of the registry.", text("Its name.", NAME)),
            ),
            "suspend": flag("No pods; all else stays as it is."),
            "rollout": text("Another text makes all pods anew.", most=253),
            "identity": obj(
                "The operator's key, in the head pod only.",
                existingSecret=secret("the key. Required"),
                kind=choice("A keystore (V3) or a BIP-39 phrase.", "keystore", "seed"),
                keyName=key_in("the keystore or phrase"),
                passwordName=key_in("the keystore's password"),
                accounts=whole("The most node accounts ever used.", 1, 1000),
            ),
            "network": obj(
                "URLs, which may hold keys.",
                existingSecret=secret("the URLs. Required"),
                rpcUrlName=key_in("the RPC endpoints: a URL on each line, in order"),
                relayUrlName=key_in("the relay's URL"),
                wsUrlName=maybe("Its key for the WebSocket endpoint's URL, where one is.", KEY),
            ),
            "journal": obj(
                "Where the durable facts are.",
                kind=choice("On the head's volume, or in a database.", "sqlite", "postgresql"),
                existingSecret=secret("the database's URL"),
                urlName=key_in("the URL"),
            ),
            "api": obj(
                "The operator's API.",
                existingSecret=secret("the bearer token. Required unless openReads"),
                tokenName=key_in("the token, without a line's end: Prometheus sends what is there"),
                openReads=flag("Let anyone read who reaches it."),
                port=whole("In the head pod.", 1024, 65535),
            ),
            "ray": obj(
                "Ray itself.",
                auth=obj(
                    "The token between Ray's processes.",
                    existingSecret=secret("it, as auth_token; none: KubeRay makes one"),
                ),
                faultTolerance=obj(
                    "Of Ray's control plane, by a Redis of yours.",
                    enabled=flag("GPU processes outlive the head."),
                    redisAddress=maybe("host:port.", r"^[A-Za-z0-9.-]+:[0-9]{1,5}$"),
                    existingSecret=secret("Redis' password"),
                    passwordName=key_in("the password"),
                    usernameName=maybe("Its key for the user's name, where Redis has users.", KEY),
                ),
            ),
            "models": obj(
                "Credentials for models, on the workers only.",
                huggingface=obj("Hugging Face.", existingSecret=secret("a token"), tokenName=token),
                civitai=obj("Civitai.", existingSecret=secret("a token"), tokenName=token),
                proxy=obj(
                    "An HTTP proxy that wants a password. Its port is for networkPolicy to know.",
                    existingSecret=secret("the URL of a proxy that wants a password"),
                    urlName=key_in("the URL"),
                ),
                ca=obj(
                    "Certificates that models' sources may show beside those believed anyhow.",
                    existingSecret=secret("certificates that sources may show too"),
                    bundleName=key_in("the certificates"),
                ),
                s3=obj(
                    "Your S3 mirror.",
                    existingSecret=secret("an AWS credentials file"),
                    credentialsName=key_in("the file"),
                ),
            ),
            "config": operator_config(),
            "head": obj(
                "The head: coordinator, supervisor and API; no cards.",
                resources=ref("Of Ray's container, with the coordinator in it.", "resources"),
                supervisorResources=ref("Of the supervisor's container.", "resources"),
                shm=text("Size of /dev/shm; counts as memory.", r"^[1-9][0-9]*(Gi|Ti)$", 16),
                tmp=text("Size of /tmp.", MEMORY, 16),
                unreachableSeconds=whole(
                    "After which its pod is deleted from a machine that does not answer.", 0, 300
                ),
                graceSeconds=whole(
                    "Until a head that goes is ended; no shorter than any group's.", 240, 86_400
                ),
                persistence=obj(
                    "The volume for the journal and for results until they are uploaded.",
                    enabled=flag("False only with PostgreSQL."),
                    **volume("Its size"),
                ),
                **placement(),
            ),
            "gpuGroups": every("One for each type of GPU node.", group()),
            "security": obj(
                "As whom the containers run.",
                user=whole("User.", 1, 2**31 - 1),
                group=whole("Group, which volumes belong to.", 1, 2**31 - 1),
                readOnlyRootFilesystem=flag("Nothing but volumes can be written."),
            ),
            "serviceAccount": obj(
                "Without any rights.",
                create=flag("Make one."),
                name=maybe("Its name; of one of yours where none is made.", NAME),
                annotations=notes("Of it, such as for workload identity."),
            ),
            "service": obj(
                "In front of the API.",
                type=choice("Its type.", "ClusterIP", "NodePort", "LoadBalancer"),
                port=whole("Its port.", 1, 65535),
                annotations=notes("Of it."),
            ),
            "ingress": obj(
                "In front of the Service.",
                enabled=flag("Make one."),
                className=maybe("Its class.", NAME),
                host=maybe("The name by which it is reached.", r"^(\*\.)?[a-z0-9.-]+$"),
                tlsSecret=maybe("The Secret with its certificate.", NAME),
                annotations=notes("Of it."),
            ),
            "networkPolicy": obj(
                "Who may talk to whom.",
                enabled=flag("Make them."),
                apiFrom=every("Who may reach the API.", ref("A peer.", "peer")),
                dnsTo=every("Where names are resolved.", ref("A peer.", "peer")),
                dnsPorts=every("At which ports.", whole("A port.", 1, 65535)),
                head=reach("Of RPC and relay at public addresses."),
                workers=reach(
                    "At public addresses, besides those that config.models needs.",
                    public=flag("Public addresses at all; false where models come from within."),
                ),
            ),
            "podDisruptionBudget": obj(
                "How many pods go at a time when nodes are drained.",
                head=flag("The head doesn't."),
                workers=flag("Of the workers, one after the other."),
                workersUnavailable=whole("So many of each group's minReplicas at a time.", 1, 1000),
            ),
            "monitoring": monitoring(),
            "test": obj(
                "Of `helm test`.",
                timeoutSeconds=whole("How long /readyz is waited for.", 10, 86_400),
            ),
        },
    )
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart crynux-cluster",
        **found,
        "definitions": definitions(),
    }


def reach(ports: str, **more: Schema) -> Schema:
    return obj(
        "What it may reach.",
        **more,
        publicPorts=every(ports, whole("A port.", 1, 65535)),
        egress=every("What else, such as at private addresses.", ref("A rule.", "egress")),
    )


def monitoring() -> Schema:
    chosen = "By which your Prometheus chooses it."
    return obj(
        "Metrics, alerts and dashboards.",
        cluster=text("The label `cluster` on every metric; none: the full name.", LABEL, 63),
        podMonitor=obj(
            "Has Prometheus scrape the head.",
            enabled=flag("Make it; needs Prometheus' operator."),
            interval=text("Between two scrapes.", r"^([1-9][0-9]s|[1-9]m)$", 3),
            labels=labels(chosen),
        ),
        rules=obj(
            "The alerts of configs/prometheus/rules.yaml.",
            enabled=flag("Make it; needs Prometheus' operator."),
            labels=labels(chosen),
        ),
        dashboards=obj(
            "The dashboards of configs/grafana/dashboards, a ConfigMap each.",
            enabled=flag("Make them."),
            labels=labels("By which Grafana's sidecar finds them."),
            annotations=notes("Such as the folder."),
        ),
    )
