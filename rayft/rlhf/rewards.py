"""What scores answers: Python functions, reward models and HTTP endpoints, each in an actor of its own."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rayft.errors import DataError, JobError, RayftError
from rayft.rlhf.placement import Spot
from rayft.spec import RewardSource

#: Answers of a request, where the job does not say.
BATCH = 64
#: Longest pause between two tries of a request, in seconds.
PAUSE_S = 30.0


class RewardError(JobError):
    """What scores answers did not give a number for each. Mending it needs no other job, so a retry is no waste."""

    terminal = False


class Scorer(Protocol):
    """Scores answers (text) to prompts (text or messages); columns: the other columns of their rows, a list each."""

    def __call__(
        self, prompts: Sequence[Any], answers: Sequence[str], columns: dict[str, list[Any]]
    ) -> list[float]: ...


class RewardActor:
    """The process of one reward source."""

    def __init__(
        self, spot: Spot, source: RewardSource, precision: str = "bf16", rank: int = 0, size: int = 1
    ) -> None:
        """precision: the job's, which a reward model computes in, whatever node it is on."""
        import torch

        torch.set_num_threads(spot.threads)
        self._source, self._spot = source, spot
        self._dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self._scorer: Scorer | None = None

    def load(self) -> None:
        """Make it ready. Raises JobError where there is no such function or model."""
        if self._source.type == "model":
            self._scorer = ModelScorer(self._source, device=self._spot.device, dtype=self._dtype)
        else:
            made: dict[str, Callable[[RewardSource], Scorer]] = {
                "function": FunctionScorer,
                "http": HttpScorer,
            }
            self._scorer = made[self._source.type](self._source)

    def score(
        self, prompts: Sequence[Any], answers: Sequence[str], columns: dict[str, list[Any]]
    ) -> list[float]:
        """One finite number an answer. Raises JobError for anything else the source gives."""
        assert self._scorer is not None
        return checked(self._scorer(prompts, answers, columns), len(answers), self._source)


class FunctionScorer:
    """A Python function, called as TRL calls reward functions: `f(prompts=…, completions=…, **columns)`."""

    def __init__(self, source: RewardSource) -> None:
        self._source = source
        self._function = load_function(source.path)

    def __call__(self, prompts: Sequence[Any], answers: Sequence[str], columns: dict[str, list[Any]]) -> Any:
        try:
            gave = self._function(prompts=list(prompts), completions=list(answers), **columns)
            return list(gave) if isinstance(gave, Iterable) else gave  # a generator raises only here
        except RayftError:
            raise
        except (Exception, SystemExit) as error:
            at = _line_of(error, self._source.path)
            raise RewardError(
                f"The reward function {self._source.path} raised {type(error).__name__}: {error}{at}.",
                "Mend it; it is called with prompts, completions and the other columns of the rows, each a list.",
            ) from error


class ModelScorer:
    """A model made by `method: reward`; of several heads the mean counts."""

    def __init__(self, source: RewardSource, *, device: str | None = None, dtype: Any = None) -> None:
        """device, dtype: as for `load_score_model`."""
        from rayft.data.template import ChatTokenizer
        from rayft.generate.scores import ScoreEngine, load_score_model

        module, tokenizer = load_score_model(source.path, device=device, dtype=dtype)
        self._engine, self._chat, self._name = ScoreEngine(module), ChatTokenizer(tokenizer), source.name

    def __call__(
        self, prompts: Sequence[Any], answers: Sequence[str], columns: dict[str, list[Any]]
    ) -> list[float]:
        """Scores of the conversations in the reward model's own template; a length beyond its context is refused."""
        from rayft.data.comparisons import Comparison
        from rayft.data.formats import Conversation, PromptCompletion, json_value
        from rayft.data.messages import check_tools

        rows, names = [], [f"answer {number} of the step" for number in range(1, len(answers) + 1)]
        tools_S = columns.get("tools", [None] * len(answers))
        for prompt, answer, given, where in zip(prompts, answers, tools_S, names, strict=True):
            if isinstance(prompt, str):
                rows.append(Comparison((PromptCompletion(prompt, answer),), 0.0))
                continue
            messages = [*prompt, {"role": "assistant", "content": answer}]
            tools = check_tools(json_value(given, "'tools'", where), where)  # which the policy was shown too
            made = Conversation(messages, tools, [None] * len(messages), completion_from=len(prompt))
            rows.append(Comparison((made,), 0.0))
        documents = []
        for encoded in self._chat.encode_batch(rows, names):
            if isinstance(encoded, DataError):
                raise RewardError(
                    f"The reward model {self._name} cannot read an answer: {encoded.message}", encoded.remedy
                )
            documents.append(encoded[0].ids.tolist())
        longest = max(map(len, documents))
        if self._engine.context and longest > self._engine.context:
            raise RewardError(
                f"An answer with its prompt has {longest} tokens for the reward model {self._name}, whose context is "
                f"{self._engine.context}.",
                "Lower data.max_length, or take another reward model.",
            )
        return [sum(heads) / len(heads) for heads in self._engine.rate(documents)]


class HttpScorer:
    """An endpoint: POST {"prompts", "completions", and the rows' other columns} -> {"scores": [number, …]}."""

    def __init__(self, source: RewardSource) -> None:
        self._source = source
        self._tries = tries(source)

    def __call__(
        self, prompts: Sequence[Any], answers: Sequence[str], columns: dict[str, list[Any]]
    ) -> list[float]:
        size, found = self._source.batch_size or BATCH, list[float]()
        for first in range(0, len(answers), size):
            part = slice(first, first + size)
            rows = {name: values[part] for name, values in columns.items()}
            asked = {**rows, "prompts": list(prompts[part]), "completions": list(answers[part])}
            found += self._scores(self._body(asked), len(answers[part]))
        return found

    def _body(self, asked: dict[str, Any]) -> bytes:
        parts = []
        for name, values in asked.items():
            try:
                parts.append(f"{json.dumps(name)}: {json.dumps(values)}")
            except (TypeError, ValueError) as error:
                raise RewardError(
                    f"The column {name!r} cannot be sent to the reward {self._source.name}: {error}.",
                    "Take it out of the rows, or write it as text or numbers.",
                ) from None
        return f"{{{', '.join(parts)}}}".encode()

    def _scores(self, body: bytes, count: int) -> list[float]:
        """Waits between tries 1, 2, 4, … seconds; what the caller made wrong (4xx) is not tried again."""
        import requests

        reason = ""
        for attempt in range(self._tries):
            if attempt:
                time.sleep(min(2.0 ** (attempt - 1), PAUSE_S))
            try:
                answer = requests.post(
                    self._source.path,
                    data=body,
                    headers={"Content-Type": "application/json"},
                    timeout=self._source.timeout_s,
                )
                if answer.ok:
                    return checked(self._list(answer), count, self._source)
                reason = f"it answered {answer.status_code} {answer.reason}"
                if 400 <= answer.status_code < 500 and answer.status_code != 429:
                    break
            except requests.RequestException as error:
                reason = _plain(error)
        raise RewardError(
            f"The reward {self._source.name} at {self._source.path} failed: {reason} "
            f"({attempt + 1} {'try' if attempt == 0 else 'tries'}).",
            "See whether it runs and can be reached from the cluster's nodes; its retries can be raised.",
        )

    def _list(self, answer: Any) -> Any:
        try:
            return answer.json()["scores"]
        except (ValueError, KeyError, TypeError):
            raise RewardError(
                f"The reward {self._source.name} at {self._source.path} answered without a list under `scores`: "
                f"{answer.text[:100]!r}.",
                'It must answer with JSON such as {"scores": [0.5, 1.0]}, one number for each completion.',
            ) from None


def tries(source: RewardSource) -> int:
    """How often a request to an endpoint is made at most."""
    return 1 + (3 if source.retries is None else source.retries)


def longest_wait(source: RewardSource, answers: int) -> float:
    """Seconds after which a source is late with the scores of so many answers: an endpoint has its time-out for each try of each
    request."""
    if source.type != "http":
        return source.timeout_s
    requests = -(-answers // (source.batch_size or BATCH))
    return requests * tries(source) * (source.timeout_s + PAUSE_S) + PAUSE_S


def _plain(error: BaseException) -> str:
    """What went wrong, without the addresses of objects that libraries put around it."""
    inner: Any = error
    while (
        below := getattr(inner, "reason", None) or next(iter(getattr(inner, "args", ())), None)
    ) and isinstance(below, BaseException):
        inner = below
    text = str(inner)
    return text.rpartition(": ")[2] if "object at 0x" in text else text


def checked(scores: Any, count: int, source: RewardSource) -> list[float]:
    """The scores as floats. Raises JobError where they are not one finite number an answer."""
    remedy = "It must return a list with one finite number for each completion."
    try:
        found = [float(score) for score in scores]
    except (TypeError, ValueError):
        raise RewardError(
            f"The reward {source.name} gave {type(scores).__name__}, not numbers.", remedy
        ) from None
    if len(found) != count:
        raise RewardError(f"The reward {source.name} gave {len(found)} scores for {count} answers.", remedy)
    for number, score in enumerate(found):
        if not math.isfinite(score):
            raise RewardError(
                f"The reward {source.name} gave {score} for answer {number + 1} of {count}.", remedy
            )
    return found


def load_function(path: str) -> Callable[..., Any]:
    """The function at `file.py:name` or `module:name`. Raises JobError if there is none."""
    where, _, name = path.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"rayft_reward_{abs(hash(where))}", where)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except Exception as error:
        raise RewardError(
            f"The reward function {path} cannot be loaded: {type(error).__name__}: {error}.",
            "Give `file.py:name` or `module:name` that every node can import.",
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        raise RewardError(f"{where} has no function {name!r}.", "Name one that it has after the colon.")
    return function


def _line_of(error: BaseException, path: str) -> str:
    """Where in the user's file it was raised."""
    file = path.rpartition(":")[0]
    trace, line = error.__traceback__, None
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).name == Path(file).name:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" (line {line})" if line else ""
