"""Whether a JSON value is valid under a JSON schema (draft 2020-12), for the keywords that serving/schema.py takes:
a plain walk that knows nothing of automata. `nullable` is OpenAPI's."""

import datetime
import ipaddress
import re
import uuid


def equal(a, b):
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return type(a) in (int, float) and type(b) in (int, float) and a == b or type(a) is type(b) and a == b


def has_type(value, kind):
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {
        "null": value is None,
        "boolean": isinstance(value, bool),
        "string": isinstance(value, str),
        "number": is_number,
        "integer": is_number and value == int(value),
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
    }[kind]


def has_format(text, name):
    checks = {
        "date": datetime.date.fromisoformat,
        "time": datetime.time.fromisoformat,
        "uuid": uuid.UUID,
        "date-time": datetime.datetime.fromisoformat,
        "ipv4": ipaddress.IPv4Address,
        "ipv6": ipaddress.IPv6Address,
    }
    patterns = {
        "email": r"[^@\s]+@[^@\s]+\.[^@\s]+",
        "uri": r"https?://[^\s/]+(/\S*)?",
        "hostname": r"[\w.-]+",
        "duration": r"P(?=.)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=.)(\d+H)?(\d+M)?(\d+S)?)?)",
    }
    if name in patterns:
        return re.fullmatch(patterns[name], text) is not None
    try:
        checks[name](text)
    except ValueError:
        return False
    return True


def is_valid(value, schema, root=None):
    root = schema if root is None else root
    if isinstance(schema, bool):
        return schema
    if schema.get("nullable") and value is None:
        return True
    if "$ref" in schema:
        target = root
        for part in schema["$ref"].split("/")[1:]:
            target = target[part.replace("~1", "/").replace("~0", "~")]
        if not is_valid(value, target, root):
            return False
    checks = [
        all(is_valid(value, part, root) for part in schema.get("allOf", ())),
        "anyOf" not in schema or any(is_valid(value, part, root) for part in schema["anyOf"]),
        "oneOf" not in schema or sum(is_valid(value, part, root) for part in schema["oneOf"]) == 1,
        "enum" not in schema or any(equal(value, each) for each in schema["enum"]),
        "const" not in schema or equal(value, schema["const"]),
    ]
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    checks.append(not types or any(has_type(value, kind) for kind in types))
    checks += limits(value, schema, root)
    return all(checks)


def limits(value, schema, root):
    get = schema.get
    if isinstance(value, str):
        patterns = get("pattern", [])
        patterns = [patterns] if isinstance(patterns, str) else patterns
        yield get("minLength", 0) <= len(value) <= get("maxLength", len(value))
        yield all(re.search(pattern, value, re.ASCII) for pattern in patterns)
        yield "format" not in schema or has_format(value, schema["format"])
    elif has_type(value, "number"):
        yield get("minimum", value) <= value <= get("maximum", value)
        yield "exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"]
        yield "exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"]
    elif isinstance(value, list):
        prefix = get("prefixItems", [])
        yield get("minItems", 0) <= len(value) <= get("maxItems", len(value))
        yield all(is_valid(item, part, root) for item, part in zip(value, prefix))
        yield all(is_valid(item, get("items", True), root) for item in value[len(prefix) :])
    elif isinstance(value, dict):
        yield all(name in value for name in get("required", ()))
        yield get("minProperties", 0) <= len(value) <= get("maxProperties", len(value))
        yield all(is_valid(name, get("propertyNames", True), root) for name in value)
        for name, item in value.items():
            parts = [get("properties", {})[name]] if name in get("properties", {}) else []
            parts += [part for pattern, part in get("patternProperties", {}).items() if re.search(pattern, name)]
            yield all(is_valid(item, part, root) for part in parts or [get("additionalProperties", True)])
