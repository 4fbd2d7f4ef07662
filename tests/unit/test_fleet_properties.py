"""Over profiles and jobs of all kinds: a manifest is valid, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayft.errors import RayftError
from rayft.fleet.render.manifest import Wishes
from rayft.fleet.render.names import rayjob_name
from rayft.fleet.render.pack import Need, Room, holds, packed
from rayft.fleet.render.run import Rendered, render
from rayft.spec import Job, parse_job
from rayft.spec.profile import Profile, parse_profile
from tests.fleets import large, small
from tests.rendered import pods_of, wrong

ARCHITECTURES = {"small": small(), "large": large(), "unknown": None}
words = st.from_regex(r"[a-z]([-a-z0-9]{0,10}[a-z0-9])?", fullmatch=True)
labels = st.from_regex(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,20}[A-Za-z0-9])?", fullmatch=True)
keys = st.sampled_from(["example.com/pool", "kubernetes.io/os", "pool", "a.b-c/d_e.f"])
plain = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20)


#: Rows that lie where the command runs, and outside of it.
HERE = ("rows.jsonl", "rows", "../beside.jsonl")


@pytest.fixture
def _where_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    for name in ("rows.jsonl", "rows/a.jsonl", "../beside.jsonl", "rewards/right.py", "rewards/sibling.py"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("{}\n")
    monkeypatch.chdir(work)


@st.composite
def node_types(draw: st.DrawFn, queue: bool) -> dict[str, Any]:
    gpus = draw(st.sampled_from([0, 0, 1, 4, 8]))
    node: dict[str, Any] = {
        "cpus": draw(st.integers(1, 200)),
        "memory_gib": draw(st.sampled_from([2, 8, 31.5, 64, 500, 2000])),
        "scratch_gib": draw(st.integers(1, 500)),
        "most": draw(st.integers(1, 20)),
        "selector": draw(st.dictionaries(keys, labels, max_size=2)),
        "tolerations": draw(
            st.lists(
                st.one_of(
                    st.fixed_dictionaries({"key": keys, "value": labels}),
                    st.fixed_dictionaries({"operator": st.just("Exists"), "effect": st.just("NoSchedule")}),
                ),
                max_size=2,
            )
        ),
        "resources": draw(st.sampled_from([{}, {"vpc.amazonaws.com/efa": 4}])),
    }
    if gpus:
        node |= {"gpus": gpus, "gpu": draw(st.sampled_from(["H100-80GB", "L4-24GB", "B200-180GB"]))}
        node["gpu_resource"] = draw(st.sampled_from(["nvidia.com/gpu", "amd.com/gpu"]))
    if queue and draw(st.booleans()):
        node["topology"] = draw(
            st.sampled_from(
                [{"mode": "unconstrained"}, {"level": "x/rack"}, {"mode": "required", "level": "x/rack"}]
            )
        )
    return node


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    queue = draw(st.booleans())
    values: dict[str, Any] = {
        "name": draw(labels),
        "namespace": draw(words),
        "image": draw(
            st.sampled_from(["r:1", "registry.example.com:5000/a/b:1.0-x", "r@sha256:" + "0" * 64])
        ),
        "ray_version": "2.60.0",
        "auth": draw(st.sampled_from(["token", "disabled"])),
        "nodes": draw(
            st.dictionaries(words.filter(lambda w: w != "head"), node_types(queue), min_size=1, max_size=3)
        ),
        "head": {"cpus": draw(st.integers(1, 8)), "memory_gib": draw(st.sampled_from([2, 4.5, 16]))},
        "limits": {
            "gpus": draw(st.integers(0, 200)),
            "workers": draw(st.integers(1, 200)),
            "upload_mb": 1,
            "hours": draw(st.sampled_from([0.5, 12, 72])),
        },
        "grace": draw(
            st.sampled_from([{}, {"worker_s": 25, "worker_drain_s": 15, "head_s": 40, "head_drain_s": 30}])
        ),
        "network_policy": {
            "operator_namespace": draw(words),
            "metrics_namespaces": draw(st.lists(words, max_size=2)),
            "egress_ports": draw(st.lists(st.integers(1, 65535) | st.just(443), max_size=3)),
            "egress_cidrs": draw(st.lists(st.sampled_from(["0.0.0.0/0", "10.0.0.0/8", "::/0"]), max_size=3)),
        },
        "checkpoint": {
            "node_mb_per_s": draw(st.floats(1, 1e4)),
            "too_slow": draw(st.sampled_from(["refuse", "warn"])),
        },
        "cache": draw(st.sampled_from([{}, {"claim": "models"}, {"host_path": "/mnt/x"}])),
        "object_store_gib": draw(st.sampled_from([0.1, 2, 16.3])),
        "environment": draw(st.dictionaries(st.sampled_from(["A", "NCCL_DEBUG", "x_1"]), plain, max_size=2)),
        "secrets": draw(st.sampled_from([{}, {"HF_TOKEN": {"secret": "hub", "key": "token"}}])),
        "service_account": draw(st.none() | words),
        "image_pull_secrets": draw(st.lists(words, max_size=2, unique=True)),
    }
    if draw(st.sampled_from([True, True, True, False])):  # else most would be refused
        values["nodes"] |= {
            "large": {"cpus": 96, "memory_gib": 2000, "most": 40, "gpus": 8, "gpu": "H100-80GB"},
            "plain": {"cpus": draw(st.integers(8, 96)), "memory_gib": 900, "most": 40},
        }
        values["limits"] |= {"gpus": 200, "workers": 200}
        values["checkpoint"]["too_slow"] = "warn"
    if draw(st.booleans()):
        values |= {"storage": "s3://bucket/a b", "storage_claim": None}
    else:
        values |= {"storage": "/storage", "storage_claim": draw(words)}
    if queue:
        values["queue"] = {"local_queue": draw(words), "priorities": {"high": draw(words)}}
    return parse_profile(values)


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    gpus = draw(st.sampled_from([0, 0, 1, 1, 0.75]))
    workers = draw(st.integers(1, 40))
    method = draw(st.sampled_from(["sft", "dpo", "reward", "grpo", "ppo"]))
    reinforced = method in ("grpo", "ppo")
    elastic = not reinforced and draw(st.booleans())
    values: dict[str, Any] = {
        "name": draw(st.from_regex(r"[a-z0-9]([-a-z0-9_.]{0,61}[a-z0-9])?", fullmatch=True)),
        "method": method,
        "model": {
            "path": draw(st.sampled_from(["org/model", "org/model", "runs/before"])),
            "revision": draw(st.none() | plain.filter(bool)),
        },
        "adapter": {"type": draw(st.sampled_from(["none", "lora"]))},
        "data": {
            "train": [{"path": draw(st.sampled_from(["s3://b/x.jsonl", *HERE])), "system": draw(plain)}],
            "max_length": 512,
        },
        "checkpoint": {
            "fork_from": draw(
                # That one on this machine is refused leaves nothing else of the job to be looked at: it comes up seldom.
                st.sampled_from([*[None] * 8, *["runs/before@3", "s3://b/r@3"] * 3, "../r@3", "/r@3"])
            )
        },
        "cluster": {
            "num_workers": [1, workers] if elastic else workers,
            "gpus_per_worker": gpus,
            "cpus_per_worker": draw(st.sampled_from([0.5, 1, 3, 8, 64])),
            "max_failures": draw(st.integers(0, 5)),
        },
        "zero": {"stage": draw(st.sampled_from(["auto", "auto", 0, 2, 3]))},
    }
    if reinforced:
        apart = {
            "apart": True,
            "cpus": draw(st.sampled_from([1, 2.5])),
            "gpus": draw(st.sampled_from([0, 1])) if gpus else 0,
        }
        right = draw(
            st.sampled_from([("http", "https://rewards.example.com"), ("function", "rewards/right.py:f")])
        )
        values["rewards"] = [{"name": "right", "type": right[0], "path": right[1]}]
        engines = draw(st.integers(0, 5))
        values["rollout"] = {"engines": engines, "max_new_tokens": 64}
        values["placement"] = {"rollout": apart} if engines and draw(st.booleans()) else {}
        if draw(st.booleans()):
            values["placement"]["rewards"] = {"apart": True, "cpus": 2}
    if draw(st.integers(0, 2)) == 0:
        values["name"] = values["name"][:30] + "s"
        values["tune"] = {
            "space": {"train.learning_rate": {"loguniform": [1e-5, 1e-3]}},
            "metric": "train.loss",
            "num_trials": draw(st.integers(1, 200)),
            "max_concurrent": draw(st.none() | st.integers(1, 20)),
            "share": draw(st.sampled_from([0.1, 0.5, 1.0])),
        }
    return parse_job(values)


def rendered(job: Job, profile: Profile, model: str, hours: float | None) -> Rendered | None:
    """The manifest, or None where it is refused in one sentence (and a remedy) that names no internals."""
    wishes = Wishes("high" if profile.queue else None, hours)
    try:
        if ARCHITECTURES[model] is None:
            from rayft.fleet.render.files import pack, travelling
            from rayft.fleet.render.manifest import as_yaml, manifest
            from rayft.fleet.render.size import size

            brought = pack(job, profile)
            found = size(brought.job, profile, None)
            objects = manifest(found, profile, wishes, travelling(brought, profile))
            return Rendered(as_yaml(objects, found, profile), objects, brought, found)
        return render(job, profile, wishes, architecture=ARCHITECTURES[model], scorers={})
    except RayftError as error:
        check_sentence(error)
        return None


def check_sentence(refusal: RayftError) -> None:
    assert refusal.code in (2, 3, 4)
    assert "\n" not in str(refusal)
    assert refusal.message.endswith(".")
    assert refusal.remedy.endswith(".")


def check(job: Job, profile: Profile, model: str, hours: float | None) -> bool:
    """Whether there is a manifest, which is then as it must be."""
    made = rendered(job, profile, model, hours)
    if made is None:
        return False
    open_by_choice = ["token"] if profile.auth == "disabled" else []
    assert wrong(made.objects, warnings=False, but=open_by_choice) == []
    rayjob = made.objects[-1]
    assert len(rayjob["metadata"]["name"]) <= 47
    head, *workers = pods_of(rayjob)
    groups = rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert 1 <= len(groups) <= 17
    assert len({group["groupName"] for group in groups}) == len(groups)
    for group in made.size.groups:
        assert group.pods.room.cpus <= group.node.cpus
        assert group.pods.room.gpus <= group.node.gpus
        assert group.pods.room.memory_mib <= group.node.memory_gib * 1024
    assert sum(group.pods.count for group in made.size.groups) <= made.size.groups[0].node.most
    assert made.size.gpus >= job.cluster.max_workers * job.cluster.gpus_per_worker - 1e-6
    for pod in (head, *workers):
        (container,) = pod["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
    return True


def look_at(examples: int, *, always_the_same: bool) -> int:
    """How many of so many jobs and profiles made a manifest."""
    made = []

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=always_the_same,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        jobs(),
        profiles(),
        st.sampled_from(["small", "small", "large", "unknown"]),
        st.sampled_from([None, None, 0.25, 24, 100]),
    )
    def one(job: Job, profile: Profile, model: str, hours: float | None) -> None:
        made.append(check(job, profile, model, hours))

    one()
    return sum(made)


@pytest.mark.usefixtures("_where_files_are")
def test_a_manifest_is_valid_or_refused() -> None:
    assert look_at(60, always_the_same=True) > 10


@pytest.mark.full
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("_where_files_are")
def test_many_manifests_are_valid_or_refused() -> None:
    assert look_at(1000, always_the_same=False) > 300


needs = st.builds(
    Need,
    st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 4.0]),
    st.sampled_from([0.5, 1.0, 3.0, 8.0]),
    st.integers(1, 5000),
)
rooms = st.builds(Room, st.sampled_from([0, 1, 4, 8]), st.integers(1, 64), st.integers(1000, 64000))


@settings(max_examples=300, deadline=None)
@given(st.lists(needs, min_size=1, max_size=30), rooms)
def test_pods_hold_what_they_were_made_for(wanted: list[Need], node: Room) -> None:
    """By the procedure that Ray packs with; none is larger than a node."""
    found = packed(wanted, node)
    if found:
        all_rooms = [pods.room for pods in found for _ in range(pods.count)]
        assert holds(all_rooms, wanted)
        for room in all_rooms:
            assert (room.gpus, room.cpus, room.memory_mib) <= (node.gpus, node.cpus, node.memory_mib)


@given(st.integers(1, 100), st.sampled_from([1, 2, 4, 8]))
def test_pods_of_like_processes_waste_no_gpu(count: int, gpus: int) -> None:
    found = packed([Need(1.0, 4.0, 100)] * count, Room(gpus, 64, 64000))
    assert sum(pods.count * pods.room.gpus for pods in found) == count
    assert len(found) <= 2


@given(
    st.lists(st.from_regex(r"[a-z0-9]([-a-z0-9_.]{0,61}[a-z0-9])?", fullmatch=True), min_size=2, unique=True)
)
def test_names_are_kept_apart(runs: list[str]) -> None:
    assert len({rayjob_name(run) for run in runs}) == len(runs)


def test_the_largest_process_goes_where_most_of_a_pod_is_left() -> None:
    """As Ray chooses: to the second pod, and then the other process finds the first one free."""
    assert holds([Room(1, 8, 100), Room(2, 4, 100)], [Need(1.0, 2.0), Need(0.0, 8.0)])
    assert not holds([Room(1, 8, 100), Room(1, 4, 100)], [Need(1.0, 2.0), Need(1.0, 2.0), Need(0.0, 8.0)])
