"""JSON schemas for tests: random ones, and the shapes of the public JSON-Schema-Test-Suite and of client libraries."""

TREE = {"$defs": {"node": {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"anyOf": [
    {"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["v", "next"], "additionalProperties": False}},
    "$ref": "#/$defs/node"}  # fmt: skip
CAT, DOG = (
    {"type": "object", "properties": {"kind": {"const": kind}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
     "required": ["kind", "n"], "additionalProperties": False} for kind in ("cat", "dog"))  # fmt: skip


SHAPES = [
    True, {}, {"type": "null"}, {"type": "boolean"}, {"type": "integer"}, {"type": "number"}, {"type": "array"},
    {"type": "object"}, {"type": "string", "maxLength": 5}, {"type": ["null", "integer"]},
    {"enum": [1, "a", None, True, {"a": [1, 2]}, [], 1.5]}, {"const": "é\"\\\n"}, {"const": {"b": 1, "a": [None]}},
    {"type": "string", "minLength": 2, "maxLength": 4}, {"type": "string", "pattern": "^[a-c]{1,3}$"},
    {"type": "string", "pattern": "^(foo|ba[rz])\\d?$", "minLength": 4},
    {"type": "string", "pattern": "^[^x]{2}$"}, {"type": "string", "pattern": "^(?=.*[A-C])(?=.*[0-9]).{3,5}$"},
    {"type": "string", "pattern": "^(?!^[-+.]*$)[+-]?0*\\d*\\.?\\d*$", "maxLength": 6},
    {"type": "string", "pattern": "^a|b$", "maxLength": 6},
    *({"type": "string", "format": name} for name in
      ("date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "uri", "hostname", "duration")),
    {"type": "integer", "minimum": -3, "maximum": 12}, {"type": "integer", "exclusiveMinimum": 0, "maximum": 1000},
    {"type": "integer", "minimum": 0.5, "exclusiveMaximum": 3.5}, {"type": "integer", "format": "int32"},
    {"type": "integer", "format": "uint64", "maximum": 99}, {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": -1.25, "exclusiveMaximum": 2}, {"type": "number", "maximum": -0.001},
    {"minimum": 5}, {"maxLength": 3}, {"required": ["a"]}, {"properties": {"a": {"type": "boolean"}}},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}}, "required": ["b"]},
    {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "boolean"}},
    {"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": True},
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 2},
    {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}, "minProperties": 2,
     "maxProperties": 2},
    {"type": "object", "properties": {}}, {"type": "object", "required": ["x", "y"]},
    {"type": "object", "patternProperties": {"^f": {"type": "integer"}, "^b": {"type": "null"}},
     "additionalProperties": False, "minProperties": 1},
    {"type": "object", "patternProperties": {"^f.$": {"type": "integer"}}, "additionalProperties": {"type": "null"},
     "properties": {"foo": {"type": "boolean"}, "fa": {"minimum": 5}}},
    {"type": "object", "propertyNames": {"pattern": "^[ab]+$", "maxLength": 3}, "additionalProperties": {"const": 0}},
    {"type": "object", "propertyNames": {"enum": ["x", "y"]}, "additionalProperties": {"type": "boolean"}},
    {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string", "maxLength": 2}]},
    {"type": "array", "prefixItems": [{"const": 1}], "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": False, "minItems": 1},
    {"type": "array", "items": {"type": "array", "items": {"enum": [0, 1]}, "maxItems": 2}, "maxItems": 2},
    {"anyOf": [{"type": "integer", "minimum": 2}, {"type": "string", "maxLength": 2}]},
    {"oneOf": [{"type": "integer"}, {"type": "null"}]}, {"oneOf": [CAT, DOG]},
    {"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}], "$defs": {"cat": CAT, "dog": DOG},
     "discriminator": {"propertyName": "kind"}},
    {"type": "object", "properties": {"pet": {"anyOf": [CAT, DOG, {"type": "null"}]}}, "required": ["pet"]},
    {"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 30}, {"minimum": 7}]},
    {"allOf": [CAT, {"properties": {"n": {"minimum": 4}}}]},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
               {"type": "object", "properties": {"b": {"const": "x"}}, "required": ["b"]}]},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
     "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    {"type": "string", "enum": ["a", "bb", 3, "ccc"], "maxLength": 2}, {"type": "string", "nullable": True,
                                                                       "maxLength": 1},
    {"$ref": "#/definitions/a~1b", "definitions": {"a/b": {"type": "boolean"}}, "title": "t", "default": 3}, TREE,
    {"$defs": {"t": {"type": "object", "properties": {"left": {"$ref": "#/$defs/t"}, "right": {"$ref": "#/$defs/t"},
                     "w": {"enum": [1, 2]}}, "required": ["w"]}}, "type": "array", "items": {"$ref": "#/$defs/t"},
     "maxItems": 2},
    {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
    {"$ref": "#/$defs/p", "$defs": {"p": {"type": "object", "properties": {"q": {"type": "integer"}}}},
     "required": ["q"]},
    {"allOf": [{"anyOf": [{"type": "integer"}, {"type": "string"}]}, {"anyOf": [{"maximum": 5, "type": "integer"},
                                                                             {"type": "boolean"}]}]},
    {"type": ["string", "array"], "maxLength": 2, "maxItems": 1, "items": {"type": "null"}},
    {"x-ours": 1, "type": "integer", "maximum": 10**20, "minimum": 10**19}, {"type": "array", "uniqueItems": False,
                                                                            "maxItems": 1},
]  # fmt: skip


REFUSED = [
    ({"type": "object", "properties": {"a": {"not": {}}}}, "#/properties/a/not: keyword 'not'"),
    ({"type": "integer", "multipleOf": 3}, "#/multipleOf: keyword 'multipleOf'"),
    ({"type": "array", "items": {"a~/": {}, "type": "array", "uniqueItems": True}}, "#/items/a~0~1: keyword 'a~/'"),
    ({"type": "array", "uniqueItems": True}, "#/uniqueItems: keyword 'uniqueItems'"),
    ({"allOf": [{"if": {}}, {}]}, "#/allOf/0/if: keyword 'if'"),
    ({"anyOf": [{"type": "null"}, {"contains": {}}]}, "#/anyOf/1/contains: keyword 'contains'"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"dependentRequired": {}}}}, "#/$defs/a/dependentRequired: keyword"),
    ({"type": "object", "unevaluatedProperties": False}, "#/unevaluatedProperties: keyword"),
    ({"$ref": "http://a/b"}, "#/$ref: "), ({"$ref": "#/$defs/none"}, "#/$ref: nothing is at"),
    ({"type": "strin"}, "#/type: one of null"), ({"type": "string", "maxLength": -1}, "#/maxLength: a whole number"),
    ({"type": "string", "pattern": "(?<=a)"}, "#/pattern: '(?<=' is not supported"),
    ({"type": "string", "pattern": "a\\b"}, "#/pattern: '\\b' is not supported"),
    ({"type": "string", "format": "color"}, '#/format: "color" is not supported; known are'),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf: branches 0 and 1"),
    ({"oneOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"a": {"const": 2}}}]}, "#/oneOf: branches"),
    ({"$defs": {"a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/a"}}, "required": ["b"]}},
      "$ref": "#/$defs/a"}, "#/$defs/a: no finite value"),
    ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "#/$defs/a: no finite value"),
    ({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "#/$defs/a/allOf/0: combined"),
    ({"const": True, "allOf": [{"const": 1}]}, "#: no finite value"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "#: no value"), (False, "#: no value"),
    ({"type": "integer", "minimum": 0.2, "maximum": 0.8}, "#: no value"), ({"enum": []}, "#: no value"),
    ({"type": "string", "pattern": "^a$", "minLength": 2}, "#: no value"), (3, "#: a schema must be"),
    ({"patternProperties": {"a": {"type": "integer"}, "b": {"type": "null"}}}, "#/patternProperties: "),
    ({"type": "object", "minProperties": 3, "additionalProperties": True}, "#/minProperties: supported up to"),
]  # fmt: skip


def random_schema(rng, depth=0):
    """A schema drawn with random.Random."""
    kinds = ["integer", "number", "string", "enum", "const", "boolean", "null"]
    kind = rng.choice(kinds + (["object"] * 5 + ["array"] * 3 + ["anyOf", "allOf"] if depth < 3 else []))
    if kind in ("boolean", "null"):
        return {"type": kind}
    if kind in ("integer", "number"):
        low, high = sorted(
            rng.choice([-100, -7, 0, 0.5, 1, 12, 99, 1000, round(rng.uniform(-50, 50), 2)]) for _ in "ab"
        )
        limits = {rng.choice(["minimum", "exclusiveMinimum"]): low, "maximum": high + 2}
        return {"type": kind} | {key: value for key, value in limits.items() if rng.random() < 0.6}
    if kind == "string":
        low = rng.randrange(4)
        extra = rng.choice(
            [
                {},
                {"maxLength": low + rng.randrange(5), "minLength": low},
                {"format": "date"},
                {"pattern": rng.choice(["^[a-f]{2,4}$", "^\\w+-\\d{2}$", "x", "^(a|bc)*$"])},
            ]
        )
        return {"type": kind, **extra}
    values = [1, -2.5, "a", "né\n", None, True, [1], {"k": "v"}, "", 10**12]
    if kind == "enum":
        return {"enum": rng.sample(values, rng.randrange(1, 5))}
    if kind == "const":
        return {"const": rng.choice(values)}
    if kind == "array":
        low = rng.randrange(3)
        return {
            "type": kind,
            "items": random_schema(rng, depth + 1),
            "minItems": low,
            "maxItems": low + rng.randrange(3),
        }
    if kind in ("anyOf", "allOf"):
        parts = [random_schema(rng, depth + 1) for _ in range(2)]
        return {"anyOf": parts} if kind == "anyOf" else {"allOf": [parts[0], {"title": "same"}, parts[0]]}
    names = rng.sample(["a", "b", "name", "x y", "é", 'q"', "id", "list"], rng.randrange(1, 5))
    schema = {"type": kind, "properties": {name: random_schema(rng, depth + 1) for name in names}}
    schema["required"] = [name for name in names if rng.random() < 0.6]
    if rng.random() < 0.7:
        schema["additionalProperties"] = rng.choice([False, False, {"type": "boolean"}])
    return schema


VALUES = [0, 1, -1, 2, 5, 7, 12, 100, 0.5, -2.5, "", "a", "ab", "foo", "2024-02-29", "2023-02-29", "a-11", "n\n", None,
          True, False, [], {}, [1], {"a": 1}, 10**12]  # fmt: skip


def changed(value, rng):
    """A JSON value near this one: a part of it is left out, added, moved or another."""
    if rng.random() < 0.25:
        return rng.choice(VALUES)
    if isinstance(value, dict) and value:
        value, key, kind = dict(value), rng.choice(list(value)), rng.random()
        if kind < 0.25:
            del value[key]
        elif kind < 0.4:
            value[rng.choice(["zz", "a", "b", "foo", "fa"])] = rng.choice(VALUES)
        elif kind < 0.5:
            value[key] = value.pop(key)  # the last now
        else:
            value[key] = changed(value[key], rng)
        return value
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        new = rng.choice([[], [rng.choice(VALUES), value[at]], [changed(value[at], rng)]])
        return value[:at] + new + value[at + 1 :]
    if isinstance(value, str) and value:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(["", "a", "1", "-", '"', value[at] * 2]) + value[at + 1 :]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return rng.choice([value + 1, value - 1, -value, value * 2, value + 0.25])
    return rng.choice(VALUES)
