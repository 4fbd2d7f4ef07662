"""The NetworkPolicy of a run's pods: each other, the operator, who the profile names; out to names, storage and model hub."""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit

from rayft.errors import JobError
from rayft.fleet.render.pods import RUN_LABEL, Object
from rayft.spec import Job
from rayft.spec.profile import Profile

JOB_API_PORT = 8265
METRICS_PORT = 8080
#: Where nodes tell their own secrets (and instance roles).
METADATA = ("169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128")


def network_policy(name: str, labels: dict[str, str], profile: Profile) -> Object:
    """It selects the pods by the run's label."""
    policy = profile.network_policy
    own = {"podSelector": {"matchLabels": {RUN_LABEL: labels[RUN_LABEL]}}}
    ingress: list[Any] = [
        {"from": [own]},
        _from([policy.operator_namespace, *policy.client_namespaces], JOB_API_PORT),
    ]
    if policy.metrics_namespaces:
        ingress.append(_from(policy.metrics_namespaces, METRICS_PORT))
    egress: list[Any] = [
        {"to": [own]},
        {
            "to": [_namespace("kube-system")],
            "ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")],
        },
    ]
    if policy.egress_ports and policy.egress_cidrs:
        egress.append(
            {
                "to": [{"ipBlock": _block(cidr)} for cidr in policy.egress_cidrs],
                "ports": [{"protocol": "TCP", "port": port} for port in policy.egress_ports],
            }
        )
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": profile.namespace, "labels": labels},
        "spec": {
            "podSelector": {"matchLabels": {RUN_LABEL: labels[RUN_LABEL]}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": ingress,
            "egress": egress,
        },
    }


def refuse_closed_ports(job: Job, profile: Profile) -> None:
    """Raise JobError for a server that the job calls and that its pods could not reach."""
    policy = profile.network_policy
    called = [
        (f"rewards.{index}.path", source.path)
        for index, source in enumerate(job.rewards)
        if source.type == "http"
    ]
    if job.log.mlflow:
        called.append(("log.mlflow", job.log.mlflow))
    there = policy.egress_ports if policy.egress_cidrs else []
    for key, url in called:
        try:
            parts = urlsplit(url)
            port = parts.port or (80 if parts.scheme == "http" else 443)
        except ValueError:
            raise JobError(f"{key} is no URL.", "Correct its host and port.") from None
        if port not in there:
            raise JobError(
                f"{key} calls port {port} of {parts.hostname}, and the network policy of profile {profile.name} opens "
                f"{', '.join(map(str, there)) or 'none'} (network_policy.egress_ports).",
                "Have the platform team open the port, or name a server that listens on an open one.",
            )


def _from(namespaces: list[str], port: int) -> Object:
    names = list(dict.fromkeys(namespaces))
    return {"from": [_namespace(name) for name in names], "ports": [{"protocol": "TCP", "port": port}]}


def _namespace(name: str) -> Object:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _block(cidr: str) -> Object:
    network = ipaddress.ip_network(cidr)
    metadata = [ipaddress.ip_network(one) for one in METADATA]
    inside = [str(one) for one in metadata if one.version == network.version and one.subnet_of(network)]  # type: ignore[arg-type]
    return {"cidr": cidr, **({"except": inside} if inside else {})}
