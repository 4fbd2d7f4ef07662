"""Jobs through the job API of a real cluster: a head and two nodes as processes of their own, behind a token."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.local import LocalCluster
from rayft.cli import main
from rayft.fleet.attempts import ATTEMPT, PACKAGE, describe, last_attempt
from rayft.fleet.client import Client, NoAnswer
from rayft.fleet.follow import follow
from rayft.report.usage import usage_of
from rayft.storage import LocalStore, open_store
from tests.cluster import rewards
from tests.cluster.steps import prepare_folder, small_job
from tests.fault.test_rlhf_kill import facts
from tests.light import without_torch
from tests.runs import ROOT, assert_same_state, events, step_reached, wait_until, write_job
from tests.s3 import aws_variables
from tests.searches import RATE
from tests.warm.start import as_usual

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

#: Steps of a run that is stopped in its middle.
LONG = 200
#: Seconds that a machine may take that others work on too.
WAIT_S = 600
#: What nodes and submitters have in their environment, and nobody may find anywhere else.
SECRETS = {
    "HF_TOKEN": "hf_planted0nodesand0submitters000000",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+key/of0nodes00000000000000",
    "WANDB_API_KEY": "planted0planted0planted0planted0planted0",
}


@pytest.fixture(scope="module", autouse=True)
def _workers_as_usual() -> Iterator[None]:
    with as_usual():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the user is: a model and rows, named by relative paths."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    from ray._raylet import get_authentication_mode

    get_authentication_mode()  # Ray keeps what it reads first; tests after these start Rays without a token here
    return prepare_folder(tmp_path_factory.mktemp("here"))


@pytest.fixture(scope="module")
def cluster(folder: Path, s3_server: str) -> Iterator[LocalCluster]:
    """A head without work and two nodes with one CPU each; they know the S3 server as a fleet's nodes do, and no job says its keys."""
    more = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAYFT_CACHE": str(folder / "node")}
    more |= aws_variables(s3_server) | SECRETS
    with LocalCluster(2, 1, drain_s=0, environment=more) as started:
        yield started


@pytest.fixture
def here(folder: Path, cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> LocalCluster:
    """This process as a user's shell in that folder, with the cluster's token."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("RAYFT_CACHE", str(folder / "client"))
    for name, value in (cluster.client_environment | SECRETS).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    return cluster


def job_file(folder: Path, name: str, steps: int, **groups: Any) -> str:
    """A job on two workers."""
    job = small_job(
        folder,
        name=name,
        storage=str(folder / "shared"),
        model={"path": "model"},
        data={"train": [{"path": "rows.jsonl"}]},
        train={"max_steps": steps},
        cluster={"num_workers": 2},
        checkpoint={"every_steps": 1000},
        **groups,
    )
    return write_job(job, folder / f"{name}.yaml").name


def store_of(folder: Path, name: str) -> LocalStore:
    return LocalStore(folder / "shared" / name)


def training(folder: Path, name: str, step: int = 2) -> Callable[[], bool]:
    return step_reached(store_of(folder, name), step)


def test_a_run_is_submitted_followed_stopped_and_resumed(
    here: LocalCluster, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, at = job_file(folder, "walk", LONG), ["--address", here.address]
    said = ""

    def rayft(*arguments: str) -> tuple[int, str]:
        nonlocal said
        code = main([*arguments, *at])
        out = "".join(capfd.readouterr())
        said += out
        return code, out

    code, out = rayft("submit", job, "--no-wait")
    assert code == 0, out
    assert "ray job submit --address" in out
    code, out = rayft("submit", job)
    assert (code, "held by its submission walk-1" in out) == (4, True), out
    code, out = rayft("resume", "walk")
    assert code == 4, out

    with monkeypatch.context() as other:
        other.setenv("RAY_AUTH_TOKEN", "not-the-token")
        code, out = rayft("list")
        assert (code, "refuses the token from RAY_AUTH_TOKEN" in out) == (2, True), out
        other.setenv("RAY_AUTH_MODE", "disabled")
        code, out = rayft("list")
        assert (code, "asks for a token" in out) == (2, True), out
    code, out = rayft("status", "walk-of-another")
    assert (code, "knows no run 'walk-of-another'" in out) == (2, True), out

    follower = subprocess.Popen(
        [sys.executable, "-m", "rayft.cli", "logs", "walk", "--follow", *at],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # As in a terminal, also where this process is a background job that ignores Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    assert follower.stdout is not None
    out = follower.stdout.readline()
    assert out.startswith("walk-1: "), out + follower.stdout.read()
    follower.send_signal(signal.SIGINT)
    out = follower.communicate(timeout=WAIT_S)[0]
    assert follower.returncode == 130, out
    assert "walk-1 goes on without you. Come back: rayft logs walk --follow" in out
    said += out

    wait_until("the run to train", training(folder, "walk"), timeout_s=WAIT_S)
    code, out = rayft("list")
    assert any(line.split()[:3] == ["walk", "walk-1", "running"] for line in out.splitlines()), out
    code, out = rayft("stop", "walk", "--timeout", str(WAIT_S))
    assert code == 0, out
    assert "Asked walk-1 to save and end." in out
    assert "walk-1 ended with code 8, preempted, resumable" in out
    assert "rayft stop by" in events(store_of(folder, "walk"), "end")[-1]["message"]

    code, out = rayft("resume", "walk")
    assert code == 0, out
    assert "walk-2 ended with code 0, done" in out
    assert f"step {LONG}" in out  # the log stream was shown
    resumed = events(store_of(folder, "walk"), "resume")
    assert resumed
    assert resumed[-1]["repeated"] == 0
    assert not (folder / "shared" / "walk" / "stop.json").exists()

    code, out = rayft("list")
    table = [line.split()[:4] for line in out.splitlines()]
    assert ["walk", "walk-1", "failed", "8"] in table
    assert ["walk", "walk-2", "succeeded", "0"] in table
    code, out = rayft("status", "walk")
    assert (code, f"step {LONG}, loss" in out, "before: walk-1" in out) == (0, True, True), out
    code, out = rayft("resume", "walk")
    assert (code, "is done" in out) == (0, True), out

    assert events(store_of(folder, "walk"), "checkpoint")[-1]["took_s"] > 0
    refuse_secrets(here, folder, said)


def refuse_secrets(cluster: LocalCluster, folder: Path, said: str) -> None:
    """No secret in what was said, in run folders and packages, or in what Ray leaves."""
    hidden = [cluster.token_path.read_text(), *SECRETS.values()]
    assert [secret for secret in hidden if secret in said] == []
    for place in (folder, cluster.folder):
        for path in place.rglob("*"):
            if path.is_file() and path != cluster.token_path:
                with contextlib.suppress(OSError):  # sockets and what has just gone
                    content = path.read_bytes()
                    assert [secret for secret in hidden if secret.encode() in content] == [], path


def test_a_file_of_jobs_is_submitted_where_there_is_no_torch(
    here: LocalCluster, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it lies in the repository but for its model and its length, by whoever says that he is ann."""
    monkeypatch.chdir(ROOT)
    said, at = "", ["--address", here.address]

    def rayft(*arguments: str) -> str:
        nonlocal said
        done = without_torch(
            *arguments, *at, timeout_s=2 * WAIT_S, RAYFT_USER="ann", RAYFT_TEAM="nlp", COLUMNS="200"
        )
        said += done.stdout + done.stderr
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    shorter = [
        *("name=lora", f"storage={folder / 'shared'}", f"model.path={folder / 'model'}"),
        *("train.max_steps=2", "train.global_batch_size=4", "eval.suites=[]"),
    ]
    out = rayft("submit", "jobs/sft_lora.yaml", *shorter)
    assert "lora-1 ended with code 0, done" in out
    assert "step 2" in rayft("logs", "lora")
    assert ["lora", "lora-1", "succeeded", "0"] in [line.split()[:4] for line in rayft("list").splitlines()]
    assert "step 2, loss" in rayft("status", "lora")
    assert "has ended" in rayft("stop", "lora")
    assert "is done" in rayft("resume", "lora")
    opened = events(store_of(folder, "lora"), "open")[-1]
    assert (opened["user"], opened["team"]) == ("ann", "nlp")
    refuse_secrets(here, folder, said)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "override", "code"),
    [
        ("two", "model.path=/nothing/model", 2),
        ("three", "data.train.0.path=broken.jsonl", 3),
        ("five", "storage=/dev/null/shared", 5),
    ],
)
def test_the_code_of_a_run_is_the_code_of_the_command(
    here: LocalCluster,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    override: str,
    code: int,
) -> None:
    (folder / "broken.jsonl").write_text('{"messages": [{"role": "user"}]}\n')
    job = job_file(folder, name, 3)
    assert main(["submit", job, "--address", here.address, override]) == code
    assert f"{name}-1 ended with code {code}" in "".join(capfd.readouterr())


@pytest.mark.full
def test_the_printed_line_works_by_itself(
    here: LocalCluster, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = job_file(folder, "line", 3)
    assert main(["submit", job, "--address", here.address]) == 0
    out = "".join(capfd.readouterr())
    line = next(line for line in out.splitlines() if line.startswith("ray job submit"))
    words = shlex.split(line.replace("line-1", "line-2"))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The run line is done" in done.stdout
    # The entry point as it lies in the repository, with the folder of the job as working directory.
    line = (
        f"ray job submit --address {here.address} --submission-id line-3 --working-dir {folder} -- "
        f"python {ROOT / 'jobs' / 'run.py'} {job}"
    )
    done = subprocess.run(
        shlex.split(line), capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Deaf(Client):
    """A client to which no log stream comes through."""

    def tail(self, submission: str) -> Any:
        raise ConnectionError("no stream")


@pytest.mark.full
def test_a_lost_log_stream_changes_nothing(here: LocalCluster, folder: Path) -> None:
    job = job_file(folder, "deaf", LONG)
    assert main(["submit", job, "--address", here.address, "--no-wait"]) == 0
    with (folder / "deaf.txt").open("w") as file:
        client = Deaf(here.address)
        assert follow(client, last_attempt(client, "deaf"), Console(file=file, width=200)) == 0
    out = (folder / "deaf.txt").read_text()
    assert "the stream of what the job prints is lost" in out
    assert "deaf-1 ended with code 0, done" in out
    assert "end: done" in out or "checkpoint: step" in out or "step " in out


@pytest.mark.full
def test_a_stopped_submission_has_no_code_and_the_run_log_has(
    here: LocalCluster, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job, client = job_file(folder, "term", LONG), Client(here.address)
    assert main(["submit", job, "--address", here.address, "--no-wait"]) == 0
    wait_until("the run to train", training(folder, "term"), timeout_s=WAIT_S)
    client.stop("term-1")
    assert follow(client, last_attempt(client, "term"), Console()) == 8
    assert last_attempt(client, "term").code is None
    assert "SIGTERM" in events(store_of(folder, "term"), "end")[-1]["message"]
    assert main(["submit", job, "--address", here.address]) == 0  # the same name resumes
    assert events(store_of(folder, "term"), "resume")
    undisturbed = job_file(folder, "calm", LONG)
    assert main(["submit", undisturbed, "--address", here.address]) == 0
    assert_same_state(folder / "shared" / "term", folder / "shared" / "calm")
    capfd.readouterr()


@pytest.mark.full
def test_a_run_that_does_not_answer_is_stopped(
    here: LocalCluster, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = job_file(folder, "mute", 10_000)
    assert main(["submit", job, "--address", here.address, "--no-wait"]) == 0
    wait_until("the run to train", training(folder, "mute"), timeout_s=WAIT_S)
    assert main(["stop", "mute", "--address", here.address, "--timeout", "0"]) == 0
    out = "".join(capfd.readouterr())
    assert "It has not ended within 0 s; stopping its submission." in out
    assert "mute-1 ended with code 8" in out


@pytest.mark.full
def test_a_rayjobs_submission_is_stopped_and_not_asked_to_end(
    here: LocalCluster, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """KubeRay takes an end by 8 for a failure, and starts the run again; it saves all the same."""

    def of_rayjob(*given: Any) -> dict[str, str]:
        return {key: value for key, value in describe(*given).items() if key not in (ATTEMPT, PACKAGE)}

    job = job_file(folder, "kube", 10_000)
    with monkeypatch.context() as other:
        other.setattr("rayft.fleet.submit.describe", of_rayjob)
        assert main(["submit", job, "--address", here.address, "--no-wait"]) == 0
    wait_until("the run to train", training(folder, "kube"), timeout_s=WAIT_S)
    assert main(["stop", "kube", "--address", here.address]) == 0
    assert "kube-1 is a RayJob's" in "".join(capfd.readouterr())
    assert last_attempt(Client(here.address), "kube").status == "STOPPED"
    [end] = events(store_of(folder, "kube"), "end")
    assert (end["code"], "SIGTERM" in end["message"]) == (8, True)


@pytest.mark.full
def test_a_search_is_submitted_like_a_run_and_its_trials_are_counted(
    here: LocalCluster, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Trials of both CPUs, so one after the other."""
    rows: dict[str, Any] = {"path": "rows.jsonl"}
    job = small_job(
        folder,
        name="sweep",
        storage=str(folder / "shared"),
        model={"path": "model"},
        data={"train": [{**rows, "limit": 40}], "eval": [{**rows, "limit": 8}]},
        train={"max_steps": 4},
        eval={"every_steps": 2},
        checkpoint={"every_steps": 2},
        cluster={"num_workers": 2},
        tune={"space": {RATE: {"grid": [1e-3, 1e-2]}}, "searcher": "grid", "metric": "eval.loss"},
    )
    path = write_job(job, folder / "sweep.yaml").name
    assert main(["submit", path, "--address", here.address]) == 0, "".join(capfd.readouterr())
    assert "Best: t000" in "".join(capfd.readouterr())
    assert main(["status", "sweep", "--address", here.address]) == 0
    assert "trials: 2 done" in "".join(capfd.readouterr())
    assert store_of(folder, "sweep").exists("best.yaml")
    used, trials = (
        usage_of(name, store)
        for name, store in ((n, store_of(folder, n)) for n in ("sweep", "sweep/trials/sweep-t0000"))
    )
    assert used is not None
    assert trials is not None
    assert (sum(used.parts.values()), sum(trials.parts.values()) > 0) == (0, True), "its trials are counted"
    assert main(["submit", path, "--address", here.address]) == 0, "what is over is not run again"


@pytest.mark.full
def test_a_loop_that_learns_from_rewards_is_submitted_stopped_and_resumed_in_s3(
    here: LocalCluster,
    folder: Path,
    s3_bucket: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(rewards.prepare_folder(folder / "rl"))
    storage, at = f"s3://{s3_bucket}/runs", ["--address", here.address]

    def job_file(name: str) -> str:
        job = rewards.rl_job(
            folder / "rl",
            "grpo",
            name=name,
            storage=storage,
            model={"path": "model"},
            data={"train": [{"path": "prompts.jsonl"}]},
            rewards=[{"name": "small", "type": "function", "path": "rewards.py:slow"}],
            train={"max_steps": 10},
            cluster={"num_workers": 2},
        )
        return write_job(job, folder / "rl" / f"{name}.yaml").name

    path = job_file("loop")
    assert main(["submit", path, *at, "--no-wait"]) == 0
    wait_until("the loop to train", step_reached(open_store(f"{storage}/loop"), 2), timeout_s=WAIT_S)
    assert main(["stop", "loop", *at, "--timeout", str(WAIT_S)]) == 0
    assert "loop-1 ended with code 8, preempted, resumable" in "".join(capfd.readouterr())
    assert main(["resume", "loop", *at]) == 0
    assert "loop-2 ended with code 0, done" in "".join(capfd.readouterr())
    assert main(["submit", job_file("calm-loop"), *at]) == 0
    assert_same_state(f"{storage}/loop", f"{storage}/calm-loop")
    assert facts(f"{storage}/loop") == facts(f"{storage}/calm-loop")


@pytest.mark.full
@pytest.mark.parametrize("power", ["drained", "lost"])
def test_a_follower_of_a_cluster_that_is_gone_learns_what_the_run_log_knows(
    folder: Path, power: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Taken away with notice the run says that it can go on; all at once it says nothing, and following ends after a while."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setattr("rayft.fleet.follow.SILENT_S", 15.0)
    name = f"gone-{power}"
    path, store = job_file(folder, name, 10_000), store_of(folder, name)
    more = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAYFT_CACHE": str(folder / "node")}
    with LocalCluster(2, 1, drain_s=60, environment=more) as cluster:
        for variable, value in cluster.client_environment.items():
            monkeypatch.setenv(variable, value)
        assert main(["submit", path, "--address", cluster.address, "--no-wait"]) == 0
        wait_until("the run to train", training(folder, name), timeout_s=WAIT_S)
        followed: list[int] = []
        watching = threading.Thread(
            target=lambda: followed.append(main(["logs", name, "--follow", "--address", cluster.address]))
        )
        watching.start()
        wait_until(
            "the follower to begin", lambda: f"{name}-1: running" in capfd.readouterr().out, timeout_s=60
        )
        if power == "lost":
            # Stopped first, so that none of them notices the end of another.
            for signalled in (signal.SIGSTOP, signal.SIGKILL):
                for process in list(cluster.processes()):
                    process.send_signal(signalled)
        else:
            cluster.stop(patience_s=90)
        watching.join(WAIT_S)
    said = "".join(capfd.readouterr())
    if power == "lost":
        assert followed == [NoAnswer.code], said
        assert "the cluster does not answer; waiting for it" in said
        assert not events(store, "end")
    else:
        assert followed == [8], said
        assert events(store, "end")[-1]["code"] == 8
        assert f"Go on: rayft resume {name}" in said


@pytest.mark.full
def test_the_local_cluster_leaves_nothing_behind(tmp_path: Path) -> None:
    """`python -m cluster.local` as typed, ended by SIGTERM while its nodes start."""
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.local", "--nodes", "1", "--drain-s", "0"],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    import psutil

    def below() -> list[psutil.Process]:
        return psutil.Process(process.pid).children(recursive=True)

    nodes = wait_until("a process of the head", below)
    time.sleep(1)
    with contextlib.suppress(psutil.Error):
        nodes += below()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=180) == 0, (tmp_path / "log").read_text()
    assert not [one for one in nodes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert "Ending the cluster" in (tmp_path / "log").read_text()
