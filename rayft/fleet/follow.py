"""Follow a submitted run to its end: by its status and its run log; what it prints is shown as long as it comes."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape

from rayft.errors import EXIT_CODES, PreemptedError
from rayft.fleet.attempts import Attempt, attempt_of
from rayft.fleet.client import Client, NoAnswer, UnknownSubmission
from rayft.fleet.outcome import Outcome, RunFolder, outcome_of
from rayft.fleet.stream import LogStream
from rayft.report.progress import Progress

POLL_S = 1.0
#: Seconds between two looks at the run log.
LOOK_S = 5.0
#: How long a cluster may be silent before following it is given up.
SILENT_S = 300.0
#: The code of a command that was left with Ctrl-C.
DETACHED = 130


class Follower:
    """One submission, watched until it has ended."""

    def __init__(self, client: Client, attempt: Attempt, console: Console) -> None:
        self._client, self._attempt, self._console = client, attempt, console
        self._folder = RunFolder(attempt.run_uri)
        self._progress = Progress(console, None)
        self._shown_rows = 0
        self._looked = 0.0
        self._stream: LogStream | None = None
        self._told_of_loss = False

    def to_the_end(self) -> Outcome:
        """Wait for the end. Raises NoAnswer where the cluster is gone and the run log knows of no end either."""
        status, silent_since = "", None
        while True:
            try:
                found = attempt_of(self._client.info(self._attempt.submission))
            except NoAnswer as error:
                silent_since = silent_since or time.monotonic()
                if end := self._end_without_cluster(silent_since, error):
                    return end
                time.sleep(POLL_S)
                continue
            silent_since = None
            assert found is not None, "a submission keeps its metadata"
            self._attempt = found
            if found.status != status:
                status = found.status
                self._say(f"{found.submission}: {status.lower()}")
            if not found.live:
                break
            if status == "RUNNING" and self._stream is None:
                self._stream = LogStream(self._client, found.submission, self._write)
            self._show_rows()
            time.sleep(POLL_S)
        if self._stream is not None:
            self._stream.close(timeout_s=5.0)
        return outcome_of(self._attempt, self._folder.end_since(self._attempt.started))

    def _end_without_cluster(self, since: float, error: NoAnswer) -> Outcome | None:
        """What the run log says where the cluster says nothing."""
        silent_s = time.monotonic() - since
        if silent_s == 0 or self._looked + LOOK_S <= time.monotonic():
            self._looked = time.monotonic()
            if end := self._folder.end_since(self._attempt.started):
                self._say("the cluster no longer answers; the run log has the run's end")
                return end
            self._say(f"the cluster does not answer; waiting for it for {SILENT_S - silent_s:.0f} s more")
        if silent_s > SILENT_S:
            raise error
        return None

    def _show_rows(self) -> None:
        """Once the log stream is lost, the rows of the run log."""
        if self._stream is None or not self._stream.lost or time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        rows = self._folder.rows()
        if not self._told_of_loss:
            self._told_of_loss = True
            seen = "what follows is from the run log" if rows is not None else "only the status is left"
            self._say(f"the stream of what the job prints is lost, which does not matter to the job; {seen}")
            started = self._attempt.started or 0.0
            self._shown_rows = sum(row["time"] < started for row in rows or [])
        for row in (rows or [])[self._shown_rows :]:
            self._progress.row(row)
        self._shown_rows = max(self._shown_rows, len(rows or []))

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()

    def _say(self, text: str) -> None:
        self._console.print(escape(text), soft_wrap=True, highlight=False)


def follow(client: Client, attempt: Attempt, console: Console) -> int:
    """Follow to the end; returns the run's own exit code. Ctrl-C leaves the run alone and says how to come back."""
    where = f"--address {client.address}"
    try:
        outcome = Follower(client, attempt, console).to_the_end()
    except KeyboardInterrupt:
        text = (
            f"\n{attempt.submission} goes on without you. Come back: rayft logs {attempt.run} --follow {where}\n"
            f"Or: rayft status {attempt.run} {where}; rayft stop {attempt.run} {where}"
        )
        console.print(escape(text), soft_wrap=True, highlight=False)
        return DETACHED
    except UnknownSubmission:
        outcome = outcome_of(attempt, RunFolder(attempt.run_uri).end_since(attempt.started))
    say_outcome(attempt, outcome, console)
    if outcome.code == PreemptedError.code:
        console.print(f"Go on: rayft resume {attempt.run} {where}", soft_wrap=True, highlight=False)
    return outcome.code


def say_outcome(attempt: Attempt, outcome: Outcome, console: Console) -> None:
    """One line about an end."""
    meaning = EXIT_CODES.get(outcome.code, "no code of rayft's")
    more = "" if outcome.message == meaning else f": {outcome.message}"
    text = f"{attempt.submission} ended with code {outcome.code}, {meaning}{more}"
    console.print(escape(text), soft_wrap=True, highlight=False)
