"""The tokenised cache: content-addressed, made once, read while it is being made."""

from __future__ import annotations

import gc
import json
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayft.data.cache import ShardInfo, plan_cache, prepare_shard, refuse_empty, shard_info
from rayft.data.corpus import Corpus, NoMoreShards
from rayft.data.formats import Text
from rayft.data.template import ChatTokenizer
from rayft.errors import DataError, StorageError, WorkerError
from rayft.spec import Data, Source
from rayft.storage import LocalStore, ObjectNotFound, cache_at, open_store
from tests.shared import ROOT, shared_data
from tests.tiny_data import FAMILIES, byte_tokenizer, chat_rows, corpus_of, family_tokenizer, write_jsonl

pytest_plugins = ["tests.s3"]


def data_of(*sources: Path | Source, **values: Any) -> Data:
    made = [s if isinstance(s, Source) else Source(path=str(s)) for s in sources]
    return Data(train=made, **{"shard_rows": 4, "max_length": 200, **values})


def keys_of(data: Data, tokenizer: ChatTokenizer, tmp_path: Path) -> list[str]:
    return [shard.key for shard in plan_cache(data.train, data, tokenizer, node_dir=tmp_path).shards]


def test_every_row_comes_back_as_it_was_encoded(tmp_path: Path) -> None:
    tokenizer = family_tokenizer("chatml")
    texts = [f"text {i} " + "é" * i for i in range(6)]
    one, two = write_jsonl(tmp_path / "a.jsonl", chat_rows(10)), tmp_path / "b.jsonl"
    write_jsonl(two, [{"text": text} for text in texts])
    spec, corpus = corpus_of(data_of(one, two), tokenizer, tmp_path)
    assert [(s.source, s.first, s.rows, s.first_id) for s in spec.shards] == [
        (0, 0, 4, 0), (0, 4, 4, 4), (0, 8, 2, 8), (1, 0, 4, 10), (1, 4, 2, 14),
    ]  # fmt: skip
    for row, text in enumerate(texts, 10):
        (document,) = corpus.documents(row)
        sample, expected = corpus.sample(document), tokenizer.encode(Text(text))[0]
        assert np.array_equal(sample.ids, expected.ids)
        assert np.array_equal(sample.trained, expected.trained)
        assert corpus.length(document) == len(expected.ids)
        assert corpus.trained_count(document) == expected.trained.sum()
    answers = [
        tokenizer.tokenizer.decode(s.ids[s.trained])
        for s in map(corpus.sample, (d for r in range(10) for d in corpus.documents(r)))
    ]
    assert answers == [row["messages"][1]["content"] + "<|im_end|>" for row in chat_rows(10)]


def test_a_row_may_have_several_documents(tmp_path: Path) -> None:
    rows = chat_rows(3)
    rows[1]["messages"] *= 2
    spec, corpus = corpus_of(
        data_of(write_jsonl(tmp_path / "a.jsonl", rows)), family_tokenizer("qwen3"), tmp_path
    )
    assert [len(corpus.documents(row)) for row in range(spec.rows)] == [1, 2, 1]


def test_the_name_of_a_shard_follows_what_decides_its_content(tmp_path: Path) -> None:
    tokenizer = family_tokenizer("chatml")
    path = write_jsonl(tmp_path / "a.jsonl", chat_rows(8))
    (tmp_path / "x").mkdir()
    moved = write_jsonl(tmp_path / "x" / "other.jsonl", chat_rows(8))
    base = keys_of(data_of(path), tokenizer, tmp_path)
    assert len(set(base)) == 2
    assert keys_of(data_of(moved), tokenizer, tmp_path) == base
    assert keys_of(data_of(moved, path), tokenizer, tmp_path) == base * 2
    assert keys_of(data_of(Source(path=str(path), limit=6)), tokenizer, tmp_path)[0] == base[0]
    different = [
        keys_of(data_of(write_jsonl(tmp_path / "b.jsonl", chat_rows(8, seed=1))), tokenizer, tmp_path),
        keys_of(data_of(Source(path=str(path), system="S")), tokenizer, tmp_path),
        keys_of(data_of(path, max_length=100), tokenizer, tmp_path),
        keys_of(data_of(path, too_long="truncate"), tokenizer, tmp_path),
        keys_of(data_of(path), family_tokenizer("zephyr"), tmp_path),
        keys_of(data_of(path), ChatTokenizer(tokenizer.tokenizer, "all"), tmp_path),
        keys_of(data_of(path, shard_rows=5), tokenizer, tmp_path),
    ]
    assert not set(base) & {key for keys in different for key in keys}


def test_the_same_names_in_another_process(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", chat_rows(8))
    here = plan_cache(data_of(path).train, data_of(path), family_tokenizer("chatml"), node_dir=tmp_path)
    script = "import pickle, sys; print(pickle.load(sys.stdin.buffer).key)"
    there = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(here), capture_output=True, cwd=ROOT, timeout=120, check=True)  # fmt: skip
    assert there.stdout.decode().strip() == here.key


def test_a_shard_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(write_jsonl(tmp_path / "a.jsonl", chat_rows(4)))
    spec = plan_cache(data.train, data, family_tokenizer("chatml"), node_dir=tmp_path)
    cache = open_store(tmp_path / "cache")
    made = prepare_shard(spec, 0, cache, node_dir=tmp_path)
    monkeypatch.setattr(LocalStore, "put_parts", lambda *_: pytest.fail("made again"))
    assert prepare_shard(spec, 0, cache, node_dir=tmp_path) == made == shard_info(cache, spec.shards[0].key)
    assert (made.rows, made.documents) == (4, 4)


def test_limit_counts_over_all_files_of_a_source(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", chat_rows(5))
    write_jsonl(folder / "b.jsonl", chat_rows(5))
    data = data_of(Source(path=str(folder), limit=7))
    spec = plan_cache(data.train, data, family_tokenizer("chatml"), node_dir=tmp_path)
    assert [(s.table, s.first, s.rows) for s in spec.shards] == [(0, 0, 4), (0, 4, 1), (1, 0, 2)]


@pytest.mark.parametrize(
    ("too_long", "expected"),
    [
        ("drop", {"documents": 1, "too_long": 2}),
        ("truncate", {"documents": 2, "truncated": 1, "answer_cut": 1}),
    ],
)
def test_what_is_too_long_is_dropped_or_truncated_and_counted(
    too_long: str, expected: dict[str, int], tmp_path: Path
) -> None:
    long = "w" * 60
    rows = [("q", "a"), ("q", long), (long, "a")]
    messages = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in rows]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": m} for m in messages])
    spec, corpus = corpus_of(
        data_of(path, max_length=50, too_long=too_long), family_tokenizer("chatml"), tmp_path
    )
    info = shard_info(open_store(tmp_path / "cache"), spec.shards[0].key)
    counts = {"too_long": 0, "truncated": 0, "answer_cut": 0} | expected
    assert {name: getattr(info, name) for name in counts} == counts
    assert [len(corpus.documents(r)) for r in range(3)] == (
        [1, 1, 0] if too_long == "truncate" else [1, 0, 0]
    )
    documents = [d for r in range(3) for d in corpus.documents(r)]
    assert info.tokens == sum(map(corpus.length, documents))
    assert info.trained_tokens == sum(map(corpus.trained_count, documents))
    if too_long == "truncate":
        assert corpus.length(documents[1]) == 50


def test_what_is_too_long_is_refused_by_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "y" * 60}])
    with pytest.raises(DataError, match=r"a\.jsonl line 2 has 61 tokens, more than data\.max_length 50"):
        corpus_of(data_of(path, max_length=50, too_long="error"), family_tokenizer("chatml"), tmp_path)


def test_the_first_wrong_row_is_named(tmp_path: Path) -> None:
    rows = chat_rows(6)
    rows[5] = {"messages": [{"role": "user", "content": "no answer"}]}
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"a\.jsonl line 6: no token of the row is trained"):
        corpus_of(data_of(path), family_tokenizer("chatml"), tmp_path)


def test_a_source_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "y" * 60}])
    data = data_of(write_jsonl(tmp_path / "b.jsonl", chat_rows(3)), path, max_length=55)
    spec = plan_cache(data.train, data, family_tokenizer("chatml"), node_dir=tmp_path)
    cache = open_store(tmp_path / "cache")
    infos = [prepare_shard(spec, i, cache, node_dir=tmp_path) for i in range(2)]
    with pytest.raises(DataError, match=r"No row of .*a\.jsonl fits into data\.max_length 55"):
        refuse_empty(spec, infos)
    refuse_empty(spec, [infos[0], ShardInfo(1, 1, 5, 5, 0, 0, 0)])


def test_reading_waits_for_a_shard_that_is_being_made(tmp_path: Path) -> None:
    data = data_of(write_jsonl(tmp_path / "a.jsonl", chat_rows(8)))
    spec = plan_cache(data.train, data, family_tokenizer("chatml"), node_dir=tmp_path)
    cache = open_store(tmp_path / "cache")
    prepare_shard(spec, 0, cache, node_dir=tmp_path)
    corpus = Corpus(spec, cache, node_dir=tmp_path, wait_timeout_s=60)
    assert len(corpus.documents(3)) == 1  # the first shard is there: no waiting
    found: list[range] = []
    reader = threading.Thread(target=lambda: found.append(corpus.documents(4)))
    reader.start()
    time.sleep(0.1)
    assert not found
    prepare_shard(spec, 1, cache, node_dir=tmp_path)
    reader.join(60)
    assert [len(documents) for documents in found] == [1]


def test_waiting_for_a_shard_can_be_ended(tmp_path: Path) -> None:
    """By whoever knows that no more are made; a shard made last of all is still read."""
    data = data_of(write_jsonl(tmp_path / "a.jsonl", chat_rows(8)))
    spec = plan_cache(data.train, data, family_tokenizer("chatml"), node_dir=tmp_path)
    cache = open_store(tmp_path / "cache")
    with pytest.raises(NoMoreShards, match=r"a\.jsonl rows 1 to 4"):
        Corpus(spec, cache, node_dir=tmp_path, on_wait=lambda: True).documents(0)

    def last() -> bool:
        prepare_shard(spec, 0, cache, node_dir=tmp_path)
        return True

    assert len(Corpus(spec, cache, node_dir=tmp_path, on_wait=last).documents(0)) == 1


def test_waiting_for_a_shard_ends_and_names_it(tmp_path: Path) -> None:
    data = data_of(write_jsonl(tmp_path / "a.jsonl", chat_rows(8)))
    spec = plan_cache(data.train, data, family_tokenizer("chatml"), node_dir=tmp_path)
    corpus = Corpus(spec, open_store(tmp_path / "cache"), node_dir=tmp_path, wait_timeout_s=0.05)
    with pytest.raises(WorkerError, match=r"shard 1 of the tokenised cache \(.*a\.jsonl rows 5 to 8"):
        corpus.documents(4)
    with pytest.raises(ObjectNotFound):
        shard_info(open_store(tmp_path / "cache"), spec.shards[1].key)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    data = data_of(write_jsonl(tmp_path / "a.jsonl", chat_rows(4)))
    spec, _ = corpus_of(data, family_tokenizer("chatml"), tmp_path)
    path = tmp_path / "cache" / spec.shards[0].key
    path.write_bytes(path.read_bytes()[:-3])
    corpus = Corpus(spec, open_store(tmp_path / "cache"), node_dir=tmp_path)
    with pytest.raises(StorageError, match=r"is damaged.*Delete it"):
        corpus.documents(0)


def test_the_cache_and_the_data_in_s3(s3_bucket: str, tmp_path: Path) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in chat_rows(6))
    root = f"s3://{s3_bucket}"
    open_store(f"{root}/set").put("train-0.jsonl", rows.encode())
    open_store(f"{root}/set").put("test-0.jsonl", b"{}\n")
    tokenizer = family_tokenizer("chatml")
    local = data_of(write_jsonl(tmp_path / "a.jsonl", chat_rows(6)))
    for path in (f"{root}/set", f"{root}/set/train-0.jsonl"):
        data = data_of(Source(path=path))
        assert keys_of(data, tokenizer, tmp_path / "node") == keys_of(local, tokenizer, tmp_path)
    spec = plan_cache(data.train, data, tokenizer, node_dir=tmp_path / "node")
    cache = open_store(f"{root}/cache")
    for i in range(2):
        prepare_shard(spec, i, cache, node_dir=tmp_path / "node")
    corpus = Corpus(spec, cache, node_dir=tmp_path / "node")
    assert [len(corpus.documents(r)) for r in range(6)] == [1] * 6
    # On the node: the file of rows, which has been read, and the shards, in use until nobody has them mapped.
    node = cache_at(tmp_path / "node").folder
    users = {entry.what.removeprefix(f"{root}/").partition("/")[0]: entry.users for entry in node.survey()}
    assert users == {"set": 0, "cache": 1}
    del corpus
    gc.collect()
    assert [entry.users for entry in node.survey()] == [0, 0, 0]
    with pytest.raises(DataError, match=r"There is no object s3://.*/no\.jsonl"):
        keys_of(data_of(Source(path=f"{root}/no.jsonl")), tokenizer, tmp_path)


def test_real_conversations(tmp_path: Path) -> None:
    """Many turns, languages and lengths: every answer comes back whole, once and in order."""
    template, bos, eos, special = FAMILIES["llama3"]
    tokenizer = ChatTokenizer(byte_tokenizer(template, bos=bos, eos=eos, special=special))
    path = shared_data("sft_oasst") / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    _, corpus = corpus_of(data_of(path, max_length=10**6, shard_rows=20), tokenizer, tmp_path)
    for number, row in enumerate(rows):
        (document,) = corpus.documents(number)
        sample = corpus.sample(document)
        answers = [m["content"].strip() + "<|eot_id|>" for m in row["messages"] if m["role"] == "assistant"]
        assert tokenizer.tokenizer.decode(sample.ids[sample.trained]) == "".join(answers)
