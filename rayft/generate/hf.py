"""The engine over a transformers model in this process; on several ranks, each does its own rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rayft.data.template import Sample
from rayft.data.tensors import pack_tensors, pad_tensors
from rayft.errors import DataError
from rayft.generate.attention import packed_generation, packed_scoring
from rayft.generate.decode import NOBODY, Choice, Ends, decode, greedy, rows_of_seed, sampling
from rayft.generate.engine import Drawn, Scored, Sync
from rayft.generate.prompts import stop_token_ids
from rayft.model.head import NllHead, causal_model, forward_logprobs, install_nll_head

#: Tokens, padding included, that are read at a time: what activations cost grows with them.
MAX_TOKENS = 8192
#: Counted tokens whose logits exist at a time while scoring.
CHUNK = 512


class TransformersEngine:
    """Generates and scores with `model`, which may be wrapped (peft) or sharded (ZeRO-3).

    batch_size: rows at a time. sync: given when the model is sharded over ranks; every rank then has to make the
    same calls in the same order (with any number of rows, also none), and all run equally many forwards.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 16,
        sync: Sync | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.batch_size = batch_size
        self.sync = sync
        inner = causal_model(model)
        self.config = inner.config
        self.stop_ids = stop_token_ids(tokenizer, inner.generation_config)
        if not any(isinstance(module, NllHead) for module in model.modules()):
            install_nll_head(model, CHUNK)

    @property
    def context(self) -> int | None:
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """See `Engine.generate`. Raises DataError for an empty prompt or one beyond the model's context."""
        self._check([len(prompt) for prompt in prompts], max_new_tokens)
        choose = sampling(temperature, top_p, rows_of_seed(seed)) if temperature > 0 else greedy
        return self._answers(prompts, choose, max_new_tokens)

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop: Sequence[str] = (),
    ) -> list[Drawn]:
        """Sample an answer to each prompt with its own seed. Raises DataError as `generate` does.

        stop: texts that end an answer too; the token that completes one is its last.

        The same prompts in the same call give the same tokens to the last bit; what an answer is does not depend on the
        others' seeds.
        """
        self._check([len(prompt) for prompt in prompts], max_new_tokens)
        logprobs: list[list[float]] = [[] for _ in prompts]

        def record(rows: Sequence[int], drawn: list[float]) -> None:
            for row, logprob in zip(rows, drawn, strict=True):
                if row != NOBODY:
                    logprobs[row].append(logprob)

        choose = sampling(temperature, top_p, seeds.__getitem__, record, top_k=top_k)
        ends = StopTexts(self.tokenizer, stop) if stop else None
        answers = self._answers(prompts, choose, max_new_tokens, ends)
        stopped = ends.rows if ends else frozenset[int]()
        return [
            Drawn(ids, own, ids[-1] in self.stop_ids or row in stopped)
            for row, (ids, own) in enumerate(zip(answers, logprobs, strict=True))
        ]

    def _answers(
        self,
        prompts: Sequence[Sequence[int]],
        choose: Choice,
        max_new_tokens: int,
        ends: Ends | None = None,
    ) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        batches = like_lengths([len(prompt) for prompt in prompts], self.batch_size)
        with evaluating(self.model), packed_generation(self.model) as packed:
            for rows in in_step(batches, self.sync):
                steps = decode(
                    self.model,
                    [prompts[row] for row in rows],
                    choose,
                    rows=rows,
                    stop_ids=self.stop_ids,
                    max_new_tokens=max_new_tokens,
                    packed=packed,
                    ends=ends,
                    sync=self.sync,
                )
                for step in steps:
                    for row, token in step:
                        answers[row].append(token)
        return answers

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[int]:
        """Tokens of one answer as they come, without the one that ends it."""
        self._check([len(prompt)], max_new_tokens)
        choose = sampling(temperature, top_p, rows_of_seed(seed)) if temperature > 0 else greedy
        with evaluating(self.model), packed_generation(self.model) as packed:
            for [(_, token)] in decode(
                self.model,
                [prompt],
                choose,
                rows=[0],
                stop_ids=self.stop_ids,
                max_new_tokens=max_new_tokens,
                packed=packed,
                sync=self.sync,
            ):
                if token not in self.stop_ids:
                    yield token

    @torch.no_grad()
    def score(self, sequences: Sequence[Scored]) -> list[tuple[float, int]]:
        """See `Engine.score`. Raises DataError for a sequence beyond the model's context."""
        if any(counted[0] for _, counted in sequences):
            raise ValueError("the first token of a sequence has no log-probability and cannot count")
        lengths = [len(ids) for ids, _ in sequences]
        self._check(lengths, 0)
        device = next(self.model.parameters()).device
        results: list[tuple[float, int]] = [(0.0, 0)] * len(sequences)
        with evaluating(self.model), packed_scoring(self.model) as packed:
            for rows in in_step(like_lengths(lengths, self.batch_size), self.sync):
                samples = [
                    Sample(np.array(ids), np.array(counted)) for ids, counted in (sequences[r] for r in rows)
                ]
                batch = pack_tensors(samples) if packed else pad_tensors(samples, pad_id=0)
                found = forward_logprobs(self.model, {name: x.to(device) for name, x in batch.items()})
                counts = [int(sample.trained.sum()) for sample in samples]
                for row, part in zip(rows, found.double().split(counts) if rows else (), strict=True):
                    results[row] = (float(part.sum()), len(part))
        return results

    def _check(self, lengths: Sequence[int], new_tokens: int) -> None:
        for row, length in enumerate(lengths):
            if length == 0:
                raise DataError(f"Row {row + 1} given to the model holds no token.", "Leave out empty rows.")
            if self.context and length + new_tokens > self.context:
                raise DataError(
                    f"Row {row + 1} has {length} tokens and {new_tokens} to be generated; the model's context is {self.context}.",
                    "Shorten it, or lower max_new_tokens.",
                )


class StopTexts:
    """Ends rows whose answers hold one of some texts. rows: those that it ended."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self._tokenizer, self._texts = tokenizer, texts
        # A text of n bytes lies within the last n tokens and the one that completes it.
        self._tail = 1 + max(len(text.encode()) for text in texts)
        self._ids: dict[int, list[int]] = {}
        self.rows: set[int] = set()

    def __call__(self, row: int, token: int) -> bool:
        ids = self._ids.setdefault(row, [])
        ids.append(token)
        written = str(self._tokenizer.decode(ids[-self._tail :], skip_special_tokens=True))
        if any(text in written for text in self._texts):
            self.rows.add(row)
            return True
        return False


def like_lengths(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Rows of like length together, at most `batch_size` rows and (but for single rows) MAX_TOKENS tokens."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if batches and len(batches[-1]) < min(batch_size, MAX_TOKENS // max(lengths[row], 1)):
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def in_step(batches: Sequence[list[int]], sync: Sync | None) -> Iterator[list[int]]:
    """The batches, and with `sync` as many empty ones after them as the rank with most batches has more."""
    left = deque(batches)
    while sync(bool(left)) if sync else left:
        yield left.popleft() if left else []


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and checkpointing off; afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
