"""Figures as text: shares in percent, numbers to four digits."""

import math


def percent(share: float) -> str:
    """Write a share in [0, 1] in percent, never rounded to 0 or 100 where it is neither."""
    value = 100 * share
    if 0 < value < 0.01:
        return "<0.01 %"
    if 99.99 < value < 100:
        return ">99.99 %"
    digits = 2 if 0 < value < 0.1 or 99.9 < value < 100 else 1
    return f"{value:.{digits}f} %"


def interval_percent(low: float, high: float) -> tuple[str, str]:
    """Write both ends of an interval of shares in percent, rounded outwards: never narrower than it is."""
    # First to six digits: 100 * 0.07 is a little more than 7.
    return f"{math.floor(round(1000 * low, 6)) / 10:.1f}", f"{math.ceil(round(1000 * high, 6)) / 10:.1f}"


def short_number(value: float) -> str:
    """Write a number to four significant digits, without trailing zeros."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def four_digits(value: float) -> str:
    """Write a number to four significant digits with trailing zeros, so that the figures of a row can be compared."""
    return short_number(value) if isinstance(value, int) or abs(value) >= 1000 else f"{value:#.4g}"
