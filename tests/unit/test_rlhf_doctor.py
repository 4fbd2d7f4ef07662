"""What `rayft doctor` says of numbers that do not hold; what it measures on a sound job is in `cluster/test_rlhf_doctor.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rayft.data.template import ChatTokenizer
from rayft.learner.learner import StepResult
from rayft.rlhf.doctor import Examination, end_of_turn
from rayft.rlhf.engines import Held
from rayft.rlhf.pool import OtherWeights, refuse_other_bytes
from rayft.rlhf.prompts import Prompt
from rayft.rlhf.rollout import Rollout
from tests.tiny import CHATML, tiny_tokenizer
from tests.unit.test_rlhf_parts import job_of

ASKED = [{"role": "user", "content": "one"}]
LOGPROBS = [np.array([-1.0, -2.0]), np.array([-0.5])]


class Answering:
    """Roles that answer with given numbers."""

    def __init__(self, reference: list[np.ndarray], metrics: dict[str, float]) -> None:
        self.reference, self.metrics = reference, metrics

    def take(self, *_: Any, **__: Any) -> None:
        pass

    def reference_logprobs(self, _: int) -> list[np.ndarray]:
        return self.reference

    def values(self, _: int) -> None:
        return None

    def update_policy(self, *_: Any) -> StepResult:
        return StepResult(0.0, 1.0, True, 1, self.metrics)

    def sync(self, _: int) -> dict[str, float]:
        raise OtherWeights("Engine 1 holds other weights than version 0, which was sent.")


def examination(**answers: Any) -> Examination:
    """Of two answers to one prompt, drawn with the probabilities that the trainer finds."""
    made = object.__new__(Examination)
    prompt = Prompt(0, 0, (1, 2), ASKED, {})
    made.job = job_of(train={"global_batch_size": 1, "precision": "fp32"}, rl={"num_generations": 2})
    made.exact, made.layout, made.scores_S, made.reference = True, [], np.array([0.0, 1.0]), None
    made.rollouts = [
        Rollout(prompt, number, [3] * len(own), own.tolist(), True, 0, "x")
        for number, own in enumerate(LOGPROBS)
    ]
    made.roles = Answering(**{"reference": LOGPROBS, "metrics": {"ratio": 2.0, "moved": 0.0}, **answers})  # type: ignore[assignment]
    return made


def moved(by: float) -> list[np.ndarray]:
    return [LOGPROBS[0] + [0.0, by], LOGPROBS[1]]


@pytest.mark.parametrize(("by", "holds"), [(0.0, True), (5e-5, True), (2e-4, False), (-2e-4, False)])
def test_log_probabilities_that_differ(by: float, holds: bool) -> None:
    assert examination()._equal("packing", LOGPROBS, moved(by)).holds is holds


@pytest.mark.parametrize(("by", "holds"), [(0.0, True), (0.01, True), (0.5, False)])
def test_an_engine_with_other_probabilities(by: float, holds: bool) -> None:
    assert examination()._engine(moved(by)).holds is holds


@pytest.mark.parametrize(("engine", "holds"), [("transformers", False), ("vllm", True)])
def test_answers_that_are_others_when_drawn_again(engine: str, holds: bool) -> None:
    """vLLM promises the same only in a mode that not every device has, so that there it is said and no failure."""
    made = examination()
    made.job = made.job.model_copy(update={"rollout": made.job.rollout.model_copy(update={"engine": engine})})
    same = made._again(made.rollouts)
    assert (same.holds, same.result) == (True, "2 of 2 are the same, their log-probabilities within 0")
    changes: list[tuple[dict[str, Any], str]] = [
        ({"ids": [4]}, "1 of 2 are the same"),
        ({"logprobs": [-0.25]}, "2 of 2 are the same, their log-probabilities within 0.25"),
    ]
    for change, words in changes:
        other = made._again([made.rollouts[0], replace(made.rollouts[1], **change)])
        assert other.holds is holds
        assert words in other.result
        assert ("VLLM_BATCH_INVARIANT" in other.result) is holds


@pytest.mark.parametrize(("by", "holds"), [(0.0, True), (1e-6, False)])
def test_a_reference_that_is_not_the_policy(by: float, holds: bool) -> None:
    [finding] = examination(reference=moved(by))._reference(LOGPROBS)
    assert finding.holds is holds


@pytest.mark.parametrize(
    ("metrics", "holds"),
    [
        ({"ratio": 2.0, "moved": 0.0}, True),
        ({"ratio": 2.001, "moved": 0.0}, False),
        ({"ratio": 2.0, "moved": 1e-3}, False),
    ],
)
def test_a_first_update_that_is_not_where_it_was_drawn(
    metrics: dict[str, float], holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics are sums over the loss's weights, here 2."""
    weights = [np.array([0.5, 0.5]), np.array([1.0])]
    monkeypatch.setattr("rayft.rlhf.doctor.weights_of", lambda *_: weights)
    assert examination(metrics=metrics)._first_update(LOGPROBS).holds is holds


def test_an_engine_that_holds_other_weights() -> None:
    finding = examination()._weights()
    assert not finding.holds
    assert "Engine 1 holds other weights" in finding.result


@pytest.mark.parametrize("held", [["a", "x"], ["a"], ["b", "a"], []])
def test_checksums_that_differ_are_refused(held: list[str]) -> None:
    refuse_other_bytes(0, Held(3, ["a", "b"], {}), ["a", "b"], 3)
    with pytest.raises(OtherWeights, match=r"Engine 1 holds other weights than version 3"):
        refuse_other_bytes(1, Held(3, held, {}), ["a", "b"], 3)


@pytest.mark.parametrize("content", [ASKED, "plain text"])
def test_answers_that_can_end(content: Any) -> None:
    finding = end_of_turn(ChatTokenizer(tiny_tokenizer()), content)
    assert finding.holds
    assert "in training they end with '<|im_end|>'" in finding.result


def test_a_template_whose_turns_end_with_what_ends_no_answer() -> None:
    """Two special tokens at the end of a turn: the model is trained to write both, and stops at the first."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|im_start|><|im_end|>")
    finding = end_of_turn(ChatTokenizer(tokenizer), ASKED)
    assert not finding.holds
    assert finding.result.startswith("in training with '<|im_end|>', but only ")
