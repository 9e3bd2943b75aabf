"""Messages as OpenAI, TRL and transformers have them -> a context and rounds, which chat templates take.

    context, rounds = parse_messages([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}])
    assert (context, rounds) == ({}, [("Hi", "Hello!")])

A round is a prompt and the reply to it. Both are texts where the conversation is plain; tool results, tool calls, names
and reasoning are kept as message objects.
"""

import json

from formats.files import UserError, brief

ROLES = {"developer": "system", "function": "tool", "ipython": "tool"}  # other names of the four roles
KEPT_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content")  # besides role and content


def parse_messages(messages: list, tools: list | str | None = None, where: str = "messages") -> tuple[dict, list]:
    """[{"role", "content", …}, …], tools -> (context, [(prompt, reply), …]).

    context: {"system": str}, if the first message is the system's, and {"tools": list}, if there are any.
    prompt: the text if it is one plain user message, else the list of message objects between two replies: [] before an
    assistant message that opens the conversation or follows another. reply: the text of a plain assistant message, else
    the message object; None in the last round if no reply is given.

    Roles are system (or developer), user, assistant and tool (or function, ipython). content is a string, a list of
    text parts, which are joined, or null beside tool_calls. Arguments of tool calls are objects in the result, also
    where they were JSON text. thinking and reasoning are read as reasoning_content, function_call as tool_calls. Keys
    with null and keys that no chat template reads (weight, id, …) are left out.
    UserError: one line that names `where`[i] and what is right.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: expected a list of at least one message, found {brief(messages)}")
    messages = [parse_message(message, f"{where}[{i}]") for i, message in enumerate(messages)]
    context = {}
    if messages[0]["role"] == "system":
        context["system"] = messages.pop(0)["content"]
    if tools := parse_tools(tools, where):
        context["tools"] = tools
    rounds, prompt = [], []
    for message in messages:
        if message["role"] != "assistant":
            prompt.append(message)
            continue
        rounds.append((_plain_text(prompt), message["content"] if _is_plain(message) else message))
        prompt = []
    if prompt or not rounds:
        rounds.append((_plain_text(prompt), None))
    return context, rounds


def parse_message(message: dict, where: str) -> dict:
    """A message as a client or a file has it -> {"role", "content", …} with KEPT_KEYS. UserError names `where`."""
    role = message.get("role") if isinstance(message, dict) else None
    role = ROLES.get(role, role) if isinstance(role, str) else None
    if role not in ("system", "user", "assistant", "tool"):
        raise UserError(
            f'{where}: expected an object with the role "system", "user", "assistant" or "tool", found {brief(message)}'
        )
    kept = {key: message[key] for key in KEPT_KEYS if message.get(key) is not None}
    for key in ("thinking", "reasoning"):  # other names of reasoning_content, in transformers' order
        if role == "assistant" and message.get(key) is not None:
            kept.setdefault("reasoning_content", message[key])
    if message.get("function_call") is not None:  # OpenAI's older form of one tool call
        kept.setdefault("tool_calls", [message["function_call"]])
    for key in ("name", "tool_call_id", "reasoning_content"):
        if not isinstance(kept.get(key, ""), str):
            raise UserError(f"{where}: {key} must be a string, found {brief(kept[key])}")
    if "tool_calls" in kept:
        if role != "assistant":
            raise UserError(f"{where}: tool_calls belong to the role 'assistant', found them with {role!r}")
        kept["tool_calls"] = _tool_calls(kept["tool_calls"], where)
        if not kept["tool_calls"]:
            del kept["tool_calls"]
    content = message.get("content")
    if content is None and "tool_calls" in kept:
        content = ""
    return {"role": role, "content": _content_text(content, where)} | kept


def parse_tools(tools: list | str | None, where: str = "messages") -> list:
    """Tools, also as JSON text -> [{"type": "function", "function": {"name", …}}, …], [] for none."""
    if isinstance(tools, str):
        tools = _from_json(tools, f"{where}: tools") if tools.strip() else []
    expected = 'a list of {"type": "function", "function": {"name": ..., "parameters": {...}}}'
    if not isinstance(tools or [], list):
        raise UserError(f"{where}: tools must be {expected}, found {brief(tools)}")
    parsed = []
    for i, tool in enumerate(tools or []):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}: tools must be {expected}, found {brief(tool)} as number {i}")
        parsed.append(tool if "function" in tool else {"type": "function", "function": tool})
    return parsed


def conversation(rounds: list, context: dict) -> tuple[list, list[int]]:
    """Rounds and context of parse_messages -> (messages, the number of messages before each reply)."""
    messages = [{"role": "system", "content": context["system"]}] if context.get("system") is not None else []
    starts = []
    for prompt, reply in rounds:
        messages += [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        starts.append(len(messages))
        if reply is not None:
            messages.append({"role": "assistant", "content": reply} if isinstance(reply, str) else reply)
    return messages, starts


def plain_rounds(rounds: list, context: dict, name: str, advice: str = "") -> list[tuple[str, str | None]]:
    """Rounds of which a format without tools can write everything -> [(text, text or None), …]; names are left out.

    UserError that names the message, what `name`, a format, has no place for, and `advice`.
    """
    if context.get("tools"):
        raise UserError(f"messages: {name} has no tools{advice}")
    messages, _ = conversation(rounds, context)
    first = int(context.get("system") is not None)
    for i, message in enumerate(messages[first:], first):
        role, expected = message["role"], ("user", "assistant")[(i - first) % 2]
        extra = next((key for key in ("tool_calls", "reasoning_content") if key in message), None)
        if role == "system":
            raise UserError(f"messages[{i}]: a system message can only be the first for {name}{advice}")
        if role == "tool" or extra:
            raise UserError(f"messages[{i}]: {name} has no {extra or 'tool results'}{advice}")
        if role != expected:
            raise UserError(
                f"messages[{i}]: the roles must be [system,] user, assistant, user, ... for {name}; found {role!r} "
                f"where {expected!r} is expected{advice}"
            )
    texts = [message["content"] for message in messages[first:]]
    return list(zip(texts[::2], [*texts[1::2], *([None] * (len(texts) % 2))]))


def without_thoughts(rounds: list, name: str, is_training: bool, inside: bool = False) -> list:
    """Rounds without reasoning_content, which clients send back with earlier replies.

    inside: as a <think> block of the content. Otherwise UserError where it would have to be learned: `name`, a
    template, writes none."""
    changed = list(rounds)
    for k, (prompt, reply) in enumerate(rounds):
        if not isinstance(reply, dict) or "reasoning_content" not in reply:
            continue
        if is_training and not inside:
            raise UserError(f"messages: reply {k + 1} has reasoning_content, which {name} does not write")
        reply = dict(reply)
        thoughts = reply.pop("reasoning_content")
        if inside:
            reply["content"] = f"<think>\n{thoughts}\n</think>\n\n{reply['content']}"
        changed[k] = prompt, reply["content"] if _is_plain(reply) else reply
    return changed


def is_plain(rounds: list, context: dict) -> bool:
    """Whether all prompts and replies are texts, and there are no tools and no arguments for a template."""
    plain = all(isinstance(prompt, str) and (reply is None or isinstance(reply, str)) for prompt, reply in rounds)
    return plain and not context.get("tools") and not context.get("chat_template_kwargs")


def _content_text(content, where):
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise UserError(
            f'{where}: content must be a string or a list of text parts {{"type": "text", "text": ...}}, found '
            f"{brief(content)}"
        )
    return "".join(part["text"] for part in parts)


def _tool_calls(calls, where):
    """[{"id", "type", "function": {"name", "arguments"}}, …], arguments as an object or JSON text, or the functions
    alone -> the same with arguments as objects."""
    if not isinstance(calls, list):
        raise UserError(f"{where}: tool_calls must be a list, found {brief(calls)}")
    parsed = []
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            expected = '{"type": "function", "function": {"name": ..., "arguments": ...}}'
            raise UserError(f"{where}: tool_calls[{i}] must be {expected}, found {brief(call)}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _from_json(arguments, f"{where}: tool_calls[{i}].function.arguments") if arguments else {}
        if not isinstance(arguments or {}, dict):
            raise UserError(
                f"{where}: tool_calls[{i}].function.arguments must be an object or its JSON text, found "
                f"{brief(function['arguments'])}"
            )
        around = {key: call[key] for key in ("id", "type") if isinstance(call.get(key), str)}
        around.setdefault("type", "function")
        parsed.append(around | {"function": {"name": function["name"], "arguments": arguments or {}}})
    return parsed


def _from_json(text, where):
    try:
        text = json.dumps(json.loads(text), ensure_ascii=False)  # half a character in it becomes U+FFFD
        return json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {' '.join(str(error).split())}; found {brief(text)}") from None


def _is_plain(message):
    return set(message) == {"role", "content"}


def _plain_text(prompt):
    """The text of a prompt that is one plain user message, else the prompt."""
    return prompt[0]["content"] if len(prompt) == 1 and prompt[0]["role"] == "user" and _is_plain(prompt[0]) else prompt
