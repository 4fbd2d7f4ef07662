"""Where a pod keeps models and data of hub and storage: a volume, the bound that fits it, and what is too large for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayft.errors import ResourceError
from rayft.model.locate import is_hub_id
from rayft.plan.architecture import Architecture
from rayft.spec import Job
from rayft.spec.profile import Profile

CACHE = "/cache"
#: The hub's own cache, on the same volume; rayft counts it against its bound (`CacheFolder.bound`).
HUB = f"{CACHE}/hub"
#: Disk of a pod beside its cache, GiB: temporary files, Ray's logs.
BESIDE_GIB = 5
#: Hubs hold weights in 16 bits; what is smaller is converted to that.
WEIGHT_BYTES = 2


@dataclass(frozen=True)
class CacheVolume:
    """source: of the Kubernetes volume. own: whether it is part of the pod's disk, with a limit beyond which the pod is evicted."""

    gib: int
    source: dict[str, Any]

    @property
    def own(self) -> bool:
        return "emptyDir" in self.source

    @property
    def bound_gb(self) -> int:
        """RAYFT_CACHE_GB: downloads under way come on top of it."""
        return max(1, int(self.gib * 2**30 / 1e9 * 0.9))

    @property
    def environment(self) -> dict[str, str]:
        """What tells rayft and the hub's libraries of it."""
        return {"RAYFT_CACHE": CACHE, "RAYFT_CACHE_GB": str(self.bound_gb), "HF_HOME": HUB}


def worker_cache(profile: Profile) -> CacheVolume:
    """Of a worker pod."""
    return _volume(profile, profile.cache.gib, profile.cache.host_path)


def head_cache(profile: Profile) -> CacheVolume:
    """Of the head, on its own disk but for a claim: a folder of the workers' nodes need not be on the head's."""
    scratch = profile.head.scratch_gib
    return _volume(profile, max(-(-scratch // 2), scratch - BESIDE_GIB), None)


def refuse_large_model(job: Job, profile: Profile, architecture: Architecture) -> None:
    """Raise ResourceError where weights that are fetched would fill the disk of a pod, which is then evicted again and again."""
    path = job.model.path
    if job.model.random_weights or not (path.startswith("s3://") or is_hub_id(path)):
        return
    taken = architecture.total * WEIGHT_BYTES
    for volume, role, key in (
        (worker_cache(profile), "a worker", "cache.gib"),
        (head_cache(profile), "the head", "head.scratch_gib"),
    ):
        if volume.own and taken > volume.gib * 2**30:
            raise ResourceError(
                f"The weights of {path} take about {taken / 1e9:.1f} GB, and the cache of {role} holds {volume.gib * 2**30 / 1e9:.1f} GB "
                f"(profile {profile.name}, {key}).",
                f"Take a smaller model, or have the platform team raise {key} or give the cache a claim.",
            )


def _volume(profile: Profile, gib: int, host_path: str | None) -> CacheVolume:
    if profile.cache.claim:
        return CacheVolume(profile.cache.gib, {"persistentVolumeClaim": {"claimName": profile.cache.claim}})
    if host_path:
        return CacheVolume(gib, {"hostPath": {"path": host_path, "type": "Directory"}})
    return CacheVolume(gib, {"emptyDir": {"sizeLimit": f"{gib}Gi"}})
