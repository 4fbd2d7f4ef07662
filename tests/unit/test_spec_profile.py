"""Fleet profiles: the shipped ones are right, and a wrong one is refused by file and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rayft.errors import JobError
from rayft.spec.profile import load_profile, parse_profile
from tests.fleets import PROFILES, profile
from tests.shared import ROOT


def values(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "x",
        "image": "registry/rayft:1.0",
        "ray_version": "2.60.0",
        "storage": "s3://bucket/prefix",
        "nodes": {"a": {"cpus": 4, "memory_gib": 16}},
    }
    return base | changes


@pytest.mark.parametrize("name", PROFILES)
def test_shipped_profiles_are_right(name: str) -> None:
    shipped = profile(name)
    assert shipped.name == name
    assert shipped.grace.worker_drain_s < shipped.grace.worker_s < shipped.grace.head_s


def test_a_name_is_looked_for_where_profiles_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values(name="mine")))
    monkeypatch.setenv("RAYFT_PROFILES", str(tmp_path))
    assert load_profile("mine").name == "mine"
    with pytest.raises(JobError, match=r"There is no profile file .*min.yaml.*Did you mean .*mine.yaml"):
        load_profile("min")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"imagee": "x"}, "unknown key 'imagee' .*did you mean 'image'"),
    ({"nodes": {"a": {"cpus": 4, "memory_gb": 16}}}, r"unknown key 'nodes\.a\.memory_gb' .*memory_gib"),
    ({"nodes": {"a": {"cpus": 0, "memory_gib": 16}}}, r"nodes\.a\.cpus = 0"),
    ({"nodes": {}}, "nodes"),
    ({"nodes": {"head": {"cpus": 4, "memory_gib": 16}}}, "'head' is the name of the head's group"),
    ({"nodes": {"A_1": {"cpus": 4, "memory_gib": 16}}}, "'A_1' is no name of a node type"),
    ({"nodes": {"a": {"cpus": 4, "memory_gib": 16, "gpus": 8}}}, "`gpus` and their type"),
    ({"nodes": {"a": {"cpus": 4, "memory_gib": 16, "topology": {"level": "x/rack"}}}}, "topology is Kueue's"),
    (
        {"nodes": {"a": {"cpus": 4, "memory_gib": 16, "selector": {"bad key": "x"}}}},
        "no label or resource name",
    ),
    ({"image": "registry/rayft"}, "no image with a tag"),
    ({"ray_version": "2.60"}, "'2.60' is no version"),
    ({"namespace": "Team"}, "'Team' is no namespace"),
    ({"storage": "runs"}, "neither s3://BUCKET/PREFIX nor an absolute path"),
    ({"storage": "/runs"}, "needs `storage_claim`"),
    ({"storage": "/runs/../etc", "storage_claim": "x"}, "neither s3"),
    ({"storage": "s3://key:word@bucket/x"}, "must not hold credentials"),
    ({"grace": {"worker_s": 60, "worker_drain_s": 60}}, "worker_drain_s 60 must be less than worker_s 60"),
    ({"grace": {"head_s": 150, "head_drain_s": 120}}, "the head must have longer than the workers"),
    ({"queue": {"local_queue": "q", "default_priority": "high"}}, "'high' is not among priorities"),
    ({"environment": {"HF_TOKEN": "x"}}, "environment.HF_TOKEN looks like a secret"),
    ({"environment": {"PROXY": "http://me:word@host"}}, "environment.PROXY looks like a secret"),
    ({"environment": {"X": "AKIA" + "Q" * 16}}, "environment.X looks like a secret"),
    ({"environment": {"RAYFT_CACHE": "/x"}}, "RAYFT_CACHE is set by rayft"),
    ({"environment": {"bad-name": "x"}}, "no name of a variable"),
    ({"auth": "disabled", "network_policy": {"enabled": False}}, "would leave the job API open"),
    ({"network_policy": {"egress_cidrs": ["10.0.0.0/99"]}}, "network_policy.egress_cidrs"),
    ({"cache": {"claim": "x", "host_path": "/x"}}, "claim or host_path, not both"),
    ({"cache": {"host_path": "/a/../etc"}}, "no absolute path"),
    ({"search_share": 0}, "search_share = 0"),
]


@pytest.mark.parametrize(("change", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_is_wrong_is_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text(yaml.safe_dump(values(**change)))
    with pytest.raises(JobError, match=rf"(?s)fleet\.yaml.*{said}"):
        load_profile(file)


def test_a_variable_that_only_names_a_place_is_no_secret() -> None:
    made = parse_profile(values(environment={"HF_TOKEN_PATH": "/x", "TOKENIZERS_PARALLELISM": "false"}))
    assert len(made.environment) == 2


def test_profiles_are_all_tested() -> None:
    assert {path.stem for path in (ROOT / "cluster" / "profiles").glob("*.yaml")} == set(PROFILES)
