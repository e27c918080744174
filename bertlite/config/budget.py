"""Budgets of a pretraining, as they are written in the YAML."""

import math
import re

from pydantic_core import PydanticCustomError

SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}
MULTIPLES = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}


def parse_budget(text: str) -> tuple[float, str]:
    """Return an amount and its unit, seconds or tokens: "1.5h" is (5400, "seconds"), "2B tokens" (2e9, "tokens").

    Raises ValueError for anything else.
    """
    number = r"(\d+\.?\d*(?:e\d+)?)"
    match = re.fullmatch(rf"\s*{number}\s*(?:(s|m|min|h|d)|([kmb]?)\s*tokens)\s*", text, re.IGNORECASE)
    amount, unit = 0.0, ""
    if match:
        unit, multiple = (group and group.lower() for group in match.groups()[1:])
        amount = float(match[1]) * (SECONDS[unit] if unit else MULTIPLES[multiple])
    if not 0 < amount < math.inf:
        raise ValueError("neither a time, such as 30m or 24h, nor a number such as 2e9 tokens")
    return amount, "seconds" if unit else "tokens"


def check_budget(text: str) -> str:
    """Return the text of a budget. Raises PydanticCustomError for what is none."""
    try:
        parse_budget(text)
    except ValueError as error:
        raise PydanticCustomError("budget", "{reason}", {"reason": str(error)}) from None
    return text


def budget_seconds(text: str | None) -> float:
    """Return a budget of time in seconds; 0 for one of tokens, and for none."""
    amount, unit = parse_budget(text) if text else (0.0, "seconds")
    return amount if unit == "seconds" else 0.0
