"""The fields of a request: their types, their limits, and the prompt that they make.

    body = parse_body(data)                                      # bytes -> dict
    fields = sampling_fields(body, is_chat, vocab_size)          # those of SamplingParams
    prompt = chat_prompt(body, tokenizer)                        # ids, and how the reply is to be read

What would change the answer and is not supported is refused by its name (HTTPError 400).
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable

from formats.chat import encode_continuation
from formats.files import brief
from formats.tool_calls import style_of, template_source
from serving.http_server import HTTPError
from serving.sampling import ThinkingBudget

KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


# Fields that would change the answer and are not supported, with the values that change nothing.
REFUSED = {"functions": ([],), "function_call": ("none",), "suffix": ("",), "modalities": (["text"],), "audio": (),
           "prediction": (), "use_beam_search": (False,), "grammar": (), "guided_grammar": (), "prompt_logprobs": (),
           "truncate_prompt_tokens": (), "include_stop_str_in_output": (False,), "add_special_tokens": (True,),
           "return_token_ids": (False,), "typical_p": (1,), "mirostat": (0,),
           "dry_multiplier": (0,), "no_repeat_ngram_size": (0,), "n_predict": (), "chat_template": (),
           "documents": ([],), "web_search_options": (), "logits_processors": ([],),
           "length_penalty": (1,)}  # fmt: skip


# Variables of a template that are not a request's to set.
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template",
            "raise_exception", "strftime_now", "bos_token", "eos_token", "unk_token", "pad_token")  # fmt: skip

# field: (type, minimum, maximum)
NUMBERS = {"temperature": (float, 0, 2), "top_p": (float, 0, 1), "top_k": (int, -1, 2**31),
           "seed": (int, -(2**63), 2**63), "presence_penalty": (float, -2, 2), "frequency_penalty": (float, -2, 2),
           "repetition_penalty": (float, 0.01, 100), "min_p": (float, 0, 1), "min_tokens": (int, 0, 2**31),
           "ignore_eos": (bool, None, None),
           "skip_special_tokens": (bool, None, None)}  # fmt: skip

MAX_CHOICES = 128  # of one request: prompts times n
MAX_STOPS = 16
MAX_BAD_WORDS = 1000
MAX_LOGPROBS = 20


class APIError(HTTPError):
    """`param` names the field of the request that is wrong."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(status, message, code)
        self.param = param


def error_body(error: HTTPError) -> dict:
    """OpenAI's error object."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    param = getattr(error, "param", None)
    return {"error": {"message": error.message, "type": kind, "param": param, "code": error.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    return APIError(400, message, code, param)


def unknown_field(name: str, known: Iterable[str], is_known: bool = False) -> APIError:
    """The refusal of a field that is not supported; where it is not known at all, with the nearest of the `known`."""
    near = [] if is_known else difflib.get_close_matches(name, sorted(known), 1, cutoff=0.7)
    meant = f"; is {near[0]} meant?" if near else ""
    return bad_request(f"{brief(name)[1:-1]}: not supported{meant}", name, "unsupported_parameter")


def take_field(body: dict, name: str, kind: type, low: float | None = None, high: float | None = None) -> object:
    """body[name], None if absent or null; HTTPError 400 if it is not of this type or not between low and high."""
    value = body.get(name)
    if value is None:
        return None
    types = (int, float) if kind is float else kind
    is_kind = isinstance(value, types) and (kind is bool or not isinstance(value, bool))
    if not is_kind or (low is not None and not low <= value <= high):
        limits = "" if low is None else f" between {low} and {high}"
        raise bad_request(f"{name}: must be {KINDS[kind]}{limits}, found {brief(value)}", name)
    return float(value) if kind is float else value


def parse_body(data: bytes, supported: tuple[str, ...] = ()) -> dict:
    """Bytes -> dict; HTTPError 400 where they are not a JSON object, or ask for what is not supported.

    supported: names in REFUSED that are fields of this route.
    """

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    try:
        body = json.loads(data.decode("utf-8-sig"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON in UTF-8: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise bad_request(f"the body must be a JSON object, found {brief(body)}", code="invalid_json")
    if rb"\ud" in data.lower():
        refuse_lone_surrogates(body)
    for name, harmless in REFUSED.items():
        if name not in supported and body.get(name) is not None and body[name] not in harmless:
            raise bad_request(f"{name}: not supported", name, "unsupported_parameter")
    if body.get("best_of") not in (None, body.get("n") or 1):
        raise bad_request("best_of: only supported if equal to n", "best_of", "unsupported_parameter")
    return body


def refuse_lone_surrogates(body: dict) -> None:
    """HTTPError 400 naming the field that has half a character somewhere; no tokenizer takes one."""
    for name, value in body.items():
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise bad_request(f"{brief(name)[1:-1]}: a lone surrogate is not a character", name) from None
        except RecursionError:
            raise bad_request(f"{name}: nested too deeply", name, "invalid_json") from None


def take_strings(body: dict, name: str, limit: int) -> tuple[str, ...]:
    """body[name], a string or a list of at most `limit` strings, none of them empty."""
    value = body.get(name)
    value = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(value, list) or len(value) > limit or not all(isinstance(part, str) and part for part in value):
        expected = f"a string or a list of at most {limit} strings, none of them empty"
        raise bad_request(f"{name}: must be {expected}, found {brief(value)}", name)
    return tuple(value)


def take_ids(value: list, name: str, vocab_size: int) -> list[int]:
    """The list, if all of it are token ids."""
    for token_id in value:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < vocab_size:
            raise bad_request(f"{name}: token ids are from 0 to {vocab_size - 1}, found {brief(token_id)}", name)
    return value


def take_logit_bias(body: dict, vocab_size: int) -> tuple:
    """logit_bias {"id": number of -100 to 100} -> pairs (id, number)."""
    pairs = []
    for key, value in (take_field(body, "logit_bias", dict) or {}).items():
        take_ids([int(key) if re.fullmatch("[0-9]{1,9}", key) else key], "logit_bias", vocab_size)
        if not isinstance(value, int | float) or isinstance(value, bool) or not -100 <= value <= 100:
            raise bad_request(
                f"logit_bias: a number between -100 and 100 is expected, found {brief(value)}", "logit_bias"
            )
        pairs.append((int(key), float(value)))
    return tuple(pairs)


def take_bad_words(body: dict, tokenizer: object) -> tuple:
    """bad_words -> tuples of ids: each word as it is written at the beginning of a text and after a space."""
    words = take_strings(body, "bad_words", MAX_BAD_WORDS)
    ids = [tuple(tokenizer.encode(space + word, False)) for word in words for space in ("", " ")]
    return tuple(dict.fromkeys(filter(None, ids)))


def sampling_fields(body: dict, is_chat: bool, vocab_size: int) -> dict:
    """The request's fields -> those of SamplingParams (max_tokens None: as many as the model has room for)."""
    fields = {name: value for name, row in NUMBERS.items() if (value := take_field(body, name, *row)) is not None}
    if fields.get("top_k") == -1:
        fields["top_k"] = 0
    if "seed" in fields:
        fields["seed"] %= 2**63
    if fields.get("top_p") == 0:
        fields["top_p"] = 1e-6  # OpenAI's clients may use 0 for greedy decoding
    fewest = 0 if body.get("echo") is True and not is_chat else 1  # 0: only the prompt is scored
    limit = take_field(body, "max_tokens", int, fewest, 2**31)
    if is_chat:
        limit = take_field(body, "max_completion_tokens", int, 1, 2**31) or limit
        enabled, logprobs = take_field(body, "logprobs", bool), take_field(body, "top_logprobs", int, 0, MAX_LOGPROBS)
        if logprobs is not None and not enabled:
            raise bad_request("top_logprobs: needs logprobs: true", "top_logprobs")
        logprobs = (logprobs or 0) if enabled else None
    else:
        limit = 16 if limit is None else limit  # OpenAI's default
        logprobs = take_field(body, "logprobs", int, 0, MAX_LOGPROBS)
    stop_ids = take_field(body, "stop_token_ids", list) or []
    allowed_ids = take_field(body, "allowed_token_ids", list) or []
    return fields | {
        "max_tokens": limit,
        "logprobs": logprobs,
        "stop": take_strings(body, "stop", MAX_STOPS),
        "stop_token_ids": tuple(take_ids(stop_ids, "stop_token_ids", vocab_size)),
        "logit_bias": take_logit_bias(body, vocab_size),
        "allowed_token_ids": tuple(take_ids(allowed_ids, "allowed_token_ids", vocab_size)),
        "n": take_field(body, "n", int, 1, MAX_CHOICES) or 1,
    }


@dataclasses.dataclass
class Prompt:
    """One prompt, and how the reply to it is read."""

    ids: list[int]
    echo: str | None = None  # the text that comes before the reply, if it is asked for
    style: str | None = None  # the form of tool calls, a key of formats.tool_calls.STYLES; None: none are looked for
    thinks: bool = False  # it opened <think>
    continues: bool = False  # the reply goes on with an assistant's message


def chat_prompt(body: dict, tokenizer: object) -> Prompt:
    """messages -> Prompt. The chat template decides which conversations there are; its refusal is a UserError.

    A last message of the assistant's is gone on with (also asked for by continue_final_message, as vLLM has it).
    """
    messages = take_field(body, "messages", list)
    if not messages:
        raise bad_request("messages: must be a list of at least one message", "messages")
    # OpenAI's clients send null for an empty reply
    messages = [m | {"content": ""} if _is_reply(m) and m.get("content") is None else m for m in messages]
    tools, kwargs = _chat_tools(body), take_field(body, "chat_template_kwargs", dict) or {}
    if reserved := next((name for name in RESERVED if name in kwargs), None):
        raise bad_request(f"chat_template_kwargs: {reserved} is not its to set", "chat_template_kwargs")
    effort = take_field(body, "reasoning_effort", str)
    if effort is not None:
        kwargs = {"reasoning_effort": effort, **({"enable_thinking": False} if effort == "none" else {}), **kwargs}
    last, continues = messages[-1], take_field(body, "continue_final_message", bool)
    is_reply = _is_reply(last)
    if (continues and not is_reply) or (is_reply and continues is False):
        raise bad_request(
            "continue_final_message: goes with a last message of the assistant's", "continue_final_message"
        )
    if take_field(body, "add_generation_prompt", bool) is is_reply:
        expected = "true, unless the last message is the assistant's, which the reply goes on with"
        raise bad_request(f"add_generation_prompt: must be {expected}", "add_generation_prompt")
    if is_reply and last.get("tool_calls"):
        raise bad_request("messages: the last one has tool_calls, which the reply cannot go on with", "messages")
    if is_reply and len(messages) == 1:
        raise bad_request("messages: a message that the reply answers is needed before the assistant's", "messages")
    ids = tokenizer.apply_chat(messages[:-1] if is_reply else messages, tools=tools, template_kwargs=kwargs)
    thinks = tokenizer.decode(ids[-8:], False).rstrip().endswith("<think>")
    if is_reply:
        text = text_of(last.get("content"), f"messages[{len(messages) - 1}]")
        ids = ids + tokenizer.encode(text if tokenizer.special_in_messages else tokenizer.shielded(text), False)
    style = style_of(tokenizer.chat_template) if tools and body.get("tool_choice") != "none" else None
    return Prompt(ids, style=style, thinks=thinks and not is_reply, continues=is_reply)


def _is_reply(message):
    return isinstance(message, dict) and message.get("role") == "assistant"


def thinking_budget(
    body: dict, tokenizer: object, prompt: Prompt, may_not_think: bool = False
) -> ThinkingBudget | None:
    """thinking_token_budget; HTTPError 400 where the template knows no thoughts, unless it may be so."""
    tokens = take_field(body, "thinking_token_budget", int, 0, 2**31)
    if tokens is None:
        return None
    if not prompt.thinks and "</think>" not in template_source(tokenizer.chat_template):
        if may_not_think:  # Anthropic's agents send a budget to every model
            return None
        problem = "the model's chat template has no thoughts"
        raise bad_request(f"thinking_token_budget: {problem}", "thinking_token_budget", "unsupported_parameter")
    closing = tuple(encode_continuation(tokenizer, "\n</think>\n\n"))
    return ThinkingBudget(tokens, closing, prompt.thinks, tokenizer.piece_bytes)


def _chat_tools(body):
    """The request's tools, None for none."""
    tools, choice = take_field(body, "tools", list) or [], body.get("tool_choice")
    if choice not in (None, "none", "auto") and not tools:
        raise bad_request("tool_choice: needs tools", "tool_choice")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            expected = '{"type": "function", "function": {"name": ..., "parameters": {...}}}'
            raise bad_request(f"tools[{i}]: must be {expected}, found {brief(tool)}", "tools")
        if any(other["function"]["name"] == function["name"] for other in tools[:i]):
            raise bad_request(f"tools[{i}]: a second function of the name {brief(function['name'])}", "tools")
    return tools or None


def text_of(content: object, where: str) -> str:
    """A message's content, a string or a list of text parts -> str."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    is_text = isinstance(parts, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts)
    if not is_text:
        raise bad_request(f"{where}.content: must be a string or text parts, found {brief(content)}", "messages")
    return "".join(part["text"] for part in parts)


def texts_of(body: dict, is_chat: bool) -> list[str]:
    """The texts that all become tokens of the prompt: a template may leave out others, such as earlier thoughts."""
    if not is_chat:
        prompt = body.get("prompt")
        prompts = prompt if isinstance(prompt, list) else [prompt]
        return [max((part for part in prompts if isinstance(part, str)), key=len, default="")]
    messages = body.get("messages")
    users = (
        [m for m in messages if isinstance(m, dict) and m.get("role") == "user"] if isinstance(messages, list) else []
    )
    return [message["content"] for message in users if isinstance(message.get("content"), str)]


def completion_prompts(body: dict, tokenizer: object) -> list[Prompt]:
    """prompt (text, texts, ids or lists of ids) -> Prompts."""
    for name in ("tools", "tool_choice"):
        if body.get(name) not in (None, [], "none"):
            raise bad_request(f"{name}: only chats have tools", name, "unsupported_parameter")
    prompt, echo = body.get("prompt"), take_field(body, "echo", bool)
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt or len(prompt) > MAX_CHOICES:
        expected = f"a string, a list of token ids, or a list of at most {MAX_CHOICES} of these"
        raise bad_request(f"prompt: must be {expected}, found {brief(prompt)}", "prompt")
    prompts = []
    for part in prompt:
        if isinstance(part, str):
            prompts.append(Prompt(tokenizer.encode(part), part if echo else None))
        elif isinstance(part, list):
            take_ids(part, "prompt", tokenizer.vocab_size)
            prompts.append(Prompt(part, tokenizer.decode(part) if echo else None))
        else:
            raise bad_request(f"prompt: each must be a string or a list of token ids, found {brief(part)}", "prompt")
    return prompts
