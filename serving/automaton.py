"""Regular expressions over bytes and special tokens, and the automaton that they are, one state at a time.

    terms = Terms()
    automaton = Automaton(terms, terms.cat(terms.literal(b"ab"), terms.repeat(terms.byte_set(b"01"), 1, 3)))
    automaton.accepts(b"ab01")

A term is an integer, equal for equal terms. Its derivatives by a symbol are terms again, and so they are the states
(Brzozowski 1964; Owens, Reppy, Turon 2009). A state's transitions are computed when it is first met. `rule` makes a
term whose body may contain it, so that the terms are grammars: what is still to be read after an inner rule is part of
the state, as a stack would hold it. `both` and `complement` are for what contains no rule.

Symbols are numbers: 0..255 are bytes, 256 + k is the k-th special token. A set of symbols is an integer with one bit
for each.
"""

import time
from collections.abc import Iterable

import numpy as np

from formats.files import UserError
from formats.progress import check_progress

EMPTY, EPSILON = 0, 1  # terms: nothing matches; the empty string matches
BYTES = (1 << 256) - 1  # the set of all bytes
MAX_TERMS = 400_000  # of one grammar, with the states that were met
MAX_DEPTH = 100  # of rules inside each other; what is nested deeper does not match


class TooComplex(UserError):
    """A grammar of more terms than MAX_TERMS, or one that takes too long."""


class Terms:
    """The terms of one grammar. A node is (kind, …), kinds: set, literal, cat, alt, repeat, both, not, rule."""

    def __init__(self, num_special: int = 0):
        self.all_symbols = (1 << (256 + num_special)) - 1
        self.nodes = [("alt", ()), ("literal", b"")]
        self._ids = {node: i for i, node in enumerate(self.nodes)}
        self._nullable, self._depth = {EMPTY: False, EPSILON: True}, [0, 0]
        self._derived, self._edges = {EMPTY: (), EPSILON: ()}, {EMPTY: (), EPSILON: ()}
        self._bodies, self._deriving = [], set()
        self.deadline = None  # of time.monotonic(), for the work that is being done
        self._not_empty, self._is_empty = set(), set()  # terms that contain both or not, as far as it is known
        self._restricted = [False, False]  # whether a term contains both or not
        self.everything = self._intern(("not", EMPTY))

    def _intern(self, node, restricted=False, depth=0):
        found = self._ids.get(node)
        if found is None:
            found = self._ids[node] = len(self.nodes)
            if found >= MAX_TERMS:
                raise TooComplex(f"the grammar has more than {MAX_TERMS:,} terms and states")
            if found % 256 == 0 and self.deadline is not None and time.monotonic() > self.deadline:
                raise TooComplex("the grammar takes too long to work out")
            if found % 1024 == 0:
                check_progress.get()(0)  # a server ends it with its client
            self.nodes.append(node)
            self._restricted.append(restricted)
            self._depth.append(depth)
        return found

    # ---- what terms are made of

    def symbols(self, symbols: int) -> int:
        """One symbol of a set."""
        return self._intern(("set", symbols)) if symbols else EMPTY

    def byte_set(self, values: Iterable[int]) -> int:
        """One byte of these."""
        return self.symbols(sum(1 << value for value in set(values)))

    def literal(self, data: bytes) -> int:
        return self._intern(("literal", data))

    def cat(self, *parts: int) -> int:
        """One after the other."""
        result = EPSILON
        for part in reversed(parts):
            result = self._cat(part, result)
        return result

    def _cat(self, first, rest):
        if first == EMPTY or rest == EMPTY:
            return EMPTY
        if first == EPSILON or rest == EPSILON:
            return rest if first == EPSILON else first
        a, b = self.nodes[first], self.nodes[rest]
        if a[0] == b[0] == "literal":
            return self.literal(a[1] + b[1])
        depth = self._depth[first] + (a[0] == "cat")
        if depth > MAX_DEPTH:
            return EMPTY
        return self._intern(("cat", first, rest), self._restricted[first] or self._restricted[rest], depth)

    def alt(self, terms: Iterable[int]) -> int:
        """One of them."""
        members, symbols = set(), 0
        for term in terms:
            kind = self.nodes[term][0]
            if kind == "set":
                symbols |= self.nodes[term][1]
            elif kind == "alt":
                inner = self.nodes[term][1]
                members.update(inner)
                symbols |= next((self.nodes[i][1] for i in inner if self.nodes[i][0] == "set"), 0)
            else:
                members.add(term)
        if symbols:
            members = {i for i in members if self.nodes[i][0] != "set"} | {self.symbols(symbols)}
        if self.everything in members:
            return self.everything
        if len(members) == 1:
            return members.pop()
        depth = max((self._depth[i] for i in members), default=0)
        return self._intern(("alt", tuple(sorted(members))), any(self._restricted[i] for i in members), depth)

    def optional(self, term: int) -> int:
        return self.alt((EPSILON, term))

    def repeat(self, term: int, low: int = 0, high: int | None = None) -> int:
        """The term low to high times one after the other; None: without end."""
        if high == 0 or term in (EMPTY, EPSILON):
            return EPSILON if not low or term == EPSILON else EMPTY
        if low == high == 1:
            return term
        low = 0 if self.nullable(term) else low
        return self._intern(("repeat", term, low, high), self._restricted[term])

    def both(self, terms: Iterable[int]) -> int:
        """What all of them match; EMPTY where that is nothing."""
        term = self._both(terms)
        return EMPTY if self.is_empty(term) else term

    def _both(self, terms):
        members = set()
        for term in terms:
            members.update(self.nodes[term][1] if self.nodes[term][0] == "both" else (term,))
        members.discard(self.everything)
        if EMPTY in members or not members:
            return EMPTY if members else self.everything
        return members.pop() if len(members) == 1 else self._intern(("both", tuple(sorted(members))), True)

    def complement(self, term: int) -> int:
        """All strings of symbols that the term does not match."""
        node = self.nodes[term]
        return node[1] if node[0] == "not" else self._intern(("not", term), True)

    def rule(self) -> int:
        """A term whose body is given later; it never matches the empty string."""
        self._bodies.append(None)
        return self._intern(("rule", len(self._bodies) - 1))

    def set_body(self, rule: int, body: int) -> None:
        self._bodies[self.nodes[rule][1]] = body

    # ---- what they match

    def nullable(self, term: int) -> bool:
        """Whether the empty string matches."""
        found = self._nullable.get(term)
        if found is None:
            found = self._nullable[term] = self._find_nullable(*self.nodes[term])
        return found

    def _find_nullable(self, kind, *parts):
        if kind == "cat":
            return self.nullable(parts[0]) and self.nullable(parts[1])
        if kind == "alt":
            return any(map(self.nullable, parts[0]))
        if kind == "both":
            return all(map(self.nullable, parts[0]))
        if kind == "not":
            return not self.nullable(parts[0])
        return kind == "repeat" and not parts[1]

    def edges(self, term: int) -> tuple[tuple[int, int], ...]:
        """((set of symbols, term that must match the rest), …): disjoint sets, no rest that nothing matches."""
        found = self._edges.get(term)
        if found is None:
            found = self._derivatives(term)
            if self._restricted[term]:
                found = tuple((symbols, rest) for symbols, rest in found if not self.is_empty(rest))
            self._edges[term] = found
        return found

    def _derivatives(self, term):
        """The edges with those to rests that nothing matches."""
        found = self._derived.get(term)
        if found is None:
            found = self._derived[term] = tuple(self._derive(term))
        return found

    def _derive(self, term):
        kind, *parts = self.nodes[term]
        if kind == "set":
            return [(parts[0], EPSILON)]
        if kind == "literal":
            return [(1 << parts[0][0], self.literal(parts[0][1:]))]
        if kind == "cat":
            first, rest = parts
            moved = [(symbols, self._cat(inner, rest)) for symbols, inner in self._derivatives(first)]
            moved = [edge for edge in moved if edge[1] != EMPTY]
            return self._merge([moved, self._derivatives(rest)]) if self.nullable(first) else moved
        if kind == "alt":
            return self._merge([self._derivatives(member) for member in parts[0]])
        if kind == "repeat":
            inner, low, high = parts
            rest = self.repeat(inner, max(low - 1, 0), None if high is None else high - 1)
            moved = [(symbols, self._cat(first, rest)) for symbols, first in self._derivatives(inner)]
            return [edge for edge in moved if edge[1] != EMPTY]
        if kind == "rule":
            return self._derive_rule(term, parts[0])
        if kind == "not":
            edges = self._derivatives(parts[0])
            others = self.all_symbols & ~_union(edges)
            moved = [(symbols, self.complement(rest)) for symbols, rest in edges]
            return moved + ([(others, self.everything)] if others else [])
        edges = [(self.all_symbols, [])]
        for member in parts[0]:
            edges = [(s & t, [*rests, rest]) for s, rests in edges for t, rest in self._derivatives(member) if s & t]
        return self._grouped((symbols, self._both(rests)) for symbols, rests in edges)

    def _derive_rule(self, term, number):
        if term in self._deriving:
            raise UserError("a rule leads to itself with nothing before it, so that it never ends")
        self._deriving.add(term)
        try:
            return self._derivatives(self._bodies[number])
        finally:
            self._deriving.discard(term)

    def _merge(self, lists):
        """Edges of alternatives -> edges with disjoint sets; where several have a symbol, alternatives follow."""
        parts = {}  # set -> rests
        for edges in lists:
            for symbols, rest in edges:
                if symbols in parts:
                    parts[symbols].append(rest)
                    continue
                for other in [other for other in parts if other & symbols]:
                    rests, common = parts.pop(other), other & symbols
                    parts[common] = [*rests, rest]
                    if other & ~common:
                        parts[other & ~common] = rests
                    symbols &= ~common
                    if not symbols:
                        break
                if symbols:
                    parts[symbols] = [rest]
        return self._grouped((symbols, self.alt(rests)) for symbols, rests in parts.items())

    def _grouped(self, edges):
        """One edge for each rest."""
        sets = {}
        for symbols, rest in edges:
            if rest != EMPTY:
                sets[rest] = sets.get(rest, 0) | symbols
        return [(symbols, rest) for rest, symbols in sets.items()]

    def is_empty(self, term: int) -> bool:
        """Whether nothing matches. Terms without both and not are never empty, save EMPTY."""
        if not self._restricted[term] or term in self._not_empty:
            return term == EMPTY
        if term in self._is_empty:
            return True
        stack, seen = [term], {term}
        while stack:
            here = stack.pop()
            if self.nullable(here) or here in self._not_empty or not self._restricted[here]:
                self._not_empty.update((here, term))
                return False
            for _, rest in self._derivatives(here):
                if rest not in seen and rest not in self._is_empty:
                    seen.add(rest)
                    stack.append(rest)
        self._is_empty |= seen
        return True


def _union(edges):
    symbols = 0
    for more, _ in edges:
        symbols |= more
    return symbols


class Automaton:
    """The states of a term that were met, with dense rows of transitions. State 0 is dead, 1 is the start."""

    def __init__(self, terms: Terms, root: int):
        self.terms = terms
        self._state_of, self.term_of = {EMPTY: 0, root: 1}, [EMPTY, root]
        self.table = np.zeros((64, 256), np.int32)  # (state, byte) -> state
        self.has_row = np.zeros(64, bool)
        self.has_row[0] = True
        self.special = {}  # state -> {k: state} by special tokens

    def state_of(self, term: int) -> int:
        """The number of a term's state."""
        found = self._state_of.get(term)
        if found is None:
            found = self._state_of[term] = len(self.term_of)
            self.term_of.append(term)
            if found >= len(self.table):
                self.table = np.concatenate([self.table, np.zeros_like(self.table)])
                self.has_row = np.concatenate([self.has_row, np.zeros_like(self.has_row)])
        return found

    def fill_row(self, state: int) -> None:
        """Compute the transitions of a state, unless they are known."""
        if self.has_row[state]:
            return
        row, special = np.zeros(256, np.int32), {}
        for symbols, rest in self.terms.edges(self.term_of[state]):
            target = self.state_of(rest)
            if low := symbols & BYTES:
                row[np.unpackbits(np.frombuffer(low.to_bytes(32, "little"), np.uint8), bitorder="little") == 1] = target
            high, k = symbols >> 256, 0
            while high:
                if high & 1:
                    special[k] = target
                high, k = high >> 1, k + 1
        self.table[state], self.has_row[state] = row, True
        if special:
            self.special[state] = special

    def next(self, state: int, byte: int) -> int:
        self.fill_row(state)
        return int(self.table[state, byte])

    def next_special(self, state: int, k: int) -> int:
        """After the k-th special token."""
        self.fill_row(state)
        return self.special.get(state, {}).get(k, 0)

    def accepting(self, state: int) -> bool:
        return self.terms.nullable(self.term_of[state])

    def is_final(self, state: int) -> bool:
        """Whether nothing can follow."""
        return not self.terms.edges(self.term_of[state])

    def accepts(self, data: bytes) -> bool:
        state = 1
        for byte in data:
            state = self.next(state, byte)
        return self.accepting(state)
