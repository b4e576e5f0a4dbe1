"""What Kubernetes defines and the values take over, closed as everything else is."""

from __future__ import annotations

from helm.schema.kinds import (
    CPU,
    LABEL,
    LABEL_KEY,
    MEMORY,
    NAME,
    Schema,
    choice,
    every,
    labels,
    maybe,
    notes,
    obj,
    ref,
    text,
    whole,
)


def definitions() -> dict[str, Schema]:
    operator = choice("How it is compared.", "In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt")
    values = every("What it is compared with.", text("A value.", LABEL, 63))
    requirement = obj(
        "A condition on labels.",
        ("key", "operator"),
        key=text("The label.", LABEL_KEY, 317),
        operator=operator,
        values=values,
    )
    term = obj(
        "Nodes for which all of these hold.",
        matchExpressions=every("Conditions on labels.", requirement),
        matchFields=every("Conditions on fields.", requirement),
    )
    selector = obj(
        "Objects for which all of these hold; none: all.",
        matchLabels=labels("Labels with these values."),
        matchExpressions=every("Conditions on labels.", requirement),
    )
    pod_term = obj(
        "Pods, and what of a node they share.",
        ("topologyKey",),
        labelSelector=ref("Which pods.", "selector"),
        namespaceSelector=ref("In which namespaces.", "selector"),
        namespaces=every("In these namespaces.", text("Its name.", NAME)),
        topologyKey=text("The node's label that must be equal.", LABEL_KEY, 317),
    )
    weight = whole("How much it counts.", 1, 100)
    pods = obj(
        "Pods to be near to, or away from.",
        requiredDuringSchedulingIgnoredDuringExecution=every("Always.", ref("A term.", "podTerm")),
        preferredDuringSchedulingIgnoredDuringExecution=every(
            "Where possible.",
            obj(
                "A term with its weight.",
                ("weight", "podAffinityTerm"),
                weight=weight,
                podAffinityTerm=ref("The term.", "podTerm"),
            ),
        ),
    )
    nodes = obj(
        "Nodes to be on.",
        requiredDuringSchedulingIgnoredDuringExecution=obj(
            "Always.",
            ("nodeSelectorTerms",),
            nodeSelectorTerms=every("One of these must hold.", ref("A term.", "nodeTerm")),
        ),
        preferredDuringSchedulingIgnoredDuringExecution=every(
            "Where possible.",
            obj(
                "A term with its weight.",
                ("weight", "preference"),
                weight=weight,
                preference=ref("The term.", "nodeTerm"),
            ),
        ),
    )
    cidr = text("A network, such as 10.20.0.0/16.", r"^[0-9a-fA-F.:]+/[0-9]{1,3}$", 49)
    return {
        "selector": selector,
        "nodeTerm": term,
        "podTerm": pod_term,
        "affinity": obj(
            "Where pods go, or don't, as Kubernetes defines it.",
            nodeAffinity=nodes,
            podAffinity=pods,
            podAntiAffinity=pods,
        ),
        "toleration": obj(
            "A taint that pods go along with.",
            key=maybe("The taint's key; none: every one.", LABEL_KEY),
            operator=choice("How its value is compared.", "Exists", "Equal"),
            value=text("The taint's value.", LABEL, 63),
            effect=choice("Which effect.", "NoSchedule", "PreferNoSchedule", "NoExecute"),
            tolerationSeconds=whole("How long, for NoExecute.", 0, 2**31),
        ),
        "resources": obj(
            "What a container is given at least, and at most.",
            ("requests", "limits"),
            requests=ref("At least.", "amounts"),
            limits=ref("At most.", "amounts"),
        ),
        "amounts": obj(
            "Processor and memory.",
            ("cpu", "memory"),
            cpu={
                "description": "Cores, or thousandths with m.",
                "type": ["number", "string"],
                "exclusiveMinimum": 0,
                "pattern": CPU,
            },
            memory=text("In Mi, Gi or Ti.", MEMORY, 16),
            **{"ephemeral-storage": text("In Mi, Gi or Ti.", MEMORY, 16)},
        ),
        "variable": obj(
            "A variable for the container's environment.",
            ("name", "value"),
            name=text("Its name; none that names a secret.", r"^[A-Za-z_][A-Za-z0-9_]*$"),
            value=text("Its value.", most=4096),
        ),
        "peer": obj(
            "Pods, namespaces or addresses, as in a NetworkPolicy.",
            ipBlock=obj(
                "Addresses.", ("cidr",), cidr=cidr, **{"except": every("But not these.", cidr)}
            ),
            namespaceSelector=ref("Namespaces.", "selector"),
            podSelector=ref("Pods.", "selector"),
        ),
        "egress": obj(
            "Where to, at which ports.",
            ("to", "ports"),
            to=every("Where to.", ref("A peer.", "peer")),
            ports=every(
                "At which ports.",
                obj(
                    "A port.",
                    ("port",),
                    port=whole("Its number.", 1, 65535),
                    protocol=choice("Its protocol.", "TCP", "UDP", "SCTP"),
                ),
            ),
        ),
    }


def placement() -> dict[str, Schema]:
    return {
        "nodeSelector": labels("Labels that the node must have."),
        "tolerations": every("Taints that its pods go along with.", ref("A taint.", "toleration")),
        "affinity": ref("Where its pods go, or don't.", "affinity"),
        "priorityClassName": maybe("Its pods' priority class.", NAME),
        "labels": labels("Further labels of its pods."),
        "annotations": notes("Further annotations of its pods."),
        "env": every("Further variables; no secrets.", ref("A variable.", "variable")),
    }


def volume(about: str) -> dict[str, Schema]:
    return {
        "size": text(f"{about}, in Mi, Gi or Ti.", MEMORY, 16),
        "storageClass": maybe("Its storage class; none: the cluster's default.", NAME),
        "accessMode": choice(
            "How it may be mounted.", "ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany"
        ),
        "existingClaim": maybe("A claim of yours instead.", NAME),
        "annotations": notes("Of the claim."),
    }
