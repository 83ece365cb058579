"""Stop signals: one wish may arrive twice, a second wish is another."""

import signal

import pytest

from adagrpo_train.cli.command import with_settings
from adagrpo_train.runtime import stopping
from adagrpo_train.runtime.stopping import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_arrives_twice_is_one_request(number: signal.Signals) -> None:
    stop = StopRequest()
    with stop.listening():
        assert not stop.requested
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert stop.requested


def test_asking_again_later_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest()
    # A shell starts its background jobs with SIGINT ignored; the test means a program that Ctrl-C ends.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), stop.listening():
            signal.raise_signal(signal.SIGINT)
            monkeypatch.setattr(stopping, "_REPEAT_SECONDS", -1.0)
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_a_command_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert with_settings([], "", lambda settings: signal.raise_signal(signal.SIGINT)) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted\n"


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest().listening():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
