"""Which tokens may come next, so that a reply matches a grammar: masks from a vocabulary and an automaton.

    guide = vocabulary_of(tokenizer).guide("ab", lambda terms: terms.literal(b"ab"))
    guide.allowed(guide.start, stop_ids, vocab_size)        # (V,) bool
    state = guide.advance(guide.start, token_id)            # states are integers: to go back is to keep the old one

A Vocabulary holds a tokenizer's tokens as a trie of bytes. A mask is made by one walk of the trie with the automaton, a
level at a time in numpy; branches that the automaton cannot follow are left out. Where one term follows another, as
what closes an object follows a string in it, the walk with the first is kept for the next place where something else
follows, and only the tokens that reach over its end are walked again. A guide keeps the masks of its states
as bits, the least recently used go first. Guides are kept per vocabulary, so that a grammar is compiled once.
"""

import collections
import re
import threading
import time
import weakref
from collections.abc import Callable

import numpy as np

from formats.files import UserError
from serving.automaton import EMPTY, Automaton, Terms, TooComplex

MAX_GUIDES, MAX_GUIDE_BYTES = 64, 512 << 20  # kept of a vocabulary; the size is estimated
MAX_MASKS = 512  # kept of a guide (V / 8 bytes each)
COMPILE_SECONDS, MASK_SECONDS = 5.0, 1.0  # the most for a grammar, for a mask
MAX_FIRSTS = 32  # walks kept of a guide (V bytes each)
MAX_STATES = 20_000  # of a guide that is used again; beyond it the next request compiles anew (1 KB a state)


class Vocabulary:
    """A tokenizer's tokens as a trie of bytes. Special tokens and added ones in brackets, such as <tool_call>, are
    symbols of their own; other added ones, such as runs of spaces, are text."""

    def __init__(self, tokenizer):
        self.size, stops = tokenizer.vocab_size, set(tokenizer.stop_ids)
        marks = {i for i, text in tokenizer.added_ids.items() if set(text) & set("<[|｜")}
        apart = {*tokenizer.special_ids, *marks}
        self.special_ids = sorted(i for i in apart if 0 <= i < self.size and i not in stops)
        self.special_index = {token: k for k, token in enumerate(self.special_ids)}
        texts = {tokenizer.added_ids[i]: i for i in self.special_ids if tokenizer.added_ids.get(i)}
        self.special_texts = texts
        words = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
        self._special_pattern = re.compile(f"({words})") if words else None
        self.pieces = [b"" if i in apart else tokenizer.piece_bytes(i) for i in range(self.size)]
        self._build_trie([i for i in range(self.size) if self.pieces[i]])
        self._guides, self._lock = collections.OrderedDict(), threading.Lock()

    def _build_trie(self, ids):
        """Nodes in order of their level, the children of a node side by side."""
        ids.sort(key=self.pieces.__getitem__)
        data = np.frombuffer(b"".join(self.pieces[i] for i in ids), np.uint8)
        lengths = np.array([len(self.pieces[i]) for i in ids], np.int64)
        starts = np.cumsum(lengths) - lengths
        self.token_ids, node = np.array(ids, np.int64), np.zeros(len(ids), np.int64)
        bytes_of, firsts, counts, size = [np.zeros(1, np.uint8)], [], [], 1
        parents, first_node = 1, 0  # of the level above: how many nodes, and the first of them
        for level in range(int(lengths.max(initial=0))):
            rows = np.flatnonzero(lengths > level)
            byte, above = data[starts[rows] + level], node[rows]
            is_new = np.ones(len(rows), bool)
            is_new[1:] = (byte[1:] != byte[:-1]) | (above[1:] != above[:-1])
            node[rows] = size + np.cumsum(is_new) - 1
            count = np.bincount(above[is_new] - first_node, minlength=parents)
            firsts.append(size + np.cumsum(count) - count)
            counts.append(count)
            bytes_of.append(byte[is_new])
            first_node, parents = size, int(is_new.sum())
            size += parents
        self.num_nodes, self.longest = size, int(lengths.max(initial=0))
        order = np.argsort(node, kind="stable")
        self.token_ids, self.node_of_token = self.token_ids[order], node[order]
        self.num_tokens = np.bincount(node, minlength=size).astype(np.int32)
        self.first_token = (np.cumsum(self.num_tokens) - self.num_tokens).astype(np.int32)
        self.byte = np.concatenate(bytes_of)
        last = np.zeros(parents, np.int64)
        self.first_child = np.concatenate([*firsts, last]).astype(np.int32)
        self.num_children = np.concatenate([*counts, last]).astype(np.int32)

    def tokens_at(self, nodes: np.ndarray) -> np.ndarray:
        """The ids of the tokens that end at these nodes."""
        if len(nodes) > self.num_nodes // 16:
            marked = np.zeros(self.num_nodes, bool)
            marked[nodes] = True
            return self.token_ids[marked[self.node_of_token]]
        return self.token_ids[_ranges(self.first_token[nodes], self.num_tokens[nodes])]

    def special(self, text: str) -> int | None:
        """The number of the special token with this text, None if there is none."""
        found = self.special_texts.get(text)
        return None if found is None else self.special_index[found]

    def guide(self, key: str, build: Callable) -> "Guide":
        """The guide for a key, made once: build(Terms) -> the term of the whole reply."""
        with self._lock:
            found = self._guides.get(key)
            if found is not None and len(found.automaton.term_of) < MAX_STATES:
                self._guides.move_to_end(key)
                return found
        terms = Terms(len(self.special_ids))
        terms.deadline = time.monotonic() + COMPILE_SECONDS
        try:
            root = build(terms)
        except RecursionError:
            raise UserError("nested too deep") from None
        terms.deadline = None
        if root == EMPTY:
            raise UserError("nothing matches")
        guide = Guide(self, Automaton(terms, root))
        if guide.ends(guide.start) == "length":
            raise UserError("no token of the vocabulary begins what matches")
        with self._lock:
            self._guides[key] = guide
            size = sum(guide.nbytes() for guide in self._guides.values())
            while len(self._guides) > MAX_GUIDES or (size > MAX_GUIDE_BYTES and len(self._guides) > 1):
                size -= self._guides.popitem(last=False)[1].nbytes()
        return guide


_vocabularies, _vocabularies_lock = weakref.WeakKeyDictionary(), threading.Lock()


def vocabulary_of(tokenizer: object) -> Vocabulary:
    """The tokenizer's Vocabulary, made when it is first asked for (about a second for 150,000 tokens)."""
    with _vocabularies_lock:
        found = _vocabularies.get(tokenizer)
        if found is None or found.size != tokenizer.vocab_size:
            found = _vocabularies[tokenizer] = Vocabulary(tokenizer)
        return found


class Guide:
    """What may follow, by states: integers, 0 for "nothing matches any more". Methods may be called from any thread."""

    start = 1

    def __init__(self, vocabulary: Vocabulary, automaton: Automaton):
        self.vocabulary, self.automaton = vocabulary, automaton
        self._masks, self._lock = collections.OrderedDict(), threading.Lock()
        self._firsts = collections.OrderedDict()  # term -> what _walk_term gave for it

    def nbytes(self) -> int:
        """About the memory that it takes."""
        automaton, V = self.automaton, self.vocabulary.size
        terms = 500 * len(automaton.terms.nodes)
        return terms + automaton.table.nbytes + len(self._masks) * V // 8 + len(self._firsts) * V

    def advance(self, state: int, token: int) -> int:
        """The state after one more token; 0 if the token may not come."""
        vocabulary = self.vocabulary
        piece = vocabulary.pieces[token] if 0 <= token < vocabulary.size else b""
        with self._lock:
            try:
                if token in vocabulary.special_index:
                    return self.automaton.next_special(state, vocabulary.special_index[token])
                state = state if piece else 0
                for byte in piece:
                    state = self.automaton.next(state, byte)
                return state
            except (TooComplex, RecursionError):
                return 0

    def accepting(self, state: int) -> bool:
        """Whether the reply may end here."""
        with self._lock:
            return self.automaton.accepting(state)

    def ends(self, state: int) -> str | None:
        """Where no token may follow: "stop" if the reply may end here, else "length" (a limit of depth, or no token has
        the bytes that must come). None: it goes on."""
        with self._lock:
            is_final = self.automaton.is_final(state)
        if state and not is_final and self.mask(state).any():
            return None
        return "stop" if self.accepting(state) else "length"

    def mask(self, state: int) -> np.ndarray:
        """(ceil(V / 8),) uint8, little-endian bits: the tokens that may come next, without those that end a reply."""
        with self._lock:
            found = self._masks.get(state)
            if found is None:
                found = self._masks[state] = np.packbits(self._allowed(state), bitorder="little")
                if len(self._masks) > MAX_MASKS:
                    self._masks.popitem(last=False)
            else:
                self._masks.move_to_end(state)
            return found

    def allowed(self, state: int, stop_ids: set[int], size: int) -> np.ndarray:
        """(size,) bool: the tokens that may come next; those of stop_ids also where the reply may end."""
        bits = np.unpackbits(self.mask(state), bitorder="little", count=self.vocabulary.size).view(bool)
        result = np.zeros(size, bool)
        result[: min(size, len(bits))] = bits[:size]
        if self.accepting(state):
            result[[i for i in stop_ids if i < size]] = True
        return result

    def _allowed(self, state):
        """(V,) bool; nothing where the automaton has no room or no time for more states."""
        automaton = self.automaton
        automaton.terms.deadline = time.monotonic() + MASK_SECONDS
        try:
            allowed = self._walk_term(automaton.term_of[state])[0].copy()
            automaton.fill_row(state)
        except (TooComplex, RecursionError):
            return np.zeros(self.vocabulary.size, bool)
        finally:
            automaton.terms.deadline = None
        for k in automaton.special.get(state, ()):
            allowed[self.vocabulary.special_ids[k]] = True
        return allowed

    def _walk_term(self, term, as_first=False):
        """((V,) bool: tokens that begin what the term matches; as_first: the nodes at which a match ends)."""
        terms, nodes = self.automaton.terms, np.zeros(1, np.int64)
        term = self._shortened(term)
        if as_first and term in self._firsts:
            self._firsts.move_to_end(term)
            return self._firsts[term]
        kind, *parts = terms.nodes[term]
        allowed, ends, rest = np.zeros(self.vocabulary.size, bool), nodes[:0], term
        if kind == "cat" and self._ends_at_few(parts[0]):
            first, rest = parts
            allowed, nodes = self._walk_term(first, True)
            allowed, ends = allowed.copy(), nodes[nodes > 0] if terms.nullable(rest) else ends
        reached, more_ends = self._walk(nodes, self.automaton.state_of(rest), as_first)
        allowed[self.vocabulary.tokens_at(reached)] = True
        if as_first:
            start = [0] if terms.nullable(term) else []
            ends = np.unique(np.concatenate([start, ends, more_ends]).astype(np.int64))
            self._firsts[term] = allowed, ends
            if len(self._firsts) > MAX_FIRSTS:
                self._firsts.popitem(last=False)
        return allowed, ends

    def _ends_at_few(self, term):
        """Whether what matches seems to pass a fixed text or a rule, such as the quote behind a string: then it ends at
        few nodes of the trie, and not at every character."""
        nodes = self.automaton.terms.nodes
        while nodes[term][0] == "cat":
            last = nodes[term][2]
            while nodes[last][0] == "cat":
                last = nodes[last][2]
            if nodes[last][0] in ("literal", "set", "rule"):
                return True
            term = nodes[term][1]
        return False

    def _shortened(self, term):
        """A term that is the same for all tokens: no token holds more characters than the longest has bytes."""
        terms, longest = self.automaton.terms, self.vocabulary.longest
        kind, *parts = terms.nodes[term]
        if kind == "cat":
            first = self._shortened(parts[0])
            return term if first == parts[0] else terms.cat(first, parts[1])
        if kind == "repeat":
            inner, low, high = parts
            return terms.repeat(inner, min(low, longest + 1), None if high is None or high > longest else high)
        return term

    def _walk(self, nodes, state, with_ends):
        """Nodes of the trie, from which the automaton goes on in a state -> (the nodes that it reaches, those of them
        at which it accepts)."""
        vocabulary, automaton = self.vocabulary, self.automaton
        states, reached, ends = np.full(len(nodes), state, np.int64), [nodes[:0]], [nodes[:0]]
        while len(nodes):
            counts = vocabulary.num_children[nodes]
            inner = counts > 0
            nodes, states, counts = nodes[inner], states[inner], counts[inner]
            for each in self._met(states):
                automaton.fill_row(each)
            children = _ranges(vocabulary.first_child[nodes], counts)
            states = automaton.table[np.repeat(states, counts), vocabulary.byte[children]]
            follows = states > 0
            nodes, states = children[follows], states[follows]
            reached.append(nodes)
            if with_ends:
                accepting = np.zeros(len(automaton.term_of), bool)
                accepting[[each for each in self._met(states) if automaton.accepting(each)]] = True
                ends.append(nodes[accepting[states]])
        return np.concatenate(reached), np.concatenate(ends)

    def _met(self, states):
        """The different states among them."""
        met = np.zeros(len(self.automaton.term_of), bool)
        met[states] = True
        return np.flatnonzero(met).tolist()


def _ranges(first, count):
    """first[i], first[i] + 1, … (count[i] numbers), for all i in turn."""
    ends = np.cumsum(count)
    return np.repeat(first - (ends - count), count) + np.arange(int(ends[-1]) if len(ends) else 0)
