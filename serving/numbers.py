"""Numbers of JSON within limits, as terms of automaton.py.

A number is written without an exponent where it has limits. It has at most 15 digits before and behind the point
together, so that what is less as text is less as a float too; integers have up to 18.
"""

from decimal import Decimal
from fractions import Fraction

from serving.automaton import EMPTY, EPSILON, Terms

MAX_INTEGER, MAX_DIGITS = 18, 15  # digits of an integer; of a number before and behind the point
NONZERO, DIGITS = b"123456789", b"0123456789"


def exact(value: int | float) -> Fraction:
    """A limit as the schema writes it."""
    return Fraction(value) if isinstance(value, int) else Fraction(Decimal(repr(value)))


def integer_term(terms: Terms, low: Fraction | None, high: Fraction | None) -> int:
    """Integers from low to high, None for no limit."""
    low = None if low is None else Fraction(-(-low.numerator // low.denominator))
    high = None if high is None else Fraction(high.numerator // high.denominator)
    longest = max([MAX_INTEGER, *(len(str(abs(limit))) for limit in (low, high) if limit is not None)])
    return _signed(terms, longest, 0, low, high, False, False)


def number_term(
    terms: Terms, low: Fraction | None, high: Fraction | None, low_open: bool = False, high_open: bool = False
) -> int:
    """Numbers from low to high, None for no limit; open: the limit itself is excluded."""
    if low is None and high is None:
        whole = terms.alt((terms.literal(b"0"), _any_digits(terms, 1, MAX_INTEGER)))
        exponent = terms.cat(
            terms.byte_set(b"eE"),
            terms.optional(terms.byte_set(b"+-")),
            terms.repeat(terms.byte_set(DIGITS), 1, 2),
        )
        minus = terms.optional(terms.literal(b"-"))
        return terms.cat(minus, whole, _any_fraction(terms, MAX_DIGITS), terms.optional(exponent))
    longest = max([MAX_DIGITS, *(len(str(int(abs(limit)))) for limit in (low, high) if limit is not None)])
    return _signed(terms, longest, MAX_DIGITS, low, high, low_open, high_open)


def _any_digits(terms, shortest, longest):
    """shortest to longest digits, the first of them not 0."""
    return terms.cat(terms.byte_set(NONZERO), terms.repeat(terms.byte_set(DIGITS), shortest - 1, longest - 1))


def _any_fraction(terms, places):
    """Nothing, or a point and up to `places` digits."""
    digits = terms.repeat(terms.byte_set(DIGITS), 1, places)
    return terms.optional(terms.cat(terms.literal(b"."), digits)) if places > 0 else EPSILON


def _signed(terms, longest, digits, low, high, low_open, high_open):
    """Numbers of both signs; digits: at most as many before and behind the point, 0 for integers."""
    result, zero = [], Fraction(0)
    if high is None or high >= 0:
        positive = low is not None and low >= 0
        limits = (low, high, low_open, high_open) if positive else (zero, high, False, high_open)
        result.append(_Magnitudes(terms, digits, *limits).term(longest))
    if low is None or low < 0:
        least = None if low is None else -low
        negative = high is not None and high < 0
        limits = (-high, least, high_open, low_open) if negative else (zero, least, True, low_open)
        result.append(terms.cat(terms.literal(b"-"), _Magnitudes(terms, digits, *limits).term(longest)))
    return terms.alt(result)


class _Magnitudes:
    """Numbers without a sign from low (at least 0) to high (None: no limit). The first digits are written out as long
    as what may follow them is partly within the limits and partly not."""

    def __init__(self, terms, digits, low, high, low_open, high_open):
        self.terms, self.digits = terms, digits
        self.low, self.high, self.low_open, self.high_open = low, high, low_open, high_open

    def inside(self, smallest, largest):
        """(whether some, whether all of the numbers between these two, which are among them, are within the limits)"""

        def above(x):
            return x > self.low if self.low_open else x >= self.low

        def below(x):
            return self.high is None or (x < self.high if self.high_open else x <= self.high)

        return above(largest) and below(smallest), above(smallest) and below(largest)

    def term(self, longest):
        """Those of 1 to `longest` digits before the point."""
        return self.terms.alt(self.whole(0, 0, length) for length in range(1, longest + 1))

    def whole(self, value, done, length):
        """The rest behind the first `done` of `length` digits before the point, which are `value`."""
        terms, left, places = self.terms, length - done, max(0, self.digits - length)
        step, unit = 10**left, Fraction(1, 10**places)
        first = 10 ** (length - 1) if not done and length > 1 else value * step
        some, every = self.inside(first, (value + 1) * step - unit)
        if not some:
            return EMPTY
        if every and (done or length > 1):
            rest = terms.repeat(terms.byte_set(DIGITS), left, left) if done else _any_digits(terms, length, length)
            return terms.cat(rest, _any_fraction(terms, places))
        if left:
            digits = range(1 if not done and length > 1 else 0, 10)
            return self.branches((digit, self.whole(value * 10 + digit, done + 1, length)) for digit in digits)
        behind = terms.cat(terms.literal(b"."), self.fraction(value, 0, places)) if places else EMPTY
        return terms.alt((EPSILON if self.inside(value, value)[0] else EMPTY, behind))

    def fraction(self, value, done, places):
        """The rest behind `done` of at most `places` digits behind the point; all digits so far are `value`."""
        smallest, left = Fraction(value, 10**done), places - done
        some, every = self.inside(smallest, smallest + Fraction(1, 10**done) - Fraction(1, 10**places))
        if not some:
            return EMPTY
        if every:
            return self.terms.repeat(self.terms.byte_set(DIGITS), 0 if done else 1, left)
        rests = self.branches((digit, self.fraction(value * 10 + digit, done + 1, places)) for digit in range(10))
        return self.terms.alt((EPSILON if done and self.inside(smallest, smallest)[0] else EMPTY, rests))

    def branches(self, rests):
        return self.terms.alt(self.terms.cat(self.terms.byte_set([DIGITS[digit]]), rest) for digit, rest in rests)
