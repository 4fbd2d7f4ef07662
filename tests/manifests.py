"""A RayJob with nothing wrong, and how tests change it."""

from __future__ import annotations

import copy
from typing import Any

import yaml

GOOD = """
apiVersion: ray.io/v1
kind: RayJob
metadata:
  name: demo
  namespace: team
spec:
  entrypoint: python jobs/submit.py /etc/rayft/job.yaml
  submissionMode: HTTPMode
  backoffLimit: 6
  activeDeadlineSeconds: 86400
  shutdownAfterJobFinishes: true
  ttlSecondsAfterFinished: 300
  rayClusterSpec:
    rayVersion: 2.60.0
    authOptions: {mode: token}
    headGroupSpec:
      rayStartParams: {num-cpus: "0"}
      template:
        spec: &pod
          automountServiceAccountToken: false
          terminationGracePeriodSeconds: 180
          securityContext:
            runAsNonRoot: true
            runAsUser: 1000
            seccompProfile: {type: RuntimeDefault}
          containers:
          - &ray
            name: ray
            image: registry.example/rayft:0.1.0-ray2.60.0-cpu
            env:
            - {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: "150"}
            resources:
              requests: {cpu: "2", memory: 8Gi}
              limits: {cpu: "2", memory: 8Gi}
            securityContext:
              allowPrivilegeEscalation: false
              capabilities: {drop: [ALL]}
    workerGroupSpecs:
    - groupName: gpu
      replicas: 2
      minReplicas: 2
      maxReplicas: 2
      rayStartParams: {}
      template:
        spec:
          <<: *pod
          terminationGracePeriodSeconds: 150
          nodeSelector: {nvidia.com/gpu.product: NVIDIA-H200}
          containers:
          - <<: *ray
            env:
            - {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: "110"}
            resources:
              requests: {cpu: "8", memory: 64Gi, nvidia.com/gpu: "4"}
              limits: {cpu: "8", memory: 64Gi, nvidia.com/gpu: "4"}
"""

#: Short names of places in the good job.
PLACES = {
    "cluster": "spec.rayClusterSpec",
    "head": "spec.rayClusterSpec.headGroupSpec",
    "headpod": "spec.rayClusterSpec.headGroupSpec.template.spec",
    "headray": "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0",
    "group": "spec.rayClusterSpec.workerGroupSpecs.0",
    "pod": "spec.rayClusterSpec.workerGroupSpecs.0.template.spec",
    "ray": "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0",
}


def good() -> dict[str, Any]:
    """A RayJob with nothing wrong; its own copy."""
    return copy.deepcopy(yaml.safe_load(GOOD))  # type: ignore[no-any-return]


def place(path: str) -> list[str | int]:
    """Keys of a path such as `ray/env/0/value`; its first part may be a short name, `~1` is a slash."""
    first, *rest = path.split("/")
    keys = [*PLACES.get(first, first).split("."), *rest]
    return [int(key) if key.isdigit() else key.replace("~1", "/") for key in keys]


def patched(changes: dict[str, Any], data: dict[str, Any] | None = None) -> dict[str, Any]:
    """The good job with values set at paths; None removes, and a number beyond the end of a list appends."""
    made = good() if data is None else copy.deepcopy(data)
    for path, value in changes.items():
        *keys, last = place(path)
        target: Any = made
        for key in keys:
            target = target.setdefault(str(key), {}) if isinstance(target, dict) else target[int(key)]
        if value is None:
            del target[last]
        elif isinstance(target, list) and int(last) >= len(target):
            target.append(value)
        else:
            target[last] = value
    return made
