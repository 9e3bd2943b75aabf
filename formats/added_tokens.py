"""Tokens that were added to a tokenizer, written into its files so that transformers gives them the same ids."""

import json
from pathlib import Path
from typing import NamedTuple

from formats.files import UserError, _json_object, atomic_file


class AddedToken(NamedTuple):
    """A token that is found in text as a whole; special: left out of decoded text."""

    text: str
    id: int
    special: bool

    def to_json(self) -> dict:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        return {"content": self.text, **flags, "special": self.special}


def split_tokens(value: str | list[str] | None, key: str) -> list[str]:
    """The value of add_tokens, a list or one text with spaces between tokens -> the tokens, each once."""
    tokens = list(dict.fromkeys(value.split() if isinstance(value, str) else value or ()))
    if wrong := [token for token in tokens if not isinstance(token, str) or not token.strip()]:
        raise UserError(f"{key}: {wrong[0]!r} is not a token: text that is not blank is expected")
    return tokens


def write_added_tokens(folder: Path, tokens: list[AddedToken]) -> None:
    """Add tokens to the tokenizer's files in a folder: tokenizer.json, and the lists that lie beside other kinds."""
    path = folder / "tokenizer.json"
    if path.is_file():
        content = _json_object(path)
        rows = {row["content"]: row for row in content.get("added_tokens") or ()}
        rows |= {token.text: {"id": token.id, **token.to_json()} for token in tokens}
        content["added_tokens"] = sorted(rows.values(), key=lambda row: row["id"])
        _write(path, content)
    else:
        path = folder / "added_tokens.json"
        listed = _json_object(path) if path.is_file() else {}
        _write(path, listed | {token.text: token.id for token in tokens})
    has_flags, path = path.name == "tokenizer.json", folder / "tokenizer_config.json"
    if path.is_file() or not has_flags:
        content = _json_object(path) if path.is_file() else {}
        decoder = content.get("added_tokens_decoder") or {}
        content["added_tokens_decoder"] = decoder | {str(token.id): token.to_json() for token in tokens}
        special = [token.text for token in tokens if token.special]
        key = "extra_special_tokens" if isinstance(content.get("extra_special_tokens"), list) else None
        key = key or "additional_special_tokens"
        if special:
            content[key] = [*(content.get(key) or ()), *special]
        _write(path, content)


def _write(path: Path, content: dict) -> None:
    with atomic_file(path) as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
