"""A JSON schema -> a term of automaton.py that matches JSON texts which are valid under it.

    term = compile_schema(terms, {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})

What the texts look like: an object has its properties in the schema's order, optional ones may be missing; one with
`properties` that says nothing of additionalProperties has these alone; an array with prefixItems and no items has these
alone. Between tokens there may be one space, or one line break with up to 20 spaces. An integer has at most 18 digits.
JSON without a schema nests up to MAX_FREE_DEPTH deep. A keyword that would change what is valid and is not supported is
refused by its JSON pointer.
"""

import json
from urllib.parse import unquote

from formats.files import UserError, brief
from serving.automaton import EMPTY, EPSILON, Terms
from serving.numbers import exact, integer_term, number_term
from serving.patterns import ANY, Characters, compile_pattern
from serving.schema_logic import ANNOTATIONS, KEYWORDS, TYPES, disjoint, equal, merge, types_of

MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH = 256_000, 64
MAX_FREE_DEPTH = 16  # objects and arrays inside each other where no schema says what they hold
MAX_ALTERNATIVES = 256  # of anyOf inside allOf, multiplied out
MAX_COUNTED = 64  # minProperties and maxProperties
MAX_LINE_SPACES = 20

_DAY = "(?:0[1-9]|1[0-9]|2[0-8])"
_LEAP = "(?:[12][0-9](?:0[48]|[2468][048]|[13579][26])|[12][048]00)"
DATE = (
    f"(?:[12][0-9]{{3}}-(?:(?:0[1-9]|1[0-2])-{_DAY}|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)|{_LEAP}-02-29)"
)
TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,30}[a-zA-Z0-9])?"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_HEX = "[0-9a-fA-F]"
_PATH = "(?:/[a-zA-Z0-9._~!$&'()*+,;=:@-]{1,60}){0,20}/?"
FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}T{TIME}",
    "duration": "P(?:[0-9]{1,4}W|[0-9]{1,4}D(?:T[0-9]{1,4}[HMS])?|[0-9]{1,4}Y(?:[0-9]{1,4}M(?:[0-9]{1,4}D)?)?"
    "|[0-9]{1,4}M(?:[0-9]{1,4}D)?|T(?:[0-9]{1,4}H(?:[0-9]{1,4}M(?:[0-9]{1,4}S)?)?|[0-9]{1,4}M(?:[0-9]{1,4}S)?"
    "|[0-9]{1,4}S))",
    "email": rf"[a-zA-Z0-9_+-]{{1,32}}(?:\.[a-zA-Z0-9_+-]{{1,32}}){{0,3}}@{_LABEL}(?:\.{_LABEL}){{1,4}}",
    "hostname": rf"{_LABEL}(?:\.{_LABEL}){{0,5}}",
    "uuid": f"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}",
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "ipv6": f"(?:{_HEX}{{1,4}}:){{7}}{_HEX}{{1,4}}|(?:{_HEX}{{1,4}}:){{1,6}}:{_HEX}{{1,4}}|::{_HEX}{{1,4}}|::",
    "uri": rf"https?://{_LABEL}(?:\.{_LABEL}){{0,5}}(?::[1-9][0-9]{{1,3}})?{_PATH}(?:\?[a-zA-Z0-9._~&=+-]{{0,200}})?"
    r"(?:#[a-zA-Z0-9._~&=+-]{1,60})?",
}
FORMATS["uri-reference"] = FORMATS["iri"] = FORMATS["uri"]
FORMATS["idn-email"] = FORMATS["email"]
FORMATS["uuid4"] = f"{_HEX}{{8}}-{_HEX}{{4}}-4{_HEX}{{3}}-[89abAB]{_HEX}{{3}}-{_HEX}{{12}}"  # pydantic's
HINT_FORMATS = ("password", "path", "file-path", "directory-path")  # for people, not for what is valid
NUMBER_FORMATS = {  # OpenAPI's
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "uint32": (0, 2**32 - 1),
    "uint64": (0, 2**64 - 1),
}

HINTS = {
    "not": "say what is allowed instead",
    "multipleOf": "list the values with enum, or check it in the client",
    "uniqueItems": "check it in the client",
    "contains": "check it in the client",
    "if": "write the cases as anyOf",
    "then": "write the cases as anyOf",
    "else": "write the cases as anyOf",
    "dependentRequired": "write the cases as anyOf",
    "dependentSchemas": "write the cases as anyOf",
    "unevaluatedProperties": "use additionalProperties: false in one object schema",
    "$dynamicRef": "use $ref",
    "$recursiveRef": "use $ref",
}


def compile_schema(terms: Terms, schema: object) -> int:
    """A JSON schema (draft 2020-12, or the same words of older ones) -> the term of its texts.

    UserError "#/pointer: what is wrong; what would be right"."""
    compiler = SchemaCompiler(terms, schema)
    term = compiler.value(schema)
    compiler.refuse_endless(term)
    return term


class SchemaCompiler:
    """One schema document. Every `$ref` target becomes a rule, so that it may refer to itself."""

    def __init__(self, terms: Terms, document: object):
        try:
            size = len(json.dumps(document, ensure_ascii=False).encode())
        except (UnicodeEncodeError, RecursionError, ValueError) as error:
            raise UserError(f"#: not JSON: {error}") from None
        if size > MAX_SCHEMA_BYTES:
            raise UserError(f"#: a schema of {size:,} bytes; at most {MAX_SCHEMA_BYTES:,} are allowed")
        self.terms, self.document, self.kept = terms, document, []  # kept: merged schemas, so that no id is used twice
        self.pointers, self.rules, self.free_values = {}, {}, {}
        self._walk(document)
        self.text = Characters(terms, in_json=True)
        space = terms.literal(b" ")
        line = terms.cat(terms.literal(b"\n"), terms.repeat(space, 0, MAX_LINE_SPACES))
        self.blank = terms.alt((EPSILON, space, line))
        self.comma = terms.cat(terms.literal(b","), self.blank)
        self.colon = terms.cat(terms.literal(b":"), terms.optional(space))
        self.quote = terms.literal(b'"')
        self.key_char = self.text.of(ANY)  # a character is written in one way only, so that keys can be compared
        unit = compile_pattern(
            r"\\/|\\u(?:[0-9A-Ca-cEeFf][0-9A-Fa-f]{3}|[dD][0-7][0-9A-Fa-f]{2}"
            r"|[dD][89ABab][0-9A-Fa-f]{2}\\u[dD][C-Fc-f][0-9A-Fa-f]{2})",
            Characters(terms),
        )
        self.char = terms.alt((self.key_char, unit))

    # ---- places and errors

    def _walk(self, document):
        """Note the JSON pointer of every object of the document."""
        stack = [("#", document, 0)]
        while stack:
            pointer, value, depth = stack.pop()
            if depth > MAX_SCHEMA_DEPTH:
                raise UserError(f"{pointer[:100]}: nested deeper than {MAX_SCHEMA_DEPTH}, which is the most")
            if isinstance(value, dict):
                self.pointers[id(value)] = pointer
                for key, inner in value.items():
                    stack.append((f"{pointer}/{_escaped(key)}", inner, depth + 1))
            elif isinstance(value, list):
                stack += [(f"{pointer}/{i}", inner, depth + 1) for i, inner in enumerate(value)]

    def where(self, schema):
        return self.pointers.get(id(schema), "#")

    def refuse(self, schema, keyword, problem):
        raise UserError(f"{self.where(schema)}/{_escaped(keyword)}: {problem}")

    def check(self, schema, where="#"):
        """UserError if it is no schema, or has a keyword that is not supported."""
        if not isinstance(schema, dict):
            raise UserError(f"{where}: a schema must be an object, true or false; found {brief(schema)}")
        for keyword, value in schema.items():
            kind = KEYWORDS.get(keyword)
            if keyword in ANNOTATIONS or keyword.startswith("x-"):
                continue
            if kind is None and value is False and keyword == "uniqueItems":
                continue
            if kind is None:
                name = keyword if keyword.isascii() else ascii(keyword)
                hint = HINTS.get(keyword, "leave it out, or check it in the client")
                self.refuse(schema, keyword, f"keyword {name[:40]!r} is not supported; {hint}")
            if not kind[1](value):
                self.refuse(schema, keyword, f"{kind[0]} is expected, found {brief(value)}")
        return schema

    # ---- schemas

    def value(self, schema) -> int:
        """A schema -> the term of its values."""
        if schema is True or schema == {}:
            return self.free_value(MAX_FREE_DEPTH)
        if schema is False:
            return EMPTY
        rest = {key: value for key, value in self.check(schema).items() if key in KEYWORDS}
        if list(rest) == ["$ref"]:
            return self.reference(schema)
        for key in ("anyOf", "oneOf"):
            if list(rest) == [key]:
                self.check_branches(schema, key)
                return self.terms.alt(self.value(branch) for branch in rest[key])
        if rest.keys() & {"$ref", "allOf", "anyOf", "oneOf", "nullable"}:
            return self.rule_of(
                json.dumps(rest, sort_keys=True), lambda: self.terms.alt(map(self.flat, self.flatten(schema))), schema
            )
        return self.flat(schema)

    def rule_of(self, key, build, schema) -> int:
        """The rule for a key, built when it is first asked for; it may be asked for again meanwhile."""
        if key not in self.rules:
            if len(self.rules) > 2000:
                raise UserError(f"{self.where(schema)}: the schema unfolds into more than 2,000 parts")
            rule = self.terms.rule()
            self.rules[key] = rule, self.where(schema)
            try:
                self.terms.set_body(rule, build())
            except RecursionError:
                raise UserError(f"{self.where(schema)}: nested too deep, or without end") from None
        return self.rules[key][0]

    def target(self, schema):
        """What a $ref refers to."""
        pointer = schema["$ref"]
        if not pointer.startswith("#") or pointer[1:2] not in ("", "/"):
            self.refuse(schema, "$ref", f"{brief(pointer)} is not a pointer into the same schema, such as #/$defs/name")
        found = self.document
        for part in unquote(pointer[1:]).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            elif isinstance(found, dict) and part in found:
                found = found[part]
            else:
                self.refuse(schema, "$ref", f"nothing is at {brief(pointer)}")
        return found

    def reference(self, schema):
        target = self.target(schema)
        if not isinstance(target, dict):
            return self.value(target)
        return self.rule_of(id(target), lambda: self.value(target), target)

    def check_branches(self, schema, key):
        """UserError if two branches of a oneOf may be right for one value."""
        branches = schema[key]
        for branch in branches if key == "oneOf" else ():
            if isinstance(branch, dict):
                self.check(branch)
        for i in range(len(branches) if key == "oneOf" else 0):
            for j in range(i):
                if not disjoint(branches[i], branches[j], self.target):
                    self.refuse(schema, key, f"branches {j} and {i} may both be right for a value; use anyOf")

    def flatten(self, schema, depth=0) -> list[dict]:
        """A schema -> alternatives without $ref, allOf, anyOf, oneOf and nullable."""
        if schema is False:
            return []
        schema = {} if schema is True else self.check(schema)
        if depth > 32:
            raise UserError(f"{self.where(schema)}: combined more than 32 deep, or without end")
        own = {key: value for key, value in schema.items() if key in KEYWORDS}
        groups = []
        if "$ref" in own:
            groups.append(self.flatten(self.target(schema), depth + 1))
            del own["$ref"]
        groups += [self.flatten(part, depth + 1) for part in own.pop("allOf", ())]
        for key in ("anyOf", "oneOf"):
            if key in own:
                self.check_branches(schema, key)
                groups.append([flat for branch in own.pop(key) for flat in self.flatten(branch, depth + 1)])
        nullable = own.pop("nullable", False)
        flats = [self.named(own, schema)]
        for group in groups:
            flats = [merge(one, two, self.refuse_merge(schema)) for one in flats for two in group]
            flats = [self.named(flat, schema) for flat in flats if flat is not None]
            if len(flats) > MAX_ALTERNATIVES:
                raise UserError(f"{self.where(schema)}: more than {MAX_ALTERNATIVES} alternatives when combined")
        return flats + ([self.named({"type": "null"}, schema)] if nullable else [])

    def named(self, schema, like):
        """The new schema, with the pointer of the one that it was made of."""
        self.kept.append(schema)
        self.pointers.setdefault(id(schema), self.where(like))
        return schema

    def refuse_merge(self, schema):
        def refuse(keyword, problem):
            raise UserError(f"{self.where(schema)}: {keyword}: {problem}")

        return refuse

    def flat(self, schema) -> int:
        """The same for a schema of types, values and limits."""
        types = types_of(schema)
        if "enum" in schema or "const" in schema:
            return self.listed(schema, types)
        makers = {
            "string": self.string,
            "integer": self.number,
            "number": self.number,
            "object": self.object,
            "array": self.array,
        }
        if "number" in types:
            types = [kind for kind in types if kind != "integer"]
        words = {"null": [b"null"], "boolean": [b"true", b"false"]}
        terms = [self.terms.literal(word) for kind in types for word in words.get(kind, ())]
        if not schema.keys() & KEYWORDS.keys() - {"type"}:  # nothing is said of what is inside
            terms += [self.free(kind, MAX_FREE_DEPTH) for kind in types if kind in makers]
        else:
            terms += [makers[kind](schema, kind) for kind in types if kind in makers]
        return self.terms.alt(terms)

    def listed(self, schema, types):
        """enum and const, as far as the other keywords allow the values."""
        values = schema.get("enum", [schema.get("const")])
        if "const" in schema:
            values = [value for value in values if equal(value, schema["const"])]
        others = {key: value for key, value in schema.items() if key in KEYWORDS and KEYWORDS[key][2]}
        allowed = self.flat(self.named({**others, "type": types}, schema)) if others else self.terms.everything
        terms = []
        for value in values:
            kind = next(kind for kind, check in TYPES.items() if check(value))
            if kind not in types and not (kind == "integer" and "number" in types):
                continue
            about = [key for key in others if KEYWORDS[key][2] == kind]
            if about and kind in ("array", "object"):
                self.refuse(schema, about[0], f"not supported beside the {kind} {brief(value)} in an enum")
            written = self.terms.literal(_dump(value))
            is_limited = any(KEYWORDS[key][2] in (kind, "number") for key in others)
            if kind in ("array", "object") or not is_limited or self.terms.both((allowed, written)) != EMPTY:
                terms.append(written)
        return self.terms.alt(terms)

    # ---- values without a schema

    def free_value(self, depth) -> int:
        if depth not in self.free_values:
            kinds = ("string", "number", *(("object", "array") if depth else ()))
            words = [self.terms.literal(word) for word in (b"null", b"true", b"false")]
            rule = self.free_values[depth] = self.terms.rule()
            self.terms.set_body(rule, self.terms.alt([*words, *(self.free(kind, depth) for kind in kinds)]))
        return self.free_values[depth]

    def free(self, kind, depth) -> int:
        """Any value of a type, with at most `depth` objects and arrays inside each other."""
        terms = self.terms
        if kind == "string":
            return terms.cat(self.quote, terms.repeat(self.char), self.quote)
        if kind in ("integer", "number"):
            return (integer_term if kind == "integer" else number_term)(terms, None, None)
        item = self.free_value(depth - 1)
        if kind == "object":
            item = terms.cat(self.key(terms.repeat(self.key_char)), self.colon, item)
        inside = terms.cat(self.items(item, 0, None, True), self.blank)
        ends = (b"{", b"}") if kind == "object" else (b"[", b"]")
        return terms.cat(terms.literal(ends[0]), inside, terms.literal(ends[1]))

    def key(self, characters):
        return self.terms.cat(self.quote, characters, self.quote)

    def items(self, item, low, high, is_first):
        """low to high items with commas; is_first: nothing is before them."""
        terms = self.terms
        if high is not None and (high < low or not high):
            return EMPTY if high < low else EPSILON
        following = terms.cat(self.comma, item)
        if not is_first:
            return terms.repeat(following, low, high)
        more = terms.repeat(following, max(low - 1, 0), None if high is None else high - 1)
        some = terms.cat(self.blank, item, more)
        return some if low else terms.optional(some)

    # ---- types

    def number(self, schema, kind):
        def limits(inclusive, exclusive, tighter):
            both = [(exact(schema[key]), key == exclusive) for key in (inclusive, exclusive) if key in schema]
            best = tighter((value for value, _ in both), default=None)
            return best, any(is_open for value, is_open in both if value == best)

        (low, low_open), (high, high_open) = (
            limits("minimum", "exclusiveMinimum", max),
            limits("maximum", "exclusiveMaximum", min),
        )
        if schema.get("format") in NUMBER_FORMATS:
            least, most = map(exact, NUMBER_FORMATS[schema["format"]])
            low, low_open = (least, False) if low is None or low < least else (low, low_open)
            high, high_open = (most, False) if high is None or high > most else (high, high_open)
        if kind == "number":
            return number_term(self.terms, low, high, low_open, high_open)
        if low is not None and low_open and low.denominator == 1:
            low += 1
        if high is not None and high_open and high.denominator == 1:
            high -= 1
        return integer_term(self.terms, low, high)

    def string(self, schema, kind="string"):
        return self.key(self.characters(schema, self.char))

    def characters(self, schema, char):
        """What is between the quotes of a string."""
        terms, parts = self.terms, []
        patterns = schema.get("pattern", ())
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            try:
                parts.append(compile_pattern(pattern, self.text, search=True))
            except UserError as error:
                self.refuse(schema, "pattern", error)
        if schema.get("format") not in (None, *HINT_FORMATS):
            if schema["format"] not in FORMATS:
                known = ", ".join(sorted(FORMATS))
                self.refuse(schema, "format", f"{brief(schema['format'])} is not supported; known are {known}")
            parts.append(compile_pattern(FORMATS[schema["format"]], self.text))
        low, high = schema.get("minLength", 0), schema.get("maxLength")
        if high is not None and high < low:
            return EMPTY
        if low or high is not None or not parts:
            parts.append(terms.repeat(self.key_char if parts else char, int(low), None if high is None else int(high)))
        return terms.both(parts) if len(parts) > 1 else parts[0]

    def array(self, schema, kind="array"):
        terms, prefix = self.terms, schema.get("prefixItems", [])
        rest = schema.get("items")
        if isinstance(rest, list):  # drafts before 2020-12
            prefix, rest = rest, schema.get("additionalItems")
        low, high = int(schema.get("minItems", 0)), schema.get("maxItems")
        if rest is None:  # a tuple has its items alone, unless it must have more
            rest = not prefix or low > len(prefix)
        rest, prefix = self.value(rest), [self.value(item) for item in prefix]
        longest = len(prefix) if rest == EMPTY else None
        high = longest if high is None else int(high) if longest is None else min(int(high), longest)
        if high is not None and high < low:
            return EMPTY
        close = terms.cat(self.blank, terms.literal(b"]"))
        more = None if high is None else max(high - len(prefix), 0)
        tail = terms.cat(self.items(rest, max(low - len(prefix), 0), more, not prefix), close)
        for i in range(len(prefix) - 1, -1, -1):
            here = terms.cat(self.comma if i else self.blank, prefix[i], tail)
            tail = EMPTY if high is not None and i >= high else here
            tail = terms.alt((tail, close)) if i >= low else tail
        return terms.cat(terms.literal(b"["), tail)

    def object(self, schema, kind="object"):
        terms, properties, required = self.terms, schema.get("properties", {}), schema.get("required", [])
        properties = properties | {name: self.unlisted(schema, name) for name in required if name not in properties}
        names, low, high = self.key_names(schema), schema.get("minProperties", 0), schema.get("maxProperties")
        pairs = []
        for name, inner in properties.items():
            written = terms.literal(_dump(name))
            if names is not None and terms.both((names, written)) == EMPTY:
                inner = False
            inner = self.with_patterns(schema, name, inner)
            pairs.append((terms.cat(written, self.colon, self.value(inner)), name in required))
        free = self.free_pairs(schema, properties, names)
        if low > len(pairs) + (free != EMPTY) or max(low, high or 0) > MAX_COUNTED + len(pairs):
            most = f"{len(pairs) + (free != EMPTY)} here, as keys that are not listed may repeat"
            self.refuse(schema, "minProperties" if low else "maxProperties", f"supported up to {most}")
        return terms.cat(terms.literal(b"{"), self.pairs(pairs, free, int(low), None if high is None else int(high)))

    def pairs(self, pairs, free, low, high):
        """[(pair, whether it is required)], pairs that may follow -> all up to the closing brace. It is a table of what
        follows pair i, when count pairs are written; counts above `most` are one."""
        terms = self.terms
        close = terms.cat(self.blank, terms.literal(b"}"))
        most = max(1, low) if high is None else max(1, high)
        table = []
        for count in range(most + 1):
            least = max(low - count, 0)
            room = None if high is None else high - count
            items = self.items(free, least, room, not count) if least < 2 else EMPTY  # keys of free pairs may repeat
            table.append(terms.cat(items, close) if high is None or count <= high else EMPTY)
        for pair, is_required in reversed(pairs):
            following = []
            for count in range(most + 1):
                fits = high is None or count < high
                before = self.comma if count else self.blank
                here = terms.cat(before, pair, table[min(count + 1, most)]) if fits else EMPTY
                following.append(here if is_required else terms.alt((here, table[count])))
            table = following
        return table[0]

    def unlisted(self, schema, name):
        """The schema of a required property that `properties` does not list."""
        if schema.get("patternProperties"):
            return True if self.matching(schema, name) else schema.get("additionalProperties", True)
        return schema.get("additionalProperties", True)

    def matching(self, schema, name):
        """The patternProperties that match a name."""
        written = self.terms.literal(_dump(name))
        found = []
        for pattern, inner in schema.get("patternProperties", {}).items():
            if self.terms.both((self.pattern_key(schema, pattern), written)) != EMPTY:
                found.append(inner)
        return found

    def pattern_key(self, schema, pattern):
        try:
            return self.key(compile_pattern(pattern, self.text, search=True))
        except UserError as error:
            self.refuse(schema, "patternProperties", error)

    def with_patterns(self, schema, name, inner):
        """The property's schema, together with those of the patterns that match its name."""
        found = self.matching(schema, name) if schema.get("patternProperties") else []
        if not found or inner is False:
            return inner
        return self.named({"allOf": [*([] if inner is True else [inner]), *found]}, schema)

    def key_names(self, schema):
        """The term of the keys that propertyNames allows, None for all."""
        names = schema.get("propertyNames")
        if names in (None, True):
            return None
        flats = [flat for flat in self.flatten(names) if "string" in types_of(flat)]
        terms = []
        for flat in flats:
            flat = self.named({**flat, "type": "string"}, names)
            listed = "enum" in flat or "const" in flat
            terms.append(self.flat(flat) if listed else self.key(self.characters(flat, self.key_char)))
        return self.terms.alt(terms)

    def free_pairs(self, schema, properties, names):
        """The term of a pair whose key is not listed, EMPTY for none."""
        terms, patterns = self.terms, schema.get("patternProperties", {})
        additional = schema.get("additionalProperties")
        if additional is None:
            additional = not properties and not patterns and "properties" not in schema
        listed = terms.alt(terms.literal(_dump(name)) for name in properties)
        allowed = self.key(terms.repeat(self.key_char)) if names is None else names
        keys = {pattern: self.pattern_key(schema, pattern) for pattern in patterns}
        others = [] if listed == EMPTY else [terms.complement(listed)]
        found = []
        for i, (pattern, key) in enumerate(keys.items()):
            for earlier in list(keys)[:i]:
                same = equal(patterns[earlier], patterns[pattern])
                if not same and terms.both((keys[earlier], key, allowed)) != EMPTY:
                    problem = f"{brief(earlier)} and {brief(pattern)} may match the same name; that is not supported"
                    self.refuse(schema, "patternProperties", problem)
            found.append(terms.cat(terms.both((key, allowed, *others)), self.colon, self.value(patterns[pattern])))
        if additional is not False:
            others += [terms.complement(key) for key in keys.values()]
            value = self.value(additional)
            found.append(terms.cat(terms.both((allowed, *others)), self.colon, value))
        return terms.alt(found)

    # ---- what has no end

    def refuse_endless(self, root):
        """UserError if a rule matches no text, as when an object requires another one like itself."""
        terms, finite = self.terms, {}

        def ends(term):
            if term in finite:
                return finite[term]
            kind, *parts = terms.nodes[term]
            finite[term] = False  # of a rule inside itself, until the next round
            if kind == "cat":
                found = ends(parts[0]) and ends(parts[1])
            elif kind == "alt":
                found = any([ends(member) for member in parts[0]])
            elif kind == "repeat":
                found = ends(parts[0]) or not parts[1]
            elif kind == "rule":
                found = ends(terms._bodies[parts[0]])
            else:
                found = True
            finite[term] = found
            return found

        try:
            known = -1
            while known != (known := sum(finite.values())):
                finite = {term: True for term, found in finite.items() if found}
                ends(root)
        except RecursionError:
            raise UserError("#: nested too deep") from None
        for rule, pointer in self.rules.values():
            if finite.get(rule) is False:
                raise UserError(f"{pointer}: no finite value is valid under it")
        if root == EMPTY or not ends(root):
            raise UserError("#: no value is valid under the schema")


def _escaped(key):
    """A key in a JSON pointer, shortened to what a message can show."""
    return brief(key.replace("~", "~0").replace("/", "~1"))[1:].removesuffix('"')


def _dump(value):
    return json.dumps(value, ensure_ascii=False).encode()
