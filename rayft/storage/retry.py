"""Bounded retries with exponential backoff and jitter."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from rayft.errors import StorageError

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """How long a storage operation is tried: at most `attempts` times, and no retry starts after `total_s` seconds."""

    attempts: int = 8
    total_s: float = 120.0
    base_s: float = 0.25
    cap_s: float = 10.0

    def delay_s(self, attempt: int) -> float:
        """Pause after failed attempt number `attempt` (from 1): doubling, capped, with jitter of half its size."""
        return min(self.cap_s, self.base_s * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)


def with_retries(
    operation: str,
    call: Callable[[int], T],
    *,
    fatal: Callable[[BaseException, str], BaseException | None],
    policy: RetryPolicy,
    describe: Callable[[BaseException], str],
) -> T:
    """Run `call(attempt)` until it returns; attempts count from 1.

    `fatal(error, operation)` returns what to raise where no retry can help, or None where one can. Raises
    `StorageError` with the last error when the policy is exhausted.
    """
    start = time.monotonic()
    attempt = 1
    while True:
        try:
            return call(attempt)
        except Exception as error:
            verdict = fatal(error, operation)
            if verdict is error:
                raise
            if verdict is not None:
                raise verdict from error
            delay_s = policy.delay_s(attempt)
            spent_s = time.monotonic() - start
            if attempt >= policy.attempts or spent_s + delay_s > policy.total_s:
                raise StorageError(
                    f"{operation} failed {attempt} times within {spent_s:.0f} s, at last with {describe(error)}.",
                    "Check that the storage is up and reachable from here, then start again: what was committed is kept.",
                ) from error
        time.sleep(delay_s)
        attempt += 1
