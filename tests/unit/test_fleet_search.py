"""A search on a fleet: a cluster for as many trials as it may have, and files that only some trials read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rayft.errors import DataError, JobError, ResourceError
from rayft.fleet.package import package
from rayft.fleet.render.run import Rendered, render
from rayft.spec import Job, load_job, parse_job
from tests.fleets import job, large, profile, small
from tests.shared import ROOT

Files = dict[str, Any]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def on_gpus(*overrides: str) -> Rendered:
    """Trials of eight GPUs on nodes of eight, of which a run may have eight and a search half."""
    return render(job("tune_hub_gpu", *overrides), profile("gpu"), architecture=large(), scorers={})


def on_cpus(name: str, *overrides: str) -> Rendered:
    """Trials of one process on nodes of four CPUs and 12 GiB."""
    what = job(name, "model.path=org/small", *overrides)
    return render(what, profile("cpu"), architecture=small(), scorers={})


def pods(made: Rendered) -> list[tuple[int, int, int]]:
    """Count, GPUs and CPUs of each worker group in the manifest."""
    groups = made.objects[-1]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups]
    return [
        (group["replicas"], int(limit.get("nvidia.com/gpu", 0)), int(limit["cpu"]))
        for group, limit in zip(groups, limits, strict=True)
    ]


@pytest.mark.parametrize(
    ("overrides", "nodes"),
    [
        ([], 4),
        (["tune.share=0.25"], 2),
        (["tune.share=1"], 4),
        (["tune.max_concurrent=3"], 3),
        (["tune.num_trials=1"], 1),
        (["cluster.num_workers=16"], 4),
        (["cluster.num_workers=12"], 3),
    ],
)
def test_a_cluster_for_as_many_trials_as_the_fleet_grants(overrides: list[str], nodes: int) -> None:
    assert pods(on_gpus(*overrides)) == [(nodes, 8, 180)]


def test_the_search_takes_all_of_its_own_cluster_and_people_are_told(tmp_path: Path) -> None:
    """The job asks for half of the fleet; half of a cluster that is half of the fleet would be too little for the last trial."""
    made = on_gpus()
    file = tmp_path / "job.yaml"
    file.write_text(made.objects[0]["data"]["job.yaml"])
    there, here = load_job(file), job("tune_hub_gpu")
    assert there.tune is not None
    assert here.tune is not None
    assert there.tune == here.tune.model_copy(update={"share": 1.0})
    assert "A search: its cluster holds 4 of 32 trials at a time, within 0.5 of what profile gpu" in " ".join(
        made.lines
    )
    assert made.objects[-1]["spec"]["entrypoint"] == "rayft run /etc/rayft/job.yaml"


def test_a_trial_beyond_the_share_is_refused() -> None:
    said = (
        r"A trial asks for 40 workers, and profile gpu lets a search have 32 \(limits.workers x search_share"
    )
    with pytest.raises(ResourceError, match=said):
        on_gpus("cluster.num_workers=40")
    few = profile("gpu").model_copy(deep=True)
    few.limits.gpus = 12
    with pytest.raises(ResourceError, match="A trial asks for 8 GPUs, and profile gpu lets a search have 6"):
        render(job("tune_hub_gpu"), few, architecture=large(), scorers={})


def test_processes_that_drive_trials_have_memory() -> None:
    """One for each trial at a time; of a population all have theirs, although few have their turn."""

    def gib(made: Rendered) -> float:
        return sum(group.pods.count * group.pods.room.memory_mib for group in made.size.groups) / 1024

    one, four = on_cpus("pbt_sft", "tune.max_concurrent=1"), on_cpus("pbt_sft")
    many = on_cpus("pbt_sft", "tune.num_trials=16")
    alone = job("pbt_sft", "model.path=org/small").model_copy(update={"tune": None})
    plain = render(alone, profile("cpu"), architecture=small(), scorers={})
    assert [pods(made)[0][0] for made in (one, many)] == [1, 4]
    assert gib(one) >= gib(plain) + 4, "all four have drivers"
    assert gib(many) >= gib(four) + 12, "twelve more"


def test_checkpoints_of_trials_on_one_node_share_its_way_to_storage() -> None:
    alone, beside = (
        on_gpus("cluster.num_workers=1", "adapter.type=lora", f"tune.max_concurrent={count}")
        for count in (1, 8)
    )
    assert alone.size.saving is not None
    assert beside.size.saving is not None
    assert pods(beside)[0][:2] == (1, 8)
    assert beside.size.saving.needed_s == pytest.approx(8 * alone.size.saving.needed_s)


def search(folder: Path, space: Files, **groups: Any) -> Job:
    """A search in `folder`, whose rows are a.jsonl; b.jsonl lies beside it."""
    for name in "ab":
        (folder / f"{name}.jsonl").write_text('{"text": "a"}\n')
    values = {
        "name": "s",
        "storage": "s3://bucket/runs",
        "model": {"path": "org/model"},
        "data": {"train": [{"path": "a.jsonl"}]},
        "tune": {"space": space, "metric": "train.loss"},
    }
    return parse_job({**values, **groups})


def test_trials_of_several_sizes_are_refused(tmp_path: Path) -> None:
    what = search(
        tmp_path, {"cluster.num_workers": {"choice": [1, 2]}}, data={"train": [{"path": "org/rows"}]}
    )
    with pytest.raises(
        JobError, match=r"tune.space.cluster.num_workers: a rendered cluster is sized for trials"
    ):
        render(what, profile("cpu"), architecture=small(), scorers={})


PATHS = {"data.train.0.path": {"choice": ["a.jsonl", "b.jsonl"]}}


def test_files_that_only_some_trials_read_travel_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    packed = package(search(tmp_path, PATHS), home=tmp_path / "home")
    assert {path.name for path in packed.folder.glob("*.jsonl")} == {"a.jsonl", "b.jsonl"}
    made = render(search(tmp_path, PATHS), profile("cpu"), architecture=small(), scorers={})
    assert set(made.packed.files) == {"a.jsonl", "b.jsonl"}
    (there,) = (one for one in yaml.safe_load_all(made.text) if one["kind"] == "ConfigMap")
    assert "b.jsonl" in there["data"]["job.yaml"]


def test_files_of_trials_that_are_missing_or_elsewhere_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    missing = search(here, {"data.train.0.path": {"choice": ["a.jsonl", "c.jsonl"]}})
    for send in (package, lambda what: render(what, profile("cpu"), architecture=small(), scorers={})):
        with pytest.raises(DataError, match=r"no file or folder c.jsonl"):
            send(missing)
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    outside = search(here, {"data.train.0.path": {"choice": ["a.jsonl", "../d.jsonl"]}})
    with pytest.raises(JobError, match=r"tune.space.data.train.0.path: '../d.jsonl' would have another name"):
        render(outside, profile("cpu"), architecture=small(), scorers={})
