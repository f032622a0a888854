"""What a person reads of a long run."""

import os
import sys

import pytest

from ovr_megatron.runtime import progress
from ovr_megatron.runtime.progress import Progress, duration, pace


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (61, "1 min"),
        (3599, "59 min"),
        (3600, "1 h"),
        (5 * 3600 + 20 * 60, "5 h 20 min"),
        (86400, "1 d"),
        (565_110, "6 d 12 h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("done", "seconds", "text"),
    [(3, 1890, "630 s an iteration"), (10, 25, "2.5 s an iteration"), (64, 20, "3.2 iteration/s"), (0, 5, "first one")],
)
def test_slow_work_is_told_in_seconds(done, seconds, text):
    assert pace(done, seconds, "iteration").startswith(text)


def test_lines_of_a_long_run_tell_days_and_hours(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Progress(900, "rl", "iteration", start=2) as bar:
        clock[0] = 630.0
        bar.update(reward="0.31")
    assert capsys.readouterr().err == "rl: 3/900 630 s an iteration, 6 d 12 h left reward=0.31\n"


def test_a_reader_that_leaves_does_not_end_the_work(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        bar = Progress(1, "rl", "iteration")
        bar.update()
        assert bar.done == 1
        # The line that nobody reads is still buffered: closing the stream would raise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), broken.fileno())
