"""Images and versions."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rayft.fleet.lint.findings import Found, rule
from rayft.fleet.lint.views import Cluster, Pod

_MOVING = {"latest", "nightly", "main", "master", "dev", "stable"}
_RAY_VERSION = re.compile(r"(?:^|[-_.])ray[-_]?(\d+\.\d+\.\d+)")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def split_image(image: str) -> tuple[str, str, str]:
    """Repository, tag and digest; the last two may be empty."""
    name, _, digest = image.partition("@")
    head, _, last = name.rpartition("/")
    last, _, tag = last.partition(":")
    return (f"{head}/{last}" if head else last), tag, digest


def ray_version(image: str) -> str | None:
    """Version of Ray that the tag of an image names: `rayproject/ray:2.60.0-py311`, or `…-ray2.60.0-…`."""
    repository, tag, _ = split_image(image)
    if found := _RAY_VERSION.search(tag):
        return found[1]
    own = repository.rpartition("/")[2] in ("ray", "ray-ml", "ray-llm")
    found = _VERSION.match(tag) if own else None
    return found[0] if found else None


@rule(
    "image-tag",
    "pod",
    reason="A retry, or a worker that comes later, pulls another image than the one that was tested",
    source="Kubernetes, images: no tag means latest; pin a version, or a digest",
)
def image_tag(pod: Pod) -> Iterator[Found]:
    """Images are pinned."""
    for container in pod.all_containers:
        image = container.data.get("image")
        if not isinstance(image, str) or not image:
            continue
        _, tag, digest = split_image(image)
        if not digest and (not tag or tag in _MOVING):
            said = "has no tag" if not tag else f"has the moving tag {tag!r}"
            yield Found(f"{container.path}.image", f"{image} {said}", "Name a version or a digest")


@rule(
    "ray-version",
    "cluster",
    reason="KubeRay chooses probes, features and the autoscaler by rayVersion; Ray refuses nodes of another version",
    source="KubeRay raycluster_types.go: rayVersion should match the image",
)
def check_ray_version(cluster: Cluster) -> Iterator[Found]:
    """`rayVersion` is the version in every image of the cluster, as far as its tag tells."""
    version = cluster.spec.get("rayVersion")
    if not isinstance(version, str) or not version:
        yield Found(
            f"{cluster.path}.rayVersion", "rayVersion is missing", "Set it to the version of Ray in the image"
        )
        return
    for group in cluster.groups:
        container = group.pod.ray
        found = ray_version(str(container.data.get("image", ""))) if container else None
        if container and found and found != version:
            yield Found(
                f"{container.path}.image",
                f"the image of {group.name!r} has Ray {found}, rayVersion is {version}",
                "Make them the same",
            )
