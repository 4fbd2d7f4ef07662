"""Data larger than memory: training starts while later shards are prepared, and reading them takes no memory."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from rayft.report.log import read_log
from rayft.spec import Job
from rayft.storage import open_store
from tests.cluster.steps import WORDS, plan_of, prepare_folder, small_job
from tests.runs import ROOT, losses, rayft, write_job

pytestmark = [pytest.mark.full, pytest.mark.slow, pytest.mark.timeout(900)]

ROWS, SHARD_ROWS, STEPS = 40_000, 500, 4
MEMORY_MB = 100

#: Reads every document with no more than MEMORY_MB for data of its own; pages of mapped files do not count.
READER = """
import pickle, resource, sys
import numpy as np
from rayft.data.corpus import Corpus
from rayft.storage import open_store

spec = pickle.load(open(sys.argv[1], "rb"))
corpus = Corpus(spec, open_store(sys.argv[2]), node_dir=None)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
used = int(status["VmData"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))
total = sum(len(corpus.sample(d).ids) for row in range(spec.rows) for d in corpus.documents(row))
print(total)
""".replace("MEMORY", f"({MEMORY_MB} << 20)")


def write_texts(path: Path) -> None:
    """Rows of about 2,000 characters, which the tiny tokenizer takes for nearly as many tokens."""
    rng = random.Random(0)
    with path.open("w") as file:
        for _ in range(ROWS):
            file.write(json.dumps({"text": " ".join(rng.choices(WORDS, k=350))}) + "\n")


def large_job(folder: Path, name: str) -> Job:
    return small_job(
        folder,
        name=name,
        data={
            "train": [{"path": str(folder / "texts.jsonl")}],
            "max_length": 2048,
            "shard_rows": SHARD_ROWS,
            "cache": str(folder / "cache"),
        },
        train={"max_steps": STEPS},
        cluster={"num_workers": 1},
    )


def test_training_starts_while_shards_are_prepared_and_memory_does_not_grow(tmp_path: Path) -> None:
    folder = prepare_folder(tmp_path, max_position_embeddings=2048)
    write_texts(folder / "texts.jsonl")
    cache, count = folder / "cache", ROWS // SHARD_ROWS
    job = large_job(folder, "early")
    with rayft("run", str(write_job(job, folder / "early.yaml")), log=tmp_path / "early.log") as run:
        assert run.wait() == 0, run.output()
        assert "shards are prepared while training runs" in " ".join(run.output().split())
    store = open_store(folder / "runs" / "early")
    first_step = next(row["time"] for row in read_log(store) if row["kind"] == "step")
    ready = [path for path in cache.rglob("*.safetensors") if path.stat().st_mtime < first_step]
    assert 0 < len(ready) < count

    plan = plan_of(job, folder, stage=0, packed=True)  # prepares the rest
    shards = list(cache.rglob("*.safetensors"))
    assert len(shards) == count
    late = large_job(folder, "late")
    with rayft("run", str(write_job(late, folder / "late.yaml")), log=tmp_path / "late.log") as run:
        assert run.wait() == 0, run.output()
    assert losses(open_store(folder / "runs" / "late")) == losses(store)

    assert sum(path.stat().st_size for path in shards) > 2 * MEMORY_MB << 20
    import pickle

    (folder / "spec.pickle").write_bytes(pickle.dumps(plan.train_spec))
    done = subprocess.run(
        [sys.executable, "-c", READER, str(folder / "spec.pickle"), str(cache)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > ROWS * 1500
