"""What a flag or a setting may be, and a command line whose errors are one line.

Every `Check` is an argparse type as well: text → value, or an error that names the range and what
was got. Knows no setting by name; `config.py` and the scripts say which check holds where.
"""

import argparse
import math
import re
import reprlib
from collections.abc import Callable
from typing import NamedTuple

LARGEST_INT = 2**63 - 1  # what arithmetic with fractions and tensors can still take
WRONG = (ValueError, TypeError, OverflowError)  # what the conversions and checks below raise


class Check(NamedTuple):
    """What one setting may be."""

    expected: str  # completes "expected …"
    parse: Callable  # a flag's text → value
    accept: Callable  # a value of YAML, Python or `parse` → the value kept; raises WRONG

    def __call__(self, text: str):
        """As argparse type: text → value. Raises: argparse.ArgumentTypeError, with the range."""
        try:
            return self.accept(self.parse(text))
        except WRONG:
            raise argparse.ArgumentTypeError(expected_got(self, text)) from None


def expected_got(check: Check, value) -> str:
    """The middle of an error line: "expected …, got …"."""
    return f"expected {check.expected}, got {reprlib.repr(value)}"  # reprlib cuts long values


def one_line(error) -> str:
    """What is wrong, as one printable line: file names and keys may hold line ends, or anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))


def _keep(value, condition):
    if not condition:
        raise ValueError
    return value


def integer(low: int, high: float = math.inf) -> Check:
    """A whole number of 64 bits from low to high, both included; neither True nor 8.0."""
    expected = f"an integer >= {low}" if high == math.inf else f"an integer from {low} to {high}"
    high = min(high, LARGEST_INT)
    return Check(expected, int, lambda v: _keep(v, type(v) is int and low <= v <= high))


def number(low: float, high: float = math.inf, *, above=False, below=False) -> Check:
    """A finite number from low to high; without low itself if `above`, without high if `below`."""

    def accept(value):
        _keep(value, type(value) in (int, float) and math.isfinite(value))
        _keep(value, low <= value <= high)
        _keep(value, not (above and value == low or below and value == high))
        return float(value)

    end = f" and {'<' if below else '<='} {high:g}" if high < math.inf else ""
    return Check(f"a number {'>' if above else '>='} {low:g}{end}", float, accept)


def one_of(*choices: str) -> Check:
    """One of these words; false counts as "no", for that is how YAML reads a bare no."""

    def accept(value):
        value = "no" if value is False else value
        return _keep(value, value in choices)

    return Check(f"one of {', '.join(choices)}", str, accept)


def words(*choices: str) -> Check:
    """One or more different words, out of `choices` if there are any, kept as a tuple."""

    def accept(value):
        _keep(value, isinstance(value, list | tuple) and 0 < len(value) == len(set(value)))
        return _keep(tuple(value), all(
            isinstance(word, str) and word and (not choices or word in choices) for word in value))

    source = f" out of {', '.join(choices)}" if choices else ""
    return Check(f"different words{source}", tuple, accept)


def _accept_blocks(value):
    if value is None or value == "all":
        return None
    if isinstance(value, str):
        _keep(value, re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", value))
        spans = [[int(end) for end in span.split("-")] for span in value.split(",")]
        _keep(value, all(span[0] <= span[-1] for span in spans))
        value = [block for span in spans for block in range(span[0], span[-1] + 1)]
    value = [value] if type(value) is int else value
    _keep(value, isinstance(value, list | tuple) and len(value) > 0)
    return tuple(sorted({BLOCK.accept(block) for block in value}))


positive_int, nonnegative_int = integer(1), integer(0)
positive_float, nonnegative_float = number(0, above=True), number(0)
fraction = number(0, 1)
BELOW_ONE, SHARE = number(0, 1, below=True), number(0, 1, above=True, below=True)
INT_OR_NULL = Check("null or an integer >= 1", int,
                    lambda v: None if v is None else positive_int.accept(v))
SEED, BLOCK = integer(0, LARGEST_INT), integer(0, 999)  # 999: "0-9999999999" would fill memory
TEXT = Check("text", str, lambda v: _keep(v, isinstance(v, str) and v.strip()))
TEXT_OR_NULL = Check("text or null", str, lambda v: None if v is None else TEXT.accept(v))
FLAG = Check("true or false", lambda v: v, lambda v: _keep(v, isinstance(v, bool)))
DEVICE = Check("auto, cpu, mps, cuda or cuda:N", str,
               lambda v: _keep(v, re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", v)))
BLOCKS = Check('null, all, a text such as "0-13" or "0,2,4-6", or a list', str, _accept_blocks)


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors on stderr, exit code 2; it completes no prefixes."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message):
        """Print one line and leave with exit code 2."""
        self.exit(2, f"{self.prog}: error: {one_line(' '.join(message.split()))}\n")
