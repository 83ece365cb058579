"""What a judge wrote, as numbers: exactly one per metric and inside its range, or none at all."""

import re
from collections.abc import Mapping

_LONGEST = 65536  # characters of an answer that are looked at

#: A number that is followed by nothing that would change it. "45" is not 4; "4/10", "4,5", "3-4", "4 or 5" and "4 out
#: of 5" are no 4 either; without the possessive ``++`` the group would give digits back until one of them fits, and
#: a run of blanks would take the square of its length.
NUMBER = (
    r"([0-9]++(?:\.[0-9]++)?+)"
    r"(?![.,]?\w"  # more digits, an exponent, a unit
    r"|[ \t]*+[/%\u2044\uff0f^~\u00b1]|\s*+out\s++of\b"  # a fraction, a share, an error
    r"|\s*+(?:[-:,;\u2010-\u2015\u2212]|to|or|of|and|x)?[ \t]*+\(?(?:or[ \t]*+)?[0-9]"  # a range, a second number
    r"|[ \t]++and[ \t]++a[ \t]++half)"
)


class UnreadableError(ValueError):
    """An answer without exactly one score per metric; the message says what was found instead."""


class AnswerFormat:
    """Finds the scores in an answer.

    Args:
        patterns: metric -> regular expression with one group, around the number; ``{number}`` stands for the group that
            NUMBER is.
        value_range: least and greatest score; others count as no score, they are not clipped.

    Raises:
        ValueError: no metric, a faulty expression, or a range that is none.
    """

    def __init__(self, patterns: Mapping[str, str], value_range: tuple[float, float]) -> None:
        low, high = value_range
        if not float("-inf") < low < high < float("inf"):
            raise ValueError(f"value_range={[low, high]}: give two finite numbers, the lesser first")
        if not patterns:
            raise ValueError("metrics={}: give at least one metric and its regular expression")
        self.value_range = (float(low), float(high))
        self._patterns = {metric: _compiled(metric, pattern) for metric, pattern in patterns.items()}

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self._patterns)

    def read(self, answer: str) -> dict[str, float]:
        """The score of every metric.

        Raises:
            UnreadableError: a metric has no score, several, or one outside the range.
        """
        if len(answer) > _LONGEST:
            raise UnreadableError(f"the answer is longer than {_LONGEST} characters")
        return {metric: self._only_one(metric, pattern.findall(answer)) for metric, pattern in self._patterns.items()}

    def _only_one(self, metric: str, found: list[str]) -> float:
        if len(found) != 1:
            raise UnreadableError(f"the answer has {len(found)} scores for {metric}, expected one")
        try:
            value = float(found[0])
        except ValueError as error:
            raise UnreadableError(f"the score for {metric} is not a number") from error
        low, high = self.value_range
        if not low <= value <= high:  # also true of NaN
            raise UnreadableError(f"the score for {metric} is {value:g}, outside [{low:g}, {high:g}]")
        return value


def _compiled(metric: str, pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern.replace("{number}", NUMBER))
    except re.error as error:
        raise ValueError(f"metrics.{metric}={pattern}: no regular expression: {error}") from error
    if compiled.groups != 1:
        raise ValueError(f"metrics.{metric}={pattern}: has {compiled.groups} groups, needs one, around the number")
    return compiled
