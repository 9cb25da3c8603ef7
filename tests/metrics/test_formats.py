"""Figures as text: no share is rounded to 0 or 100 %, no interval is narrower than it is."""

import pytest

from siss_diffusers.metrics.formats import four_digits, interval_percent, percent, short_number


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0.0 %"), (1, "100.0 %"), (0.8633, "86.3 %"), (0.0004, "0.04 %"), (1e-6, "<0.01 %"), (0.99999, ">99.99 %")],
)
def test_percent(share, text):
    assert percent(share) == text


def test_intervals_are_rounded_outwards():
    assert interval_percent(0.81594, 0.01441) == ("81.5", "1.5")
    assert interval_percent(0.07, 0.07) == ("7.0", "7.0")
    assert interval_percent(0.0, 1.0) == ("0.0", "100.0")


def test_numbers():
    assert (short_number(31.25), short_number(2311), short_number(7.5)) == ("31.25", "2,311", "7.5")
    assert (four_digits(0.97), four_digits(24.3), four_digits(256)) == ("0.9700", "24.30", "256")
