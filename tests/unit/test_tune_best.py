"""What a search leaves behind: the best trial's job and model, the page, and what is said of them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from rayft.errors import JobError, StorageError
from rayft.report.log import read_all
from rayft.report.trials import trials_of
from rayft.spec import load_job
from rayft.storage import LocalStore, Store, open_store
from rayft.tune.answers import answer
from rayft.tune.best import best_job, best_yaml, copy_model, export_best, run_folder
from rayft.tune.choose import choose
from tests.ledgers import CHANGE, LOSS, asha_search, pbt_search, search_job


def test_best_yaml_is_a_job_to_run(tmp_path: Path) -> None:
    search, trials = search_job(scheduler="asha"), trials_of(asha_search().rows)
    choice = choose(trials, LOSS, {})
    file = tmp_path / "best.yaml"
    file.write_text(best_yaml(search, choice, trials))
    job = load_job(file)
    assert job == best_job(search, choice.trial)
    assert (job.name, job.storage, job.tune) == ("sweep-best", "runs", None)
    assert (job.train.learning_rate, job.adapter.lora_r) == (choice.trial.values["train.learning_rate"], 16)
    assert job.train.max_steps == 24
    assert "t0005, eval.loss 1.275 at step 24" in file.read_text()


def test_best_yaml_of_a_line_tells_its_schedule(tmp_path: Path) -> None:
    space = {"train.learning_rate": {"loguniform": [1e-5, 1e-2]}}
    search, trials = search_job(scheduler="pbt", space=space), trials_of(pbt_search().rows)
    text = best_yaml(search, choose(trials, LOSS, {}), trials)
    assert "#   steps 9 to 16 (sweep-t0000-1): train.learning_rate 0.0008\n" in text
    (tmp_path / "best.yaml").write_text(text)
    assert load_job(tmp_path / "best.yaml").train.learning_rate == 9e-4


def test_a_long_name_stays_a_name() -> None:
    search = search_job().model_copy(update={"name": "a" * 57 + "-" + "b" * 5})
    trial = trials_of(asha_search().rows)["t0001"]
    assert best_job(search, trial).name == "a" * 57 + "-best"


def a_model(store: Store, **more: bytes) -> None:
    files = {"model.safetensors": b"w" * 999, "config.json": b"{}", "export.json": b'{"uri": "x"}', **more}
    for name, data in files.items():
        store.put(name, data)


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_the_model_of_a_finished_trial_is_copied(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = (
        str(tmp_path / "sweep")
        if kind == "local"
        else f"s3://{request.getfixturevalue('s3_bucket')}/runs/sweep"
    )
    store = open_store(uri)
    asha_search().write(store)
    choice = choose(trials_of(read_all(store)), LOSS, {})
    a_model(run_folder(store, "sweep-t0005").child("model"))
    store.put("model/stale.bin", b"of an earlier best")
    assert "The model of sweep-t0005 is in" in export_best(store, choice)
    out = store.child("model")
    assert [entry.key for entry in out.list()] == ["config.json", "export.json", "model.safetensors"]
    versions = [entry.version for entry in out.list()]
    export_best(store, choice)
    assert [entry.version for entry in out.list()] == versions  # it is there already


def test_a_copy_that_is_cut_off_is_not_taken_for_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = LocalStore(tmp_path / "a"), LocalStore(tmp_path / "b")
    a_model(source)
    a_model(out, **{"export.json": b"of another"})
    upload = LocalStore.upload

    def breaks(self: LocalStore, path: Path, key: str) -> None:
        if key == "model.safetensors":
            raise StorageError("the disk is full")
        upload(self, path, key)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "upload", breaks)
        with pytest.raises(StorageError):
            copy_model(source, out)
    assert not out.exists("config.json")
    copy_model(source, out)
    assert out.exists("config.json")


def test_no_model_and_no_checkpoint_is_said(tmp_path: Path) -> None:
    choice = choose(trials_of(asha_search().rows), LOSS, {})
    with pytest.raises(StorageError, match="t0005 has neither a model nor a checkpoint"):
        export_best(LocalStore(tmp_path), choice)


def test_answer_writes_everything_and_keeps_the_rest_where_no_model_is(tmp_path: Path) -> None:
    store, out = LocalStore(tmp_path), io.StringIO()
    asha_search().write(store)
    choice = answer(store, search_job(scheduler="asha"), Console(file=out, width=200))
    assert choice.trial.trial == "t0005"
    assert store.exists("report.html")
    for told in ("Best: t0005, eval.loss 1.275", "name: sweep-best", "No model was exported", "best.yaml"):
        assert told in out.getvalue()
    assert load_job(tmp_path / "best.yaml").name == "sweep-best"


def test_a_search_that_nothing_meets_still_has_its_page(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    asha_search().write(store)
    search = search_job(constraints={CHANGE: {"max": -1}})
    with pytest.raises(JobError, match="the closest is t0001"):
        answer(store, search, Console(file=io.StringIO()))
    assert "the closest is t0001" in (tmp_path / "report.html").read_text()
    assert not store.exists("best.yaml")
