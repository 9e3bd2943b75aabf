"""Records of conversations and of preference pairs, in the formats that people have -> one form.

    context, rounds, learned, is_plain = parse_conversation(record, "train.json:1")
    history, prompt, chosen, rejected, context, is_plain = parse_pair(record, "train.json:1")

A format is known by its keys: CONVERSATIONS and PAIRS are the tables, docs/data.md has an example of each row.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from formats.files import UserError, brief
from formats.messages import parse_messages

# ============================== one record ==============================


class Conversation(NamedTuple):
    """context: {"system"?, "tools"?, …}; rounds: [(prompt, reply), …] as formats.messages has them; learned: a bool for
    each round. is_plain: one round of texts that no chat template surrounds."""

    context: dict
    rounds: list
    learned: list
    is_plain: bool = False


class Pair(NamedTuple):
    """Two replies to one prompt. history: the rounds before it. is_plain as in Conversation."""

    history: list
    prompt: str | list
    chosen: str | dict
    rejected: str | dict
    context: dict
    is_plain: bool = False


def _texts(record, key, where):
    """record[key], a string or a list of strings, as a list."""
    value = [record[key]] if isinstance(record[key], str) else record[key]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f"{where}: {key!r} must be a string or a list of strings, found {brief(record[key])}")
    return value


def _text(record, key, where, default=None):
    value = default if record.get(key) is None else record[key]
    if not isinstance(value, str) and value is not default:
        raise UserError(f"{where}: {key!r} must be a string, found {brief(value)}")
    return value


def _object(record, key, where):
    if not isinstance(record[key], dict):
        raise UserError(f"{where}: {key!r} must be an object, found {brief(record[key])}")
    return record[key]


def _context(record, where):
    context = record.get("context") or {}
    if not isinstance(context, dict) or not isinstance(context.get("system", ""), str):
        raise UserError(f"{where}: 'context' must be an object, and its 'system' a string; found {brief(context)}")
    return context


def _is_learned(message, where):
    """Whether OpenAI's `weight`, or `train` or `label` of a message, lets it be learned; yes without them."""
    for key in ("weight", "train", "label"):
        value = message.get(key) if isinstance(message, dict) else None
        if value is not None:
            if value not in (0, 1):
                raise UserError(f"{where}: {key!r} of a message must be 0, 1, true or false, found {brief(value)}")
            return bool(value)
    return True


SPEAKERS = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "function": "tool",
            "observation": "tool", "function_call": "function_call"}  # fmt: skip


def _from_sharegpt(message, where):
    """{"from", "value"} -> {"role", "content"}; a message that has "role" already stays."""
    if not isinstance(message, dict) or "from" not in message:
        return message
    role, value = message["from"], message.get("value")
    role = SPEAKERS.get(role, role) if isinstance(role, str) else role
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    if role != "function_call":
        return {"role": role, "content": value, **rest}
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise UserError(f"{where}: the value of function_call must be JSON text, found {brief(value)}") from None
    return {"role": "assistant", "content": None, "tool_calls": calls if isinstance(calls, list) else [calls], **rest}


def _messages(record, key, where):
    """record[key] as a list of messages with "role"; one message may stand without a list."""
    value = record[key]
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {key!r} must be a list of messages, found {brief(value)}")
    return [_from_sharegpt(message, f"{where}: {key}[{i}]") for i, message in enumerate(value)]


def _with_system(record, messages, where):
    """The messages behind ShareGPT's and Alpaca's `system` key, if it has a text."""
    system = _text(record, "system", where)
    return [{"role": "system", "content": system}, *messages] if system else messages


def _chat(record, messages, where):
    """Messages, and a record's tools and chat_template_kwargs -> Conversation."""
    context, rounds = parse_messages(messages, record.get("tools"), where)
    if record.get("chat_template_kwargs") is not None:
        context["chat_template_kwargs"] = _object(record, "chat_template_kwargs", where)
    learned = [_is_learned(m, f"{where}[{i}]") for i, m in enumerate(messages) if m.get("role") == "assistant"]
    return Conversation(context, rounds, learned + [False] * (len(rounds) - len(learned)))


def src_tgt(record: dict, where: str) -> Conversation:
    """PaddleNLP's src and tgt, each a text or a list of the same length, and context."""
    turns = [_texts(record, key, where) for key in ("src", "tgt")]
    if len(turns[0]) != len(turns[1]) or not turns[0]:
        raise UserError(
            f"{where}: 'src' has {len(turns[0])} turns and 'tgt' has {len(turns[1])}; both need the same "
            "number, at least one"
        )
    context = _context(record, where)
    return Conversation(context, list(zip(*turns)), [True] * len(turns[0]))


def openai_messages(record: dict, where: str) -> Conversation:
    """`messages` and `tools` of OpenAI, TRL and transformers."""
    return _chat(record, _messages(record, "messages", where), f"{where}: messages")


def sharegpt(record: dict, where: str) -> Conversation:
    """`conversations` of from and value, `system` and `tools` (JSON text) of ShareGPT and LLaMA-Factory."""
    messages = _with_system(record, _messages(record, "conversations", where), where)
    return _chat(record, messages, f"{where}: conversations")


def prompt_completion(record: dict, where: str) -> Conversation:
    """TRL's prompt and completion: messages, or texts that are read as they stand, without a chat template."""
    if record.get("label") is not None:
        raise UserError(f"{where}: prompt, completion and label is an unpaired preference: {FOR_KTO}")
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return Conversation({}, [(prompt, completion)], [True], is_plain=True)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise UserError(f"{where}: 'prompt' and 'completion' must both be texts or both be messages")
    before = _messages(record, "prompt", where)
    messages = before + (_messages(record, "completion", where) if completion else [])
    conversation = _chat(record, messages, f"{where}: prompt + completion")
    replies = sum(isinstance(m, dict) and m.get("role") == "assistant" for m in before)
    learned = [flag and i >= replies for i, flag in enumerate(conversation.learned)]  # TRL learns the completion
    return conversation._replace(learned=learned)


def alpaca(record: dict, where: str) -> Conversation:
    """instruction, input, output, system and history [[question, answer], …] of Alpaca and LLaMA-Factory."""
    rounds = record.get("history") or []
    if not isinstance(rounds, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in rounds
    ):
        raise UserError(f"{where}: 'history' must be a list of [question, answer], found {brief(rounds)}")
    prompt = "\n".join(filter(None, (_text(record, key, where, "") for key in ("instruction", "input"))))
    system = _text(record, "system", where)
    rounds = [*map(tuple, rounds), (prompt, _text(record, "output", where, ""))]
    return Conversation({"system": system} if system else {}, rounds, [True] * len(rounds))


def plain_text(record: dict, where: str) -> Conversation:
    """`text`: all of it is learned, and no chat template surrounds it."""
    return Conversation({}, [("", _text(record, "text", where, ""))], [True], is_plain=True)


def response_sort(record: dict, where: str) -> Pair:
    """PaddleNLP's src, tgt (the replies to all but the last src), response [text, text], sort [number, number]: the
    response with the larger number is the chosen one."""
    users = _texts(record, "src", where)
    bots = _texts(record, "tgt", where) if record.get("tgt") else []
    if len(users) != len(bots) + 1:
        raise UserError(
            f"{where}: 'src' has {len(users)} turns and 'tgt' has {len(bots)}; 'tgt' holds the replies to "
            "all turns but the last, so it must have one fewer"
        )
    replies, sort = record["response"], record["sort"]
    if not isinstance(replies, list) or len(replies) != 2 or not all(isinstance(text, str) for text in replies):
        single = isinstance(replies, list) and len(replies) == 1
        raise UserError(
            f"{where}: 'response' must be a list of two strings, found {brief(replies)}"
            + (f"; single replies: {FOR_KTO}" if single else "")
        )
    if empty := [i for i, text in enumerate(replies) if not text.strip()]:
        raise UserError(f"{where}: 'response' number {empty[0] + 1} is empty; both must have text")
    numbers = isinstance(sort, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in sort)
    if not numbers or len(sort) != 2:
        raise UserError(f"{where}: 'sort' must be a list of two numbers, found {brief(sort)}")
    if sort[0] == sort[1]:
        raise UserError(
            f"{where}: 'sort' is {brief(sort)}: equal, so neither reply is the better one; the chosen "
            "one's must be larger"
        )
    context = _context(record, where)
    chosen, rejected = replies if sort[0] > sort[1] else replies[::-1]
    return Pair(list(zip(users, bots)), users[-1], chosen, rejected, context)


def _pair_of_messages(record, prompt, chosen, rejected, where):
    """Messages of a prompt and of two replies, and the record's tools -> Pair; what both replies begin with belongs to
    the prompt."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    prompt, ends = prompt + chosen[:shared], (chosen[shared:], rejected[shared:])
    if chosen == rejected:  # the same reply twice: nothing to learn, which is counted later
        prompt, ends = prompt[:-1], (chosen[-1:], rejected[-1:])
    for name, end in zip(("chosen", "rejected"), ends):
        if len(end) != 1 or not isinstance(end[0], dict) or end[0].get("role") != "assistant":
            raise UserError(
                f"{where}: after what both replies share, {name!r} must be one message of the assistant, found "
                f"{len(end)} messages: {brief(end)}"
            )
    context, rounds, _, _ = _chat(record, [*prompt, *ends[0]], f"{where}: prompt + chosen")
    others = _chat(record, [*prompt, *ends[1]], f"{where}: prompt + rejected").rounds
    return Pair(rounds[:-1], rounds[-1][0], rounds[-1][1], others[-1][1], context)


def prompt_chosen_rejected(record: dict, where: str) -> Pair:
    """TRL's prompt, chosen and rejected: messages, or texts without a chat template. Without a prompt it is what chosen
    and rejected have in common at their beginning."""
    prompt, chosen, rejected = (record.get(key) for key in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str | None):
        if prompt is None:
            shared = os.path.commonprefix([chosen, rejected])
            if shared.endswith(" ") and len(shared) < min(len(chosen), len(rejected)):
                shared = shared[:-1]  # the space belongs to the reply, as in TRL
            prompt, chosen, rejected = shared, chosen[len(shared) :], rejected[len(shared) :]
        return Pair([], prompt, chosen, rejected, {}, is_plain=True)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise UserError(f"{where}: 'prompt', 'chosen' and 'rejected' must all be texts or all be messages")
    chosen, rejected = _messages(record, "chosen", where), _messages(record, "rejected", where)
    if isinstance(prompt, str):  # beside whole conversations: it is in them already, as in UltraFeedback
        if not any(isinstance(m, dict) and m.get("content") == prompt for m in chosen[:2]):
            raise UserError(f"{where}: 'prompt' is a text and 'chosen' are messages that do not begin with it")
        prompt = None
    before = [] if prompt is None else _messages(record, "prompt", where)
    return _pair_of_messages(record, _with_system(record, before, where), chosen, rejected, where)


def openai_preference(record: dict, where: str) -> Pair:
    """OpenAI's input {"messages", "tools"}, preferred_output and non_preferred_output."""
    given = record["input"]
    if not isinstance(given, dict) or given.get("messages") is None:
        raise UserError(f"{where}: 'input' must be an object with 'messages', found {brief(given)}")
    ends = [_messages(record, key, where) for key in ("preferred_output", "non_preferred_output")]
    return _pair_of_messages(given, _messages(given, "messages", where), *ends, where)


def sharegpt_pair(record: dict, where: str) -> Pair:
    """LLaMA-Factory's conversations with chosen and rejected, {"from", "value"} each."""
    before, *ends = (_messages(record, key, where) for key in ("conversations", "chosen", "rejected"))
    return _pair_of_messages(record, _with_system(record, before, where), *ends, where)


def alpaca_pair(record: dict, where: str) -> Pair:
    """LLaMA-Factory's instruction, input, system and history with chosen and rejected as texts."""
    context, rounds, _, _ = alpaca({**record, "output": ""}, where)
    chosen, rejected = (_text(record, key, where, "") for key in ("chosen", "rejected"))
    return Pair(rounds[:-1], rounds[-1][0], chosen, rejected, context)


class RecordFormat(NamedTuple):
    """A row: a record that has all `keys` is read by `parse`; `others` may be there too."""

    keys: tuple
    parse: Callable
    others: tuple = ()

    @property
    def name(self) -> str:
        return "+".join(self.keys)


# The first row fits whose keys are all there, so what is in several formats' keys is decided here.
CONVERSATIONS = (
    RecordFormat(("src", "tgt"), src_tgt, ("context",)),
    RecordFormat(("messages",), openai_messages, ("tools", "chat_template_kwargs")),
    RecordFormat(("conversations",), sharegpt, ("system", "tools")),
    RecordFormat(("prompt", "completion"), prompt_completion, ("tools",)),
    RecordFormat(("instruction", "output"), alpaca, ("input", "system", "history")),
    RecordFormat(("text",), plain_text),
)
PAIRS = (
    RecordFormat(("src", "response", "sort"), response_sort, ("tgt", "context")),
    RecordFormat(("input", "preferred_output", "non_preferred_output"), openai_preference),
    RecordFormat(("conversations", "chosen", "rejected"), sharegpt_pair, ("system", "tools")),
    RecordFormat(("instruction", "chosen", "rejected"), alpaca_pair, ("input", "system", "history")),
    RecordFormat(("chosen", "rejected"), prompt_chosen_rejected, ("prompt", "system", "tools")),
)
UNPAIRED = (
    RecordFormat(("src", "response", "sort"), response_sort, ("tgt", "context")),
    RecordFormat(("messages", "label"), openai_messages, ("tools", "chat_template_kwargs")),
    RecordFormat(("conversations", "label"), sharegpt, ("system", "tools")),
    RecordFormat(("prompt", "completion", "label"), prompt_completion, ("tools",)),
    RecordFormat(("instruction", "output", "label"), alpaca, ("input", "system", "history")),
)
REPLY_KEYS = {"src": "tgt", "prompt": "completion", "instruction": "output"}  # what a record to be answered may lack
KNOWN_KEYS = tuple(
    dict.fromkeys(key for row in (*CONVERSATIONS, *PAIRS, *UNPAIRED) for key in (*row.keys, *row.others))
)
FOR_KTO = "dpo.py with loss_type kto learns from it"


def with_place(error: UserError, where: str) -> UserError:
    """The error, beginning with file:line."""
    return error if str(error).startswith(where) else UserError(f"{where}: {error}")


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """A UserError in here names file:line: what a tokenizer or a template refuses does not know them."""
    try:
        yield
    except UserError as error:
        raise with_place(error, where) from None


def record_format(record: dict, rows: tuple) -> RecordFormat | None:
    """The first row whose keys the record has, None if there is none. A key with null counts as missing."""
    for row in rows:
        for key in row.keys:
            if record.get(key) is None:
                break
        else:
            return row
    return None


def _names(record):
    return ", ".join(f"{key!r}{' (null)' * (value is None)}" for key, value in record.items())[:120] or "no keys"


def _parse(record, where, rows, other_rows, other_script):
    """The record by its row. UserError names file:line, the keys and the formats."""
    row = record_format(record, rows)
    if row is not None:
        try:
            return row.parse(record, where)
        except UserError as error:
            raise UserError(f"{error}; keys {_names(record)}; formats: docs/data.md") from None
    found, taken = _names(record), f"taken are {', '.join(row.name for row in rows)}: see docs/data.md"
    if other := record_format(record, other_rows):
        raise UserError(f"{where}: found {found}; {other.name} is for {other_script}; {taken}")
    near = max(rows, key=lambda row: sum(record.get(key) is not None for key in row.keys) / len(row.keys))
    missing = [key for key in near.keys if record.get(key) is None]
    reason = f"key {missing[0]!r} is missing" if len(missing) < len(near.keys) else "no key of a known format"
    raise UserError(f"{where}: {reason}; found {found}; {taken}; other names: columns")


def parse_conversation(record: dict, where: str) -> Conversation:
    """A record of CONVERSATIONS, with a reply in every round. UserError names file:line, what is wrong, the formats."""
    conversation = _parse(record, where, CONVERSATIONS, PAIRS, "dpo.py")
    rounds = conversation.rounds[:-1] if conversation.rounds[-1][1] is None else conversation.rounds
    if not rounds:
        raise UserError(f"{where}: no message of the assistant to learn; keys {_names(record)}")
    return conversation._replace(rounds=rounds, learned=conversation.learned[: len(rounds)])


def parse_prompt(record: dict, where: str) -> Conversation:
    """A record of CONVERSATIONS that is to be answered: its last reply may be missing, and is "" if it is."""
    key = next((reply for key, reply in REPLY_KEYS.items() if key in record and record.get(reply) is None), None)
    if key is not None:
        src = record.get("src")
        record = {**record, key: [""] * len(src) if key == "tgt" and isinstance(src, list) else ""}
        if key == "completion" and not isinstance(record["prompt"], str):
            record[key] = []
    conversation = _parse(record, where, CONVERSATIONS, PAIRS, "dpo.py")
    (prompt, reply), is_text = conversation.rounds[-1], conversation.is_plain and not conversation.rounds[-1][0]
    last = (reply, "") if is_text else (prompt, "" if reply is None else reply)  # a text is to be continued
    return conversation._replace(rounds=[*conversation.rounds[:-1], last])


def parse_pair(record: dict, where: str) -> Pair:
    """A record of PAIRS. UserError names file:line, what is wrong, the formats."""
    if record_format(record, PAIRS) is None and (row := record_format(record, UNPAIRED)):
        raise UserError(f"{where}: {row.name} is an unpaired preference: {FOR_KTO}; formats: docs/data.md")
    return _parse(record, where, PAIRS, CONVERSATIONS, "finetune.py")


def parse_unpaired(record: dict, where: str) -> Pair:
    """A reply that is good (`label` or LLaMA-Factory's `kto_tag` true) or bad, as a Pair without the other one (None);
    or a record of PAIRS, whose replies are one good and one bad. UserError names file:line, what is wrong, the formats.
    """
    if record.get("label") is None and record.get("kto_tag") is not None:
        record = {**record, "label": record["kto_tag"]}
    replies = record.get("response")
    if record_format(record, UNPAIRED[:1]) and (
        isinstance(replies, str) or isinstance(replies, list) and len(replies) == 1
    ):
        return _single_response(record, where)
    if record_format(record, PAIRS):
        return parse_pair(record, where)
    label = record.get("label")
    is_good = {"true": True, "1": True, "false": False, "0": False}.get(str(label).lower())
    row = record_format(record, UNPAIRED)
    if row is not None and is_good is None:
        raise UserError(f"{where}: 'label' must be true or false, found {brief(label)}")
    without = {key: value for key, value in record.items() if key != "label"}
    found = _parse(
        record if row is None else without, where, CONVERSATIONS if row else UNPAIRED, PAIRS, "another loss_type"
    )
    (prompt, reply), history = found.rounds[-1], found.rounds[:-1]
    if reply is None:
        raise UserError(f"{where}: no reply that could be good or bad; keys {_names(record)}")
    both = (reply, None) if is_good else (None, reply)
    return Pair(history, prompt, *both, found.context, found.is_plain)


def _single_response(record, where):
    """PaddleNLP's src, tgt, response with one text, and sort, which is 1 for a good reply and 0 for a bad one."""
    sort = record["sort"][0] if isinstance(record["sort"], list) and len(record["sort"]) == 1 else record["sort"]
    if sort not in (0, 1):
        raise UserError(f"{where}: 'sort' of one response must be 1 (good) or 0 (bad), found {brief(record['sort'])}")
    text = record["response"] if isinstance(record["response"], str) else record["response"][0]
    if not isinstance(text, str):
        raise UserError(f"{where}: 'response' must be a string or a list of strings, found {brief(text)}")
    other = text + "." if text.strip() else text  # an empty one is refused there
    pair = response_sort({**record, "response": [text, other], "sort": [1, 0]}, where)
    return pair._replace(rejected=None) if sort else pair._replace(chosen=None, rejected=text)
