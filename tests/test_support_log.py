"""support/log.py: the line of an interval. Trackers: test_report.py."""

import pytest

from support import log


@pytest.mark.parametrize(("seconds", "left"), [(1.0, "0:03"), (20.0, "1:00"), (36.0, "1:48"), (39.9, "2:00")])
def test_progress__gives_the_remaining_time_in_minutes_and_seconds(seconds, left):
    """After 100 of 400 steps, three times as long is left."""
    assert log.progress(100, 400, seconds, "").endswith(f" {left} left")
