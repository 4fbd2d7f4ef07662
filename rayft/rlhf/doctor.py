"""`rayft doctor`: on the user's own model, prompts, rewards and cluster, the equalities that learning from rewards rests on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from rich.console import Console
from rich.markup import escape

from rayft.data.formats import Conversation, PromptCompletion, Row
from rayft.data.template import ChatTokenizer
from rayft.errors import JobError
from rayft.generate.prompts import PROBE, stop_token_ids
from rayft.model.files import load_tokenizer
from rayft.rlhf.experience import Columns, experience, score_with_rules, weights_of
from rayft.rlhf.layout import MiniBatch, lay_out
from rayft.rlhf.plan import RlPrepared, prepare
from rayft.rlhf.pool import OtherWeights
from rayft.rlhf.roles import Roles
from rayft.rlhf.rollout import Rollout
from rayft.spec import Job
from rayft.train.cluster import connect, refuse_impossible
from rayft.train.recorder import start_recorder

#: A step of the job at most this large is looked at.
PROMPTS, GENERATIONS, NEW_TOKENS = 8, 4, 64

#: Bounds of log-probabilities that must agree: the largest difference in fp32; in bf16 the mean, since single tokens differ by
#: up to a bit of the largest logit.
FP32_LARGEST, BF16_MEAN = 1e-4, 2e-2

#: Mean difference of probabilities between engine and trainer above which training is known to suffer.
ENGINE_MEAN = 1e-2

INVARIANT = (
    "vLLM promises all only in its batch-invariant mode, VLLM_BATCH_INVARIANT=1 in the engines' environment"
)


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what came out, whether it holds."""

    name: str
    result: str
    holds: bool


def doctor(job: Job, console: Console | None = None) -> int:
    """Print a line for every equality; returns 0, or JobError's exit code if one does not hold. Trains nothing and leaves nothing
    behind."""
    if not job.reinforced:
        raise JobError(
            f"`rayft doctor` looks at jobs that learn from rewards; this one has method {job.method}.",
            "Use `rayft check` for its data and `rayft plan` for its memory.",
        )
    console = console or Console()
    job = smaller(job)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="rayft-doctor-") as folder:
        for finding in examine(job, f"file://{folder}/run", console):
            failed += not finding.holds
            mark = "[green]ok  [/]" if finding.holds else "[red]FAIL[/]"
            console.print(f"{mark} {escape(finding.name)}: {escape(finding.result)}", highlight=False)
    if failed:
        console.print(f"{failed} of these do not hold; what the job would learn is not what it says.")
    return JobError.code if failed else 0


def smaller(job: Job) -> Job:
    """The job with one small update a step."""
    rl, rollout = job.rl, job.rollout
    generations = min(rl.num_generations or 1, GENERATIONS)
    return job.model_copy(
        update={
            "train": job.train.model_copy(
                update={"global_batch_size": min(job.train.global_batch_size or 1, PROMPTS), "max_steps": 1}
            ),
            "rl": rl.model_copy(
                update={
                    "num_generations": generations,
                    "num_epochs": 1,
                    "num_mini_batches": 1,
                    "truncated": "score",
                }
            ),
            "rollout": rollout.model_copy(
                update={"max_new_tokens": min(rollout.max_new_tokens, NEW_TOKENS), "lag": 0}
            ),
        }
    )


def examine(job: Job, run_uri: str, console: Console) -> Iterator[Finding]:
    """The findings, one by one as they are made."""
    connect(job.cluster)
    refuse_impossible(job.cluster)
    prepared = prepare(job, run_uri, {}, console.print)
    recorder = start_recorder(job, run_uri, {}, 0)
    roles = Roles(prepared.plan, recorder, console.print)
    try:
        # No attempt at a run: nothing is saved, so other nodes need not reach the folder.
        roles.begin(0, None)
        yield from Examination(prepared, roles).findings()
    finally:
        roles.close()
        ray.kill(recorder)


def end_of_turn(chat: ChatTokenizer, content: Any) -> Finding:
    """Whether what ends an answer to a prompt in training ends one when it is drawn."""
    if isinstance(content, str):
        row: Row = PromptCompletion(content, PROBE)
    else:
        messages = [*content, {"role": "assistant", "content": PROBE}]
        row = Conversation(messages, None, [None] * len(messages), completion_from=len(content))
    [sample] = chat.encode(row)
    last = int(sample.ids[sample.trained][-1])
    stops = sorted(stop_token_ids(chat.tokenizer))
    shown = ", ".join(repr(chat.tokenizer.decode([token])) for token in stops) or "nothing"
    name = repr(chat.tokenizer.decode([last]))
    if last in stops:
        return Finding("answers can end", f"by {shown}; in training they end with {name}", True)
    return Finding(
        "answers can end", f"in training with {name}, but only {shown} ends one that is drawn", False
    )


class Examination:
    """One small step, looked at from all sides."""

    def __init__(self, prepared: RlPrepared, roles: Roles) -> None:
        self.prepared, self.plan, self.job, self.roles = prepared, prepared.plan, prepared.plan.job, roles
        self.exact = self.job.train.precision == "fp32"

    def findings(self) -> Iterator[Finding]:
        """Everything, in the order of a step."""
        prompts = self.prepared.prompts.take(0, self.job.train.global_batch_size or 1).prompts
        tokenizer = load_tokenizer(self.prepared.files, self.job.model)
        yield end_of_turn(ChatTokenizer(tokenizer), prompts[0].content)
        weights = self._weights()
        yield weights
        if not weights.holds:
            return  # what such engines say means nothing
        self.rollouts = self.roles.generate(prompts)
        yield self._again(self.roles.generate(prompts))
        self.layout = self._layout(self.job)
        old = self._logprobs(self.layout, self.plan.packed)
        yield self._engine(old)
        yield from self._invariance(old)
        yield from self._reference(old)
        yield from self._rewards()
        yield self._first_update(old)

    def _layout(
        self, job: Job, ranks: int | None = None, packed: bool | None = None, shared: bool | None = None
    ) -> list[MiniBatch]:
        lengths = [rollout.length for rollout in self.rollouts]
        size = len(self.roles.policy)
        packed = self.plan.packed if packed is None else packed
        shared = packed and self.plan.shared if shared is None else shared
        prompts = [len(rollout.prompt.ids) for rollout in self.rollouts] if shared else None
        made = lay_out(lengths, job, ranks=ranks or size, packed=packed, step=0, prompts=prompts)
        if ranks is None:
            return made
        nothing: list[list[int]] = [[] for _ in made[0].ranks[0]]
        return [replace(batch, ranks=[*batch.ranks, *[nothing] * (size - ranks)]) for batch in made]

    def _logprobs(self, layout: list[MiniBatch], packed: bool) -> list[np.ndarray]:
        self.roles.take(self.rollouts, layout, packed=packed)
        return self.roles.old_logprobs(len(self.rollouts))

    def _weights(self) -> Finding:
        try:
            took = self.roles.sync(0)
        except OtherWeights as error:
            return Finding("weights of the engines", error.message, False)
        if not took:
            return Finding("weights of the engine", "the policy's own tensors", True)
        size = f"{took['bytes'] / 1e6:.1f} MB in {took['buckets']:.0f} buckets"
        return Finding("weights of the engines", f"{size}, every checksum as sent", True)

    def _again(self, again: Sequence[Rollout]) -> Finding:
        """Work that is lost with an engine is given to another, which must write the same answers for the run to stay what it was."""
        name, pairs = "answers drawn again", list(zip(self.rollouts, again, strict=True))
        same = [(a.logprobs, b.logprobs) for a, b in pairs if a.ids == b.ids]
        gap = max((np.abs(np.subtract(a, b)).max(initial=0) for a, b in same), default=0)
        result = f"{len(same)} of {len(pairs)} are the same, their log-probabilities within {gap:g}"
        holds = len(same) == len(pairs) and bool(gap == 0)
        if not holds and self.job.rollout.engine == "vllm":
            # It promises no more without that mode, which not every device has.
            return Finding(name, f"{result} ({INVARIANT})", True)
        return Finding(name, result, holds)

    def _engine(self, old: Sequence[np.ndarray]) -> Finding:
        drawn = [np.asarray(r.logprobs) for r in self.rollouts]
        gap = np.concatenate([np.abs(np.exp(o) - np.exp(d)) for o, d in zip(old, drawn, strict=True)])
        result = f"mean |Δp| {gap.mean():.1e}, largest {gap.max():.1e} over {len(gap)} tokens (mean up to {ENGINE_MEAN:g})"
        return Finding("engine against trainer", result, bool(gap.mean() <= ENGINE_MEAN))

    def _invariance(self, old: Sequence[np.ndarray]) -> Iterator[Finding]:
        one = self.job.model_copy(update={"train": self.job.train.model_copy(update={"micro_batch_size": 1})})
        yield self._equal(
            "micro-batches of one row", old, self._logprobs(self._layout(one), self.plan.packed)
        )
        if self.plan.shared:
            whole = self._layout(self.job, shared=False)
            yield self._equal("each answer with its prompt", old, self._logprobs(whole, True))
        if self.plan.packed:
            padded = self._layout(self.job, packed=False)
            yield self._equal("padding instead of packing", old, self._logprobs(padded, False))
        if len(self.roles.policy) > 1:
            alone = self._layout(self.job, ranks=1)
            yield self._equal("one rank instead of all", old, self._logprobs(alone, self.plan.packed))

    def _equal(self, name: str, old: Sequence[np.ndarray], new: Sequence[np.ndarray]) -> Finding:
        gap = np.concatenate([np.abs(a - b) for a, b in zip(old, new, strict=True)])
        found, bound, word = (
            (gap.max(), FP32_LARGEST, "largest") if self.exact else (gap.mean(), BF16_MEAN, "mean")
        )
        return Finding(
            f"log-probabilities: {name}", f"{word} |Δ| {found:.1e} (up to {bound:g})", bool(found <= bound)
        )

    def _reference(self, old: Sequence[np.ndarray]) -> Iterator[Finding]:
        self.roles.take(self.rollouts, self.layout)
        self.reference = self.roles.reference_logprobs(len(self.rollouts))
        if self.reference is None:
            return
        gap = max(float(np.abs(a - b).max()) for a, b in zip(old, self.reference, strict=True))
        yield Finding("reference at the start", f"largest |Δ| to the policy {gap:g} (must be 0)", gap == 0)

    def _rewards(self) -> Iterator[Finding]:
        self.scores_S, together = self.roles.score(self.rollouts)
        few = self.rollouts[:4]
        alone = [self.roles.score([rollout])[1] for rollout in few]
        for source in self.job.rewards:
            whole = together[source.name][: len(few)]
            single = np.array([scores[source.name][0] for scores in alone])
            gap = float(np.abs(whole - single).max())
            bound = 1e-4 if source.type == "function" else 2e-2 * max(1.0, float(np.abs(whole).max()))
            spread = f"{together[source.name].mean():.3g} ± {together[source.name].std():.3g}"
            result = f"{spread}; one answer alone against all together |Δ| {gap:.1e} (up to {bound:.1e})"
            yield Finding(f"reward {source.name}", result, gap <= bound)

    def _first_update(self, old: Sequence[np.ndarray]) -> Finding:
        """Learning rate 0: looked at, not taken."""
        count, kl = len(self.rollouts), self.job.rl.kl_coef or 0.0
        columns, _ = self._columns(old, self.roles.values(count), kl)
        result = self.roles.update_policy(0, columns, 0.0, kl)
        total = float(sum(weight.sum() for weight in columns["weights"]))
        ratio, moved = result.metrics["ratio"] / total, result.metrics["moved"] / total
        holds = abs(ratio - 1) < 1e-6 and moved == 0
        words = f"ratio {ratio:.7f} (must be 1), KL to the policy that drew {moved:g} (must be 0), gradient norm {result.grad_norm:.3g}"
        return Finding("first update", words, holds)

    def _columns(
        self, old: Sequence[np.ndarray], values: Sequence[np.ndarray] | None, kl: float
    ) -> tuple[Columns, dict[str, float]]:
        scores_S = score_with_rules(self.rollouts, self.scores_S, self.job)
        columns, metrics = experience(self.rollouts, scores_S, old, self.reference, values, self.job, kl)
        columns["weights"] = weights_of(self.rollouts, self.layout, self.job)
        return columns, metrics
