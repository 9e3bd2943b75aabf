"""The fast tokenizers' file: tokenizer.json -> steps before byte pairs, the merges, and how ids become text again."""

import re
import unicodedata
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path

from formats.bpe import (
    BPE,
    GPT2_WORDS,
    MOST_IDS,
    SPACE,
    check_vocabulary_ids,
    compile_words,
    merge_ranks,
    prefix_step,
    split_step,
    to_nfc,
)
from formats.files import UserError, brief, read_json


def metaspace_step(replacement: str, scheme: str, split: bool) -> Callable:
    """Step that writes spaces as `replacement` and puts one before every piece (always), that at the text's beginning
    (first) or none (never); with split, each begins a new piece."""
    words = split_step(f"{re.escape(replacement)}[^{re.escape(replacement)}]*|[^{re.escape(replacement)}]+")

    def step(texts, at_start):
        texts = [text.replace(" ", replacement) for text in texts]
        for n, text in enumerate(texts):
            if not text.startswith(replacement) and (scheme == "always" or scheme == "first" and at_start and n == 0):
                texts[n] = replacement + text
        return words(texts, at_start) if split else texts

    return step


# What may stand in a tokenizer.json: part -> type -> its keys, with the default or, where one must be given, the type.
JSON_PARTS = {
    "normalizer": {
        "NFC": {}, "NFD": {}, "NFKC": {}, "NFKD": {}, "Prepend": {"prepend": str},
        "Replace": {"pattern": dict, "content": str}, "Sequence": {"normalizers": list}},
    "pre_tokenizer": {
        "ByteLevel": {"add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "Split": {"pattern": dict, "behavior": str, "invert": False}, "Digits": {"individual_digits": False},
        "Metaspace": {"replacement": SPACE, "add_prefix_space": True, "prepend_scheme": "always", "split": True,
                      "str_rep": SPACE}, "Sequence": {"pretokenizers": list}},
    "post_processor": {
        "ByteLevel": {"add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "TemplateProcessing": {"single": list, "pair": [], "special_tokens": dict}, "Sequence": {"processors": list}},
    "decoder": {
        "ByteLevel": {"add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "Metaspace": {"replacement": SPACE, "add_prefix_space": True, "prepend_scheme": "always", "split": True,
                      "str_rep": SPACE},
        "Replace": {"pattern": dict, "content": str}, "ByteFallback": {}, "Fuse": {},
        "Strip": {"content": str, "start": 0, "stop": 0}, "Sequence": {"decoders": list}},
    "model": {
        "BPE": {"vocab": dict, "merges": list, "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}},
}  # fmt: skip


def json_parts(spec: object, part: str, where: str) -> list[tuple]:
    """A component of tokenizer.json -> [(where, type, its keys)...], sequences laid flat, [] for null. UserError for a
    type or key that is not in JSON_PARTS."""
    if spec is None:
        return []
    known, kind = JSON_PARTS[part], spec.get("type") if isinstance(spec, dict) else None
    if kind is None and part == "model" and isinstance(spec, dict) and "merges" in spec:
        kind = "BPE"  # files of 2020 do not say
    if kind not in known:
        raise UserError(f"{where}: {brief(kind or spec)} is not supported; known are {', '.join(known)}")
    values = known[kind] | {key: value for key, value in spec.items() if key != "type"}
    if unknown := sorted(set(values) - set(known[kind])):
        raise UserError(f"{where}: unknown key {unknown[0]!r} of {kind}; known are {', '.join(known[kind]) or 'none'}")
    for key, default in known[kind].items():
        wanted = default if isinstance(default, type) else type(default)
        if default is not None and not isinstance(values[key], wanted):
            found = "nothing" if values[key] is default else brief(values[key])
            raise UserError(f"{where}.{key}: a {wanted.__name__} is expected, found {found}")
    if kind != "Sequence":
        return [(where, kind, values)]
    ((key, inner),) = values.items()
    return [found for n, one in enumerate(inner) for found in json_parts(one, part, f"{where}.{key}[{n}]")]


def pattern_text(pattern: dict, where: str) -> str:
    """{"String": text} or {"Regex": text} -> a pattern."""
    (kind, text), *more = pattern.items() or [(None, None)]
    if more or kind not in ("String", "Regex") or not isinstance(text, str):
        raise UserError(f'{where}.pattern: {{"String": text}} or {{"Regex": text}} is expected, found {brief(pattern)}')
    return re.escape(text) if kind == "String" else text


def json_normalizer(where: str, kind: str, values: dict) -> Callable:
    """-> function str -> str."""
    if kind == "Prepend":
        return lambda text: values["prepend"] + text if text else text
    if kind == "Replace":
        compiled, content = compile_words(pattern_text(values["pattern"], where), where), values["content"]
        return lambda text: compiled.sub(lambda match: content, text)
    return to_nfc if kind == "NFC" else partial(unicodedata.normalize, kind)


def json_steps(parts: list) -> tuple[list, bool]:
    """Parts of a pre_tokenizer -> (steps, whether the last of them was ByteLevel)."""
    steps = []
    for n, (where, kind, values) in enumerate(parts):
        if kind == "ByteLevel":
            if n + 1 < len(parts):
                raise UserError(f"{where}: ByteLevel must come last; {parts[n + 1][1]} follows")
            steps += [prefix_step] if values["add_prefix_space"] else []
            steps += [split_step(GPT2_WORDS)] if values["use_regex"] else []
        elif kind == "Metaspace":
            scheme = values["prepend_scheme"] if values["add_prefix_space"] else "never"
            if scheme not in ("always", "first", "never"):
                raise UserError(f"{where}.prepend_scheme: always, first or never is expected, found {brief(scheme)}")
            steps.append(metaspace_step(values["replacement"], scheme, values["split"]))
        elif kind == "Digits":
            steps.append(split_step(r"\p{N}" if values["individual_digits"] else r"\p{N}+"))
        elif values["behavior"] not in ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext"):
            raise UserError(
                f"{where}.behavior: {brief(values['behavior'])} is not supported; known are Isolated, Removed, "
                "MergedWithPrevious, MergedWithNext"
            )
        else:
            pattern = pattern_text(values["pattern"], where)
            steps.append(split_step(pattern, values["behavior"], values["invert"], where))
    return steps, bool(parts) and parts[-1][1] == "ByteLevel"


def json_around(parts: list) -> tuple[list, list]:
    """Parts of a post_processor -> (ids before a text, ids after it)."""
    head, tail = [], []
    for where, kind, values in parts:
        if kind == "ByteLevel":
            continue  # moves offsets, which nobody here asks for
        side = None
        for n, item in enumerate(values["single"]):
            what, about = next(iter(item.items())) if isinstance(item, dict) and item else (None, None)
            token = about.get("id") if isinstance(about, dict) else None
            if what == "Sequence" and token == "A" and side is None:
                side = tail
                continue
            entry = values["special_tokens"].get(token) if what == "SpecialToken" else None
            ids = entry.get("ids") if isinstance(entry, dict) else None
            if not isinstance(ids, list):
                raise UserError(
                    f"{where}.single[{n}]: a SpecialToken of special_tokens or, once, the Sequence A is expected, "
                    f"found {brief(item)}"
                )
            (head if side is None else tail).extend(ids)
        if side is None:
            raise UserError(f"{where}.single: it has no Sequence A, the text itself")
    return head, tail


def json_decoder(parts: list, where: str) -> tuple[bool, int]:
    """Parts of a decoder -> (whether it is ByteLevel, how many leading spaces it drops)."""
    kinds = [kind for _, kind, _ in parts]
    if kinds == ["ByteLevel"]:
        return True, 0
    lead = 0
    for at, kind, values in parts:
        if kind == "Metaspace":
            lead = int(values["add_prefix_space"] and values["prepend_scheme"] != "never")
        elif kind == "Strip":
            lead = values["start"]
        if (
            kind == "ByteLevel"
            or kind == "Replace"
            and (values["pattern"], values["content"]) != ({"String": SPACE}, " ")
            or kind == "Strip"
            and (values["content"], values["stop"]) != (" ", 0)
            or kind == "Metaspace"
            and values["replacement"] != SPACE
        ):
            raise UserError(f"{at}: this {kind} is not supported here: {brief(values)}")
    if not {"Replace", "Metaspace"} & set(kinds):
        raise UserError(
            f"{where}: ByteLevel, or a Sequence with Metaspace or with {SPACE!r} replaced by a space, is "
            f"wanted; found {', '.join(kinds) or 'null'}"
        )
    return False, lead


def read_tokenizer_json(path: Path) -> tuple:
    """tokenizer.json -> (BPE, its added tokens, ids before a text, ids after it, leading spaces that decoding
    drops)."""
    spec = read_json(path)
    if not isinstance(spec, dict) or not spec.get("model"):
        raise UserError(f"{path}: an object with a model is expected, found {brief(spec)}")
    parts = {name: json_parts(spec.get(name), name, f"{path}: {name}") for name in JSON_PARTS}
    where, _, model = parts["model"][0]
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[key]:
            raise UserError(f"{where}.{key}: {brief(model[key])} is not supported")
    vocab, unk = model["vocab"], model["unk_token"]
    check_vocabulary_ids(vocab, f"{where}.vocab")
    if unk is not None and (not isinstance(unk, str) or unk not in vocab):
        raise UserError(f"{where}.unk_token: {brief(unk)} is not in the vocabulary")
    merges = [
        tuple(pair.split(" ") if isinstance(pair, str) else pair if isinstance(pair, list) else ())
        for pair in model["merges"]
    ]
    if {*map(len, merges)} - {2} or {*map(type, chain.from_iterable(merges))} - {str}:
        number = next(n for n, pair in enumerate(merges) if len(pair) != 2 or {*map(type, pair)} != {str})
        raise UserError(f"{where}.merges[{number}]: two symbols are expected, found {brief(model['merges'][number])}")
    ranks = merge_ranks(merges, vocab, lambda number: f"{where}.merges[{number}]")
    steps, byte_level = json_steps(parts["pre_tokenizer"])
    decodes_bytes, lead = json_decoder(parts["decoder"], f"{path}: decoder")
    if byte_level != decodes_bytes:
        raise UserError(
            f"{path}: pre_tokenizer and decoder must both be ByteLevel or both not; one is, the other is not"
        )
    added = spec.get("added_tokens") or []
    for n, token in enumerate(added):
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or type(token.get("id")) is not int:
            raise UserError(
                f"{path}: added_tokens[{n}]: an object with content and id is expected, found {brief(token)}"
            )
        if not 0 <= token["id"] < MOST_IDS:
            raise UserError(f"{path}: added_tokens[{n}]: the id {token['id']} is not between 0 and {MOST_IDS - 1}")
        if token.get("single_word"):
            raise UserError(f"{path}: added_tokens[{n}]: single_word of {token['content']!r} is not supported")
    engine = BPE(
        vocab,
        ranks,
        steps,
        [json_normalizer(*part) for part in parts["normalizer"]],
        byte_level,
        model["ignore_merges"],
        unk,
        model["fuse_unk"],
        model["byte_fallback"],
    )
    return engine, added, *json_around(parts["post_processor"]), lead
