"""Scores: of the last token, in fp32, whatever the padding, batch, packing, and after saving and loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rayft.checkpoint import CheckpointReader
from rayft.data.template import Sample
from rayft.data.tensors import sequence_tensors
from rayft.errors import JobError
from rayft.generate.scores import ScoreEngine, load_score_model
from rayft.model.export import export_model
from rayft.model.files import NewScore, job_files
from rayft.model.load import build_model
from rayft.model.score import ScoreHead, forward_scores, install_score_head
from rayft.model.weights import new_score
from rayft.spec import Job, parse_job
from rayft.storage import open_store
from tests.tiny import FAMILIES, save_tiny, tiny_tokenizer
from tests.unit.test_model_export import checkpoint, trained

GENERATOR = np.random.default_rng(0)
DOCUMENTS = [GENERATOR.integers(0, 256, length).tolist() for length in (3, 17, 40, 1, 28)]


def job_of(model: Path, **groups: Any) -> Job:
    values = {
        "name": "r",
        "method": "reward",
        "model": {"path": str(model)},
        "data": {"train": [{"path": "x"}]},
    }
    return parse_job({**values, **groups})


def built(job: Job, cache: Path, dtype: torch.dtype = torch.float32, attention: str = "auto") -> Any:
    model = build_model(job_files(job, cache), job.model, dtype=dtype, attention=attention)
    install_score_head(model)
    return model


def checkpoint_of(job: Job, folder: Path) -> tuple[CheckpointReader, Any]:
    """A checkpoint of the job's model after some 'training', and that model."""
    module = trained(job, job_files(job, folder / "cache"))
    return checkpoint(module, folder / "run"), module


def samples(documents: list[list[int]]) -> list[Sample]:
    return [Sample(np.array(ids), np.zeros(len(ids), np.bool_)) for ids in documents]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_transformers_own_classifier(family: str, tmp_path: Path) -> None:
    """Packed, padded with any id and one at a time: the score at each document's last token, as transformers has it."""
    job = job_of(save_tiny(tmp_path / "model", family), seed=3)
    model = built(job, tmp_path / "cache")
    reference = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", num_labels=1, attn_implementation="eager"
    ).eval()
    reference.score.weight.data = new_score(reference.score.weight.shape, NewScore(1, 3))
    with torch.no_grad():
        expected = torch.cat([reference(torch.tensor([ids])).logits[0] for ids in DOCUMENTS]).tolist()
        packed = forward_scores(model, sequence_tensors(samples(DOCUMENTS), packed=True))
        end = tiny_tokenizer().eos_token_id
        padded = [
            forward_scores(model, sequence_tensors(samples(DOCUMENTS), packed=False, pad_id=pad_id))
            for pad_id in (0, end)
        ]
    for found in (packed, *padded):
        assert found[:, 0].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert torch.equal(padded[0], padded[1])
    assert len({round(score, 4) for score in expected}) == len(expected)


def test_batch_size_does_not_show(tmp_path: Path) -> None:
    model = built(job_of(save_tiny(tmp_path / "model"), reward={"heads": 3}), tmp_path / "cache")
    alone = ScoreEngine(model, batch_size=1).rate(DOCUMENTS)
    together = ScoreEngine(model, batch_size=5).rate(DOCUMENTS)
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-6)
    assert np.shape(alone) == (5, 3)


def test_new_heads_follow_the_seed_and_have_the_size_of_one_over_root_of_the_width(tmp_path: Path) -> None:
    shape = torch.Size([4, 10_000])
    first, again, other = (new_score(shape, NewScore(4, seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std().item() == pytest.approx(1 / 10_001**0.5, rel=0.02)
    assert not new_score(shape, NewScore(4, 1, zeros=True)).any()


def test_the_head_computes_in_fp32_beside_bf16(tmp_path: Path) -> None:
    model = built(job_of(save_tiny(tmp_path / "model")), tmp_path / "cache", torch.bfloat16)
    assert isinstance(model.score, ScoreHead)
    hidden = torch.randn(2, model.config.hidden_size, dtype=torch.bfloat16)
    assert model.score(hidden).dtype == torch.float32
    assert torch.equal(model.score(hidden), hidden.float() @ model.score.weight.float().T)


@pytest.mark.parametrize("adapter", [{}, {"type": "lora", "lora_r": 4}], ids=["full", "lora"])
def test_a_reward_model_is_saved_and_loaded_with_its_head(
    adapter: dict[str, Any], tmp_path: Path, s3_bucket: str
) -> None:
    """Exported apart and merged: rayft's loader and transformers give the scores of the model that was trained."""
    job = job_of(save_tiny(tmp_path / "model"), adapter=adapter, reward={"heads": 2})
    reader, module = checkpoint_of(job, tmp_path)
    install_score_head(module)
    expected = ScoreEngine(module).rate(DOCUMENTS)
    files = job_files(job, tmp_path / "cache")
    prompts = DOCUMENTS[:3]
    for merge in (False, True):
        out = tmp_path / f"out-{merge}"
        report = export_model(reader, files, job, out, merge=merge, dtype=torch.float32, prompts=prompts)
        remote = open_store(f"s3://{s3_bucket}/run-{merge}/model")
        for file in out.iterdir():
            remote.upload(file, file.name)
        for where in (str(out), f"s3://{s3_bucket}/run-{merge}"):
            loaded, _ = load_score_model(
                where, cache_dir=tmp_path / "cache", device="cpu", dtype=torch.float32
            )
            np.testing.assert_allclose(ScoreEngine(loaded).rate(DOCUMENTS), expected, rtol=1e-5, atol=1e-5)
        if adapter and merge:
            assert report.proof is not None
            assert report.proof.merge_error < 1e-5
    whole = AutoModelForSequenceClassification.from_pretrained(out)
    assert whole.config.num_labels == 2
    with torch.no_grad():
        scores = [whole(torch.tensor([ids])).logits[0].tolist() for ids in DOCUMENTS]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
    assert "SequenceClassification" in (out / "README.md").read_text()


def test_the_head_stays_fp32_where_the_rest_is_bf16(tmp_path: Path) -> None:
    from safetensors import safe_open

    job = job_of(save_tiny(tmp_path / "model"))
    reader, _ = checkpoint_of(job, tmp_path)
    export_model(reader, job_files(job, tmp_path / "cache"), job, tmp_path / "out", dtype=torch.bfloat16)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.get_slice("score.weight").get_dtype() == "F32"
        assert file.get_slice("model.norm.weight").get_dtype() == "BF16"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] is not None
    loaded, _ = load_score_model(str(tmp_path / "out"), cache_dir=tmp_path / "cache", dtype=torch.bfloat16)
    assert loaded.score.weight.dtype == torch.float32  # type: ignore[union-attr]


def test_a_reward_model_can_be_trained_on(tmp_path: Path) -> None:
    """What was exported is a model to start from: its own heads stay; another number of them is refused."""
    job = job_of(save_tiny(tmp_path / "model"), seed=5)
    reader, module = checkpoint_of(job, tmp_path)
    export_model(reader, job_files(job, tmp_path / "cache"), job, tmp_path / "out", dtype=torch.float32)
    again = built(job_of(tmp_path / "out", seed=6), tmp_path / "cache")
    assert torch.equal(again.score.weight, module.score.weight)
    with pytest.raises(JobError, match="score"):
        built(job_of(tmp_path / "out", reward={"heads": 2}), tmp_path / "cache")


def test_a_language_model_has_no_score(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    with pytest.raises(JobError, match="no score head"):
        load_score_model(str(tmp_path / "model"), cache_dir=tmp_path / "cache")
