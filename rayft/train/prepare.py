"""Decide, once and before any worker starts, what the run is: model, ZeRO stage, packing, tokenised data, steps."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from rayft.data.cache import CacheSpec, ShardInfo, plan_cache, prepare_shard, refuse_empty
from rayft.data.contradictions import refuse_contradictions
from rayft.data.corpus import Corpus
from rayft.data.formats import layouts_of
from rayft.data.order import Order
from rayft.data.step import plan_step
from rayft.data.template import ChatTokenizer
from rayft.errors import JobError, RayftError, WorkerError
from rayft.model.adapter_info import adapter_folder, base_of, check_adapter
from rayft.model.families import can_pack
from rayft.model.files import ModelFiles, job_files, load_config, load_tokenizer, resolve_model
from rayft.plan.choose import choose_stage, scorer_architectures
from rayft.spec import Job, Model, RewardSource
from rayft.storage import node_cache_dir, open_store
from rayft.train.cluster import reported_gpu
from rayft.train.failures import as_rayft_error
from rayft.train.group import RunPlan

#: Tokenising a shard of a few thousand rows takes seconds; a task that is silent for this long is lost.
PREPARE_TIMEOUT_S = 1800.0
TASK_RETRIES = 3


@dataclass(frozen=True)
class Prepared:
    """What preparing found out.

    plan: of the run. files: of the model. shards: those still being made. memory: the memory plan as fields of an event.
    """

    plan: RunPlan
    files: ModelFiles
    shards: Shards
    memory: dict[str, Any]

    def origin(self) -> dict[str, Any]:
        """Hashes of what the run is made from, for `lineage.json`."""
        spec = self.plan.train_spec
        return {
            "model": {"source": self.files.source, "identity": self.files.identity},
            "data": {
                "identity": spec.key,
                "rows": spec.rows,
                "sources": [source.path for source in spec.sources],
            },
            "tokenizer_and_template": spec.tokenizer.identity,
        }


class Shards:
    """Tokenising tasks on the cluster. They ask for no CPU of Ray's: training may hold all of them already.

    A single shard is made right here: a task's process takes longer to start than a few thousand rows to tokenise.
    """

    def __init__(self, spec: CacheSpec, cache_uri: str, order: list[int], at_once: int) -> None:
        self.spec, self.cache_uri = spec, cache_uri
        self.infos: dict[int, ShardInfo] = {}
        self._waiting = list(reversed(order))
        self._running: dict[Any, int] = {}
        self._at_once = at_once
        if len(order) == 1:
            self._waiting.clear()
            self.infos[order[0]] = _prepare(spec, order[0], cache_uri)
            return
        self._spec_ref = ray.put(spec)
        self.advance(0)

    @property
    def done(self) -> bool:
        return not self._waiting and not self._running

    def advance(self, timeout_s: float) -> None:
        """Start tasks while there is room, collect finished ones for up to `timeout_s`. Raises what a task raised."""
        task = ray.remote(_prepare).options(num_cpus=0, max_retries=TASK_RETRIES)
        while self._waiting and len(self._running) < self._at_once:
            index = self._waiting.pop()
            self._running[task.remote(self._spec_ref, index, self.cache_uri)] = index
        if not self._running:
            return
        tasks = list(self._running)
        ready, _ = ray.wait(tasks, timeout=timeout_s)
        ready, _ = ray.wait(tasks, num_returns=len(tasks), timeout=0) if ready else ([], [])
        for ref in ready:
            self.infos[self._running.pop(ref)] = _result(ref)

    def refuse_empty(self) -> None:
        """Once all shards are there, raise DataError for a source none of whose rows is left."""
        if self.done:
            refuse_empty(self.spec, [self.infos[i] for i in range(len(self.spec.shards))])

    def idle(self) -> bool:
        """Whether no task runs. After one has failed no other is started."""
        if self._running:
            _, running = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
            self._running = {ref: self._running[ref] for ref in running}
        return not self._running

    def wait(self, count: int | None = None) -> None:
        """Wait until `count` shards (all by default) are there. Raises WorkerError if nothing happens for too long."""
        wanted = len(self.spec.shards) if count is None else min(count, len(self.spec.shards))
        last, seen = time.monotonic(), -1
        while len(self.infos) < wanted:
            self.advance(1.0)
            if len(self.infos) != seen:
                last, seen = time.monotonic(), len(self.infos)
            if time.monotonic() - last > PREPARE_TIMEOUT_S:
                raise WorkerError(
                    f"No shard of the tokenised data was finished for {PREPARE_TIMEOUT_S:.0f} s ({seen} of {wanted} are there).",
                    "Look at the cluster's log for the tasks named _prepare.",
                )


def prepare(
    job: Job, run_uri: str, cache_uri: str, owner: dict[str, Any], say: Callable[[str], None]
) -> Prepared:
    """Resolve the model, tokenise what the first steps need, and fix every decision of the run."""
    job = with_absolute_paths(job)
    node_dir = node_cache_dir()
    files = job_files(job, node_dir)
    config = load_config(files, job.model)
    packed = decide_packing(job, config)
    stage, memory = decide_stage(job, files)
    tokenizer = ChatTokenizer(load_tokenizer(files, job.model), job.data.loss_on)
    began = time.monotonic()
    look = functools.partial(
        plan_cache, data=job.data, tokenizer=tokenizer, node_dir=node_dir, allowed=layouts_of(job)
    )
    spec = look(job.data.train)
    eval_spec = look(job.data.eval) if job.data.eval else None
    order = Order.of(spec, job.seed)
    at_once = max(1, int(ray.cluster_resources().get("CPU", 1)))
    shards = Shards(spec, cache_uri, _shard_order(spec, order), at_once)
    end = None if job.train.max_steps else math.ceil(job.train.num_train_epochs * order.epoch_rows())
    if spec.compares or (job.train.tokens_per_step and end is not None):
        # Rows may contradict each other wherever they stand; or how many steps there are depends on every row's length.
        shards.wait()
    else:
        shards.wait(count=1)
    shards.refuse_empty()
    if eval_spec is not None:
        eval_shards = Shards(eval_spec, cache_uri, list(range(len(eval_spec.shards))), at_once)
        eval_shards.wait()
        refuse_empty(eval_spec, [eval_shards.infos[i] for i in range(len(eval_spec.shards))])
    if spec.compares and job.data.contradictions == "error":
        corpus = Corpus(spec, open_store(cache_uri), node_dir=node_dir)
        refuse_contradictions(spec, corpus, node_dir=node_dir)
    say(f"data: {describe(shards.infos.values(), spec)} in {time.monotonic() - began:.1f} s")
    total = _total_steps(job, spec, order, cache_uri, packed, end)
    every = job.checkpoint.every_steps or max(1, min(500, total // 10))
    plan = RunPlan(job, run_uri, owner, stage, packed, spec, eval_spec, cache_uri, total, end, every)
    return Prepared(plan, files, shards, memory)


def with_absolute_paths(job: Job) -> Job:
    """The job with paths that exist here made absolute: workers run in folders of their own.

    The run folder keeps the paths as they were written, so that a moved checkout still is the same job.
    """

    def absolute(path: str | None) -> str | None:
        return str(Path(path).absolute()) if path and Path(path).exists() else path

    model = job.model.model_copy(
        update={name: absolute(getattr(job.model, name)) for name in ("path", "tokenizer", "chat_template")}
    )
    data = job.data.model_copy(
        update={
            name: [s.model_copy(update={"path": absolute(s.path)}) for s in getattr(job.data, name)]
            for name in ("train", "eval")
        }
    )
    suites = [
        s.model_copy(update={"path": absolute(s.path), "schema_path": absolute(s.schema_path)})
        for s in job.eval.suites
    ]
    rewards = [
        source.model_copy(update={"path": _absolute_reward(source, absolute)}) for source in job.rewards
    ]
    evaluation = job.eval.model_copy(update={"suites": suites})
    return job.model_copy(update={"model": model, "data": data, "eval": evaluation, "rewards": rewards})


def _absolute_reward(source: RewardSource, absolute: Callable[[str], str | None]) -> str:
    if source.type == "model":
        return absolute(source.path) or source.path
    file, _, function = source.path.rpartition(":")
    return f"{absolute(file)}:{function}" if file.endswith(".py") else source.path


def decide_packing(job: Job, config: Any) -> bool:
    """Whether documents share a row. Raises JobError where packing is asked for a family nobody proved it for."""
    possible, reason = can_pack(config)
    if job.model.attention not in ("auto", "documents"):
        possible, reason = False, f"model.attention {job.model.attention} does not keep documents apart"
    if job.data.packing is True and not possible:
        raise JobError(
            f"data.packing: {reason}.",
            "Set data.packing to false, or to auto to pack only where it is exact.",
        )
    return possible and job.data.packing is not False


def decide_stage(job: Job, files: ModelFiles) -> tuple[int, dict[str, Any]]:
    """The ZeRO stage (the job's, or the lowest that fits by the memory plan), and the plan for the run log."""
    try:
        gpu = reported_gpu() if job.cluster.gpus_per_worker and ray.is_initialized() else None
        scorers = scorer_architectures(reward_model_folders(job))
        choice = choose_stage(job, files.folder, gpu=gpu, scorers=scorers)
    except JobError as error:
        # Only `auto` depends on the plan; a model that it does not know can be trained at a stage the job names.
        if job.zero.stage == "auto":
            raise
        check_adapter(job.adapter, job.zero.stage)
        return job.zero.stage, {"message": f"ZeRO stage {job.zero.stage}; no memory plan: {error.message}"}
    check_adapter(job.adapter, choice.stage)
    terms = {name: round(size / 1e9, 4) for name, size in choice.plan.terms().items()}
    message = f"ZeRO stage {choice.stage}: {choice.reason}"
    return choice.stage, {"message": message, "stage": choice.stage, "memory_terms_gb": terms}


def reward_model_folders(job: Job) -> list[tuple[str, Path | None]]:
    """The path of each reward model as the job has it, and a folder with its body's config.json, fetched without weights; None
    where there is none (the role says so when it loads)."""
    found: list[tuple[str, Path | None]] = []
    for source in job.rewards:
        if source.type == "model":
            try:
                adapter = adapter_folder(source.path, node_cache_dir())
                path = base_of(adapter) if adapter else source.path
                spec = Model.model_validate({"path": path, "random_weights": True})
                found.append((source.path, resolve_model(spec, node_cache_dir()).folder))
            except RayftError:
                found.append((source.path, None))
    return found


def describe(infos: Any, spec: CacheSpec) -> str:
    """One line on what the tokenised rows hold and what was left out."""
    infos = list(infos)
    parts = [
        f"{spec.rows} rows, {sum(i.tokens for i in infos)} tokens of which {sum(i.trained_tokens for i in infos)} are trained"
    ]
    for name, words in (
        ("too_long", "dropped as too long"),
        ("truncated", "truncated"),
        ("answer_cut", "dropped as no answer was left"),
    ):
        if number := sum(getattr(i, name) for i in infos):
            parts.append(f"{number} {words}")
    if len(infos) < len(spec.shards):
        parts.append(
            f"{len(spec.shards) - len(infos)} of {len(spec.shards)} shards are prepared while training runs"
        )
    return ", ".join(parts)


def _shard_order(spec: CacheSpec, order: Order) -> list[int]:
    """Shards in the order in which the first epoch needs them."""
    by_first = {shard.first_id: shard.index for shard in spec.shards}
    return [by_first[first] for first in order.first_shards()]


def _total_steps(
    job: Job, spec: CacheSpec, order: Order, cache_uri: str, packed: bool, end: int | None
) -> int:
    """Optimizer steps until `end`. Of `global_batch_size` rows each there may be fewer, where rows are dropped; of
    `tokens_per_step` they are counted by planning each."""
    if end is None:
        assert job.train.max_steps is not None
        return job.train.max_steps
    if job.train.global_batch_size:
        return math.ceil(end / job.train.global_batch_size)
    corpus = Corpus(spec, open_store(cache_uri), node_dir=node_cache_dir())
    position, steps = 0, 0
    while True:
        plan = plan_step(
            corpus, order, position, data=job.data, train=job.train, packed=packed, world_size=1, end=end
        )
        if plan.rows == 0:
            return steps
        position, steps = plan.next_position, steps + 1


def _prepare(spec: CacheSpec, index: int, cache_uri: str) -> ShardInfo:
    """One tokenising task."""
    return prepare_shard(spec, index, open_store(cache_uri), node_dir=node_cache_dir())


def _result(ref: Any) -> ShardInfo:
    try:
        return ray.get(ref, timeout=60)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RayftError):
            raise cause from None
        raise
    except ray.exceptions.RayError as error:  # its process or node died, four times
        raise as_rayft_error(error, TASK_RETRIES) from error
