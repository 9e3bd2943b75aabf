"""JSON schema's keywords, and what two schemas say together: `merge` for allOf, `disjoint` for oneOf."""

from collections.abc import Callable

from formats.files import brief


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value):
    return _is_number(value) and value >= 0 and value == int(value) and value <= 1_000_000


def _is_schema(value):
    return isinstance(value, dict | bool)


def _is_schemas(value):
    return isinstance(value, dict) and all(map(_is_schema, value.values()))


def _is_list_of(check, least=1):
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(check, value))


TYPES = {  # the first that fits is a value's type
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) or (isinstance(value, float) and value.is_integer()),
    "number": _is_number,
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def _is_type(value):
    return isinstance(value, str) and value in TYPES


def _is_text(value):
    return isinstance(value, str)


# keyword: (what is expected, check, the types that it is about)
COUNT, NUMBER = ("a whole number from 0 to 1,000,000", _is_count), ("a number", _is_number)
SCHEMA, SCHEMAS = ("a schema", _is_schema), ("an object of schemas", _is_schemas)
LIST = ("a list of schemas", _is_list_of(_is_schema))
KEYWORDS = {
    "type": (f"one of {', '.join(TYPES)}, or a list of them",
             lambda value: _is_type(value) or _is_list_of(_is_type)(value), ()),
    "enum": ("a list", lambda value: isinstance(value, list), ()),
    "const": ("", lambda value: True, ()),
    "$ref": ("a JSON pointer", _is_text, ()),
    "allOf": (*LIST, ()), "anyOf": (*LIST, ()), "oneOf": (*LIST, ()),
    "nullable": ("true or false", lambda value: isinstance(value, bool), ()),
    "minLength": (*COUNT, "string"), "maxLength": (*COUNT, "string"),
    "pattern": ("a regular expression", lambda value: _is_text(value) or _is_list_of(_is_text)(value), "string"),
    "format": ("a name", _is_text, "string"),
    "minimum": (*NUMBER, "number"), "maximum": (*NUMBER, "number"),
    "exclusiveMinimum": (*NUMBER, "number"), "exclusiveMaximum": (*NUMBER, "number"),
    "items": ("a schema", lambda value: _is_schema(value) or _is_list_of(_is_schema, 0)(value), "array"),
    "prefixItems": (*LIST, "array"), "additionalItems": (*SCHEMA, "array"),
    "minItems": (*COUNT, "array"), "maxItems": (*COUNT, "array"),
    "properties": (*SCHEMAS, "object"), "patternProperties": (*SCHEMAS, "object"),
    "required": ("a list of names", _is_list_of(_is_text, 0), "object"),
    "additionalProperties": (*SCHEMA, "object"), "propertyNames": (*SCHEMA, "object"),
    "minProperties": (*COUNT, "object"), "maxProperties": (*COUNT, "object"),
}  # fmt: skip


# These change nothing of what is valid. discriminator only repeats what oneOf says.
ANNOTATIONS = ("title", "description", "default", "examples", "example", "$schema", "$id", "$comment", "$defs",
               "definitions", "readOnly", "writeOnly", "deprecated", "$anchor", "discriminator")  # fmt: skip


def types_of(schema: dict) -> list[str]:
    """The types that a schema without references allows; where it names none, those that its keywords are about."""
    types = schema.get("type")
    if types is not None:
        return [types] if isinstance(types, str) else list(types)
    about = {KEYWORDS[key][2] for key in schema if key in KEYWORDS and KEYWORDS[key][2]}
    values = "enum" in schema or "const" in schema
    return [kind for kind in TYPES if values or not about or kind in about]


def _types_together(one, two):
    both = [kind for kind in one if kind in two or (kind == "integer" and "number" in two)]
    return both + [kind for kind in two if kind == "integer" and "number" in one and kind not in both]


def _together(one: object, two: object) -> object:
    """Two schemas of the same place -> one."""
    if one is False or two is False:
        return False
    if one is True or equal(one, two):
        return two
    return one if two is True else {"allOf": [one, two]}


def merge(one: dict, two: dict, refuse: Callable) -> dict | None:
    """Two schemas without references and alternatives -> what they say together; None if their types differ.

    refuse(keyword, problem) raises for what cannot be said in one."""
    result = dict(one)
    for key, value in two.items():
        mine = result.get(key)
        if key not in result or equal(mine, value):
            result[key] = value
        elif key == "type":
            lists = [[types] if isinstance(types, str) else types for types in (mine, value)]
            result[key] = _types_together(*lists)
            if not result[key]:
                return None
        elif key in ("minLength", "minItems", "minProperties", "minimum", "exclusiveMinimum"):
            result[key] = max(mine, value)
        elif key in ("maxLength", "maxItems", "maxProperties", "maximum", "exclusiveMaximum"):
            result[key] = min(mine, value)
        elif key == "required":
            result[key] = list(dict.fromkeys([*mine, *value]))
        elif key == "pattern":
            result[key] = [
                *([mine] if isinstance(mine, str) else mine),
                *([value] if isinstance(value, str) else value),
            ]
        elif key == "enum":
            result[key] = [entry for entry in mine if any(equal(entry, other) for other in value)]
        elif key == "const":
            if not equal(mine, value):
                return None
        elif key not in ("properties", "additionalProperties"):
            if key in ("items", "propertyNames") and not isinstance(mine, list) and not isinstance(value, list):
                result[key] = _together(mine, value)
            else:
                refuse(key, f"{brief(mine)} and {brief(value)} together are not supported")
    if "enum" in result and "const" in result:
        result["enum"] = [entry for entry in result["enum"] if equal(entry, result["const"])]
    if "prefixItems" in one and "items" in two or "prefixItems" in two and "items" in one:
        if not all(equal(one.get(key), two.get(key)) for key in ("prefixItems", "items")):
            refuse("prefixItems", "together with another schema's items it is not supported")
    return _merge_properties(one, two, result, refuse)


def _merge_properties(one, two, result, refuse):
    keys = {"properties", "additionalProperties", "patternProperties"}
    if not (one.keys() & keys and two.keys() & keys):
        return result
    for schema, other in ((one, two), (two, one)):
        closed = any(each.get("additionalProperties", True) is not True for each in (one, two))
        if "patternProperties" in schema and closed and not equal(other, schema):
            refuse("patternProperties", "with additionalProperties and another schema's properties it is not supported")
    mine, others = one.get("properties", {}), two.get("properties", {})
    result["properties"] = {
        name: _together(
            mine.get(name, one.get("additionalProperties", True)),
            others.get(name, two.get("additionalProperties", True)),
        )
        for name in [*mine, *(name for name in others if name not in mine)]
    }
    additional = [schema["additionalProperties"] for schema in (one, two) if "additionalProperties" in schema]
    if additional:
        result["additionalProperties"] = _together(additional[0], additional[-1])
    return result


def equal(one: object, two: object) -> bool:
    """JSON's equality: 1 is 1.0 and not true."""
    if isinstance(one, bool) or isinstance(two, bool):
        return one is two
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(equal, one, two))
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    return one == two


def disjoint(one: object, two: object, target: Callable, depth: int = 0) -> bool:
    """Whether it is certain that no value is valid under both schemas. target: a schema with $ref -> what it names."""
    if one is False or two is False:
        return True
    if not isinstance(one, dict) or not isinstance(two, dict) or depth > 8:
        return False
    for here, there in ((one, two), (two, one)):
        if "$ref" in here and disjoint(target(here), there, target, depth + 1):
            return True
        if any(disjoint(part, there, target, depth + 1) for part in here.get("allOf", ())):
            return True
        for key in ("anyOf", "oneOf"):
            if key in here and all(disjoint(part, there, target, depth + 1) for part in here[key]):
                return True
    if one.get("nullable") or two.get("nullable"):
        return False
    return _disjoint_values(one, two) or _disjoint_objects(one, two, target, depth)


def _said_types(schema):
    """The types of all values that are valid; None where nothing is said."""
    if "enum" in schema or "const" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return {next(kind for kind, check in TYPES.items() if check(value)) for value in values}
    types = schema.get("type")
    return None if types is None else {types} if isinstance(types, str) else set(types)


def _disjoint_values(one, two):
    types = _said_types(one), _said_types(two)
    if None not in types and not _types_together(*map(sorted, types)):
        return True
    values = [[schema["const"]] if "const" in schema else schema.get("enum") for schema in (one, two)]
    if None not in values:
        return not any(equal(entry, other) for entry in values[0] for other in values[1])
    numeric = all(kinds is not None and kinds <= {"integer", "number"} for kinds in types)
    for here, there in ((one, two), (two, one)):
        highs = [here[key] for key in ("maximum", "exclusiveMaximum") if key in here]
        lows = [there[key] for key in ("minimum", "exclusiveMinimum") if key in there]
        if numeric and highs and lows and min(highs) < max(lows):
            return True
    return False


def _disjoint_objects(one, two, target, depth):
    """Two object schemas: a property that both require differs, or one requires what the other forbids."""
    if _said_types(one) != {"object"} or _said_types(two) != {"object"}:
        return False
    mine, others = one.get("properties", {}), two.get("properties", {})
    for here, there in ((one, two), (two, one)):
        closed = there.get("additionalProperties") is False and not there.get("patternProperties")
        if closed and any(name not in there.get("properties", {}) for name in here.get("required", ())):
            return True
    shared = [name for name in mine if name in others and name in {*one.get("required", ()), *two.get("required", ())}]
    return any(disjoint(mine[name], others[name], target, depth + 1) for name in shared)
