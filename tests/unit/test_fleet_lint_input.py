"""`rayft k8s lint` on files, folders and stdin: what it says and returns, and what it makes of bad input."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rayft.cli import main
from rayft.errors import JobError
from rayft.fleet.lint import lint
from rayft.fleet.lint.quantity import quantity
from rayft.fleet.lint.read import parse
from rayft.fleet.lint.rules.images import ray_version, split_image
from rayft.fleet.lint.rules.secrets import looks_secret
from tests.manifests import good, patched
from tests.shared import ROOT

BAD = {"spec/submissionMode": "K8sJobMode", "pod/terminationGracePeriodSeconds": 60}


def write(path: Path, *documents: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump_all(documents))
    return str(path)


def test_a_line_for_each_finding_and_2_for_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "job.yaml", good(), patched(BAD | {"metadata/name": "other"}))
    assert main(["k8s", "lint", path]) == 2
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if not line.startswith("note: ")]
    grace = "spec.rayClusterSpec.workerGroupSpecs[0].template.spec.terminationGracePeriodSeconds"
    assert found[0] == (
        f"{path}#2 RayJob/other {grace}: error [grace-drain] the grace of 60 s is not longer than Ray's drain of 110 s. "
        "Set it to 140 or more, or RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S to less."
    )
    assert "[submitter-follows-log]" in found[1]
    assert found[2:] == ["2 objects: 2 errors, 0 warnings"]


def test_warnings_alone_return_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "job.yaml", patched({"pod/automountServiceAccountToken": None}))
    assert main(["k8s", "lint", path]) == 0
    assert "warning [service-account-token]" in capsys.readouterr().out


def test_a_job_api_that_asks_for_no_token_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "job.yaml", patched({"cluster/authOptions": None}))
    assert main(["k8s", "lint", path]) == 2
    assert "error [token]" in capsys.readouterr().out


def test_silenced_findings_are_mentioned_and_do_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ignore = {"metadata/annotations": {"rayft.dev/lint-ignore": "grace-drain, submitter-follows-log"}}
    path = write(tmp_path / "job.yaml", patched(BAD | ignore))
    assert main(["k8s", "lint", path]) == 0
    out = capsys.readouterr().out
    assert out.count("silenced error") == 2
    assert "2 silenced by rayft.dev/lint-ignore (grace-drain, submitter-follows-log)" in out


def test_rules_are_listed_with_reason_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["k8s", "lint", "--rules"]) == 0
    out = capsys.readouterr().out
    assert (
        "grace-drain (error): The grace of a pod is longer than Ray's drain in it, defaults counted." in out
    )
    assert out.count("    Source: ") > 60


def test_stdin_json_lists_and_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    several = {"apiVersion": "v1", "kind": "List", "items": [good(), patched(BAD | {"metadata/name": "b"})]}
    stdin = SimpleNamespace(buffer=io.BytesIO(json.dumps(several).encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["k8s", "lint", "-"]) == 2
    assert "stdin#1 RayJob/b" in capsys.readouterr().out

    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "job.yaml", good())
    (tmp_path / "notes.txt").write_text("not a manifest")
    assert main(["k8s", "lint", str(tmp_path)]) == 0
    assert "1 objects: 0 errors" in capsys.readouterr().out


def test_a_kustomization_is_built_and_is_a_set_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "job.yaml", good())
        (tmp_path / name / "kustomization.yaml").write_text(f"resources: [job.yaml]\nnameSuffix: -{name}\n")
    (tmp_path / "b" / "kustomization.yaml").write_text("resources: [job.yaml]\n")
    (tmp_path / "c").mkdir()
    write(tmp_path / "c" / "job.yaml", patched(BAD))
    assert main(["k8s", "lint", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert "3 objects: 2 errors" in out
    assert "[duplicate]" not in out

    (tmp_path / "a" / "kustomization.yaml").write_text("resources: [absent.yaml]\n")
    assert main(["k8s", "lint", str(tmp_path / "a")]) == 2
    assert "kubectl does not build" in capsys.readouterr().err


def test_without_kubectl_a_kustomization_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    assert main(["k8s", "lint", str(ROOT / "k8s" / "overlays" / "cpu")]) == 2
    assert "kustomize build" in capsys.readouterr().err


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdef", "bcdefg", strict=True)
)

INPUTS = {
    "not YAML": (b"a: [1, 2", "is not YAML, line 2"),
    "a tab": (b"a:\n\tb: 1", "is not YAML, line 2"),
    "a template": (b"{{- if .Values.x }}\na: {{ .Values.b }}: c\n", "Render templates first"),
    "a list": (b"- a\n- b\n", "Document 1 of {path} is not a mapping"),
    "a text": (b"hello", "is not a mapping"),
    "empty": (b"", "holds no Kubernetes object"),
    "comments": (b"# nothing\n---\n---\n", "holds no Kubernetes object"),
    "binary": (b"\x7fELF\x02\x01\x01\x00\xff\xfe", "is not text"),
    "zeros": (b"\0\0\0\0", "is not text"),
    "values of a chart": (b"image: x\n", "it has no apiVersion"),
    "no kind": (b"apiVersion: v1\n", "it has no kind"),
    "kind is no text": (b"apiVersion: v1\nkind: [a]\n", "it has no kind"),
    "a key twice": (b"apiVersion: v1\nkind: Pod\nspec: {a: 1, a: 2}\n", "the key 'a' is there twice"),
    "an unknown alias": (b"a: *b\n", "is not YAML"),
    "an object of Python": (b"!!python/object/apply:os.system ['true']\n", "is not YAML"),
    "aliases without end": (BOMB.encode(), "grows beyond all bounds"),
    "a loop": (b"&a {apiVersion: v1, kind: Pod, spec: *a}\n", "is nested too deeply"),
    "a kustomization": (
        b"apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n",
        "Name its folder",
    ),
    "deep": (b"[" * 5000 + b"]" * 5000, "is nested too deeply"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_bad_input_is_one_sentence_and_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, said = INPUTS[name]
    path = tmp_path / "bad.yaml"
    path.write_bytes(data)
    assert main(["k8s", "lint", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said.format(path=path) in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_other_bad_command_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "job.yaml", good())
    (tmp_path / "empty").mkdir()
    for arguments, said in {
        (str(tmp_path / "absent.yaml"),): "There is no file",
        (str(tmp_path / "empty"),): "holds no manifests",
        (): "needs a file",
        (path, "--schemas", str(tmp_path / "absent")): "There is no folder of schemas",
        (path, "--schemas", str(tmp_path / "empty")): "holds no schemas",
    }.items():
        assert main(["k8s", "lint", *arguments]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "empty" / "x.json").write_text('{"kind": "RayJob"}')
    assert main(["k8s", "lint", path, "--schemas", str(tmp_path / "empty")]) == 2
    assert "is no schema of a kind" in capsys.readouterr().err


def test_dates_stay_texts_as_in_kubernetes() -> None:
    document = parse("apiVersion: v1\nkind: X\nmetadata: {labels: {day: 2026-11-23}}\n", "x")[0]
    assert document.metadata["labels"] == {"day": "2026-11-23"}


def test_the_linter_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    """In a fresh interpreter that cannot import them, nor the optional packages."""
    path = write(tmp_path / "job.yaml", patched(BAD))
    blocked = [
        "torch",
        "deepspeed",
        "ray",
        "transformers",
        "boto3",
        "datasets",
        "cel_expr_python",
        "kubernetes_validate",
    ]
    program = (
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        f"from rayft.cli import main\nsys.exit(main(['k8s', 'lint', {path!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "2 errors, 0 warnings" in done.stdout
    assert (
        "note: kinds and pods of Kubernetes are not checked against its schemas: pip install 'rayft[k8s]'"
        in done.stdout
    )


#: Parts of a job that the good one lacks, so that every rule has something to look at.
MORE: dict[str, Any] = {
    "metadata/labels": {"kueue.x-k8s.io/queue-name": "team"},
    "metadata/annotations": {"kueue.x-k8s.io/elastic-job": "true", "rayft.dev/lint-ignore": "token"},
    "spec/runtimeEnvYAML": "env_vars: {A: b}",
    "spec/metadata": {"run": "demo"},
    "spec/submitterPodTemplate": {"spec": {"containers": [{"name": "a", "image": "b:1", "args": ["c"]}]}},
    "spec/deletionStrategy": {
        "onSuccess": {"policy": "DeleteCluster"},
        "deletionRules": [{"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "ttlSeconds": 1}}],
    },
    "cluster/enableInTreeAutoscaling": True,
    "cluster/autoscalerOptions": {"version": "v2", "env": [{"name": "A", "value": "b"}]},
    "cluster/networkPolicy": {"mode": "DenyAll", "head": {}, "workerGroups": [{"groupName": "gpu"}]},
    "cluster/gcsFaultToleranceOptions": {"backend": "rocksdb", "storage": {"claimName": "a"}},
    "cluster/tlsOptions": {"enabled": True},
    "head/labels": {"a": "b"},
    "head/headService": {"spec": {"type": "NodePort"}},
    "group/idleTimeoutSeconds": 5,
    "group/priority": 1,
    "group/resources": {"CPU": "1"},
    "group/template/metadata": {
        "labels": {"a": "b"},
        "annotations": {
            "kueue.x-k8s.io/podset-group-name": "a",
            "kueue.x-k8s.io/podset-preferred-topology": "b",
            "kueue.x-k8s.io/podset-slice-size": "1",
        },
    },
    "pod/volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}],
    "ray/volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    "ray/lifecycle": {"preStop": {"exec": {"command": ["true"]}}},
    "ray/command": ["bash"],
    "ray/securityContext/capabilities/add": ["CHOWN"],
}

QUEUES = """
apiVersion: kueue.x-k8s.io/v1beta2
kind: ClusterQueue
metadata: {name: all}
spec:
  cohortName: fleet
  preemption: {reclaimWithinCohort: Any}
  resourceGroups:
  - coveredResources: [cpu]
    flavors: [{name: a, resources: [{name: cpu, nominalQuota: "1", lendingLimit: "1"}]}]
---
apiVersion: kueue.x-k8s.io/v1beta2
kind: LocalQueue
metadata: {name: team, namespace: team}
spec: {clusterQueue: all}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: job, namespace: team}
data: {job.yaml: "{name: a, method: sft}"}
"""

RICH: list[dict[str, Any]] = [patched(MORE), *yaml.safe_load_all(QUEUES)]
ODD: list[Any] = [None, True, -3, 1.5, "a\n\x1b[2J", [], {}, [[1]], [{"name": ["a"]}], {"a": [1]}, {1: None}]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a manifest."""
    pairs = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    )
    return [path, *(place for key, each in pairs for place in places(each, (*path, key)))]


PLACES = [path for path in places(RICH) if len(path) > 1 and path[1] not in ("apiVersion", "kind")]


def changed(path: tuple[Any, ...], value: Any, data: Any) -> Any:
    """The data with one value put in; as it is where there is no such place any more."""
    if not path:
        return value
    made = copy.copy(data)
    if isinstance(made, dict):
        made[path[0]] = changed(path[1:], value, made.get(path[0]))
    elif isinstance(made, list) and isinstance(path[0], int) and path[0] < len(made):
        made[path[0]] = changed(path[1:], value, made[path[0]])
    return made


def holds(documents: list[dict[str, Any]]) -> None:
    for finding in lint(documents).findings:
        assert str(finding).isprintable()


def test_no_value_anywhere_breaks_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value of rich manifests in turn becomes each of some odd ones; schemas are left out, as they look at each alone."""
    from rayft.fleet.lint import run

    monkeypatch.setattr(run, "_structure", lambda *_: [])
    for path in PLACES:
        for value in ODD:
            holds(changed(path, value, RICH))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PLACES), VALUES), min_size=1, max_size=3))
def test_no_values_together_break_the_linter(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    made: Any = RICH
    for path, value in changes:
        made = changed(path, value, made)
    holds(made)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("500m", 0.5),
        ("2", 2),
        (2, 2),
        ("1Ki", 1024),
        ("1k", 1000),
        ("1e3", 1000),
        ("1.5Gi", 1.5 * 2**30),
        (".5", 0.5),
    ],
)
def test_quantities(text: str | int, number: float) -> None:
    assert quantity(text) == number


@pytest.mark.parametrize("value", ["", "1 Gi", "Gi", "1kb", True, None, [1], "1e9999"])
def test_no_quantities(value: object) -> None:
    assert quantity(value) is None


@pytest.mark.parametrize(
    ("image", "version"),
    [
        ("rayproject/ray:2.60.0-py311-gpu", "2.60.0"),
        ("rayproject/ray-ml:2.9.0", "2.9.0"),
        ("host:5000/a/rayft:0.1.0-ray2.60.0-cu128", "2.60.0"),
        ("rayft:ray-2.60.0", "2.60.0"),
        ("host/rayft:0.1.0", None),
        ("host/array2.1.0", None),
        ("rayproject/ray@sha256:0123", None),
    ],
)
def test_versions_of_ray_in_images(image: str, version: str | None) -> None:
    assert ray_version(image) == version


def test_parts_of_images() -> None:
    assert split_image("host:5000/a/b:1@sha256:2") == ("host:5000/a/b", "1", "sha256:2")
    assert split_image("host:5000/a/b") == ("host:5000/a/b", "", "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_TOKENS", "512"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("RAY_AUTH_TOKEN_PATH", "/run/token"),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "token"),
        ("API_KEY", "$(API_KEY)"),
        ("API_KEY", ""),
        ("TOKEN_TTL", "30s"),
        ("STORAGE", "s3://bucket/prefix"),
        ("ENDPOINT", "http://host:9000"),
        ("RAY_AUTH_MODE", "token"),
    ],
)
def test_what_is_no_secret(name: str, value: str) -> None:
    assert not looks_secret(name, value)


def test_secrets_are_never_shown() -> None:
    marker = "hf_" + "Q" * 34
    changes = {
        "ray/env/1": {"name": "HF_TOKEN", "value": marker},
        "spec/entrypoint": f"env HF_TOKEN={marker} rayft run x",
        "spec/runtimeEnvYAML": f"env_vars: {{HF_TOKEN: {marker}}}",
        "metadata/annotations": {"note": marker},
        # Where a schema wants something else, too.
        "spec/backoffLimit": marker,
        "ray/imagePullPolicy": [marker],
        "cluster/authOptions/mode": marker,
    }
    findings = lint([patched(changes)]).findings
    assert len(findings) >= 7
    assert marker not in "".join(map(str, findings))


def test_errors_name_what_to_do() -> None:
    with pytest.raises(JobError) as caught:
        parse("- a", "x.yaml")
    assert caught.value.code == 2
    assert caught.value.remedy
