"""Tools and environments of rl.py: replies of several turns, in which the model calls functions and reads results.

    toolbox = load_toolbox("tools.py:add,tools.py:search", environment_factory=None, tokenizer=tokenizer)
    toolbox.schemas                        # of the functions, from signatures and docstrings: what the template shows
    calls = toolbox.calls_in(token_ids)    # of a finished turn, parsed in the model's own format
    ids = toolbox.results_ids(calls, ["5"])    # what stands between this turn and the next

Token in, token out: what the model wrote is never decoded and encoded again. The chat template writes results once, and
their ids are appended. Names are TRL's.
"""

import inspect
import json
import re
import types
import typing
from collections.abc import Callable

from alignment.rewards import FAILURES, load_function, within
from formats.files import UserError
from formats.tokenizer import Tokenizer
from formats.tool_calls import parse_reply, style_of

JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
ARGUMENT = re.compile(r"\s*(\w+)(?:\s*\([^)]*\))?:\s*(.*)")


def tool_schema(function: Callable) -> dict:
    """A typed function with a docstring -> its schema as OpenAI and chat templates have it.

    The docstring's first paragraph describes the function, lines "name: text" under "Args:" its arguments. Types are
    str, int, float, bool, list, dict, Literal of texts, and these or None. UserError for what cannot be said so.
    """
    name, doc = function.__name__, inspect.getdoc(function) or ""
    if not doc:
        raise UserError(f"tools: {name} has no docstring; the model reads there what it does")
    description, _, rest = doc.partition("Args:")
    described = dict(match.groups() for line in rest.splitlines() if (match := ARGUMENT.match(line)))
    properties, required = {}, []
    for key, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise UserError(f"tools: {name}: *{key} has no schema; give each argument a name")
        properties[key] = _type_schema(parameter.annotation, f"{name}: {key}")
        if key in described:
            properties[key]["description"] = described[key].strip()
        if parameter.default is parameter.empty:
            required.append(key)
    parameters = {"type": "object", "properties": properties, "required": required}
    function = {"name": name, "description": " ".join(description.split()), "parameters": parameters}
    return {"type": "function", "function": function}


def _type_schema(annotation, where):
    origin, of = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType) and len(kinds := [kind for kind in of if kind is not type(None)]) == 1:
        return _type_schema(kinds[0], where)
    if origin is typing.Literal and all(isinstance(value, str) for value in of):
        return {"type": "string", "enum": list(of)}
    if (kind := JSON_TYPES.get(origin or annotation)) is None:
        found = "no type" if annotation is inspect.Parameter.empty else f"the type {annotation}"
        raise UserError(f"tools: {where} has {found}; possible are {', '.join(t.__name__ for t in JSON_TYPES)}")
    return {"type": kind, "items": _type_schema(of[0], where)} if kind == "array" and of else {"type": kind}


class Toolbox:
    """What replies may call: functions, or the methods of an environment that each reply has for itself.

    factory: makes an environment, an object whose public methods are its tools, but for reset(**record), which is
    called once before the first turn and returns None or text that follows the prompt.
    """

    def __init__(
        self,
        functions: list[Callable],
        factory: Callable | None,
        tokenizer: Tokenizer,
        timeout: float = 0.0,
        max_turns: int = 8,
    ):
        self.style, self.tokenizer = style_of(tokenizer.chat_template), tokenizer
        self.timeout, self.max_turns = timeout, max_turns
        if self.style is None:
            raise UserError("tools: the tokenizer's chat template writes calls in no form that is known here")
        self.functions, self.factory = functions, factory
        offered = functions + (self.methods(self.make_environment()) if factory else [])
        self.schemas = [tool_schema(function) for function in offered]
        names = [schema["function"]["name"] for schema in self.schemas]
        if len(set(names)) < len(names):
            raise UserError(f"tools: {', '.join(names)}: each needs its own name")

    def make_environment(self) -> object:
        return self._user_call(self.factory, "environment_factory")

    def reset(self, environment: object, record: dict, where: str) -> str:
        """The text that follows the prompt of the record at `where`, if any."""
        name = f"environment_factory: {where}: reset()"
        text = self._user_call(lambda: environment.reset(**record), name)
        if text is not None and not isinstance(text, str):
            raise UserError(f"{name} returned {type(text).__name__}; None or a text is needed")
        return text or ""

    def _user_call(self, call: Callable, name: str) -> object:
        """call(), or UserError with what it raised."""
        try:
            return within(self.timeout, call, name)
        except UserError:
            raise
        except FAILURES as error:
            raise UserError(f"{name}: {type(error).__name__}: {error}") from error

    @staticmethod
    def methods(environment: object) -> list[Callable]:
        names = [name for name in dir(environment) if not name.startswith("_") and name != "reset"]
        return [getattr(environment, name) for name in names if callable(getattr(environment, name))]

    def calls_in(self, token_ids: list[int]) -> list[dict]:
        """The calls of a turn, as OpenAI has them."""
        ends = self.tokenizer.stop_ids
        ids = token_ids[:-1] if token_ids and token_ids[-1] in ends else token_ids
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        return parse_reply(text, self.style).get("tool_calls", [])

    def call(self, call: dict, environment: object | None) -> tuple[str, bool]:
        """(the result as text, whether it failed): what went wrong is told to the model, which may do better."""
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        offered = {f.__name__: f for f in self.functions + (self.methods(environment) if environment else [])}
        try:
            if name not in offered:
                raise LookupError(f"there is no tool {name!r}; there are {', '.join(offered)}")
            result = within(self.timeout, lambda: offered[name](**arguments), name)
        except FAILURES as error:  # of the user's function, or of the model's arguments
            return json.dumps({"error": f"{type(error).__name__}: {error}"}, ensure_ascii=False), True
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str), False

    def results_ids(self, calls: list[dict], results: list[str]) -> list[int]:
        """What the template writes after the end token of a turn with these calls: the results, and the next turn's
        beginning. It is read off a short conversation, so that no turn is encoded again."""
        asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": calls}]
        answered = [
            {"role": "tool", "tool_call_id": call["id"], "name": call["function"]["name"], "content": result}
            for call, result in zip(calls, results)
        ]
        before = self.tokenizer.apply_chat(asked, add_generation_prompt=False, tools=self.schemas)
        after = self.tokenizer.apply_chat([*asked, *answered], tools=self.schemas)
        asked_ends, ends = ([i for i, t in enumerate(ids) if t in self.tokenizer.stop_ids] for ids in (before, after))
        if not asked_ends or len(ends) < len(asked_ends):  # templates differ in what they write inside of a last turn
            raise UserError("tools: the chat template writes no end token after a turn with calls")
        return after[ends[len(asked_ends) - 1] + 1 :]


def load_toolbox(
    tools: str | list[str] | None, environment_factory: str | None, tokenizer: Tokenizer, timeout: float, max_turns: int
) -> Toolbox | None:
    """The Toolbox of names "FILE.py:NAME"; None if there are none. timeout: seconds of one call, 0: no limit."""
    names = [part.strip() for part in (tools.split(",") if isinstance(tools, str) else tools or [])]
    functions = [load_function(name, "tools") for name in names]
    factory = load_function(environment_factory, "environment_factory") if environment_factory else None
    return Toolbox(functions, factory, tokenizer, timeout, max_turns) if functions or factory else None
