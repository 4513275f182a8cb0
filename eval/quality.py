"""How much one answer is like another. Pure functions on texts."""

import functools
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

_FRAC = re.compile(r"\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
_NUMBER = re.compile(
    r"(?<!\^)(?<!\^\{)(?P<minus>(?<![\w)\]])[-\u2212])?"  # in "10-5" it is no sign, in "10^-3" part of an exponent
    r"(?:[$€£¥](?P<minus_inside>[-\u2212])?)?"
    r"(?<![A-Za-z_0-9^])(?<![0-9]\.)(?<!\^\{)(?<!\^[-\u2212])(?<!\^\{[-\u2212])"
    r"(?:(?P<fraction>(?<!/)[0-9]{1,9}/[1-9][0-9]{0,8}(?![0-9/]|\.[0-9]))"  # 01/05/2024 is none
    r"|(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+))"
)


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L F-measure without stemming, of Google's `rouge-score`.

    Words are its words for English. It drops every letter but a to z; here other letters count, too.
    """
    if text == reference:
        return 1.0  # also where there is no word in it
    return float(_scorer().score(reference, text)["rougeL"].fmeasure)


def final_number(text: str) -> str | None:
    """The last number in a text as plain digits, None without any: "$1,234.50" -> "1234.5", "#### 18" -> "18".

    Numbers are written the English way; "%" and currency signs are dropped. A fraction of whole numbers counts by
    its value: "3/4" and "\\frac{3}{4}" -> "0.75", "2/6" -> "1/3". Digits right after a letter or "^" are no number:
    the last one of "24 m^2" is 24.
    """
    matches = list(_NUMBER.finditer(_FRAC.sub(r"\1/\2", text)))
    if not matches:
        return None
    last = matches[-1]
    size = _value(Fraction(last["fraction"])) if last["fraction"] else _plain(Decimal(last["digits"].replace(",", "")))
    return f"-{size}" if (last["minus"] or last["minus_inside"]) and size != "0" else size


def first_difference(a: str, b: str) -> int | None:
    """Characters before two texts part, None if they are equal."""
    if a == b:
        return None
    return next((i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def is_maths(category: str | None) -> bool:
    """Whether answers of a category end in a number: "maths", "math_reasoning", "gsm8k" and the like."""
    return any(word.startswith(("math", "gsm")) for word in re.split(r"[^a-z0-9]+", (category or "").lower()))


def _plain(number: Decimal) -> str:
    digits = format(number, "f")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def _value(value: Fraction) -> str:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest > 1:  # no finite decimal
        return f"{value.numerator}/{value.denominator}"
    return _plain(Decimal(value.numerator) / Decimal(value.denominator))


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk: 2 s

    return RougeScorer(["rougeL"], tokenizer=_Words())
