"""Chat formats of the families, for tokenizers that ship no template: one table, FORMATS.

    segments = FORMATS["chatml"].segments([("Hi", "Hello!"), ("Bye", None)], {"system": "Be brief."}, tokenizer)
    FORMATS["chatml"].jinja()      # the same as a template for transformers, vLLM and llama.cpp

Plain conversations are written by the fields of a ChatFormat. Tools, tool calls and thoughts are written by the
family's template in formats/templates, whose plain conversations are the same text.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from string import Formatter

from formats.files import UserError, read_text
from formats.messages import conversation, is_plain, plain_rounds, without_thoughts
from formats.rendering import PromptSegment, RenderedTemplate

TEMPLATE_FILE = "chat_template.json"
JINJA_FILE = "chat_template.jinja"
TEMPLATES = Path(__file__).parent / "templates"


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
    template: tuple = ()  # (a file of TEMPLATES that writes tools, the settings that it begins with)
    tool_tokens: tuple = ()  # tokens that the vocabulary must have for tools
    thoughts: bool = False  # the template writes reasoning_content
    name: str = ""

    def files(self) -> dict[str, str]:
        """The format by its name, which is read here, and the same as a template, which other software reads."""
        return {TEMPLATE_FILE: json.dumps({"chat_format": self.name}) + "\n", JINJA_FILE: self.jinja()}

    def jinja(self) -> str:
        """A Jinja template that writes the same: the family's file behind its settings, or one made of the fields."""
        if self.template:
            file, settings = self.template
            lines = [f"{{%- set {name} = {value} %}}\n" for name, value in settings.items()]
            return "".join(lines) + read_text(TEMPLATES / file)
        return jinja_of_fields(self)

    @cached_property
    def rendered(self) -> RenderedTemplate:
        """The template that writes what is not plain."""
        return RenderedTemplate(self.jinja(), f"chat format {self.name!r}")

    @property
    def not_learned(self) -> int:
        """Replies that were shown and not learned so far (formats/rendering.py)."""
        return self.rendered.not_learned

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

    def segments(self, rounds: list, context: dict, tokenizer, is_training=False, split=True) -> list[PromptSegment]:
        """As ChatTemplate.segments. UserError for a system text, tools or messages that the family has no place for."""
        if not self.thoughts:
            rounds = without_thoughts(rounds, f"chat format {self.name!r}", is_training)
        if self.template and not is_plain(rounds, context):
            if context.get("tools") and (
                token := next((t for t in self.tool_tokens if not tokenizer.has_token(t)), None)
            ):
                raise UserError(
                    f"messages: chat format {self.name!r} writes tools with {token}, which is no token here"
                )
            return self.rendered.divided(*conversation(rounds, context), context, tokenizer, is_training, split)
        names = ", ".join(name for name, chat_format in FORMATS.items() if chat_format.template)
        turns = plain_rounds(rounds, context, f"chat format {self.name!r}", f"; formats with tools: {names}")
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


# ============================== as Jinja templates ==============================

TOKEN_TEXTS = {195: "<reserved_106>", 196: "<reserved_107>"}  # Baichuan 2's names of the tokens that its format has

JINJA_NAMES = {
    "bos": "bos_token",
    "eos": "eos_token",
    "round": "(loop.index0 // 2)",
    "number": "(loop.index0 // 2 + 1)",
}

JINJA_FORMAT = """{%%- if tools or messages | selectattr('tool_calls') | list %%}
    {{- raise_exception('this chat format has no tools') }}
{%%- endif %%}
{%%- set first = 1 if messages[0].role == 'system' else 0 %%}
{%%- set turns = messages[first:] %%}
{%%- set system = messages[0].content%(strip_system)s if first else %(default)s %%}
{{- %(begin)s }}
%(system)s
{%%- for message in turns %%}
    {%%- if message.role != ('assistant' if loop.index0 %% 2 else 'user') %%}
        {{- raise_exception('the roles must be [system,] user, assistant, user, ...') }}
    {%%- endif %%}
    {%%- if message.role == 'user' %%}
        {%%- set user = message.content%(strip_user)s %%}
        %(merge)s
        {{- %(user)s }}
    {%%- else %%}
        {%%- set bot = message.content%(strip_bot)s %%}
        {{- %(header)s }}
        {%%- if loop.last and not add_generation_prompt %%}
            {{- %(generation_prompt)s ~ %(last_bot)s ~ %(finish)s }}
        {%%- else %%}
            {{- %(bot)s }}
        {%%- endif %%}
    {%%- endif %%}
{%%- endfor %%}
{%%- if add_generation_prompt %%}
    {{- %(header)s ~ %(generation_prompt)s }}
{%%- endif %%}
"""


def jinja_of_fields(chat_format: ChatFormat) -> str:
    """A format without a file of its own -> a Jinja template that writes the same of a plain conversation."""
    part = {name: jinja_text(getattr(chat_format, name)) for name in ("begin", "user", "header", "bot", "finish")}
    part["generation_prompt"] = jinja_text(chat_format.generation_prompt)
    part["last_bot"] = "bot" if chat_format.reply_in_prompt else part["bot"]
    part["default"] = "none" if chat_format.default is None else jinja_text(chat_format.default)
    part |= {f"strip_{name}": " | trim" if name in chat_format.strip else "" for name in ("system", "user", "bot")}
    if chat_format.single_turn_user:
        part["user"] = f"({jinja_text(chat_format.single_turn_user)} if turns | length < 3 else {part['user']})"
    if chat_format.next_turn_mark:
        part["user"] = f"{jinja_text(chat_format.next_turn_mark)} ~ {part['user']}"
    part["merge"] = part["system"] = ""
    if chat_format.system is not None:
        part["system"] = (
            f"{{%- if system is not none %}}\n    {{{{- {jinja_text(chat_format.system)} }}}}\n{{%- endif %}}"
        )
    if chat_format.merge:
        at = {0: "0", -1: "(turns | length - 1) // 2 * 2"}[chat_format.merge[0]]
        text = jinja_text(chat_format.merge[1])
        part["merge"] = f"{{%- if first and loop.index0 == {at} %}}{{%- set user = {text} %}}{{%- endif %}}"
    elif chat_format.system is None:
        part["system"] = "{%- if first %}{{- raise_exception('this chat format has no system message') }}{%- endif %}"
    return "".join(f"{line}\n" for line in (JINJA_FORMAT % part).splitlines() if line.strip())


def jinja_text(spec: str | tuple) -> str:
    """A str or tuple of a format -> a Jinja expression of the text that it writes."""
    spec = spec if isinstance(spec, str) else "".join(TOKEN_TEXTS.get(item, item) for item in spec)
    pieces = []
    for text, name, _, _ in Formatter().parse(spec):
        if text:
            pieces.append("'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'")
        if name:
            pieces.append(JINJA_NAMES.get(name, name))
    return " ~ ".join(pieces) or "''"


# ============================== the table ==============================


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
    "<|im_start|>user\n{user}<|im_end|>\n",
    "{bot}<|im_end|>\n",
    header="<|im_start|>assistant\n",
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
    LLAMA3_ROLE.format("user") + "{user}<|eot_id|>",
    "{bot}<|eot_id|>",
    header=LLAMA3_ROLE.format("assistant"),
    begin="<|begin_of_text|>",
    system=LLAMA3_ROLE.format("system") + "{system}<|eot_id|>",
    strip=("system", "user", "bot"),
    stops=("<|eot_id|>",),
    required_tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)

MISTRAL = ChatFormat(" [INST] {user} [/INST]", " {bot}{eos}", begin="{bos}", merge=(0, "{system}\n\n{user}"))

GEMMA = ChatFormat(
    "<start_of_turn>user\n{user}<end_of_turn>\n",
    "{bot}<end_of_turn>\n",
    header="<start_of_turn>model\n",
    begin="{bos}",
    strip=("user", "bot"),
    stops=("<end_of_turn>",),
    required_tokens=("<start_of_turn>", "<end_of_turn>"),
)

DEEPSEEK3 = ChatFormat(
    "<｜User｜>{user}",
    "{bot}<｜end▁of▁sentence｜>",
    begin="{bos}",
    header="<｜Assistant｜>",
    system="{system}",
    clean_reply=after_thoughts,
    stops=("<｜end▁of▁sentence｜>",),
    template=("deepseek.jinja", {"thoughts": "false"}),
    thoughts=True,
    tool_tokens=(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁outputs▁begin｜>",
        "<｜tool▁outputs▁end｜>",
    ),
    required_tokens=("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
)

GLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

NO_THOUGHTS = {"default_system": "none", "thoughts": "false"}  # settings of chatml.jinja

THOUGHTS = {"default_system": "none", "thoughts": "true"}


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
        template=("llama3.jinja", {"date_string": "date_string or '26 Jul 2024'"}),
    ),
    "llama3.2": replace(
        LLAMA3,
        begin="{bos}",
        default="",
        system=LLAMA3_ROLE.format("system") + LLAMA3_DATE.format("{date}") + "{system}<|eot_id|>",
        template=("llama3.jinja", {"date_string": "date_string or strftime_now('%d %b %Y')"}),
    ),
    "mistral-v1": MISTRAL,
    "mistral-v3": replace(
        MISTRAL,
        user="[INST] {user}[/INST]",
        merge=(-1, "{system}\n\n{user}"),
        strip=("bot",),
        required_tokens=("[INST]", "[/INST]"),
        template=("mistral-v3.jinja", {}),
        tool_tokens=("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    "mistral-hf": replace(MISTRAL, user="[INST] {user} [/INST]", bot="{bot}{eos}", merge=None),  # 7B v0.2, 8x7B
    "mistral-v0.1-hf": replace(MISTRAL, user="[INST] {user} [/INST]", bot="{bot}{eos} ", merge=None),
    "mixtral": MISTRAL,
    "chatml": replace(CHATML, template=("chatml.jinja", NO_THOUGHTS)),  # also Yi and Qwen3 2507 Instruct
    "yi-1.5": replace(CHATML, system="{system}"),
    "qwen": ChatFormat(  # the first Qwen: each text by itself
        ("<|im_start|>", "user", "\n", "{user}", "<|im_end|>", "\n"),
        ("{bot}", "<|im_end|>", "\n"),
        header=("<|im_start|>", "assistant", "\n"),
        system=("<|im_start|>", "system", "\n", "{system}", "<|im_end|>", "\n"),
        default="",
        verbatim=True,
        stops=("<|im_end|>",),
        required_tokens=CHATML.required_tokens,
    ),
    "qwen1.5": replace(CHATML, default="You are a helpful assistant"),
    "qwen2": replace(CHATML, default="You are a helpful assistant."),
    "qwen2.5": replace(
        CHATML,
        default=QWEN25_SYSTEM,
        template=("chatml.jinja", {**NO_THOUGHTS, "default_system": f"'{QWEN25_SYSTEM}'"}),
    ),
    "qwen3": replace(
        CHATML,
        clean_reply=qwen3_reply,
        not_user=("<tool_response>", "</tool_response>"),
        template=("chatml.jinja", THOUGHTS),
        thoughts=True,
    ),
    "qwen3-no-thinking": replace(
        CHATML,
        clean_reply=partial(qwen3_reply, thinking=False),
        generation_prompt="<think>\n\n</think>\n\n",
        not_user=("<tool_response>", "</tool_response>"),
        template=("chatml.jinja", {**THOUGHTS, "enable_thinking": "enable_thinking is true"}),
        thoughts=True,
    ),
    "baichuan2": ChatFormat((195, "{user}"), ("{bot}",), header=(196,), system=("{system}",), finish=("{eos}",)),
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
        "[Round {number}]\n\n问：{user}",
        "{bot}\n\n",
        header="\n\n答：",
        begin=("[gMASK]", "sop"),
        reply_in_prompt=True,
        finish=("{eos}",),
        required_tokens=("[gMASK]", "sop"),
    ),
    "chatglm3": ChatFormat(
        ("\n", "{user}"),
        ("\n", "{bot}"),
        header=("<|assistant|>",),
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
        template=("glm-4.jinja", {}),
        required_tokens=("[gMASK]", "<sop>", *GLM_ROLES),
    ),
    "internlm": ChatFormat(
        "<|User|>:{user}<eoh>\n",
        "{bot}<eoa>\n",
        header="<|Bot|>:",
        begin=("{bos}",),
        stops=("<eoa>",),
        required_tokens=("<eoh>", "<eoa>"),
    ),
    "internlm2": replace(CHATML, begin="{bos}", finish="{eos}"),
    "gemma": GEMMA,
    "gemma-hf": replace(GEMMA, begin=""),  # the template of the first Gemma left bos to the tokenizer
    "deepseek-v2": ChatFormat(
        "User: {user}\n\n", " {bot}{eos}", header="Assistant:", begin="{bos}", system="{system}\n\n"
    ),
    "deepseek-v3": DEEPSEEK3,
    "deepseek-r1": replace(
        DEEPSEEK3,
        generation_prompt="<think>\n",
        clean_reply=deepseek_r1_reply,
        template=("deepseek.jinja", {"thoughts": "true"}),
    ),
}

FORMATS = {name: replace(chat_format, name=name) for name, chat_format in FORMATS.items()}
