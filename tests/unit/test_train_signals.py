"""A signal asks a training run to save, and ends one that does not train, with the code of a preempted run."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from rayft.errors import DataError, PreemptedError
from rayft.train.fit import LateShards
from rayft.train.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_interrupts(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    asked: list[str] = []
    heard = threading.Event()

    def ask(name: str) -> None:
        asked.append(name)
        heard.set()

    with StopSignals() as signals:
        with pytest.raises(PreemptedError, match=number.name) as caught:
            os.kill(os.getpid(), number)
        assert caught.value.code == 8
        with signals.asking(ask):
            os.kill(os.getpid(), number)
            assert heard.wait(10)
            with pytest.raises(PreemptedError):
                os.kill(os.getpid(), number)
        signal.signal(number, signal.SIG_DFL)  # as Ray does
        with pytest.raises(PreemptedError), signals.lent_to_ray():
            raise SystemExit(number)
        with pytest.raises(PreemptedError):
            os.kill(os.getpid(), number)
    assert asked == [number.name]
    assert signal.getsignal(number) is before


class Broken:
    """Shards of which one cannot be made."""

    def advance(self, timeout_s: float) -> None:
        raise DataError("row 7 is wrong.", "Correct it.")

    def idle(self) -> bool:
        return True


def test_a_late_shard_that_fails_has_the_ranks_save_first() -> None:
    asked: list[str] = []
    patient = LateShards(Broken(), asked.append, patience_s=60)  # type: ignore[arg-type]
    patient.advance()
    patient.advance()
    assert len(asked) == 1
    assert isinstance(patient.error, DataError)
    impatient = LateShards(Broken(), asked.append, patience_s=0)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="row 7"):
        impatient.advance()


def test_a_wish_before_training_is_heard_when_it_would_begin() -> None:
    """Outside of the main thread, where no signal reaches a run."""
    asked: list[str] = []
    raised: list[BaseException] = []

    def run() -> None:
        with StopSignals() as signals:
            signals.request("not wanted any more")
            try:
                with signals.asking(asked.append):
                    asked.append("trained")
            except PreemptedError as error:
                raised.append(error)
        with StopSignals() as signals, signals.asking(asked.append):
            signals.request("enough")
            signals.request("enough, again")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert "not wanted any more" in str(raised[0])
    assert asked == ["enough"]
