"""Configuration files: flat keys in JSON or YAML -> {key: (value, line)}, strictly.

A key that is given twice, a number that is not finite and anything that is no mapping are errors with file and line.
YAML is read by the core schema of YAML 1.2: 1e-4 is a number, and yes, no, on and off are text. It needs PyYAML.
"""

import collections
import json
import math
import re
from pathlib import Path

from formats.files import UserError

MAX_DEPTH = 20  # of YAML: an anchor can hold itself
CORE_SCHEMA = (  # plain scalars of YAML 1.2; anything else is text
    (r"~|null|Null|NULL|", lambda text: None),
    (r"true|True|TRUE", lambda text: True),
    (r"false|False|FALSE", lambda text: False),
    (r"[-+]?[0-9]+", int),
    (r"0o[0-7]+|0x[0-9a-fA-F]+", lambda text: int(text, 0)),
    (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", float),
    (r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", lambda text: math.nan),
)


def read_config(path: str) -> dict[str, tuple[object, int]]:
    """{key: (value, line)} of a file of flat keys: YAML if its name ends in .yaml or .yml, else JSON. UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; arguments are JSON or YAML files, then --key value") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as UTF-8 text: {error}") from None
    return _read_yaml(path, text) if path.endswith((".yaml", ".yml")) else _read_json(path, text)


def _read_json(path, text):
    def line_of(key, which=0):
        places = [
            match.start() for match in re.finditer(re.escape(json.dumps(key, ensure_ascii=False)) + r"\s*:", text)
        ]
        return 1 + text.count("\n", 0, places[which]) if places else 1  # none: the file writes the key with escapes

    def unique(pairs):
        for key, count in collections.Counter(key for key, _ in pairs).items():
            if count > 1:
                raise UserError(f"{path}:{line_of(key, -1)}: key {key!r} is given {count} times; keep one")
        return dict(pairs)

    def finite(name):
        raise UserError(f"{path}: {name} is not a JSON number")

    try:
        config = json.loads(text, object_pairs_hook=unique, parse_constant=finite)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{path}: not a file of flat keys: it is nested too deeply") from None
    if not isinstance(config, dict):
        raise UserError(f'{path}: holds a {type(config).__name__}; an object is needed: {{"learning_rate": 1e-4, …}}')
    return {key: (value, line_of(key)) for key, value in config.items()}


def _read_yaml(path, text):
    try:
        import yaml
    except ImportError:
        raise UserError(f"{path}: reading YAML needs PyYAML: pip install pyyaml (JSON needs nothing)") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise UserError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(node, yaml.MappingNode):
        found = "nothing" if node is None else f"a {node.id}"
        raise UserError(f"{path}: holds {found}; keys and values are needed: learning_rate: 1e-4")
    value = _yaml_value(path, node, 0)
    lines = {key.value: key.start_mark.line + 1 for key, _ in node.value}
    return {key: (item, lines[key]) for key, item in value.items()}


def _yaml_value(path, node, depth):
    """A node of PyYAML as a JSON value."""
    where = f"{path}:{node.start_mark.line + 1}"
    if depth > MAX_DEPTH:
        raise UserError(f"{where}: not a file of flat keys: it is nested more than {MAX_DEPTH} deep")
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        raise UserError(f"{where}: the tag {node.tag!r} is not read; give a plain value")
    if node.id == "sequence":
        return [_yaml_value(path, item, depth + 1) for item in node.value]
    if node.id == "scalar":
        if node.style is not None:  # quoted, or a block of text
            return node.value
        for pattern, convert in CORE_SCHEMA:
            if re.fullmatch(pattern, node.value):
                value = convert(node.value)
                if isinstance(value, float) and not math.isfinite(value):
                    raise UserError(f"{where}: {node.value} is not a finite number")
                return value
        return node.value
    found = {}
    for key, item in node.value:
        if key.id != "scalar":
            raise UserError(f"{path}:{key.start_mark.line + 1}: a key must be one word, found a {key.id}")
        if key.value in found:
            raise UserError(f"{path}:{key.start_mark.line + 1}: key {key.value!r} is given twice; keep one")
        found[key.value] = _yaml_value(path, item, depth + 1)
    return found
