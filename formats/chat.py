"""Chat formats: a conversation -> prompt segments -> ids.

    template = load_chat_template("chatml")              # or a folder, a .jinja file, PaddleNLP's chat_template.json
    segments = template.segments([("Hi", "Hello!"), ("Bye", None)], {"system": "Be brief."}, tokenizer)
    system_ids, *ids_of_turns = encode_conversation(tokenizer, segments, parts=5)

Three kinds of templates have the same four methods: ChatFormat (built in, for folders that ship none), JinjaTemplate
(Hugging Face) and ChatTemplate (PaddleNLP). A segment knows whether it is a reply, which training learns, or a prompt.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import cached_property, lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from formats.files import UserError, brief, read_json, read_text
from formats.messages import parse_messages as parse_messages

TEMPLATE_FILE = "chat_template.json"
PLAIN = {"chat_format": "plain"}  # what TEMPLATE_FILE holds where plain text is meant, and a template is not missing


# ============================== rendering ==============================


class _Missing(jinja2.Undefined):
    """A variable that a record does not give: false in a condition, an error where its text is expected."""

    def __str__(self) -> str:
        self._fail_with_undefined_error()


class _Generation(Extension):
    """{% generation %} marks replies for other trainers; it writes nothing."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# PaddleNLP's documentation writes {{ system | 'text' }} for {{ system | default('text') }}.
PADDLENLP_DEFAULT = re.compile(r"""(\{\{[^{}]*?\|\s*)('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")


@lru_cache(maxsize=64)
def compile_template(source: str, where: str, paddlenlp: bool = False) -> jinja2.Template:
    """A template is somebody else's program: it runs in jinja2's sandbox, with what transformers gives to it.

    paddlenlp: keeps the last line break and refuses to print a variable that is not there, as PaddleNLP does.
    UserError when the text is not Jinja.
    """
    options = {}
    if paddlenlp:
        options = {"keep_trailing_newline": True, "undefined": _Missing}
        source = PADDLENLP_DEFAULT.sub(r"\1default(\2)", source)
    extensions = [_Generation, loopcontrols]
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions, **options)
    env.filters["tojson"] = _to_json
    env.globals |= {"raise_exception": _raise_exception, "strftime_now": lambda text: datetime.now().strftime(text)}
    try:
        return env.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: not a Jinja template: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class PromptSegment(NamedTuple):
    """A stretch of a conversation on its way to ids.

    part: 0 the beginning, 1 + 2 k what stands before the reply of turn k, 2 + 2 k that reply, which is learned.
    kind: "text": adjacent segments of this kind are read as one text, special tokens in it included (Hugging Face reads
    a rendered template so); "separate": a text encoded by itself; "verbatim": the same, but special tokens in it are
    ordinary characters; "token": one token.
    """

    part: int
    kind: str
    text: str | int  # of a token its text or its id


class ChatTemplate:
    """PaddleNLP's chat_template.json: {"system": text, "conversation": [user text, bot text], "query": text}.

    Only the bot text is learned; "query" takes the place of the user text when an answer is to be generated. Variables:
    the keys of the record's context (system, …), user, bot, query, index, is_first, is_last, length, is_training,
    bos_token and eos_token. UserError names the file and what is wrong in it.
    """

    def __init__(self, config, where: str):
        config = config if isinstance(config, dict) else {}
        system, conversation, query = config.get("system") or "", config.get("conversation"), config.get("query")
        texts = [system, *conversation, query] if isinstance(conversation, list) else []
        if len(texts) != 4 or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f'{where}: a chat template is {{"system": text, "conversation": [user text, bot text], '
                f'"query": text}}; found the keys {", ".join(config) or "none"}'
            )
        if unknown := sorted(set(config) - {"system", "conversation", "query"}):
            raise UserError(f"{where}: unknown key {unknown[0]!r}; a chat template has system, conversation and query")
        self.name, self.config = where, config
        self.templates = {
            part: compile_template(text, f"{where}: {part}", paddlenlp=True)
            for part, text in zip(("system", "user", "bot", "query"), texts)
        }

    @cached_property
    def stops(self) -> list[str]:
        """The text that follows every reply, such as <|im_end|>, without surrounding white space."""
        turn = {"system": "", "user": "", "query": "", "bot": "reply", "index": 0, "is_first": True, "is_last": True}
        try:
            end = self.render("bot", {**turn, "length": 1, "is_training": False}).partition("reply")[2].strip()
        except UserError:
            end = ""
        return [end] if end else []

    def missing(self, tokenizer) -> None:
        """A chat_template.json names no required tokens."""

    def files(self) -> dict[str, str]:
        return {TEMPLATE_FILE: json.dumps(self.config, ensure_ascii=False, indent=2) + "\n"}

    def render(self, part: str, variables: dict) -> str:
        try:
            return self.templates[part].render(variables)
        except jinja2.UndefinedError as error:
            names = ", ".join(variables)
            raise UserError(f"{self.name}: {part}: {one_line(error)}; this record's context has {names}") from None
        except Exception as error:  # somebody else's program: it may fail in any way
            raise UserError(f"{self.name}: {part}: {one_line(error)}") from None

    def segments(self, turns: list, context: dict, tokenizer, is_training=False, split=True) -> list[PromptSegment]:
        """[(user, bot), …], the last bot None if it is to be generated -> [PromptSegment, …], each encoded by
        itself."""
        variables = {**context, "length": len(turns), "is_training": is_training}
        tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        variables |= {name: token for name, token in tokens.items() if token is not None}
        segments = [PromptSegment(0, "separate", self.render("system", variables))]
        for index, (user, bot) in enumerate(turns):
            turn = variables | {"index": index, "is_first": index == 0, "is_last": index == len(turns) - 1}
            turn |= {"user": user, "query": user} | ({} if bot is None else {"bot": bot})
            text = self.render("query" if bot is None else "user", turn)
            segments.append(PromptSegment(1 + 2 * index, "separate", text))
            if bot is not None:
                segments.append(PromptSegment(2 + 2 * index, "separate", self.render("bot", turn)))
        return segments


# ============================== built-in formats ==============================


@dataclass(frozen=True)
class ChatFormat:
    """How a family writes a conversation, for folders that ship no template.

        begin  system  { next_turn_mark  user  header  bot } …  next_turn_mark  user  header  generation_prompt | bot
        finish

    A str is text around {user}, {bot}, {system}, {bos}, {eos}, {round} (from 0), {number} (from 1) and {date}. A tuple
    is what the family's own code encodes item by item, tokens (those in `required_tokens`, or ids) and texts, so that
    what a user writes can never become a token. `next_turn_mark` is the mark with which the family's models end their
    replies: it is learned with the reply before it."""

    user: str | tuple
    bot: str | tuple
    begin: str | tuple = ""
    system: str | tuple | None = None  # None: the format has no system block
    default: str | None = None  # the system text where none is given; None: no block then
    merge: tuple | None = None  # (0 or -1, text): the user turn that takes the system text, and how
    strip: tuple = ()  # which of system, user, bot lose surrounding white space
    next_turn_mark: str | tuple = ""
    header: str | tuple = ""
    generation_prompt: str | tuple = ""  # before the last reply only
    single_turn_user: str = ""  # replaces `user` in a conversation of one turn
    finish: str | tuple = ""
    clean_reply: Callable = lambda bot, last: bot
    reply_in_prompt: bool = (
        False  # earlier replies are part of the prompt, never learned; the last is encoded by itself
    )
    verbatim: bool = False  # texts of tuples are "verbatim" instead of "separate"
    not_user: tuple = ()  # beginning and end of user texts that the family reads as a tool's answer: refused
    skip_empty: bool = False  # of an empty text nothing is written, not even its role
    stops: tuple = ()  # tokens that end a reply besides eos
    required_tokens: tuple = ()  # tokens that the vocabulary must have
    name: str = ""

    def files(self) -> dict[str, str]:
        return {TEMPLATE_FILE: json.dumps({"chat_format": self.name}) + "\n"}

    def missing(self, tokenizer) -> str | None:
        """The first required token that the vocabulary lacks, or that encoding a text does not give as one token."""
        texts = [getattr(self, field.name) for field in fields(self)]
        written = "".join(text for text in texts if isinstance(text, str))
        for token in self.required_tokens:
            if not tokenizer.has_token(token) if token in written else tokenizer.token_id(token) is None:
                return token
        return None

    def _fill(self, part, spec, values):
        """A str or tuple of the format -> [PromptSegment, …]."""
        if isinstance(spec, str):
            return [PromptSegment(part, "text", spec.format(**values))] if spec else []
        segments = []
        for item in spec:
            is_token = isinstance(item, int) or item in ("{bos}", "{eos}", *self.required_tokens)
            kind = "token" if is_token else "verbatim" if self.verbatim else "separate"
            text = item if isinstance(item, int) else item.format(**values)
            if text != "":
                segments.append(PromptSegment(part, kind, text))
        return segments

    def segments(self, turns: list, context: dict, tokenizer, is_training=False, split=True) -> list[PromptSegment]:
        """As ChatTemplate.segments. UserError for a system text where the family has no place for one."""
        system, last = context.get("system"), len(turns) - 1
        if system is not None and self.system is None and self.merge is None:
            raise UserError(f"messages: chat format {self.name!r} has no system message; put its text into the user's")
        text = self.default if system is None else system
        values = {
            "bos": tokenizer.bos_token or "",
            "eos": tokenizer.eos_token or "",
            "date": f"{datetime.now():%d %b %Y}",
            "system": text.strip() if text and "system" in self.strip else text,
        }
        segments = self._fill(0, self.begin, values)
        if self.system is not None and (text or text == "" and not self.skip_empty):
            segments += self._fill(0, self.system, values)
        for k, (user, bot) in enumerate(turns):
            if self.merge and system is not None and k == self.merge[0] % len(turns):
                user = self.merge[1].format(**values | {"user": user})
            values |= {"round": k, "number": k + 1}
            segments += self._turn(k, user, bot, values, k == last)
        return segments

    def _turn(self, k, user, bot, values, is_last):
        """[PromptSegment, …] of turn k."""
        if self.not_user and user.startswith(self.not_user[0]) and user.endswith(self.not_user[1]):
            raise UserError(
                f"messages: chat format {self.name!r} reads a user's text from {self.not_user[0]} to "
                f"{self.not_user[1]} as a tool's answer; tools are not supported here"
            )
        values["user"] = user.strip() if "user" in self.strip else user
        segments = []
        if user or not self.skip_empty:
            segments += self._fill(2 * k or 1, self.next_turn_mark, values)
            alone = self.single_turn_user and k == 0 and is_last
            segments += self._fill(1 + 2 * k, self.single_turn_user if alone else self.user, values)
        if is_last or bot or not self.skip_empty:
            segments += self._fill(1 + 2 * k, self.header, values)
        if is_last:
            segments += self._fill(1 + 2 * k, self.generation_prompt, values)
        if is_last and bot is not None or bot or bot == "" and not self.skip_empty:
            reply = self.clean_reply(bot, is_last)
            values["bot"] = reply.strip() if "bot" in self.strip else reply
            if self.reply_in_prompt and is_last:
                segments.append(PromptSegment(2 + 2 * k, "separate", values["bot"]))
            else:
                segments += self._fill(2 + 2 * k + self.reply_in_prompt, self.bot, values)
            if is_last:
                segments += self._fill(2 + 2 * k, self.finish, values)
        return segments


def after_thoughts(bot: str, last: bool) -> str:
    """DeepSeek's models see earlier replies without their reasoning; the last one stays as given."""
    return bot if last else bot.split("</think>")[-1]


def deepseek_r1_reply(bot: str, last: bool) -> str:
    """The prompt already ends with <think> and a line break; a reply without reasoning closes it at once."""
    if not last:
        return after_thoughts(bot, last)
    return bot.removeprefix("<think>\n") if "</think>" in bot else "\n</think>\n\n" + bot


def qwen3_reply(bot: str, last: bool, thinking: bool = True) -> str:
    """Qwen3's template: the last reply keeps its reasoning, even if empty; all others lose it."""
    thoughts, end, text = bot.rpartition("</think>")
    text = text.lstrip("\n") if end else bot
    if not last:
        return text
    thoughts = bot.split("</think>")[0].rstrip("\n").split("<think>")[-1].strip("\n") if end else ""
    if not thinking and not thoughts:
        return text.lstrip("\n")  # the prompt has the empty reasoning already
    return f"<think>\n{thoughts}\n</think>\n\n" + text.lstrip("\n")


LLAMA3_ROLE = "<|start_header_id|>{}<|end_header_id|>\n\n"

LLAMA3_DATE = "Cutting Knowledge Date: December 2023\nToday Date: {}\n\n"

CHATML = ChatFormat(
    "<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n",
    "{bot}<|im_end|>\n",
    system="<|im_start|>system\n{system}<|im_end|>\n",
    stops=("<|im_end|>",),
    required_tokens=("<|im_start|>", "<|im_end|>"),
)

LLAMA2 = ChatFormat(
    "{bos} [INST] {user} [/INST]",
    " {bot} {eos}",
    strip=("user", "bot"),
    merge=(0, "<<SYS>>\n{system}\n<</SYS>>\n\n{user}"),
)

LLAMA3 = ChatFormat(
    LLAMA3_ROLE.format("user") + "{user}<|eot_id|>" + LLAMA3_ROLE.format("assistant"),
    "{bot}<|eot_id|>",
    begin="<|begin_of_text|>",
    system=LLAMA3_ROLE.format("system") + "{system}<|eot_id|>",
    strip=("system", "user", "bot"),
    stops=("<|eot_id|>",),
    required_tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)

MISTRAL = ChatFormat(" [INST] {user} [/INST]", " {bot}{eos}", begin="{bos}", merge=(0, "{system}\n\n{user}"))

GEMMA = ChatFormat(
    "<start_of_turn>user\n{user}<end_of_turn>\n<start_of_turn>model\n",
    "{bot}<end_of_turn>\n",
    begin="{bos}",
    strip=("user", "bot"),
    stops=("<end_of_turn>",),
    required_tokens=("<start_of_turn>", "<end_of_turn>"),
)

DEEPSEEK3 = ChatFormat(
    "<｜User｜>{user}<｜Assistant｜>",
    "{bot}<｜end▁of▁sentence｜>",
    begin="{bos}",
    system="{system}",
    clean_reply=after_thoughts,
    stops=("<｜end▁of▁sentence｜>",),
    required_tokens=("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
)

GLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


# From the families' own code (goldens) or published templates. "-hf": as Hugging Face's template of that family has it,
# where that differs from the family's own code by a space or by the name of bos.
FORMATS = {
    "llama2": LLAMA2,  # Meta's ids: a space after bos
    "llama2-hf": replace(LLAMA2, user="{bos}[INST] {user} [/INST]"),
    "llama3": LLAMA3,
    "llama3-hf": replace(LLAMA3, begin="{bos}", required_tokens=()),
    "llama3.1": replace(
        LLAMA3,
        begin="{bos}",
        default="",
        system=LLAMA3_ROLE.format("system") + LLAMA3_DATE.format("26 Jul 2024") + "{system}<|eot_id|>",
    ),
    "llama3.2": replace(
        LLAMA3,
        begin="{bos}",
        default="",
        system=LLAMA3_ROLE.format("system") + LLAMA3_DATE.format("{date}") + "{system}<|eot_id|>",
    ),
    "mistral-v1": MISTRAL,
    "mistral-v3": replace(
        MISTRAL,
        user="[INST] {user}[/INST]",
        merge=(-1, "{system}\n\n{user}"),
        strip=("bot",),
        required_tokens=("[INST]", "[/INST]"),
    ),
    "mistral-hf": replace(MISTRAL, user="[INST] {user} [/INST]", bot="{bot}{eos}", merge=None),  # 7B v0.2, 8x7B
    "mistral-v0.1-hf": replace(MISTRAL, user="[INST] {user} [/INST]", bot="{bot}{eos} ", merge=None),
    "mixtral": MISTRAL,
    "chatml": CHATML,  # also Yi and Qwen3 2507 Instruct
    "yi-1.5": replace(CHATML, system="{system}"),
    "qwen": ChatFormat(  # the first Qwen: each text by itself
        ("<|im_start|>", "user", "\n", "{user}", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"),
        ("{bot}", "<|im_end|>", "\n"),
        system=("<|im_start|>", "system", "\n", "{system}", "<|im_end|>", "\n"),
        default="",
        verbatim=True,
        stops=("<|im_end|>",),
        required_tokens=CHATML.required_tokens,
    ),
    "qwen1.5": replace(CHATML, default="You are a helpful assistant"),
    "qwen2": replace(CHATML, default="You are a helpful assistant."),
    "qwen2.5": replace(CHATML, default="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": replace(CHATML, clean_reply=qwen3_reply, not_user=("<tool_response>", "</tool_response>")),
    "qwen3-no-thinking": replace(
        CHATML,
        clean_reply=partial(qwen3_reply, thinking=False),
        generation_prompt="<think>\n\n</think>\n\n",
        not_user=("<tool_response>", "</tool_response>"),
    ),
    "baichuan2": ChatFormat((195, "{user}", 196), ("{bot}",), system=("{system}",), finish=("{eos}",)),
    "chatglm": ChatFormat(
        "[Round {round}]\n问：{user}\n答：",
        "{bot}\n",
        single_turn_user="{user}",
        generation_prompt=("[gMASK]", "<sop>"),
        reply_in_prompt=True,
        finish=("{eos}",),
        required_tokens=("[gMASK]", "<sop>"),
    ),
    "chatglm2": ChatFormat(
        "[Round {number}]\n\n问：{user}\n\n答：",
        "{bot}\n\n",
        begin=("[gMASK]", "sop"),
        reply_in_prompt=True,
        finish=("{eos}",),
        required_tokens=("[gMASK]", "sop"),
    ),
    "chatglm3": ChatFormat(
        ("\n", "{user}", "<|assistant|>"),
        ("\n", "{bot}"),
        begin=("[gMASK]", "sop"),
        next_turn_mark=("<|user|>",),
        system=("<|system|>", "\n", "{system}"),
        finish=("{eos}",),
        stops=("<|user|>", "<|observation|>"),
        required_tokens=("[gMASK]", "sop", *GLM_ROLES),
    ),
    "glm-4": ChatFormat(
        "\n{user}",
        "\n{bot}",
        begin="[gMASK]<sop>",
        system="<|system|>\n{system}",
        next_turn_mark="<|user|>",
        header="<|assistant|>",
        finish="<|user|>",
        skip_empty=True,
        stops=("<|user|>", "<|observation|>"),
        required_tokens=("[gMASK]", "<sop>", *GLM_ROLES),
    ),
    "internlm": ChatFormat(
        "<|User|>:{user}<eoh>\n<|Bot|>:",
        "{bot}<eoa>\n",
        begin=("{bos}",),
        stops=("<eoa>",),
        required_tokens=("<eoh>", "<eoa>"),
    ),
    "internlm2": replace(CHATML, begin="{bos}", finish="{eos}"),
    "gemma": GEMMA,
    "gemma-hf": replace(GEMMA, begin=""),  # the template of the first Gemma left bos to the tokenizer
    "deepseek-v2": ChatFormat("User: {user}\n\nAssistant:", " {bot}{eos}", begin="{bos}", system="{system}\n\n"),
    "deepseek-v3": DEEPSEEK3,
    "deepseek-r1": replace(DEEPSEEK3, generation_prompt="<think>\n", clean_reply=deepseek_r1_reply),
}

FORMATS = {name: replace(chat_format, name=name) for name, chat_format in FORMATS.items()}


# ============================== templates of Hugging Face tokenizers ==============================

JINJA_FILE = "chat_template.jinja"

# Conversations by which the built-in format is found that writes what a template writes. Each shows one difference.
PROBES = (
    ([("question", None)], {}),
    ([("question", None)], {"system": "rules"}),
    ([(" first", "<think>\nthoughts\n</think>\n\nreply "), ("second", None)], {}),
)


class JinjaTemplate:
    """The chat_template of a Hugging Face tokenizer."""

    def __init__(self, source, where: str):
        if not isinstance(source, str):
            raise UserError(f"{where}: chat_template must be a text, found {brief(source)}")
        self.source, self.name, self._formats = source, where, {}

    @cached_property
    def stops(self) -> list[str]:
        """The text that follows a reply, without surrounding white space."""
        try:
            user, bot = {"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}
            prompt, conversation = self.render([user], None, True), self.render([user, bot], None, False)
        except UserError:
            return []
        follows = conversation.removeprefix(prompt) if conversation.startswith(prompt) else ""
        end = follows.partition("reply")[2].strip()
        return [end] if end else []

    def missing(self, tokenizer) -> None:
        """As in transformers: what is no token of the vocabulary is ordinary text."""

    def files(self) -> dict[str, str]:
        return {JINJA_FILE: self.source}

    def render(self, messages: list, tokenizer, add_generation_prompt: bool) -> str:
        """Messages -> text. UserError when the template refuses them or fails."""
        template = compile_template(self.source, self.name)
        names = [f"{name}_token" for name in ("bos", "eos", "unk", "pad")]
        tokens = {name: token for name in names if (token := getattr(tokenizer, name, None)) is not None}
        try:
            return template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **tokens
            )
        except Exception as error:  # somebody else's program: it may fail in any way
            raise UserError(f"messages: {self.name} refuses this conversation: {one_line(error)}") from None

    def equal_format(self, tokenizer) -> ChatFormat | None:
        """The built-in format that writes all PROBES as this template does: it also knows which tokens to learn.

        A format of tuples is the family's own code. Its template imitates it in text, so white space may differ.
        """
        key = tokenizer.bos_token, tokenizer.eos_token
        if key not in self._formats:
            texts = [self._prompt(turns, context, tokenizer) for turns, context in PROBES]
            self._formats[key] = next((f for f in FORMATS.values() if _writes(f, texts, tokenizer)), None)
        return self._formats[key]

    def _prompt(self, turns, context, tokenizer):
        """The rendered prompt; None if the template refuses."""
        try:
            return self.render(_messages(turns, context)[:-1], tokenizer, True)
        except UserError:
            return None

    def segments(self, turns: list, context: dict, tokenizer, is_training=False, split=True) -> list[PromptSegment]:
        """As ChatTemplate.segments; replies are found by rendering every beginning of the conversation.

        UserError when `split` and one rendered beginning is not the beginning of the next.
        """
        equal = self.equal_format(tokenizer)
        if equal is not None and _of_tuples(equal):
            return equal.segments(turns, context, tokenizer)
        messages = _messages(turns, context)
        size, first, reply = len(messages), len(messages) - 2 * len(turns), turns[-1][1]
        prompt = self.render(messages[:-1], tokenizer, True)
        if equal is not None and _text(equal, [*turns[:-1], (turns[-1][0], None)], context, tokenizer) == prompt:
            return equal.segments(turns, context, tokenizer)
        ends = range(first + 1, size - 1) if split else ()  # of every part before the last prompt, in messages
        texts = ["", *(self.render(messages[:end], tokenizer, (end - first) % 2 == 1) for end in ends), prompt]
        if reply is not None:
            texts.append(self.render(messages, tokenizer, False))
        segments = []
        for part, (before, text) in enumerate(zip(texts, texts[1:]), 1 if split else size - first - 1):
            if not text.startswith(before):
                raise UserError(
                    f"{self.name}: this template renders the first {part // 2} turns otherwise once more turns follow, "
                    f"so replies cannot be told apart; train on single turns, or give chat_template: "
                    f"{', '.join(FORMATS)}, plain"
                )
            segments.append(PromptSegment(part, "text", text[len(before) :]))
        ended = reply is None or segments[-1].text.rstrip().endswith(tuple(tokenizer.special))
        if not ended and tokenizer.eos_token is not None:
            segments.append(PromptSegment(segments[-1].part, "token", tokenizer.eos_token))  # a reply must end
        return segments


def _messages(turns, context):
    """[(user, bot), …] -> Hugging Face's messages; the last one's content is None if it is to be generated."""
    messages = [{"role": "system", "content": context["system"]}] if context.get("system") is not None else []
    for user, bot in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": bot}]
    return messages


def _of_tuples(chat_format):
    return isinstance(chat_format.user, tuple) or isinstance(chat_format.begin, tuple)


def _text(chat_format, turns, context, tokenizer):
    """What a format writes, as one text; None if it refuses."""
    try:
        return "".join(str(segment.text) for segment in chat_format.segments(turns, context, tokenizer))
    except UserError:
        return None


def _writes(chat_format, texts, tokenizer):
    """Whether the format writes these texts for PROBES; None stands for a refusal."""
    if chat_format.missing(tokenizer) is not None:
        return False
    written = [_text(chat_format, *probe, tokenizer) for probe in PROBES]
    if _of_tuples(chat_format):
        written, texts = ([text and "".join(text.split()) for text in row] for row in (written, texts))
    return texts[0] is not None and written == texts


def load_chat_template(name: str | Path | None) -> ChatTemplate | ChatFormat | JinjaTemplate | None:
    """A name of FORMATS, or a chat_template.json or .jinja or the folder of one; "plain", "none", None -> None.

    None as a template means plain text: prompt, reply, eos, nothing around them.
    """
    if name in (None, "none", "plain"):
        return None
    if name in FORMATS:
        return FORMATS[name]
    path = Path(name)
    if path.is_dir() and (template := folder_template(path)):
        return template
    path = path / TEMPLATE_FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"chat_template {str(name)!r}: no such file; give one, or {', '.join(FORMATS)}, plain, none")
    if path.suffix == ".jinja":
        return JinjaTemplate(read_text(path), str(path))
    config = read_json(path)
    if isinstance(config, dict) and set(config) == {"chat_template"}:
        return JinjaTemplate(config["chat_template"], str(path))
    if config == PLAIN:
        return None
    if isinstance(config, dict) and set(config) == {"chat_format"}:
        if config["chat_format"] not in FORMATS:
            raise UserError(f"{path}: no chat format {brief(config['chat_format'])}; known are {', '.join(FORMATS)}")
        return FORMATS[config["chat_format"]]
    return ChatTemplate(config, str(path))


def folder_template(folder: Path) -> ChatTemplate | ChatFormat | JinjaTemplate | None:
    """The template in a tokenizer's folder: chat_template.json, chat_template.jinja, or tokenizer_config.json's key.

    Of several under that key it is the one named "default".
    """
    for name in (TEMPLATE_FILE, JINJA_FILE):
        if (folder / name).is_file():
            return load_chat_template(folder / name)
    path = folder / "tokenizer_config.json"
    source = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
        if source is None:
            raise UserError(f"{path}: none of the chat templates {', '.join(map(str, named))} is named default")
    return None if source is None else JinjaTemplate(source, f"{path}: chat_template")


def is_plain(folder: Path) -> bool:
    """Whether a tokenizer's folder says that plain text is its format."""
    return (folder / TEMPLATE_FILE).is_file() and read_json(folder / TEMPLATE_FILE) == PLAIN


def save_chat_template(
    template: ChatTemplate | ChatFormat | JinjaTemplate | None, folder: Path, plain: bool = False
) -> None:
    """Write the template (None: none, or with `plain` PLAIN) into a copy of a tokenizer's folder; remove any other."""
    files = template.files() if template is not None else {TEMPLATE_FILE: json.dumps(PLAIN) + "\n"} if plain else {}
    for name in {TEMPLATE_FILE, JINJA_FILE} - set(files):
        (folder / name).unlink(missing_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if config.get("chat_template") is not None and config["chat_template"] != files.get(JINJA_FILE):
        del config["chat_template"]
        path.unlink()  # it may be read-only, like its original
        path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


# ============================== conversations to ids ==============================


def encode_conversation(tokenizer: object, segments: list[PromptSegment], parts: int) -> list[list[int]]:
    """[PromptSegment, …] -> `parts` lists of ids."""
    ids_of = [[] for _ in range(parts)]
    for kind, run in groupby(segments, key=lambda segment: segment.kind):
        if kind == "text":
            for part, ids in encode_segments(tokenizer, list(run)):
                ids_of[part] += ids
            continue
        for part, _, text in run:
            if kind == "token":
                ids_of[part].append(text if isinstance(text, int) else tokenizer.token_id(text))
            else:
                ids_of[part] += tokenizer.encode(text, False, False if kind == "verbatim" else None)
    return ids_of


def encode_segments(tokenizer: object, run: list[PromptSegment], behind: bool = False) -> list[tuple[int, list[int]]]:
    """Adjacent "text" segments, read as one text, -> [(part, ids), …], divided where the parts change.

    A token across a boundary belongs to the part after it. Before a reply the text itself is divided: a reply is
    learned as it would be generated, after its prompt's ids. behind: the run continues an earlier text."""
    ends = [i for i in range(1, len(run)) if run[i].part != run[i - 1].part]
    for i in ends:  # a special token separates the texts around it, so that no beginning is encoded twice
        if starts_with_special(run[i].text, tokenizer):
            return encode_segments(tokenizer, run[:i], behind) + encode_segments(tokenizer, run[i:], behind)
    encode = partial(encode_continuation, tokenizer) if behind else partial(tokenizer.encode, add_special_tokens=False)
    all_ids, done, out = encode("".join(segment.text for segment in run)), 0, []
    for start, end in zip([0, *ends], ends):
        head = encode("".join(segment.text for segment in run[:end]))
        if head[:done] != all_ids[:done]:
            return out + encode_segments(tokenizer, run[start:], behind=True)
        same = next((i for i, (a, b) in enumerate(zip(head, all_ids)) if a != b), min(len(head), len(all_ids)))
        if same < len(head) and run[end].part % 2 == 0:
            return [*out, (run[start].part, head[done:])] + encode_segments(tokenizer, run[end:], behind=True)
        out.append((run[start].part, all_ids[done:same]))
        done = same
    return [*out, (run[-1].part, all_ids[done:])]


def encode_continuation(tokenizer: object, text: str) -> list[int]:
    """Ids of a text that continues another one: without the space that sentencepiece puts in front."""
    line, ids = tokenizer.encode("\n", False), tokenizer.encode(text, False)
    if tokenizer.encode("\na", False) == line + tokenizer.encode("a", False):
        return ids
    both = tokenizer.encode("\n" + text, False)
    return both[len(line) :] if both[: len(line)] == line else ids


def starts_with_special(text: str, tokenizer: object) -> bool:
    starts = (token for token in tokenizer.special if text.startswith(token))
    return any(not tokenizer.flags.get(token, {}).get("lstrip") for token in starts)


def check_messages(messages: list, add_generation_prompt: bool) -> tuple[dict, list]:
    """[{"role": "system" | "user" | "assistant", "content": str}, …] -> context, [(user, bot or None), …].

    UserError: one line that says which message is wrong.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"messages: expected a list of at least one message, found {brief(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise UserError(
                f'messages[{i}]: expected an object with the role "system", "user" or "assistant", found '
                f"{brief(message)}"
            )
        if not isinstance(message.get("content"), str):
            raise UserError(f"messages[{i}]: content must be a string, found {brief(message.get('content'))}")
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise UserError(f"messages[{roles.index('system', 1)}]: a system message can only be the first")
    turns = messages[roles[0] == "system" :]
    for i, turn in enumerate(turns, len(messages) - len(turns)):
        expected = ("user", "assistant")[(i + len(turns) - len(messages)) % 2]
        if turn["role"] != expected:
            raise UserError(
                f"messages[{i}]: the roles must be [system,] user, assistant, user, ...; found "
                f"{turn['role']!r} where {expected!r} is expected"
            )
    if not turns or add_generation_prompt != (turns[-1]["role"] == "user"):
        raise UserError(
            "messages: the last must be the user's if a reply is to be generated, else the assistant's; "
            f"found {roles[-1]!r}"
        )
    texts = [turn["content"] for turn in turns] + [None] * (len(turns) % 2)
    context = {"system": messages[0]["content"]} if roles[0] == "system" else {}
    return context, list(zip(texts[::2], texts[1::2]))
