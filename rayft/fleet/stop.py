"""`rayft stop`: ask a run to save and end, and stop its submission only if it does not."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape

from rayft.checkpoint.stop import STOP_WAIT_S, request_stop
from rayft.errors import RayftError, WorkerError
from rayft.fleet.attempts import Attempt, attempt_of, last_attempt
from rayft.fleet.client import Client
from rayft.fleet.follow import POLL_S, say_outcome
from rayft.fleet.outcome import RunFolder, outcome_of
from rayft.fleet.owner import login_name


def stop(run: str, address: str | None, *, timeout_s: float, console: Console | None = None) -> int:
    """End a run, with a checkpoint if it answers within `timeout_s`; returns 0 once it has ended."""
    console = console or Console()
    client = Client(address)
    attempt = last_attempt(client, run)
    if not attempt.live:
        _say(f"The run {attempt.run} is not running; {attempt.submission} has ended.", console)
        return 0
    if not attempt.number:
        # A RayJob's: KubeRay starts one anew that ends by itself before its work is done, and leaves one that was stopped.
        _say(f"{attempt.submission} is a RayJob's; stopping its submission, which asks by SIGTERM.", console)
    elif attempt.status == "RUNNING" and ask(attempt, console):
        attempt = wait_for_end(client, attempt, timeout_s)
        if attempt.live:
            _say(f"It has not ended within {timeout_s:.0f} s; stopping its submission.", console)
    if attempt.live:
        client.stop(attempt.submission)
        attempt = wait_for_end(client, attempt, STOP_WAIT_S + 60)
    if attempt.live:
        raise WorkerError(
            f"{attempt.submission} was stopped and is still {attempt.status.lower()}.",
            "Look at the cluster; its head may be lost.",
        )
    say_outcome(attempt, outcome_of(attempt, RunFolder(attempt.run_uri).end_since(attempt.started)), console)
    return 0


def ask(attempt: Attempt, console: Console) -> bool:
    """Leave the wish in the run folder; False where it cannot be written from here."""
    store = RunFolder(attempt.run_uri).store
    try:
        if store is not None:
            request_stop(store, f"rayft stop by {login_name() or 'somebody'}", attempt.submission)
            _say(f"Asked {attempt.submission} to save and end.", console)
            return True
        why = "it is not a folder of this machine"
    except RayftError as error:
        why = error.message
    _say(
        f"The run cannot be asked through {attempt.run_uri} ({why}); stopping its submission, which asks by SIGTERM.",
        console,
    )
    return False


def wait_for_end(client: Client, attempt: Attempt, timeout_s: float) -> Attempt:
    """The attempt once it has ended, or as it is when the time is over."""
    deadline = time.monotonic() + timeout_s
    while attempt.live and time.monotonic() < deadline:
        time.sleep(POLL_S)
        attempt = attempt_of(client.info(attempt.submission)) or attempt
    return attempt


def _say(text: str, console: Console) -> None:
    console.print(escape(text), soft_wrap=True, highlight=False)
