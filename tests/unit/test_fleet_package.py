"""What travels with a submitted job: what it names, at the same place, and nothing that it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.errors import JobError, RayftError
from rayft.fleet.package import ENTRY, ENTRY_FILE, package
from rayft.fleet.submit import refuse_odd_name
from rayft.spec import Job, load_job, parse_job
from tests.shared import ROOT

MARKER = "f1eet-marker-0b5ecure"


def job(**groups: Any) -> Job:
    return parse_job(
        {
            "name": "small",
            "storage": "/shared/runs",
            "model": {"path": "HuggingFaceTB/SmolLM2-135M"},
            "data": {"train": [{"path": "data/rows.jsonl"}]},
            **groups,
        }
    )


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A working directory as people have them."""
    folder = tmp_path / "here"
    for name, text in {
        "data/rows.jsonl": "{}\n",
        "data/.hidden": MARKER,
        ".env": f"HF_TOKEN={MARKER}",
        ".git/config": MARKER,
        "rewards/right.py": "from rewards.sibling import x\n",
        "rewards/sibling.py": "x = 1\n",
        "rewards/__pycache__/right.pyc": MARKER,
        "model/config.json": "{}",
        "model/venv/pyvenv.cfg": MARKER,
        "model/old/job.yaml": MARKER,
        "model/old/lineage.json": MARKER,
        "secrets.txt": MARKER,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_what_the_job_names_travels(here: Path, tmp_path: Path) -> None:
    wanted = job(
        method="grpo",
        model={"path": "model"},
        rewards=[{"name": "right", "type": "function", "path": "rewards/right.py:f"}],
        train={"global_batch_size": 4, "max_steps": 1},
    )
    packed = package(wanted, here=here, home=tmp_path / "home")
    assert names(packed.folder) == {
        "job.yaml",
        ENTRY_FILE,
        "data/rows.jsonl",
        "model/config.json",
        "rewards/right.py",
        "rewards/sibling.py",
    }
    assert load_job(packed.folder / "job.yaml") == wanted
    assert all(MARKER not in (packed.folder / name).read_text() for name in names(packed.folder))
    assert packed.files == 6


def test_a_function_of_a_module_here_travels_too(here: Path, tmp_path: Path) -> None:
    rewards = [{"name": "right", "type": "function", "path": "rewards.right:f"}]
    wanted = job(method="grpo", rewards=rewards, train={"global_batch_size": 4, "max_steps": 1})
    packed = package(wanted, here=here, home=tmp_path / "home")
    assert {"rewards/right.py", "rewards/sibling.py"} <= names(packed.folder)


def test_runs_that_are_not_here_are_those_of_the_storage(here: Path, tmp_path: Path) -> None:
    (here / "runs" / "here").mkdir(parents=True)
    (here / "runs" / "here" / "config.json").write_text("{}")
    wanted = job(
        method="grpo",
        storage="s3://b/team/",
        model={"path": "runs/sft", "tokenizer": "runs/here"},
        rewards=[{"name": "liked", "type": "model", "path": "runs/judge"}],
        checkpoint={"fork_from": "runs/mine@40"},
        train={"global_batch_size": 4, "max_steps": 1},
    )
    packed = package(wanted, here=here, home=tmp_path / "home")
    there = load_job(packed.folder / "job.yaml")
    assert (there.model.path, there.model.tokenizer) == ("s3://b/team/sft", "runs/here")
    assert there.rewards[0].path == "s3://b/team/judge"
    assert there.checkpoint.fork_from == "s3://b/team/mine@40"
    assert "model.path runs/sft is read from s3://b/team/sft." in packed.notes
    assert "runs/here/config.json" in names(packed.folder)


def test_a_run_in_a_list_of_values_is_refused(here: Path, tmp_path: Path) -> None:
    space = {"model.path": {"choice": ["runs/a", "runs/b"]}}
    wanted = job(
        tune={"space": space, "metric": "train.loss"}, train={"global_batch_size": 4, "max_steps": 1}
    )
    with pytest.raises(JobError, match=r"tune\.space\.model\.path: 'runs/a' would have another name"):
        package(wanted, here=here, home=tmp_path / "home")


def test_a_package_is_known_by_its_content(here: Path, tmp_path: Path) -> None:
    first = package(job(), here=here, home=tmp_path / "home")
    assert package(job(), here=here, home=tmp_path / "home") == first
    (here / "data" / "rows.jsonl").write_text("{} \n")
    other = package(job(), here=here, home=tmp_path / "home")
    assert other.digest != first.digest
    assert first.folder.is_dir()


def test_too_much_is_refused_with_the_largest_file_and_a_remedy(here: Path, tmp_path: Path) -> None:
    (here / "data" / "rows.jsonl").write_bytes(b"x" * 3000)
    with pytest.raises(JobError, match=r"rows\.jsonl") as caught:
        package(job(), here=here, home=tmp_path / "home", limit=2000)
    assert caught.value.code == 2
    assert "s3://" in caught.value.remedy


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"storage": "runs"}, "storage: 'runs' is relative"),
        (
            {"data": {"train": [{"path": "data/rows.jsonl"}], "cache": "cache"}},
            r"data\.cache: 'cache' is relative",
        ),
        ({"checkpoint": {"fork_from": "mine@40"}}, "fork_from mine is a folder of this machine"),
        ({"data": {"train": [{"path": "../rows.jsonl"}]}}, "outside of the folder"),
        ({"data": {"train": [{"path": "data/nothing.jsonl"}]}}, "no file or folder data/nothing.jsonl"),
    ],
)
def test_what_cannot_travel_is_refused(
    here: Path, tmp_path: Path, groups: dict[str, Any], words: str
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(RayftError, match=words) as caught:
        package(job(**groups), here=here, home=tmp_path / "home")
    assert caught.value.remedy


@pytest.mark.parametrize(
    "name",
    [
        "../other",
        "..",
        ".",
        "a/b",
        "/etc",
        "a\\b",
        "a\n",
        "",
        "-a",
        "a.",
        "A",
        "a b",
        "a%2fb",
        "é",
        "a" * 64,
        "~a",
    ],
)
def test_a_name_cannot_reach_outside_of_its_runs_prefix(name: str) -> None:
    with pytest.raises(JobError) as caught:
        job(name=name)
    assert caught.value.code == 2
    with pytest.raises(JobError):
        refuse_odd_name(name)


@settings(deadline=None)
@given(st.text(max_size=70))
def test_a_name_that_is_taken_is_one_folder_of_the_storage(name: str) -> None:
    try:
        job(name=name)
    except JobError:
        return
    path = Path("/shared/runs") / name
    assert path.resolve().parent == Path("/shared/runs")
    assert path.name == name


def test_the_entry_point_of_packages_is_that_of_the_repository() -> None:
    assert (ROOT / ENTRY_FILE).read_text() == ENTRY
