"""Chat formats: a conversation -> prompt segments -> ids."""

import ast
import hashlib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import cached_property, lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from formats.files import UserError, brief, read_json, read_text

TEMPLATE_FILE = "chat_template.json"


# ============================== chat templates ==============================
# A strict subset of Jinja, enough for what PaddleNLP's chat_template.json files use: text, {{ expression }}, {# comment
# #} and {% if %}/{% elif %}/{% else %}/{% endif %}, with trim_blocks, lstrip_blocks and keep_trailing_newline as
# upstream sets them. Anything else is refused when the file is loaded, since a template that renders a little
# differently trains a model on the wrong prompt.

TAG = re.compile(r"(\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\})", re.DOTALL)


UNDEFINED = type("Undefined", (), {"__bool__": lambda self: False, "__repr__": lambda self: "undefined"})()


CONSTANTS = {"true": True, "false": False, "none": None, "True": True, "False": False, "None": None}


def compile_expression(source, where):
    """Text of a Jinja expression -> function of the variables. UserError names the construct that is not known."""
    try:
        tree = ast.parse(source.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise UserError(f"{where}: cannot read the expression {source.strip()!r}") from None
    return compile_node(tree, where)


def compile_node(node, where):
    """Python syntax tree -> function of the variables; here Python and Jinja agree. Unknown names are UNDEFINED."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, type(None))):
        return lambda variables: node.value
    if isinstance(node, ast.Name):
        return lambda variables: CONSTANTS[node.id] if node.id in CONSTANTS else variables.get(node.id, UNDEFINED)
    if isinstance(node, ast.Attribute) or isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        key, owner = node.attr if isinstance(node, ast.Attribute) else node.slice.value, compile_node(node.value, where)
        return lambda variables: look_up(owner(variables), key, f"{where}: {ast.unparse(node)!r}")
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = compile_node(node.operand, where)
        return lambda variables: not value(variables)
    if isinstance(node, ast.BoolOp):
        values, decisive = [compile_node(value, where) for value in node.values], isinstance(node.op, ast.Or)

        def first_decisive(variables):  # the value itself, as in Python and Jinja: {{ system or 'text' }}
            for value in values:
                result = value(variables)
                if bool(result) == decisive:
                    break
            return result

        return first_decisive
    if isinstance(node, ast.IfExp):
        test, yes, no = (compile_node(part, where) for part in (node.test, node.body, node.orelse))
        return lambda variables: yes(variables) if test(variables) else no(variables)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, right, operator = compile_node(node.left, where), node.comparators[0], node.ops[0]
        if isinstance(operator, (ast.Eq, ast.NotEq)):
            right, equal = compile_node(right, where), isinstance(operator, ast.Eq)
            return lambda variables: (left(variables) == right(variables)) == equal
        if isinstance(operator, (ast.Is, ast.IsNot)) and isinstance(right, ast.Name) and right.id == "defined":
            return lambda variables: (left(variables) is not UNDEFINED) == isinstance(operator, ast.Is)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        # Jinja binds | tighter than +, Python looser; as + is refused, the two cannot disagree here.
        value, text = compile_node(node.left, where), ast.unparse(node.right)
        if text == "trim" and not isinstance(node.left, ast.BinOp):
            return lambda variables: str(value(variables)).strip() if value(variables) is not UNDEFINED else UNDEFINED
        call = node.right
        if isinstance(call, ast.Call) and text.startswith("default(") and len(call.args) == 1 and not call.keywords:
            call = call.args[0]
        if isinstance(call, ast.Constant) and isinstance(call.value, str):
            return lambda variables: call.value if value(variables) is UNDEFINED else value(variables)
    raise UserError(
        f"{where}: the construct {ast.unparse(node)!r} is not supported; known are names, 'text', numbers, "
        "a.key, a['key'], ==, !=, and, or, not, is defined, x if y else z, | trim, | default('text')"
    )


def look_up(owner, key, where):
    """owner[key], UNDEFINED when it is not there; UserError when there is nothing to look into."""
    if isinstance(owner, dict):
        return owner.get(key, UNDEFINED)
    if isinstance(owner, list) and isinstance(key, int) and -len(owner) <= key < len(owner):
        return owner[key]
    raise UserError(f"{where} does not exist in this record's context")


def strip_around_tags(pieces):
    """[text, tag, text, ..., text] with trim_blocks, lstrip_blocks and the tags' own - done to the texts."""
    line_starts = True  # does pieces[i - 1] begin a line of the source?
    for i in range(1, len(pieces), 2):
        tag = pieces[i]
        if tag.startswith(("{%-", "{{-", "{#-")):  # - eats all white space on its side
            pieces[i - 1] = pieces[i - 1].rstrip()
        elif not tag.startswith("{{"):  # lstrip_blocks: indentation before a block goes
            start = pieces[i - 1].rfind("\n") + 1
            if (start or line_starts) and not pieces[i - 1][start:].strip():
                pieces[i - 1] = pieces[i - 1][:start]
        text = pieces[i + 1]
        if tag.endswith(("-%}", "-}}", "-#}")):
            pieces[i + 1] = text.lstrip()
        elif not tag.startswith("{{"):  # trim_blocks: the line break right after a block goes
            pieces[i + 1] = text.removeprefix("\n")
        line_starts = text[: len(text) - len(pieces[i + 1])].endswith("\n")
    return pieces


def parse_template(source, where):
    """Template text -> list of nodes: str | ("print", function, text) | ("if", [(function | None, nodes)...])."""
    pieces = strip_around_tags(TAG.split(source))
    stack = [[]]  # innermost open list of nodes last; [nodes, branches, nodes, branches, ..., nodes]
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            if "{{" in piece or "{%" in piece:
                raise UserError(f"{where}: a tag that never closes: {piece[piece.find('{') :][:40]!r}")
            stack[-1].append(piece)
            continue
        inner = piece[2:-2].removeprefix("-").removesuffix("-").strip()
        word, _, rest = inner.partition(" ")
        if piece.startswith("{#"):
            continue
        if piece.startswith("{{"):
            stack[-1].append(("print", compile_expression(inner, where), inner))
        elif word == "if":
            branches = [(compile_expression(rest, where), [])]
            stack[-1].append(("if", branches))
            stack += [branches, branches[0][1]]
        elif word in ("elif", "else") and len(stack) > 1 and stack[-2][-1][0] is not None:
            stack[-2].append((compile_expression(rest, where) if word == "elif" else None, []))
            stack[-1] = stack[-2][-1][1]
        elif inner == "endif" and len(stack) > 1:
            del stack[-2:]
        else:
            raise UserError(f"{where}: {piece!r} is not supported; known are if, elif, else, endif and {{{{ name }}}}")
    if len(stack) > 1:
        raise UserError(f"{where}: an {{% if %}} without its {{% endif %}}")
    return stack[0]


def render(nodes, variables, where):
    """Nodes of `parse_template` -> text."""
    out = []
    for node in nodes:
        if isinstance(node, str):
            out.append(node)
        elif node[0] == "print":
            value = node[1](variables)
            if value is UNDEFINED:
                raise UserError(f"{where}: {node[2]!r} is not in this record's context: {', '.join(variables)}")
            out.append(str(value))
        else:
            chosen = next((body for test, body in node[1] if test is None or test(variables)), [])
            out.append(render(chosen, variables, where))
    return "".join(out)


class ChatTemplate:
    """Texts around a conversation, PaddleNLP's chat_template.json: {"system", "conversation": [user, bot], "query"}.

    Only the bot part is learnt; "query" is the user part when an answer is to be generated. Variables: the keys of the
    record's context (system, ...), user, bot, query, index, is_first, is_last, length, is_training, bos_token and
    eos_token. UserError names the file and what is wrong in it."""

    def __init__(self, config, where):
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
        self.parts = {
            part: parse_template(text, f"{where}: {part}")
            for part, text in zip(("system", "user", "bot", "query"), texts)
        }

    @property
    def stops(self):
        """What the bot part writes after every reply, such as <|im_end|>, without white space around it."""
        last = self.parts["bot"][-1]
        return [last.strip()] if isinstance(last, str) and last.strip() else []

    def missing(self, tokenizer):
        return None  # it names no tokens

    def files(self):
        return {TEMPLATE_FILE: json.dumps(self.config, ensure_ascii=False, indent=2) + "\n"}

    def render(self, part, variables):
        return render(self.parts[part], variables, f"{self.name}: {part}")

    def pieces(self, rounds, context, tokenizer, is_training=False, split=True):
        """[(user, bot)...], the last bot None if it is to be written -> [PromptSegment...]; every part is read by itself."""
        variables = {**context, "length": len(rounds), "is_training": is_training}
        tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        variables |= {name: token for name, token in tokens.items() if token is not None}
        out = [PromptSegment(0, "own", self.render("system", variables))]
        for index, (user, bot) in enumerate(rounds):
            turn = variables | {"index": index, "is_first": index == 0, "is_last": index == len(rounds) - 1}
            turn |= {"user": user, "query": user}
            if bot is None:
                out.append(PromptSegment(1 + 2 * index, "own", self.render("query", turn)))
            else:
                turn["bot"] = bot
                out.append(PromptSegment(1 + 2 * index, "own", self.render("user", turn)))
                out.append(PromptSegment(2 + 2 * index, "own", self.render("bot", turn)))
        return out


class PromptSegment(NamedTuple):
    """A stretch of a conversation on its way to ids."""

    part: (
        int  # 0: the beginning, 1 + 2 k: what stands before the reply of round k, 2 + 2 k: that reply, which is learnt
    )
    # "text": neighbors of this kind are one text, special tokens in it included (so Hugging Face reads what a template
    # rendered); "own": a text by itself; "literal": that, special tokens in it being mere characters; "token": one token
    kind: str
    text: str | int  # of a token its text or its id


@dataclass(frozen=True)
class ChatFormat:
    """How a family writes a conversation. A str is text around {user}, {bot}, {system}, {bos}, {eos}, {round} (from 0),
    {number} (from 1) and {date}; a tuple is what the family's code encodes piece by piece: tokens (those in `needs`, or
    ids) and texts, so that what a user writes can never become a token there.

    `begin`, the system block, then of each round `opener`, `user`, `header` and `bot`; `ask` stands before the last
    reply only. `opener` is the next user's mark, with which the family's models end their replies: it is learnt with the
    reply before it. A finished conversation is, in training and elsewhere, the prompt of its last question, that reply
    and `finish`."""

    user: str | tuple
    bot: str | tuple
    begin: str | tuple = ""
    system: str | tuple | None = None  # None: no block for it
    default: str | None = None  # the system text where none is given; None: no block then
    merge: tuple | None = None  # (0 or -1, text): the user turn that takes the system text, and how
    strip: tuple = ()  # whose texts lose the white space around them
    opener: str | tuple = ""
    header: str | tuple = ""
    ask: str | tuple = ""
    alone: str = ""  # instead of `user` in a conversation of one round
    finish: str | tuple = ""
    clean: Callable = lambda bot, last: bot  # what is left of a reply
    history: bool = False  # earlier replies are part of the prompt, never learnt, and the last one is read by itself
    literal: bool = False  # texts of tuples are "literal", else "own"
    not_user: tuple = ()  # beginning and end of user texts that the family reads as something else: refused
    skip_empty: bool = False  # nothing is written of an empty text, its role neither
    stops: tuple = ()  # tokens that end a reply besides eos
    needs: tuple = ()  # tokens that the vocabulary must have
    name: str = ""

    def files(self):
        return {TEMPLATE_FILE: json.dumps({"chat_format": self.name}) + "\n"}

    def missing(self, tokenizer):
        """The first token that the vocabulary lacks, or that does not become one where the format writes it as text."""
        texts = [getattr(self, field.name) for field in fields(self)]
        written = "".join(text for text in texts if isinstance(text, str))
        return next(
            (
                token
                for token in self.needs
                if (not tokenizer.has_token(token) if token in written else tokenizer.token_id(token) is None)
            ),
            None,
        )

    def fill(self, part, spec, values):
        """A str or tuple of the format -> [PromptSegment...]."""
        if isinstance(spec, str):
            return [PromptSegment(part, "text", spec.format(**values))] if spec else []
        kinds = [
            "token"
            if item in ("{bos}", "{eos}", *self.needs) or isinstance(item, int)
            else "literal"
            if self.literal
            else "own"
            for item in spec
        ]
        texts = [item if isinstance(item, int) else item.format(**values) for item in spec]
        return [PromptSegment(part, kind, text) for kind, text in zip(kinds, texts) if text != ""]

    def pieces(self, rounds, context, tokenizer, is_training=False, split=True):
        """As ChatTemplate.pieces. UserError for a system text where the family has no place for one."""
        system, last = context.get("system"), len(rounds) - 1
        if system is not None and self.system is None and self.merge is None:
            raise UserError(f"messages: chat format {self.name!r} has no system message; put its text into the user's")
        text = self.default if system is None else system
        values = {
            "bos": tokenizer.bos_token or "",
            "eos": tokenizer.eos_token or "",
            "date": f"{datetime.now():%d %b %Y}",
            "system": text.strip() if text and "system" in self.strip else text,
        }
        out = self.fill(0, self.begin, values)
        if self.system is not None and (text or text == "" and not self.skip_empty):
            out += self.fill(0, self.system, values)
        for k, (user, bot) in enumerate(rounds):
            if self.not_user and user.startswith(self.not_user[0]) and user.endswith(self.not_user[1]):
                raise UserError(
                    f"messages: chat format {self.name!r} takes a user's text from {self.not_user[0]} to "
                    f"{self.not_user[1]} for a tool's answer; tools are not known here"
                )
            if self.merge and system is not None and k == self.merge[0] % len(rounds):
                user = self.merge[1].format(**values | {"user": user})
            values |= {"round": k, "number": k + 1, "user": user.strip() if "user" in self.strip else user}
            if user or not self.skip_empty:
                out += self.fill(2 * k or 1, self.opener, values)
                out += self.fill(1 + 2 * k, self.alone if self.alone and not last else self.user, values)
            if k == last or bot or not self.skip_empty:
                out += self.fill(1 + 2 * k, self.header, values)
            if k == last:
                out += self.fill(1 + 2 * k, self.ask, values)
            if k == last and bot is not None or bot or bot == "" and not self.skip_empty:
                reply = self.clean(bot, k == last)
                values["bot"] = reply.strip() if "bot" in self.strip else reply
                if self.history and k == last:
                    out.append(PromptSegment(2 + 2 * k, "own", values["bot"]))
                else:
                    out += self.fill(2 + 2 * k + self.history, self.bot, values)
                if k == last:
                    out += self.fill(2 + 2 * k, self.finish, values)
        return out


def after_thoughts(bot, last):
    """DeepSeek's models see earlier replies without their reasoning; the last one stays as it was given."""
    return bot if last else bot.split("</think>")[-1]


def deepseek_r1_reply(bot, last):
    """The prompt has written <think> and a line break already; a reply without reasoning ends it at once."""
    if not last:
        return after_thoughts(bot, last)
    return bot.removeprefix("<think>\n") if "</think>" in bot else "\n</think>\n\n" + bot


def qwen3_reply(bot, last, thinking=True):
    """Qwen3's template: the last reply with its reasoning, be it empty, all others without."""
    thoughts, end, text = bot.rpartition("</think>")
    text = text.lstrip("\n") if end else bot
    if not last:
        return text
    thoughts = bot.split("</think>")[0].rstrip("\n").split("<think>")[-1].strip("\n") if end else ""
    if not thinking and not thoughts:
        return text.lstrip("\n")  # the prompt has the empty reasoning already
    return f"<think>\n{thoughts}\n</think>\n\n" + text.lstrip("\n")


LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n"


LLAMA3_DATE = "Cutting Knowledge Date: December 2023\nToday Date: {}\n\n"


CHATML = ChatFormat(
    "<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n",
    "{bot}<|im_end|>\n",
    system="<|im_start|>system\n{system}<|im_end|>\n",
    stops=("<|im_end|>",),
    needs=("<|im_start|>", "<|im_end|>"),
)


LLAMA2 = ChatFormat(
    "{bos} [INST] {user} [/INST]",
    " {bot} {eos}",
    strip=("user", "bot"),
    merge=(0, "<<SYS>>\n{system}\n<</SYS>>\n\n{user}"),
)


LLAMA3_FORMAT = ChatFormat(
    LLAMA3.format("user") + "{user}<|eot_id|>" + LLAMA3.format("assistant"),
    "{bot}<|eot_id|>",
    begin="<|begin_of_text|>",
    system=LLAMA3.format("system") + "{system}<|eot_id|>",
    strip=("system", "user", "bot"),
    stops=("<|eot_id|>",),
    needs=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)


MISTRAL = ChatFormat(" [INST] {user} [/INST]", " {bot}{eos}", begin="{bos}", merge=(0, "{system}\n\n{user}"))


GEMMA = ChatFormat(
    "<start_of_turn>user\n{user}<end_of_turn>\n<start_of_turn>model\n",
    "{bot}<end_of_turn>\n",
    begin="{bos}",
    strip=("user", "bot"),
    stops=("<end_of_turn>",),
    needs=("<start_of_turn>", "<end_of_turn>"),
)


DEEPSEEK3 = ChatFormat(
    "<｜User｜>{user}<｜Assistant｜>",
    "{bot}<｜end▁of▁sentence｜>",
    begin="{bos}",
    system="{system}",
    clean=after_thoughts,
    stops=("<｜end▁of▁sentence｜>",),
    needs=("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
)


GLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


# From the families' own code (goldens) or published templates. "-hf": as Hugging Face's template of that family has it,
# where that differs from the family's own code by a space or by the name of bos.
FORMATS = {
    "llama2": LLAMA2,  # Meta's ids: a space after bos
    "llama2-hf": replace(LLAMA2, user="{bos}[INST] {user} [/INST]"),
    "llama3": LLAMA3_FORMAT,
    "llama3-hf": replace(LLAMA3_FORMAT, begin="{bos}", needs=()),
    "llama3.1": replace(
        LLAMA3_FORMAT,
        begin="{bos}",
        default="",
        system=LLAMA3.format("system") + LLAMA3_DATE.format("26 Jul 2024") + "{system}<|eot_id|>",
    ),
    "llama3.2": replace(
        LLAMA3_FORMAT,
        begin="{bos}",
        default="",
        system=LLAMA3.format("system") + LLAMA3_DATE.format("{date}") + "{system}<|eot_id|>",
    ),
    "mistral-v1": MISTRAL,
    "mistral-v3": replace(
        MISTRAL,
        user="[INST] {user}[/INST]",
        merge=(-1, "{system}\n\n{user}"),
        strip=("bot",),
        needs=("[INST]", "[/INST]"),
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
        literal=True,
        stops=("<|im_end|>",),
        needs=CHATML.needs,
    ),
    "qwen1.5": replace(CHATML, default="You are a helpful assistant"),
    "qwen2": replace(CHATML, default="You are a helpful assistant."),
    "qwen2.5": replace(CHATML, default="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "qwen3": replace(CHATML, clean=qwen3_reply, not_user=("<tool_response>", "</tool_response>")),
    "qwen3-no-thinking": replace(
        CHATML,
        clean=partial(qwen3_reply, thinking=False),
        ask="<think>\n\n</think>\n\n",
        not_user=("<tool_response>", "</tool_response>"),
    ),
    "baichuan2": ChatFormat((195, "{user}", 196), ("{bot}",), system=("{system}",), finish=("{eos}",)),
    "chatglm": ChatFormat(
        "[Round {round}]\n问：{user}\n答：",
        "{bot}\n",
        alone="{user}",
        ask=("[gMASK]", "<sop>"),
        history=True,
        finish=("{eos}",),
        needs=("[gMASK]", "<sop>"),
    ),
    "chatglm2": ChatFormat(
        "[Round {number}]\n\n问：{user}\n\n答：",
        "{bot}\n\n",
        begin=("[gMASK]", "sop"),
        history=True,
        finish=("{eos}",),
        needs=("[gMASK]", "sop"),
    ),
    "chatglm3": ChatFormat(
        ("\n", "{user}", "<|assistant|>"),
        ("\n", "{bot}"),
        begin=("[gMASK]", "sop"),
        opener=("<|user|>",),
        system=("<|system|>", "\n", "{system}"),
        finish=("{eos}",),
        stops=("<|user|>", "<|observation|>"),
        needs=("[gMASK]", "sop", *GLM_ROLES),
    ),
    "glm-4": ChatFormat(
        "\n{user}",
        "\n{bot}",
        begin="[gMASK]<sop>",
        system="<|system|>\n{system}",
        opener="<|user|>",
        header="<|assistant|>",
        finish="<|user|>",
        skip_empty=True,
        stops=("<|user|>", "<|observation|>"),
        needs=("[gMASK]", "<sop>", *GLM_ROLES),
    ),
    "internlm": ChatFormat(
        "<|User|>:{user}<eoh>\n<|Bot|>:", "{bot}<eoa>\n", begin=("{bos}",), stops=("<eoa>",), needs=("<eoh>", "<eoa>")
    ),
    "internlm2": replace(CHATML, begin="{bos}", finish="{eos}"),
    "gemma": GEMMA,
    "gemma-hf": replace(GEMMA, begin=""),  # the template of the first Gemma left bos to the tokenizer
    "deepseek-v2": ChatFormat("User: {user}\n\nAssistant:", " {bot}{eos}", begin="{bos}", system="{system}\n\n"),
    "deepseek-v3": DEEPSEEK3,
    "deepseek-r1": replace(DEEPSEEK3, ask="<think>\n", clean=deepseek_r1_reply),
}


FORMATS = {name: replace(chat_format, name=name) for name, chat_format in FORMATS.items()}


# ------------------------------ templates of Hugging Face tokenizers ------------------------------

JINJA_FILE = "chat_template.jinja"


JINJA_TAG = re.compile(r"""(\{#.*?\#}|\{([{%])(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^'"])*?[}%]\})""", re.DOTALL)


JINJA_WORD = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\w+|\S""", re.DOTALL)


RECOGNISED = {  # signature of a published template -> the format above that writes the same
    "8cebae4383b5f5ef": "llama2-hf",
    "887ebf6518a49f5e": "llama2-hf",
    "a91e8117b8273304": "llama3-hf",
    "18effb7f647917ce": "llama3-hf",
    "fbaeb982512c0172": "llama3.1",
    "f494a82fa92d92e4": "llama3.2",
    "1cc3bd28400671d8": "mistral-v1",
    "50dffd348e62e746": "mistral-v3",
    "9446e1d0ef52f78e": "mistral-hf",
    "e6884210125c6ba0": "mistral-v0.1-hf",
    "f97ff78f9ac4d9b3": "chatml",
    "005fb62f163011c6": "chatml",
    "f63ab8eecfb6e093": "chatml",
    "656f0e8a822ff73a": "yi-1.5",
    "2516ffda360ef345": "qwen1.5",
    "b1ce672fd41319a5": "qwen1.5",
    "9678456d5a9c6c90": "qwen2",
    "47c15d407362786f": "qwen2",
    "2e431a3fbc4dad49": "qwen2",
    "3417ce61dccf006f": "qwen2.5",
    "a248a94b02877bfb": "qwen3",
    "39c3d73f51aa0e27": "qwen3",
    "be7a7d38d7fb95be": "chatglm3",
    "0a4a31787cd1c5ca": "glm-4",
    "45dee6961672d54d": "glm-4",
    "c3d0baece2c3d32e": "internlm2",
    "e09a969b2804875b": "gemma",
    "2707abe460ff9ef3": "gemma-hf",
    "5b8cb85e36980483": "deepseek-v2",
    "12c6f41d7752aa7c": "deepseek-v3",
    "69286192c8cb85d7": "deepseek-v3",
    "be062348adb7aa4f": "deepseek-r1",
}


def signature(source):
    """Jinja template -> hash of its meaning: texts as they stand after white-space control, the words of each tag with
    string literals read; comments, spaces in tags and the kind of quotes do not count."""
    found = JINJA_TAG.split(source.removesuffix("\n"))  # text, tag, its second character, text, ...
    pieces = strip_around_tags([piece for i, piece in enumerate(found) if i % 3 < 2])
    words = []
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            words += ["text", piece] if piece else []
        elif not piece.startswith("{#"):
            inner = piece[2:-2].removeprefix("-").removesuffix("-")
            for word in [piece[:2], *JINJA_WORD.findall(inner)]:
                if word[0] in "'\"" and len(word) > 1:
                    word = "'" + word[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")
                words.append(word)
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


@lru_cache(maxsize=16)
def compile_jinja(source, where):
    """Template text -> a jinja2 template in a sandbox, with what transformers gives to one; None without jinja2.
    UserError when it is not Jinja."""
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return None
    if tuple(int(n) for n in re.findall(r"\d+", jinja2.__version__)[:3]) < (3, 1, 6):
        return None  # known ways out of the sandbox; a template is somebody else's program

    class Generation(Extension):  # {% generation %} marks replies for trainers; it writes nothing
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda text: datetime.now().strftime(text)}
    try:
        return env.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: not a Jinja template: {one_line(error)}") from None


def one_line(error):
    return " ".join(str(error).split())


class JinjaTemplate:
    """A template of a Hugging Face tokenizer. jinja2 renders it if it is installed; without it, a published template is
    recognized by its text and the format of FORMATS that writes the same takes its place. Any other is refused when a
    conversation comes, not when the tokenizer is loaded."""

    def __init__(self, source, where):
        if not isinstance(source, str):
            raise UserError(f"{where}: chat_template must be a text, found {brief(source)}")
        self.source, self.name = source, where
        self.known = FORMATS.get(RECOGNISED.get(signature(source)))

    @cached_property
    def stops(self):
        """What the template writes after a reply, without white space around it."""
        if self.known:
            return list(self.known.stops)
        if compile_jinja(self.source, self.name) is None:
            return []
        try:
            user, bot = {"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}
            prompt, whole = self.render([user], None, True), self.render([user, bot], None, False)
        except UserError:
            return []
        end = whole.removeprefix(prompt).partition("reply")[2].strip() if whole.startswith(prompt) else ""
        return [end] if end else []

    def missing(self, tokenizer):
        return None  # as in transformers: what is no token of the vocabulary is ordinary text

    def files(self):
        return {JINJA_FILE: self.source}

    def render(self, messages, tokenizer, add_generation_prompt):
        """Messages -> text. UserError when the template refuses them or fails."""
        template = compile_jinja(self.source, self.name)
        names = [f"{name}_token" for name in ("bos", "eos", "unk", "pad")]
        tokens = {name: token for name in names if (token := getattr(tokenizer, name, None)) is not None}
        try:
            return template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **tokens
            )
        except Exception as error:  # somebody else's program: it may fail in any way
            raise UserError(f"messages: {self.name} refuses this conversation: {one_line(error)}") from None

    def pieces(self, rounds, context, tokenizer, is_training=False, split=True):
        """As ChatTemplate.pieces; replies are found by rendering every beginning of the conversation. UserError when
        jinja2 is missing and the template is none of those known, or when `split` and one beginning, rendered, is not
        the beginning of the next."""
        missing = compile_jinja(self.source, self.name) is None
        if self.known and (missing or any(isinstance(spec, tuple) for spec in (self.known.user, self.known.begin))):
            return self.known.pieces(rounds, context, tokenizer)  # a tuple: the family's own code renders nothing
        if missing:
            raise UserError(
                f"{self.name}: this chat template is none of those known here; pip install 'jinja2>=3.1.6', "
                f"or give chat_template: {', '.join(FORMATS)}, plain"
            )
        messages = [{"role": "system", "content": context["system"]}] if context.get("system") is not None else []
        for user, bot in rounds:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": bot}]
        size, first, reply = len(messages), len(messages) - 2 * len(rounds), rounds[-1][1]
        prompt = self.render(messages[:-1], tokenizer, True)
        if self.known:
            with suppress(UserError):
                same = self.known.pieces([*rounds[:-1], (rounds[-1][0], None)], context, tokenizer)
                if "".join(piece.text for piece in same) == prompt:
                    return self.known.pieces(rounds, context, tokenizer)
        ends = range(first + 1, size - 1) if split else ()  # of every part before the last prompt, by messages
        texts = ["", *(self.render(messages[:end], tokenizer, (end - first) % 2 == 1) for end in ends), prompt]
        if reply is not None:
            texts.append(self.render(messages, tokenizer, False))
        out = []
        for part, (before, text) in enumerate(zip(texts, texts[1:]), 1 if split else size - first - 1):
            if not text.startswith(before):
                raise UserError(
                    f"{self.name}: what this template writes of the first {part // 2} rounds is not how it "
                    "begins the conversation, so replies cannot be told apart; train on single rounds, or "
                    f"give chat_template: {', '.join(FORMATS)}, plain"
                )
            out.append(PromptSegment(part, "text", text[len(before) :]))
        ended = reply is None or out[-1].text.rstrip().endswith(tuple(tokenizer.special))
        if not ended and tokenizer.eos_token is not None:
            out.append(PromptSegment(out[-1].part, "token", tokenizer.eos_token))  # a reply must end
        return out


def load_chat_template(name):
    """A name of FORMATS | a chat_template.json or .jinja or the folder of one -> ChatTemplate, ChatFormat or
    JinjaTemplate; plain | none | None -> None.

    None as a template means plain text: prompt, reply, eos, nothing around them."""
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
    if isinstance(config, dict) and set(config) == {"chat_format"}:
        if config["chat_format"] not in FORMATS:
            raise UserError(f"{path}: no chat format {brief(config['chat_format'])}; known are {', '.join(FORMATS)}")
        return FORMATS[config["chat_format"]]
    return ChatTemplate(config, str(path))


def folder_template(folder):
    """The chat template that a tokenizer's folder holds, or None: chat_template.json, chat_template.jinja, or the key of
    that name in tokenizer_config.json (of several the one named default)."""
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


def save_chat_template(template, folder):
    """Writes the template (None: none) into a folder that holds a copy of a tokenizer's files; takes out any other."""
    files = {} if template is None else template.files()
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


# ------------------------------ conversations to ids ------------------------------


def encode_pieces(tokenizer, pieces, parts):
    """[PromptSegment...] -> list of `parts` lists of ids."""
    out = [[] for _ in range(parts)]
    for kind, run in groupby(pieces, key=lambda piece: piece.kind):
        if kind == "text":
            for part, ids in encode_segments(tokenizer, list(run)):
                out[part] += ids
            continue
        for piece in run:
            if kind == "token":
                out[piece.part].append(piece.text if isinstance(piece.text, int) else tokenizer.token_id(piece.text))
            else:
                out[piece.part] += tokenizer.encode(piece.text, False, False if kind == "literal" else None)
    return out


def encode_segments(tokenizer, run, behind=False):
    """Neighboring "text" pieces, read as one text, -> [(part, ids)...], cut where the parts change. A token across a cut
    goes to the part behind it, but for a reply: there the text is cut, as a reply is learnt the way it would be
    generated, after its prompt's ids. behind: the text does not begin here."""
    ends = [i for i in range(1, len(run)) if run[i].part != run[i - 1].part]
    for i in ends:  # a special token parts the text before it from the text behind: so no beginning is read twice
        if starts_with_special(run[i].text, tokenizer):
            return encode_segments(tokenizer, run[:i], behind) + encode_segments(tokenizer, run[i:], behind)
    encode = partial(encode_continuation, tokenizer) if behind else partial(tokenizer.encode, add_special_tokens=False)
    whole, done, out = encode("".join(piece.text for piece in run)), 0, []
    for start, end in zip([0, *ends], ends):
        head = encode("".join(piece.text for piece in run[:end]))
        if head[:done] != whole[:done]:
            return out + encode_segments(tokenizer, run[start:], behind=True)
        same = next((i for i, (a, b) in enumerate(zip(head, whole)) if a != b), min(len(head), len(whole)))
        if same < len(head) and run[end].part % 2 == 0:
            return [*out, (run[start].part, head[done:])] + encode_segments(tokenizer, run[end:], behind=True)
        out.append((run[start].part, whole[done:same]))
        done = same
    return [*out, (run[-1].part, whole[done:])]


def encode_continuation(tokenizer, text):
    """Ids of a text that stands behind another: without the space that sentencepiece puts before a beginning."""
    line, ids = tokenizer.encode("\n", False), tokenizer.encode(text, False)
    if tokenizer.encode("\na", False) == line + tokenizer.encode("a", False):
        return ids
    both = tokenizer.encode("\n" + text, False)
    return both[len(line) :] if both[: len(line)] == line else ids


def starts_with_special(text, tokenizer):
    starts = (token for token in tokenizer.special if text.startswith(token))
    return any(not tokenizer.flags.get(token, {}).get("lstrip") for token in starts)


def check_messages(messages, add_generation_prompt):
    """[{"role": "system" | "user" | "assistant", "content": str}...] -> context, [(user, bot or None)...]. UserError:
    one line that says which message is wrong."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"messages: a list of at least one message is wanted, found {brief(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise UserError(
                f'messages[{i}]: an object with the role "system", "user" or "assistant" is wanted, found '
                f"{brief(message)}"
            )
        if not isinstance(message.get("content"), str):
            raise UserError(f"messages[{i}]: content must be a string, found {brief(message.get('content'))}")
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise UserError(f"messages[{roles.index('system', 1)}]: a system message can only be the first")
    turns = messages[roles[0] == "system" :]
    for i, turn in enumerate(turns, len(messages) - len(turns)):
        wanted = ("user", "assistant")[(i + len(turns) - len(messages)) % 2]
        if turn["role"] != wanted:
            raise UserError(
                f"messages[{i}]: the roles must be [system,] user, assistant, user, ...; found "
                f"{turn['role']!r} where {wanted!r} is wanted"
            )
    if not turns or add_generation_prompt != (turns[-1]["role"] == "user"):
        raise UserError(
            "messages: the last must be the user's if a reply is to be generated, else the assistant's; "
            f"found {roles[-1]!r}"
        )
    texts = [turn["content"] for turn in turns] + [None] * (len(turns) % 2)
    context = {"system": messages[0]["content"]} if roles[0] == "system" else {}
    return context, list(zip(texts[::2], texts[1::2]))
