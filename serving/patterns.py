"""A regular expression's text -> a term of automaton.py over the UTF-8 bytes of what it matches.

    term = compile_pattern("[a-z]+@[a-z]{2,8}", Characters(terms))                      # the whole text must match
    term = compile_pattern("^[A-Z]", Characters(terms, in_json=True), search=True)      # JSON schema's `pattern`

What ECMA-262 and Python's `re` read alike: literals, `.`, classes, \\d \\w \\s and their opposites, groups,
alternatives, greedy and lazy repetition, ^ and $ at the ends, lookahead where the end of the pattern follows. \\d, \\w
and \\s are ASCII. Lookbehind, back references, \\b, \\p and flags are refused by name.
"""

import re

from formats.files import UserError
from serving.automaton import Terms

LAST = 0x10FFFF
MAX_PATTERN, MAX_GROUPS, MAX_REPEAT = 20_000, 40, 100_000  # characters; groups inside each other; {n}
ANY = [(0, LAST)]
LINE_ENDS = [(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)]
DIGIT, SPACE = [(0x30, 0x39)], [(0x09, 0x0D), (0x20, 0x20)]
WORD = [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
EVERY_SPACE = [*SPACE, (0x1C, 0x1F), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A),
               (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)]  # fmt: skip
SHORT_ESCAPES = {0x08: b"\\b", 0x09: b"\\t", 0x0A: b"\\n", 0x0C: b"\\f", 0x0D: b"\\r", 0x22: b'\\"', 0x5C: b"\\\\"}
CONTROLS = {"n": 0x0A, "t": 0x09, "r": 0x0D, "f": 0x0C, "v": 0x0B, "0": 0x00, "a": 0x07}


def merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges of characters, in order and apart from each other."""
    result = []
    for low, high in sorted(ranges):
        if result and low <= result[-1][1] + 1:
            result[-1] = result[-1][0], max(high, result[-1][1])
        else:
            result.append((low, high))
    return result


def inverted(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """All other characters."""
    result, start = [], 0
    for low, high in merged(ranges):
        if low > start:
            result.append((start, low - 1))
        start = high + 1
    return [*result, (start, LAST)] if start <= LAST else result


def utf8_ranges(low: int, high: int) -> list[list[tuple[int, int]]]:
    """Characters low to high -> sequences of byte ranges that are their UTF-8, surrogates left out."""
    for last in (0x7F, 0x7FF, 0xD7FF, 0xDFFF, 0xFFFF):
        if low <= last < high:
            return utf8_ranges(low, last) + utf8_ranges(last + 1, high)
    if 0xD800 <= low <= 0xDFFF:
        return []
    for i in range(1, len(chr(high).encode())):
        rest = (1 << 6 * i) - 1
        if low & ~rest != high & ~rest:
            if low & rest:
                return utf8_ranges(low, low | rest) + utf8_ranges((low | rest) + 1, high)
            if high & rest != rest:
                return utf8_ranges(low, (high & ~rest) - 1) + utf8_ranges(high & ~rest, high)
    return [list(zip(chr(low).encode(), chr(high).encode()))]


class Characters:
    """Sets of characters -> terms; in_json: as they are written between the quotes of a JSON string."""

    def __init__(self, terms: Terms, in_json: bool = False):
        self.terms, self.in_json, self._known = terms, in_json, {}

    def of(self, ranges: list[tuple[int, int]]) -> int:
        """Ranges of characters -> one of them."""
        key = tuple(merged(ranges))
        if key not in self._known:
            self._known[key] = self._escaped(key) if self.in_json else self._plain(key)
        return self._known[key]

    def _plain(self, ranges):
        heads = {}  # the term behind the first byte -> the set of first bytes
        for low, high in ranges:
            for first, *rest in utf8_ranges(low, high):
                tail = self.terms.cat(*(self.terms.byte_set(range(a, b + 1)) for a, b in rest))
                heads[tail] = heads.get(tail, 0) | ((1 << first[1] + 1) - (1 << first[0]))
        return self.terms.alt(self.terms.cat(self.terms.symbols(first), tail) for tail, first in heads.items())

    def _escaped(self, ranges):
        inside = [code for code in (*range(0x20), 0x22, 0x5C) if any(low <= code <= high for low, high in ranges)]
        plain = inverted([*inverted(list(ranges)), (0, 0x1F), (0x22, 0x22), (0x5C, 0x5C)])
        escapes = [self.terms.literal(SHORT_ESCAPES.get(code, b"\\u%04x" % code)) for code in inside]
        return self.terms.alt([self._plain(tuple(plain)), *escapes])

    def text(self, text: str) -> int:
        """These characters."""
        if not self.in_json:
            return self.terms.literal(text.encode())
        return self.terms.cat(*(self.of([(ord(char), ord(char))]) for char in text))


class _Parser:
    """The text of a pattern -> a tree: ("chars", ranges), ("cat" or "alt", nodes), ("repeat", node, low, high),
    ("start",), ("end",), ("ahead", whether it is negative, node)."""

    def __init__(self, text):
        self.text, self.at, self.groups = text, 0, 0
        if len(text) > MAX_PATTERN:
            raise UserError(f"a pattern of {len(text):,} characters; at most {MAX_PATTERN:,} are allowed")

    def refuse(self, what, at=None):
        at = self.at if at is None else at
        raise UserError(f"{what} at character {at} of the pattern {self.text[:60]!r}")

    def take(self, *texts):
        """The first of the texts that comes next, which is then passed; None if none does."""
        found = next((text for text in texts if self.text.startswith(text, self.at)), None)
        self.at += len(found or "")
        return found

    def parse(self):
        tree = self.alternatives()
        if self.at < len(self.text):
            self.refuse("')' without '('")
        return tree

    def alternatives(self):
        branches = [self.sequence()]
        while self.take("|"):
            branches.append(self.sequence())
        return branches[0] if len(branches) == 1 else ("alt", branches)

    def sequence(self):
        nodes = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            nodes.append(self.repetition(self.atom()))
        return ("cat", nodes)

    def repetition(self, node):
        while self.at < len(self.text):
            at = self.at
            if symbol := self.take("*", "+", "?"):
                low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[symbol]
            elif match := re.compile(r"\{([0-9]{1,9})(,?)([0-9]{0,9})\}").match(self.text, self.at):
                self.at = match.end()
                low = int(match[1])
                high = int(match[3]) if match[3] else None if match[2] else low
                if max(low, high or 0) > MAX_REPEAT or (high is not None and high < low):
                    self.refuse(f"a repetition must be of at most {MAX_REPEAT:,}, the lower number first;", at)
            else:
                break
            if node[0] in ("start", "end", "ahead", "repeat"):
                self.refuse(f"nothing to repeat for {self.text[at : self.at]!r}", at)
            if self.take("+"):
                self.refuse("possessive repetition is not supported;", at)
            self.take("?")  # lazy: the same strings match
            node = ("repeat", node, low, high)
        return node

    def atom(self):
        at, char = self.at, self.take(*"(.[^$\\*+?{") or self.text[self.at]
        if char == "(":
            return self.group(at)
        if char == "[":
            return ("chars", self.character_class())
        if char in "^$":
            return ("start",) if char == "^" else ("end",)
        if char == ".":
            return ("chars", inverted(LINE_ENDS))
        if char == "\\":
            return ("chars", self.escape(in_class=False))
        if char in "*+?":
            self.refuse(f"nothing to repeat for {char!r}", at)
        self.at = at + 1  # "{" that begins no repetition is itself
        return ("chars", [(ord(char), ord(char))])

    def group(self, at):
        self.groups += 1
        if self.groups > MAX_GROUPS:
            self.refuse(f"more than {MAX_GROUPS} groups inside each other")
        if self.take("?"):
            if ahead := self.take("=", "!"):
                return ("ahead", ahead == "!", self.closed(at))
            named = re.compile(r"P?<[A-Za-z_]\w*>").match(self.text, self.at)
            if named:
                self.at = named.end()
            elif not self.take(":"):
                kind = self.text[self.at - 2 : self.at + 2]
                self.refuse(f"{kind!r} is not supported (no lookbehind, no flags, no conditions);", at)
        return self.closed(at)

    def closed(self, at):
        """What is in a group, up to its end."""
        tree = self.alternatives()
        if not self.take(")"):
            self.refuse("'(' without ')'", at)
        self.groups -= 1
        return tree

    def escape(self, in_class):
        """Behind a backslash -> ranges."""
        at = self.at - 1
        char = self.text[self.at : self.at + 1]
        self.at += 1
        if char in tuple("dDwWsS"):
            ranges = {"d": DIGIT, "w": WORD, "s": SPACE if char == "s" else EVERY_SPACE}[char.lower()]
            return inverted(ranges) if char.isupper() else ranges
        if char == "b" and in_class:
            return [(0x08, 0x08)]
        if char in CONTROLS and not (char == "0" and self.text[self.at : self.at + 1].isdigit()):
            code = CONTROLS[char]
        elif char in ("x", "u"):
            match = re.compile(r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]{1,6})\}").match(
                self.text, self.at - 1
            )
            if not match or int(match[1] or match[2] or match[3], 16) > LAST:
                self.refuse(f"'\\{char}' without its hexadecimal digits", at)
            self.at, code = match.end(), int(match[1] or match[2] or match[3], 16)
            low = re.compile(r"\\u([dD][c-fC-F][0-9A-Fa-f]{2})").match(self.text, self.at)
            if 0xD800 <= code <= 0xDBFF and low:
                self.at, code = low.end(), 0x10000 + ((code - 0xD800) << 10) + int(low[1], 16) - 0xDC00
        elif not char or char.isalnum():
            what = "back references are" if char.isdigit() else f"'\\{char}' is"
            self.refuse(f"{what} not supported;" if char else "a backslash with nothing behind it", at)
        else:
            code = ord(char)
        return [(code, code)]

    def character_class(self):
        """Behind "[" -> ranges."""
        at, negated, ranges = self.at - 1, self.take("^"), []
        while not self.text.startswith("]", self.at) or self.at == at + 1 + bool(negated):
            if self.at >= len(self.text):
                self.refuse("'[' without ']'", at)
            if self.text[self.at] == "]":
                self.refuse("an empty class is not supported; write \\] for the character;")
            low = self.class_member()
            if self.text.startswith("-", self.at) and not self.text.startswith("-]", self.at):
                dash, self.at = self.at, self.at + 1
                if self.at >= len(self.text):
                    self.refuse("'[' without ']'", at)
                high = self.class_member()
                if len(low) != 1 or len(high) != 1 or low[0][0] != low[0][1] or high[0][0] < low[0][0]:
                    self.refuse("not a range of characters", dash)
                low = [(low[0][0], high[0][1])]
            ranges += low
        self.at += 1
        return inverted(ranges) if negated else merged(ranges)

    def class_member(self):
        char = self.text[self.at]
        self.at += 1
        return self.escape(in_class=True) if char == "\\" else [(ord(char), ord(char))]


def _with_ends(node, at_start, at_end, search):
    """The tree without ^, $ and lookahead. A sequence that may begin (end) where the text does gets "anything" before
    (behind) it, if it does not say ^ ($) and search[0] (search[1]) is true; elsewhere they are refused."""
    kind = node[0]
    if kind in ("start", "end", "ahead"):
        return _with_ends(("cat", [node]), at_start, at_end, search)
    if kind == "alt":
        return ("alt", [_with_ends(branch, at_start, at_end, search) for branch in node[1]])
    if kind == "repeat":
        return ("repeat", _with_ends(node[1], False, False, search), node[2], node[3])
    if kind == "chars":
        return node
    nodes = node[1]
    first = next((i for i, inner in enumerate(nodes) if inner[0] != "start"), len(nodes))
    last = next((i for i in range(len(nodes), first, -1) if nodes[i - 1][0] != "end"), first)
    if (first and not at_start) or (last < len(nodes) and not at_end):
        raise UserError("^ and $ are supported at the ends of a pattern only")
    before, opening = at_start and search[0] and not first, at_start
    parts, behind = [], at_end and search[1] and last == len(nodes)
    for i in range(first, last):
        inner, at_last = nodes[i], at_end and i == last - 1
        if inner[0] == "ahead":
            if not at_end:
                raise UserError("lookahead is supported where the end of the pattern follows only")
            rest = _with_ends(("cat", nodes[i + 1 :]), False, True, (False, search[1]))
            ahead = _with_ends(inner[2], opening and not before, True, (False, True))
            parts.append(("both", inner[1], ahead, rest))
            behind = False
            break
        opens, closes = opening and _anchored(inner), at_last and _anchored(inner)
        parts.append(_with_ends(inner, opens, closes, (before and opens, behind and closes)))
        before, behind, opening = before and not opens, behind and not closes, False
    anything = [("repeat", ("chars", ANY), 0, None)]
    return ("cat", anything * before + parts + anything * behind)


def _anchored(node):
    """Whether there is a ^, a $ or a lookahead in it."""
    return node[0] in ("start", "end", "ahead") or (node[0] in ("alt", "cat") and any(map(_anchored, node[1])))


def _term(node, characters):
    kind, terms = node[0], characters.terms
    if kind == "chars":
        return characters.of(node[1])
    if kind == "repeat":
        return terms.repeat(_term(node[1], characters), node[2], node[3])
    if kind == "both":
        ahead, rest = (_term(inner, characters) for inner in node[2:])
        return terms.both((terms.complement(ahead) if node[1] else ahead, rest))
    parts = [_term(inner, characters) for inner in node[1]]
    return terms.alt(parts) if kind == "alt" else terms.cat(*parts)


def compile_pattern(text: str, characters: Characters, search: bool = False) -> int:
    """A pattern -> the term of the texts that match it; search: of those with a part that does.

    UserError names what is not supported and its place."""
    tree = _Parser(text).parse()
    return _term(_with_ends(tree, True, True, (search, search)), characters)
