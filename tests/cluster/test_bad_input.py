"""Everything a user can get wrong ends in one sentence that names it and the remedy, with the right exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from rayft.checkpoint import latest
from rayft.cli import main
from rayft.data.order import WINDOW, Order
from rayft.storage import open_store
from tests import checkpoints
from tests.cluster.steps import plan_of, prepare_folder, small_job
from tests.tiny import save_tiny

pytestmark = pytest.mark.slow

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@dataclass(frozen=True)
class Case:
    """What is wrong, the verb that finds it, its exit code, and words its sentence must have."""

    name: str
    code: int
    words: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    rows: tuple[object, ...] | None = None
    text: str | None = None
    prepare: Callable[[Path], None] | None = None
    verb: str = "run"


def _no_turn_end(folder: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (folder / "template.jinja").write_text(template)


def _unproven_family(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tiny import tiny_tokenizer

    config = AutoConfig.for_model("gpt2", vocab_size=264, n_embd=32, n_layer=1, n_head=2, n_positions=256)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "other")
    tiny_tokenizer().save_pretrained(folder / "other")


def _another_run(folder: Path) -> None:
    run = folder / "runs" / "small"
    run.mkdir(parents=True)
    (run / "job.yaml").write_text(
        yaml.safe_dump(small_job(folder, train={"learning_rate": 0.5}).model_dump(mode="json"))
    )
    checkpoints.save(open_store(run), 4)


def _file_in_the_way(folder: Path) -> None:
    (folder / "taken").write_text("no folder")


def _truncated_weights(folder: Path) -> None:
    save_tiny(folder / "broken")
    weights = folder / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])


def lines(*rows: object) -> tuple[object, ...]:
    return rows


PAIR = {"prompt": "why?", "chosen": "yes", "rejected": "no"}
ANSWER = {"role": "assistant", "content": "y"}
REWARD, DPO, KTO = ("method=reward",), ("method=dpo",), ("method=dpo", "dpo.loss=kto")

CASES = [
    # 2: the job file or the command line
    Case("unknown key", 2, ("train.learning_rat", "did you mean 'learning_rate'"), ("train.learning_rat=1",)),
    Case("wrong type", 2, ("train.max_steps", "'many'"), ("train.max_steps=many",)),
    Case("out of range", 2, ("train.warmup_ratio", "1.5"), ("train.warmup_ratio=1.5",)),
    Case("not yaml", 2, ("not valid YAML", "line 2"), text="name: x\n  model: [\n"),
    Case("no mapping", 2, ("holds no job",), text="- a\n- b\n"),
    Case("missing group", 2, ("'data' is missing",), text="name: x\nmodel: {path: y}\n"),
    Case("bad override", 2, ("'learning_rate'", "group.key=value"), ("learning_rate",)),
    Case("override through a value", 2, ("name.x",), ("name.x=1",)),
    Case("two batch units", 2, ("global_batch_size or tokens_per_step",), ("train.tokens_per_step=64",)),
    Case("bad run name", 2, ("name", "My Run"), ("name=My Run",)),
    Case(
        "early stopping alone",
        2,
        ("early_stopping_patience", "data.eval"),
        ("train.early_stopping_patience=2",),
    ),
    Case(
        "deepspeed contradicts",
        2,
        ("deepspeed.gradient_clipping", "train.max_grad_norm"),
        ("deepspeed.gradient_clipping=3",),
    ),
    Case("no such model", 2, ("nowhere",), ("model.path=./nowhere",)),
    Case("no such package", 2, ("no_such_package",), ("model.path=package:no_such_package",)),
    Case(
        "broken weights",
        2,
        ("broken", "safetensors"),
        ("model.path={folder}/broken",),
        prepare=_truncated_weights,
    ),
    Case("no such template", 2, ("missing.jinja",), ("model.chat_template=missing.jinja",)),
    Case("qlora on cpu", 2, ("qlora", "GPU"), ("adapter.type=qlora",)),
    Case(
        "dora under zero-3",
        2,
        ("use_dora", "zero.stage 3"),
        ("adapter.type=lora", "adapter.use_dora=true", "zero.stage=3"),
    ),
    Case("no such target", 2, ("q_porj", "q_proj"), ("adapter.type=lora", "adapter.target_modules=[q_porj]")),
    Case(
        "packing unproven",
        2,
        ("gpt2", "packing"),
        ("model.path={folder}/other", "data.packing=true"),
        prepare=_unproven_family,
    ),
    Case("another job", 2, ("learning_rate: 0.5 -> 0.001", "another name"), prepare=_another_run),
    # 3: the data
    Case("no such data", 3, ("missing.jsonl",), ("data.train.0.path=missing.jsonl",)),
    Case("empty file", 3, ("rows.jsonl", "no rows"), rows=()),
    Case("bad json", 3, ("rows.jsonl line 2", "JSON"), rows=(GOOD, "{broken")),
    Case("unknown columns", 3, ("rows.jsonl line 1", "frage"), rows=({"frage": "a"},)),
    Case(
        "ambiguous columns",
        3,
        ("rows.jsonl line 1", "text"),
        rows=({"text": "a", "messages": GOOD["messages"]},),
    ),
    Case("wrong column type", 3, ("rows.jsonl line 2", "messages"), rows=(GOOD, {"messages": "hello"})),
    Case(
        "unknown role",
        3,
        ("rows.jsonl line 1", "robot"),
        rows=({"messages": [{"role": "robot", "content": "x"}]},),
    ),
    Case(
        "nothing trained",
        3,
        ("rows.jsonl line 1", "train"),
        rows=({"messages": [{"role": "user", "content": "x"}]},),
    ),
    Case("too long", 3, ("data.max_length",), ("data.max_length=8", "data.too_long=error")),
    Case("all too long", 3, ("data.max_length", "rows.jsonl"), ("data.max_length=4", "train.max_steps=null")),
    Case("no turn end", 3, ("end",), ("model.chat_template={folder}/template.jinja",), prepare=_no_turn_end),
    Case(
        "the doctor finds it too",
        3,
        ("rows.jsonl line 1", "train"),
        rows=({"messages": [{"role": "user", "content": "x"}]},),
        verb="check",
    ),
    # 3: comparisons
    Case(
        "equal answers",
        3,
        ("rows.jsonl line 2", "say the same"),
        REWARD,
        rows=(PAIR, {**PAIR, "rejected": "yes"}),
    ),
    Case(
        "no prompt",
        3,
        ("rows.jsonl line 2", "'prompt'"),
        REWARD,
        rows=(PAIR, {"chosen": "a", "rejected": "b"}),
    ),
    Case(
        "no shared prompt",
        3,
        ("rows.jsonl line 1", "share no prompt"),
        REWARD,
        rows=({"chosen": GOOD["messages"], "rejected": [{"role": "user", "content": "else"}, ANSWER]},),
    ),
    Case(
        "contradictory ratings",
        3,
        ("rows.jsonl line 3 contradicts", "rows.jsonl line 1", "data.contradictions"),
        REWARD,
        rows=(PAIR, {**PAIR, "prompt": "who?"}, {**PAIR, "chosen": "no", "rejected": "yes"}),
    ),
    Case(
        "label out of range",
        3,
        ("rows.jsonl line 1", "the label is 3"),
        KTO,
        rows=({"prompt": "why?", "completion": "yes", "label": 3},),
    ),
    Case("empty answer", 3, ("rows.jsonl line 1", "'chosen' is empty"), DPO, rows=({**PAIR, "chosen": ""},)),
    Case("pairs for kto", 3, ("rows.jsonl line 1", "labelled"), KTO, rows=(PAIR,)),
    Case("conversations for dpo", 3, ("rows.jsonl line 1", "preference"), DPO),
    Case("pairs for sft", 3, ("rows.jsonl line 1", "preference", "reward and dpo"), rows=(PAIR,)),
    Case("another method's group", 2, ("dpo", "method sft"), ("dpo.beta=0.3",)),
    # 4: resources
    Case(
        "too many workers",
        4,
        ("asks for 64 workers", "the cluster holds 2", "CPU"),
        ("cluster.num_workers=64",),
    ),
    Case("a GPU that is not there", 4, ("1 GPU",), ("cluster.gpus_per_worker=1", "cluster.gpu=H100-80GB")),
    # 5: storage
    Case("a file where runs go", 5, ("taken",), ("storage={folder}/taken",), prepare=_file_in_the_way),
    Case("no such bucket scheme", 2, ("gs://",), ("storage=gs://bucket/runs",)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("bad"))


def test_there_are_at_least_25_cases() -> None:
    assert len(CASES) >= 25


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_bad_input(
    case: Case,
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    local_ray: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "node"))
    for name in ("model", "rows.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    if case.rows is not None:
        (tmp_path / "rows.jsonl").unlink()
        (tmp_path / "rows.jsonl").write_text(
            "".join(r + "\n" if isinstance(r, str) else json.dumps(r) + "\n" for r in case.rows)
        )
    if case.prepare:
        case.prepare(tmp_path)
    path = tmp_path / "job.yaml"
    path.write_text(case.text or yaml.safe_dump(small_job(tmp_path).model_dump(mode="json")))
    capfd.readouterr()
    overrides = [override.format(folder=tmp_path) for override in case.overrides]
    code = main([case.verb, str(path), *overrides])
    err = capfd.readouterr().err
    sentences = [line for line in err.splitlines() if line.startswith(f"rayft {case.verb}:")]
    assert len(sentences) == 1, err
    assert code == case.code, sentences
    assert "Traceback" not in err
    missing = [word for word in case.words if word not in sentences[0]]
    assert not missing, sentences[0]


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        (
            {"space": {"train.lerning_rate": {"uniform": [1e-4, 1e-3]}}},
            ("train.lerning_rate", "did you mean 'learning_rate'"),
        ),
        ({"space": {"train.learning_rate": {"uniform": [1e-3, 1e-3]}}}, ("from 0.001 to 0.001 is empty",)),
        (
            {
                "space": {"train.learning_rate": {"uniform": [1e-4, 1e-3]}},
                "scheduler": "pbt",
                "searcher": "optuna",
            },
            ("tune.searcher optuna with tune.scheduler pbt",),
        ),
    ],
    ids=["unknown key", "empty range", "a searcher with pbt"],
)
def test_a_search_that_cannot_be(
    tune: dict[str, object], words: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`rayft tune` says so in one sentence, and makes nothing."""
    job = small_job(tmp_path).model_dump(mode="json")
    job["data"]["eval"], job["eval"] = job["data"]["train"], {"every_steps": 5}
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump({**job, "tune": {"metric": "eval.loss", **tune}}))
    code = main(["tune", str(path)])
    err = capfd.readouterr().err
    [sentence] = [line for line in err.splitlines() if line.startswith("rayft tune:")]
    assert code == 2, err
    assert "Traceback" not in err
    assert not [word for word in words if word not in sentence], sentence
    assert not (tmp_path / "runs").exists()


def test_diverged_run_ends_with_6_and_is_not_tried_again(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], local_ray: None
) -> None:
    """A NaN loss: no retry by Ray, and the same command again ends at once with the same code."""
    job = small_job(
        folder,
        name="nan",
        storage=str(tmp_path),
        train={"learning_rate": 1e30, "max_grad_norm": 0.0, "warmup_steps": 0},
    )
    path = tmp_path / "nan.yaml"
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    for _ in range(2):
        assert main(["run", str(path)]) == 6
        err = capfd.readouterr().err
        assert "diverged at step" in err
        assert "Traceback" not in err
    log = (tmp_path / "nan" / "log.jsonl").read_text()
    starts = [line for line in log.splitlines() if '"event":"start"' in line or '"event":"resume"' in line]
    assert len(starts) == 1, log


def test_a_mistake_is_corrected_under_the_same_name(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], local_ray: None
) -> None:
    """Data that is not there, then a row that is wrong, then both right: the third start trains."""
    (tmp_path / "model").symlink_to(folder / "model")
    job = small_job(tmp_path, name="corrected", train={"max_steps": 2, "global_batch_size": 1})
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    assert main(["run", str(path)]) == 3
    (tmp_path / "rows.jsonl").write_text("{broken\n")
    assert main(["run", str(path)]) == 3
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD) + "\n")
    assert main(["run", str(path)]) == 0, capfd.readouterr().err


def test_a_wrong_row_in_a_late_shard_is_told_after_saving(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], local_ray: None
) -> None:
    """Found while training runs: the ranks save first, then the run ends with 3; the same rows end it at once."""
    for name in ("model", "rows.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    data = {"train": [{"path": str(tmp_path / "rows.jsonl")}], "max_length": 256, "shard_rows": 2}
    job = small_job(tmp_path, name="late", data=data, train={"max_steps": 100_000})
    spec = plan_of(job, tmp_path, stage=0, packed=True).train_spec
    assert len(spec.shards) > WINDOW
    last = Order.of(spec, job.seed).first_shards()[-1]
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    rows[last] = json.dumps({"messages": [{"role": "user", "content": "nothing is trained here"}]})
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    for _ in range(2):
        assert main(["run", str(path)]) == 3
        assert f"line {last + 1}" in capfd.readouterr().err
    saved = latest(open_store(tmp_path / "runs" / "late"))
    assert saved is not None
    rows[last] = json.dumps(GOOD)
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    assert main(["run", str(path)]) == 2
    assert "the rows of data.train" in capfd.readouterr().err


def test_corrupt_checkpoint_is_named_and_never_loaded(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], local_ray: None
) -> None:
    """One flipped byte: `export` refuses the checkpoint by name."""
    job = small_job(folder, name="flipped", storage=str(tmp_path), train={"max_steps": 2})
    path = tmp_path / "flipped.yaml"
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    assert main(["run", str(path)]) == 0
    data = next((tmp_path / "flipped" / "checkpoints" / "step-2").glob("*.bin"))
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    capfd.readouterr()
    assert main(["export", str(tmp_path / "flipped"), str(tmp_path / "out")]) == 5
    err = capfd.readouterr().err
    assert "step-2 is corrupt" in err
    assert data.name in err


def test_missing_job_file_names_the_nearest(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "demo.yaml").write_text("name: x\n")
    assert main(["run", str(tmp_path / "demp.yaml")]) == 2
    assert "demo.yaml" in capfd.readouterr().err
