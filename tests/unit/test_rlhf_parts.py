"""Prompts, units of work, layouts of updates and experience: pure parts of the loop."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayft.data.template import ChatTokenizer
from rayft.errors import DataError, StorageError
from rayft.rlhf.experience import experience, score_with_rules, uniform_groups, weights_of
from rayft.rlhf.finished import keep_finished, kept_finished, read_values
from rayft.rlhf.layout import Prompts, lay_out, padding_of
from rayft.rlhf.prompts import Prompt, PromptSet
from rayft.rlhf.rollout import Rollout, asked_of, units_of
from rayft.spec import Data, Job, parse_job
from rayft.storage import open_store
from rayft.train.finish import proof_prompts
from tests.tiny import tiny_tokenizer


def job_of(method: str = "grpo", **groups: Any) -> Job:
    values: dict[str, Any] = {
        "name": "run",
        "method": method,
        "model": {"path": "m"},
        "data": {"train": [{"path": "a.jsonl"}], "max_length": 64},
        "rollout": {"max_new_tokens": 8},
        "rewards": [{"name": "r", "type": "function", "path": "r.py:f"}],
        "train": {"global_batch_size": 2},
    }
    return parse_job({**values, **groups})


def prompt_set(folder: Path, rows: list[Any], **groups: Any) -> PromptSet:
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data.model_validate(
        {"train": [{"path": str(folder / "prompts.jsonl"), **groups.pop("source", {})}], **groups}
    )
    return PromptSet(data, ChatTokenizer(tiny_tokenizer()), seed=1, longest=60, node_dir=folder)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_every_prompt_comes_once_an_epoch_wherever_steps_end(tmp_path: Path) -> None:
    """With rows in between that are too long, which are named."""
    rows = [{"prompt": ask(f"{i}" if i % 5 else "x" * 100), "id": i} for i in range(20)]
    prompts = prompt_set(tmp_path, rows)
    straight = prompts.take(0, 16)
    assert sorted(p.row for p in straight.prompts) == [i for i in range(20) if i % 5]
    assert set(straight.too_long) <= {0, 5, 10, 15}
    first = prompts.take(0, 7)
    rest = prompts.take(first.next_position, 9)
    assert first.prompts + rest.prompts == straight.prompts
    assert first.too_long + rest.too_long == straight.too_long
    last = prompts.take(first.next_position, 99, end=20)
    assert len(first.prompts + last.prompts) == 16
    assert prompts.take(20, 5, end=20).prompts == []
    one = straight.prompts[0]
    assert one.columns == {"id": one.row}
    assert tiny_tokenizer().decode(list(one.ids)).endswith(f"{one.row}<|im_end|>\n<|im_start|>assistant\n")


def test_rows_of_sft_give_prompts_and_the_answer_to_compare_with(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "b"}
    told = {"role": "system", "content": "be brief"}
    source = {"source": {"system": "be brief"}}
    rows = [{"messages": [*ask("a"), answer], "id": 7}, {"messages": json.dumps(ask("c"))}]
    first, second = sorted(prompt_set(tmp_path, rows, **source).take(0, 2).prompts, key=lambda p: p.row)
    assert first.content == [told, *ask("a")]
    assert first.columns == {"id": 7, "reference": "b"}
    assert second.content == [told, *ask("c")]
    assert second.columns == {}
    as_prompts = [{"prompt": ask("a"), "id": 7}, {"prompt": ask("c")}]
    same = prompt_set(tmp_path, as_prompts, **source).take(0, 2).prompts
    assert {first.ids, second.ids} == {p.ids for p in same}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": ""}, "missing or empty"),
        ({"text": "a"}, "missing or empty"),
        ({"prompt": [{"role": "user"}]}, "line 1"),
        ({"prompt": [*ask("a"), {"role": "assistant", "content": "b"}]}, "ends with a turn of the assistant"),
        ({"prompt": ask("a"), "completions": ["b"]}, "a column 'completions'"),
        ({"prompt": "a", "prompts": ["b"]}, "a column 'prompts'"),
        ({"messages": [{"role": "user"}]}, "line 1"),
        ({"messages": [{"role": "assistant", "content": "b"}]}, "nothing is asked before the answer"),
        (
            {"messages": [*ask("a"), {"role": "assistant", "content": "b"}], "reference": 1},
            "a column 'reference'",
        ),
        ({"prompt": ask("x" * 100)}, "No prompt of data.train has at most 60 tokens"),
    ],
)
def test_rows_that_are_no_prompts(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        prompt_set(tmp_path, [row]).take(0, 1)


def test_a_prompt_that_is_too_long_ends_the_run_where_the_job_wants_that(tmp_path: Path) -> None:
    prompts = prompt_set(tmp_path, [{"prompt": ask("x" * 100)}], too_long="error")
    with pytest.raises(DataError, match="the prompt has"):
        prompts.take(0, 1)


def test_prompts_of_plain_text_and_renamed_columns(tmp_path: Path) -> None:
    prompts = prompt_set(tmp_path, [{"question": "one two"}], source={"columns": {"prompt": "question"}})
    [prompt] = prompts.take(0, 1).prompts
    assert tiny_tokenizer().decode(list(prompt.ids)) == "one two"
    assert prompt.columns == {}
    [prompt] = prompt_set(tmp_path, [{"prompt": "[ ] one"}]).take(0, 1).prompts
    assert prompt.content == "[ ] one"
    [prompt] = prompt_set(tmp_path, [{"prompt": json.dumps(ask("a"), indent=1)}]).take(0, 1).prompts
    assert prompt.content == ask("a")


def prompt(position: int, length: int = 3) -> Prompt:
    return Prompt(position, position, tuple(range(length)), "text", {})


def test_units_follow_from_the_prompts_alone() -> None:
    prompts = [prompt(i) for i in range(5)]
    units = units_of(asked_of(prompts, 3), 6, seed=7)
    assert [len(unit.prompts) for unit in units] == [6, 6, 3]
    seeds = [seed for unit in units for seed in unit.seeds]
    assert len(set(seeds)) == 15
    assert [seed for unit in units_of(asked_of(prompts[2:4], 3), 6, seed=7) for seed in unit.seeds] == seeds[
        6:12
    ]
    assert units_of(asked_of(prompts, 3), 6, seed=8)[0].seeds != units[0].seeds


def rollouts(lengths: list[int], ended: list[bool] | None = None, generations: int = 2) -> list[Rollout]:
    rng = np.random.default_rng(0)
    return [
        Rollout(
            prompt(i // generations),
            i % generations,
            list(range(n)),
            rng.normal(-2, 0.1, n).tolist(),
            ended[i] if ended else True,
            0,
            "",
        )
        for i, n in enumerate(lengths)
    ]


def test_an_answer_is_trained_as_it_was_drawn() -> None:
    """Token by token, also where its text would be tokenised otherwise, or holds what looks like a special token."""
    end = tiny_tokenizer().eos_token_id
    asked = Prompt(0, 0, (end, 5), ask("x"), {})
    example = Rollout(asked, 0, [end, 97, end, end], [0.0] * 4, True, 0, "a").example
    assert example.ids.tolist() == [end, 5, end, 97, end, end]
    assert example.trained.tolist() == [False] * 2 + [True] * 4


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_answer_is_in_one_mini_batch_and_ranks_have_equally_many_micro_batches(
    ranks: int, packed: bool
) -> None:
    job = job_of(rl={"num_mini_batches": 3}, train={"global_batch_size": 10, "micro_batch_size": 2})
    lengths = np.random.default_rng(0).integers(4, 60, 20).tolist()
    mini_batches = lay_out(lengths, job, ranks=ranks, packed=packed, step=4)
    assert sorted(i for m in mini_batches for i in m.answers) == list(range(20))
    for mini_batch in mini_batches:
        assert len({len(own) for own in mini_batch.ranks}) == 1
        dealt = [i for own in mini_batch.ranks for micro_batch in own for i in micro_batch]
        assert sorted(dealt) == sorted(mini_batch.answers)
    assert lay_out(lengths, job, ranks=ranks, packed=packed, step=4) == mini_batches
    padding = padding_of(mini_batches, lengths, packed=packed)
    assert padding == 0.0 if packed else 0.0 < padding < 1.0
    assert lay_out(lengths, job, ranks=ranks, packed=packed, step=5) != mini_batches


@pytest.mark.parametrize("mini_batches", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_answers_to_a_prompt_lie_beside_each_other(ranks: int, mini_batches: int) -> None:
    """Once each, equally many micro-batches everywhere, none over the capacity but for single answers, and fewer tokens."""
    job = job_of(
        "grpo",
        rl={"num_generations": 4, "num_mini_batches": mini_batches},
        train={"global_batch_size": 5, "micro_batch_size": 2},
    )
    rng = np.random.default_rng(0)
    prompts = np.repeat(rng.integers(5, 30, 5), 4).tolist()
    lengths = [prompt + int(n) for prompt, n in zip(prompts, rng.integers(1, 30, 20), strict=True)]
    made = lay_out(lengths, job, ranks=ranks, packed=True, step=4, prompts=prompts)
    assert sorted(i for m in made for i in m.answers) == list(range(20))
    parted = [
        prompt for prompt in range(5) if sum(any(i // 4 == prompt for i in m.answers) for m in made) > 1
    ]
    assert len(parted) < mini_batches, "more prompts are parted than lie over the end of a mini-batch"
    of_prompts = Prompts(lengths, prompts, 4)

    def tokens(micro_batch: list[int]) -> int:
        runs = [list(run) for _, run in itertools.groupby(micro_batch, key=lambda i: i // 4)]
        return sum(of_prompts.size(run) for run in runs)

    for mini_batch in made:
        assert mini_batch.shared
        assert len({len(own) for own in mini_batch.ranks}) == 1
        dealt = [micro_batch for own in mini_batch.ranks for micro_batch in own]
        assert sorted(i for micro_batch in dealt for i in micro_batch) == sorted(mini_batch.answers)
        assert all(tokens(one) <= 2 * job.data.max_length or len(one) == 1 for one in dealt)
        assert sum(map(tokens, dealt)) < sum(lengths[i] for i in mini_batch.answers)


def test_a_prompt_is_parted_where_a_rank_would_have_nothing_to_do() -> None:
    job = job_of("grpo", rl={"num_generations": 8}, train={"global_batch_size": 1})
    [made] = lay_out([15] * 8, job, ranks=2, packed=True, step=0, prompts=[10] * 8)
    assert [sorted(i for one in own for i in one) for own in made.ranks] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_rules_about_length() -> None:
    made = rollouts([8, 2, 7, 8], [False, True, True, True])
    scores = np.ones(4)
    assert score_with_rules(made, scores, job_of()).tolist() == [1, 1, 1, 1]
    penalty = job_of(rl={"truncated": "penalty", "truncated_penalty": -3.0})
    assert score_with_rules(made, scores, penalty).tolist() == [-3, 1, 1, 1]
    assert score_with_rules(made, scores, job_of("dapo", rl={"overlong_buffer": 2})).tolist() == [
        0,
        1,
        0.5,
        0,
    ]
    assert scores.tolist() == [1, 1, 1, 1]


def test_answers_that_were_cut_off_can_be_left_out_of_the_loss() -> None:
    job = job_of("dapo", rl={"truncated": "mask"})
    made = rollouts([4, 2, 3, 1], [False, True, True, True])
    mini_batches = lay_out([7, 5, 6, 4], job, ranks=1, packed=True, step=0)
    weights = weights_of(made, mini_batches, job)
    assert weights[0].tolist() == [0] * 4
    assert weights[1].tolist() == pytest.approx([1 / 6] * 2)


def test_kl_in_the_reward_of_groups_counts_against_the_answer() -> None:
    """RLOO: the answer's whole divergence is taken off its score."""
    made = rollouts([2, 1])
    old = [np.array([-1.0, -1.0]), np.array([-1.0])]
    reference = [np.array([-1.5, -2.0]), np.array([-1.0])]
    job = job_of("rloo", rl={"num_generations": 2})
    columns, metrics = experience(made, np.array([2.0, 1.0]), old, reference, None, job, 0.1)
    advantage = (2.0 - 0.1 * 1.5) - 1.0
    assert columns["advantages"][0].tolist() == pytest.approx([advantage] * 2)
    assert columns["advantages"][1].tolist() == pytest.approx([-advantage])
    assert metrics["kl"] == pytest.approx(0.75)
    assert "reference" not in columns


def test_kl_in_the_loss_goes_to_the_objective() -> None:
    made = rollouts([2, 1])
    old, reference = [np.zeros(2), np.zeros(1)], [np.ones(2), np.ones(1)]
    columns, _ = experience(
        made, np.array([2.0, 1.0]), old, reference, None, job_of(rl={"num_generations": 2}), 0.1
    )
    assert columns["reference"] == reference
    assert sum(columns["advantages"][0]) > 0


def test_a_critic_gives_every_token_its_own_advantage() -> None:
    made = rollouts([3, 1], generations=1)
    old = [np.zeros(3), np.zeros(1)]
    values = [np.full(3, 0.5), np.full(1, 0.5)]
    job = job_of("ppo", rl={"whiten_advantages": False, "gae_lambda": 1.0})
    columns, _ = experience(made, np.array([1.0, 0.0]), old, old, values, job, 0.1)
    assert columns["advantages"][0].tolist() == pytest.approx([0.5] * 3)
    assert columns["returns"][0].tolist() == pytest.approx([1.0] * 3)
    assert columns["advantages"][1].tolist() == pytest.approx([-0.5])


def test_whitening_counts_what_is_trained_on() -> None:
    """Without the answer that was cut off, 1 and 3 have mean 2 and deviation sqrt(2)."""
    made = rollouts([1, 1, 1], [True, True, False], generations=1)
    job = job_of("reinforce++", rl={"truncated": "mask", "kl_coef": 0.0})
    columns, _ = experience(made, np.array([1.0, 3.0, 100.0]), [np.zeros(1)] * 3, None, None, job, 0.0)
    assert [a[0] for a in columns["advantages"][:2]] == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-3)


def test_the_engines_difference_is_weighted_and_measured() -> None:
    made = rollouts([2, 2])
    old = [np.asarray(r.logprobs) + 0.1 for r in made]
    job = job_of("dr_grpo", rl={"num_generations": 2})
    columns, metrics = experience(made, np.array([1.0, 0.0]), old, None, None, job, 0.0)
    assert columns["importance"][0].tolist() == pytest.approx([np.exp(0.1)] * 2)
    assert metrics["engine_gap"] == pytest.approx(0.1)
    assert "kl" not in metrics


@pytest.mark.parametrize(
    ("method", "generations", "asked", "prompts"),
    [
        ("ppo", 1, 64, 32),
        ("ppo", 1, 16, 8),
        ("ppo", 4, 16, 8),
        ("grpo", 8, 16, 4),
        ("grpo", 3, 3, 1),
        ("grpo", 64, 1, 1),
    ],
)
def test_a_unit_is_32_answers_or_half_a_step(method: str, generations: int, asked: int, prompts: int) -> None:
    job = job_of(method, rl={"num_generations": generations}, train={"global_batch_size": asked})
    assert (job.rollout.unit_prompts, job.unit_answers) == (prompts, prompts * generations)
    given = job_of(
        method, rl={"num_generations": generations}, rollout={"max_new_tokens": 8, "unit_prompts": 3}
    )
    assert given.unit_answers == 3 * generations


def test_uniform_groups() -> None:
    job = job_of(rl={"num_generations": 2})
    assert uniform_groups(np.array([1.0, 1.0, 0.0, 1.0]), job).tolist() == [True, False]


def test_finished_answers_belong_to_one_checkpoint(tmp_path: Path) -> None:
    """Of a step and the epoch that wrote it; before the first there is none whose weights could have drawn them."""
    prompts = prompt_set(tmp_path, [{"prompt": ask("a"), "id": 1}])
    [asked] = prompts.take(0, 1).prompts
    rollout = Rollout(asked, 0, [65, 66], [-0.5, -0.25], True, 2, "AB")
    store = open_store(tmp_path / "run")
    keep_finished(store, 2, 3, {(asked.position, 0): rollout})
    assert kept_finished(store, 2, 3, prompts) == {(asked.position, 0): rollout}
    assert kept_finished(store, 2, 4, prompts) == {}
    assert kept_finished(store, 1, 3, prompts) == {}
    key = "rollouts/finished-000002.json.gz"
    for damaged in (store.get(key)[:-9], store.get(key)[:5], b"", b"no gzip"):
        store.put(key, damaged)
        assert kept_finished(store, 2, 3, prompts) == {}, "they are drawn again"
        with pytest.raises(StorageError, match=r"finished-000002\.json\.gz is damaged"):
            read_values(store, key)
    keep_finished(store, 0, 0, {(asked.position, 0): rollout})
    assert kept_finished(store, 0, 0, prompts) == {}


@pytest.mark.parametrize("row", [{"prompt": ask("one two")}, {"messages": ask("one two")}])
def test_a_merged_adapter_is_proved_on_prompts_of_either_kind(row: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    job = job_of(data={"train": [{"path": str(tmp_path / "rows.jsonl")}], "max_length": 64})
    [ids] = proof_prompts(tiny_tokenizer(), job)
    assert "one two" in tiny_tokenizer().decode(ids)
