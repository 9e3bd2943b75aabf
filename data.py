"""From a file on disk to a batch of numpy arrays: tokenizers, chat templates, packing, corpora. Never imports paddle.

    python data.py corpus corpus.jsonl --tokenizer demo/model --output data/corpus --workers 2

turns text (`.jsonl`: one {"text": ...} a line; `.txt`: documents separated by blank lines) into Megatron's `.bin/.idx`,
which pretrain.py reads by memory map. Everything else here is used by import:

    tokenizer = load_tokenizer(folder)                  sentencepiece, byte pairs; special tokens, chat template
    dataset = SFTDataset(path, tokenizer, src_length, max_length)         src/tgt JSON lines -> one flat int32 array
    loader = SFTLoader(dataset, batch_size, max_length, ...)              .batch(epoch, index) -> dict of arrays
    dataset = PreferenceDataset(path, tokenizer, max_seq_len, ...)        pairs of replies, one better than the other
    loader = PreferenceLoader(dataset, batch_size, max_seq_len, ...)      the same, several pairs a row
    loader = CorpusLoader(prefix, "949,50,1", "train", ...)               the same over memory-mapped tokens

A batch, everywhere (B batch, T sequence):
    input_ids, position_ids     int64 [B, T]   positions restart in each sample
    labels                      int64 [B, T]   shifted HERE, once: labels[t] is position t's target; -100 is ignored
    startend_row_indices        int32 [B, 1, T, 1]   causal FlashMask: rows i >= value[j] cannot see key j
    sample_ids                  per row, the list of record (or corpus sample) numbers in it
    tokens                      int, how many positions are real
and of preference pairs (N pairs in the batch, numbered as sample_ids lists them) also
    reply_ids                   int64 [B, T]   2 n + side (0 chosen, 1 rejected) where pair n has a label, else -1
    reply_tokens                int64 [N, 2]   labels of the chosen and of the rejected reply
Padding is a segment of its own: it sees itself, nobody sees it, and no row is fully masked.

Order is a pure function of (seed, epoch), and batch(epoch, index) is random access, so resuming needs no state but the
step number. Orders come from np.random.RandomState, whose stream numpy has frozen for good: an upgrade between the two
halves of a run changes nothing.

Not here: Unigram and WordPiece in tokenizer.json, tools in chats, Jinja of our own (jinja2 renders templates; without it
those of RECOGNISED are known).
"""

import argparse
import ast
import base64
import bisect
import codecs
import hashlib
import json
import os
import re
import shutil
import struct
import sys
import unicodedata
from array import array
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import cached_property, lru_cache, partial
from heapq import heapify, heappop, heappush
from itertools import chain, groupby, starmap
from multiprocessing import get_context
from operator import add
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

IGNORED = -100  # label of a position that teaches nothing
TEMPLATE_FILE = "chat_template.json"


class UserError(ValueError):
    """Something the user can put right: one line that says where, what was found and what would be right."""


def read_json(path):
    """JSON file -> object. UserError with file:line when it is missing, not UTF-8 or not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON in UTF-8: {error}") from None


def read_text(path):
    """File -> str, as it is. UserError when it cannot be read or is not UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error.reason}") from None


def parse_json_line(line, path, number):
    """One line (bytes) of a JSON-lines file -> dict, or a UserError that names file:line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        shown = line[:40].decode("utf-8", "replace").strip()
        raise UserError(f"{path}:{number}: not a JSON object on one line: {error}; found {shown!r}") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}:{number}: a JSON object is wanted on each line, found {brief(record)}")
    return record


def brief(value):
    """A JSON value in at most 60 characters, for a message."""
    return json.dumps(value, ensure_ascii=False)[:60]


def names_in(folder):
    """A few file names, for a message."""
    return ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"


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
        """[(user, bot)...], the last bot None if it is to be written -> [Piece...]; every part is read by itself."""
        variables = {**context, "length": len(rounds), "is_training": is_training}
        tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        variables |= {name: token for name, token in tokens.items() if token is not None}
        out = [Piece(0, "own", self.render("system", variables))]
        for index, (user, bot) in enumerate(rounds):
            turn = variables | {"index": index, "is_first": index == 0, "is_last": index == len(rounds) - 1}
            turn |= {"user": user, "query": user}
            if bot is None:
                out.append(Piece(1 + 2 * index, "own", self.render("query", turn)))
            else:
                turn["bot"] = bot
                out.append(Piece(1 + 2 * index, "own", self.render("user", turn)))
                out.append(Piece(2 + 2 * index, "own", self.render("bot", turn)))
        return out


class Piece(NamedTuple):
    """A stretch of a conversation on its way to ids."""

    part: (
        int  # 0: the beginning, 1 + 2 k: what stands before the reply of round k, 2 + 2 k: that reply, which is learnt
    )
    # "text": neighbours of this kind are one text, special tokens in it included (so Hugging Face reads what a template
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
        """A str or tuple of the format -> [Piece...]."""
        if isinstance(spec, str):
            return [Piece(part, "text", spec.format(**values))] if spec else []
        kinds = [
            "token"
            if item in ("{bos}", "{eos}", *self.needs) or isinstance(item, int)
            else "literal"
            if self.literal
            else "own"
            for item in spec
        ]
        texts = [item if isinstance(item, int) else item.format(**values) for item in spec]
        return [Piece(part, kind, text) for kind, text in zip(kinds, texts) if text != ""]

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
                    out.append(Piece(2 + 2 * k, "own", values["bot"]))
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
    recognised by its text and the format of FORMATS that writes the same takes its place. Any other is refused when a
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
            out.append(Piece(part, "text", text[len(before) :]))
        ended = reply is None or out[-1].text.rstrip().endswith(tuple(tokenizer.special))
        if not ended and tokenizer.eos_token is not None:
            out.append(Piece(out[-1].part, "token", tokenizer.eos_token))  # a reply must end
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
    """[Piece...] -> list of `parts` lists of ids."""
    out = [[] for _ in range(parts)]
    for kind, run in groupby(pieces, key=lambda piece: piece.kind):
        if kind == "text":
            for part, ids in encode_run(tokenizer, list(run)):
                out[part] += ids
            continue
        for piece in run:
            if kind == "token":
                out[piece.part].append(piece.text if isinstance(piece.text, int) else tokenizer.token_id(piece.text))
            else:
                out[piece.part] += tokenizer.encode(piece.text, False, False if kind == "literal" else None)
    return out


def encode_run(tokenizer, run, behind=False):
    """Neighbouring "text" pieces, read as one text, -> [(part, ids)...], cut where the parts change. A token across a cut
    goes to the part behind it, but for a reply: there the text is cut, as a reply is learnt the way it would be
    generated, after its prompt's ids. behind: the text does not begin here."""
    ends = [i for i in range(1, len(run)) if run[i].part != run[i - 1].part]
    for i in ends:  # a special token parts the text before it from the text behind: so no beginning is read twice
        if starts_with_special(run[i].text, tokenizer):
            return encode_run(tokenizer, run[:i], behind) + encode_run(tokenizer, run[i:], behind)
    encode = partial(encode_behind, tokenizer) if behind else partial(tokenizer.encode, add_special_tokens=False)
    whole, done, out = encode("".join(piece.text for piece in run)), 0, []
    for start, end in zip([0, *ends], ends):
        head = encode("".join(piece.text for piece in run[:end]))
        if head[:done] != whole[:done]:
            return out + encode_run(tokenizer, run[start:], behind=True)
        same = next((i for i, (a, b) in enumerate(zip(head, whole)) if a != b), min(len(head), len(whole)))
        if same < len(head) and run[end].part % 2 == 0:
            return [*out, (run[start].part, head[done:])] + encode_run(tokenizer, run[end:], behind=True)
        out.append((run[start].part, whole[done:same]))
        done = same
    return [*out, (run[-1].part, whole[done:])]


def encode_behind(tokenizer, text):
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


# ============================== tokenizer ==============================
# A family's tokenizer is data: the files of its folder and a row of CLASSES. Two engines turn text into ids:
# SentencePieces (the C++ library) and BPE (ours); readers make one from the files; Tokenizer, the door, adds what stands
# around it: special tokens, bos and eos, chat templates.

SPACE = "\u2581"  # how sentencepiece writes a space
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
SENTENCEPIECE_FILES = ("tokenizer.model", "sentencepiece.bpe.model")  # Hugging Face's name, PaddleNLP's name
MODEL_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "qwen.tiktoken", "ice_text.model", *SENTENCEPIECE_FILES)
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", TEMPLATE_FILE)
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+")  # fmt: skip
QWEN_WORDS = LLAMA3_WORDS.replace("{1,3}", "")  # each digit by itself
LLAMA3_TOKENS = (
    "<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> <|reserved_special_token_1|> "
    "<|finetune_right_pad_id|> <|step_id|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|> <|python_tag|> "
    "<|image|>").split() + [f"<|reserved_special_token_{i}|>" for i in range(2, 246)]  # fmt: skip
QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
GLM_TOKENS = ["[MASK]", "[gMASK]", "[sMASK]"]
GLM_ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]

# Kind of file -> tokenizer_class (less "Fast") -> what the class does. Keys as in tokenizer_config.json are defaults
# that this file overrides. The others are the class's own code:
#   words, nfc      the pattern that cuts text into words; text is brought to Unicode's NFC first
#   tokens          special tokens numbered on from the vocabulary's end
#   head, tail      tokens before and after every text, in place of bos and eos
#   parse           special tokens that are recognised in text, if not all; `roles` are those recognised on request
#   strips          white space around a special token in the text goes
#   lead            spaces that decoding drops at the beginning, besides those that a sentencepiece model drops itself
#   gap             where legacy decoding keeps the space before a text that a special token ends: "inside" (not at the
#                   very beginning) or "always"
#   bare            special tokens are decoded as the sentencepiece model would, most of them as nothing
#   blanks          line breaks, tabs and runs of spaces have pieces of their own
LLAMA = {"add_bos_token": True, "add_prefix_space": True, "lead": 1, "gap": "inside"}
BAICHUAN = {"legacy": True, "gap": "inside"}
INTERNLM = {"legacy": True, "gap": "always", "add_bos_token": True, "clean_up_tokenization_spaces": True}
CHATGLM2 = {"legacy": True, "pad_token": "<unk>", "tokens": [*GLM_TOKENS, "sop", "eop"],
            "head": ["[gMASK]", "sop"], "parse": [], "bare": True}  # fmt: skip
GPT2 = {"words": GPT2_WORDS, **dict.fromkeys(SPECIAL_NAMES[:3], "<|endoftext|>")}
QWEN = {"words": QWEN_WORDS, "nfc": True, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
LLAMA3 = {"words": LLAMA3_WORDS, "tokens": LLAMA3_TOKENS, "add_bos_token": True, "bos_token": "<|begin_of_text|>",
          "eos_token": "<|end_of_text|>", "pad_token": "<|finetune_right_pad_id|>"}  # fmt: skip
CLASSES = {
    "sentencepiece": {
        "LlamaTokenizer": LLAMA, "CodeLlamaTokenizer": LLAMA, "MistralTokenizer": LLAMA,
        "GemmaTokenizer": {"add_bos_token": True},
        "BaichuanTokenizer": BAICHUAN, "BaiChuanTokenizer": BAICHUAN,
        "InternLMTokenizer": INTERNLM, "InternLM2Tokenizer": INTERNLM,
        "ChatGLMTokenizer": CHATGLM2, "ChatGLMv2Tokenizer": CHATGLM2,
        "ChatGLM3Tokenizer": {**CHATGLM2, "tokens": CHATGLM2["tokens"] + GLM_ROLES, "roles": GLM_ROLES, "bare": False},
    },
    "ice_text": {
        "ChatGLMTokenizer": {
            "legacy": True, "bos_token": "<sop>", "eos_token": "<eop>", "unk_token": "<unk>",
            "pad_token": "<pad>", "additional_special_tokens": ["[MASK]"], "tail": ["[gMASK]", "<sop>"],
            "bare": True, "strips": True, "blanks": True, "clean_up_tokenization_spaces": True},
    },
    "merges": {
        "GPT2Tokenizer": GPT2, "GPTTokenizer": GPT2, "Qwen2Tokenizer": QWEN,
        "OPTTokenizer": {**GPT2, **dict.fromkeys(SPECIAL_NAMES[:3], "</s>"), "pad_token": "<pad>",
                         "add_bos_token": True},
    },
    "tiktoken": {
        "QWenTokenizer": {**QWEN, "tokens": QWEN_TOKENS},
        "Llama3Tokenizer": LLAMA3, "LlamaTokenizer": LLAMA3, "PreTrainedTokenizer": LLAMA3,
        "ChatGLM4Tokenizer": {
            "words": LLAMA3_WORDS, "tokens": ["<|endoftext|>", *GLM_TOKENS, "<sop>", "<eop>", *GLM_ROLES],
            "head": ["[gMASK]", "<sop>"], "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    },
}  # fmt: skip
# The class where tokenizer_config.json names none, by config.json's model_type and the kind of file.
MODEL_TYPES = {
    "gpt2": "GPT2Tokenizer", "opt": "OPTTokenizer", "qwen": "QWenTokenizer",
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    "baichuan": "BaichuanTokenizer", "internlm": "InternLMTokenizer", "internlm2": "InternLM2Tokenizer",
    **dict.fromkeys(("gemma", "gemma2"), "GemmaTokenizer")}  # fmt: skip
# Their own software has no use for a tokenizer.json, even if one lies beside the file that it reads.
SLOW_CLASSES = ("BaichuanTokenizer", "BaiChuanTokenizer", "InternLMTokenizer", "ChatGLMTokenizer", "ChatGLM4Tokenizer",
                "QWenTokenizer")  # fmt: skip
# These put bos before a text unless add_bos_token is false, whatever tokenizer.json's post_processor says.
BOS_BY_CONFIG = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "InternLM2Tokenizer")

# A byte that is no UTF-8 becomes one U+FFFD each, as in sentencepiece itself ("replace" would write one for several).
codecs.register_error("one_mark_per_byte", lambda error: ("\ufffd" * (error.end - error.start), error.end))

# ---- Engines: a stretch of text without special tokens -> ids; an id -> its bytes ----


class SentencePieces:
    """A model of the sentencepiece library. `shift` ids before its own are ChatGLM-6B's images.

    legacy: every stretch gets the model's own leading space. Otherwise none does: Tokenizer puts one before the very
    beginning of a text, and spaces that begin a stretch are kept."""

    normalizers, errors = (), "one_mark_per_byte"

    def __init__(self, path, legacy=False, blanks=False, shift=0):
        import sentencepiece

        self.legacy, self.blanks, self.shift = legacy, blanks, shift
        try:
            model = path.read_bytes()
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.own_prefix = self.sp.encode("a", out_type=str)[0].startswith(SPACE)
            if not legacy:
                # Bytes appended to a protobuf message are merged into it: normalizer_spec (3) {add_dummy_prefix (3): false}
                self.sp = sentencepiece.SentencePieceProcessor(model_proto=model + b"\x1a\x02\x18\x00")
        except RuntimeError:
            raise UserError(
                f"{path}: neither a sentencepiece model nor tiktoken text (base64, a space, the rank)"
            ) from None
        count = self.sp.get_piece_size()
        self.size, self.byte_ids = shift + count, {shift + i for i in range(count) if self.sp.is_byte(i)}
        self._bytes = [f"<image_{i}>".encode() for i in range(shift)] + [self._decoded(i) for i in range(count)]
        self._unk = self.sp.id_to_piece(max(self.sp.unk_id(), 0))
        self._unk_length = len(self.sp.encode(self._unk))

    def _decoded(self, i):
        """Piece number -> its bytes; control pieces have none, unk is a visible mark, as the library decodes them."""
        text = self.sp.id_to_piece(i)
        if self.sp.is_byte(i):  # written <0x0A>
            return bytes([int(text[3:5], 16)])
        if self.sp.is_control(i) or self.sp.is_unknown(i):
            return b"" if self.sp.is_control(i) else " \u2047 ".encode()
        if self.blanks:
            text = {"<n>": "\n", "<|tab|>": "\t"}.get(text, text)
            text = re.sub(r"^<\|blank_(\d+)\|>$", lambda match: " " * int(match[1]), text)
        return text.replace(SPACE, " ").encode()

    def own_special_tokens(self):
        """[bos, eos, unk, pad] of the model itself, None where it has none."""
        ids = self.sp.bos_id(), self.sp.eos_id(), self.sp.unk_id(), self.sp.pad_id()
        return [self.sp.id_to_piece(i) if i >= 0 else None for i in ids]

    def id_of(self, piece):
        """Piece -> id, None if the vocabulary lacks it."""
        i = self.sp.piece_to_id(piece)
        return self.shift + i if self.sp.id_to_piece(i) == piece else None

    def piece_bytes(self, token_id):
        return self._bytes[token_id] if 0 <= token_id < self.size else b""

    def encode(self, text, at_start):
        if self.blanks:
            text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
            text = re.sub(" {2,80}", lambda run: f"<|blank_{len(run[0])}|>", text)
        if not self.legacy and text.startswith((SPACE, " ")):  # behind unk, these survive sentencepiece's clean-up
            return self.sp.encode(self._unk + text)[self._unk_length :]
        ids = self.sp.encode(text)
        return [self.shift + i for i in ids] if self.shift else ids


# GPT-2 writes the 256 bytes as characters that can be seen: printable Latin-1 as itself, the others from U+0100 on.
_seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_CHARS = {b: chr(b) for b in _seen} | {b: chr(256 + n) for n, b in enumerate(sorted(set(range(256)) - set(_seen)))}
CHAR_BYTES = {char: b for b, char in BYTE_CHARS.items()}


class WordCache(dict):
    """cache[word] = function(word), called once a word. Emptied when full, and long words are not kept: its memory is
    bounded whatever is encoded."""

    WORDS, LETTERS = 1 << 17, 64

    def __init__(self, function):
        self.function = function

    def __missing__(self, word):
        value = self.function(word)
        if len(word) <= self.LETTERS:
            if len(self) >= self.WORDS:
                self.clear()
            self[word] = value
        return value


class BPE:
    """Byte pair encoding (Sennrich et al. 2016, arXiv:1508.07909), over bytes (GPT-2) or over characters.

    A text is cut into words by `steps`, functions (list of str, at_start) -> list of str. A word begins as its bytes
    (byte_level; symbols are written in BYTE_CHARS) or its characters; then the two neighbours of lowest rank are joined,
    the leftmost first, until no two have a rank. ranks: {(left, right): rank}; None ranks a pair by the id of what it
    makes, as tiktoken does. whole_words: a word of the vocabulary is its id, whatever the ranks say. A character that
    the vocabulary lacks is its bytes <0x00>... (byte_fallback), else unk (once for a run of them: fuse_unk), else
    nothing. normalizers are functions str -> str that Tokenizer applies before."""

    def __init__(
        self,
        vocab,
        ranks,
        steps,
        normalizers=(),
        byte_level=True,
        whole_words=False,
        unk=None,
        fuse_unk=False,
        byte_fallback=False,
    ):
        self.vocab, self.byte_level, self.whole_words, self.normalizers = vocab, byte_level, whole_words, normalizers
        self.unk, self.fuse_unk, self.byte_fallback = unk, fuse_unk, byte_fallback
        self.rank = (lambda pair: vocab.get(pair[0] + pair[1])) if ranks is None else ranks.get
        self.steps = list(steps)
        if (
            not (byte_level or whole_words)
            and SPACE in vocab
            and not any(right[0] == SPACE != left[-1] for left, right in ranks)
        ):  # no pair reaches over the beginning of a word: a text may be cut there, and words can be remembered
            self.steps.append(split_step(f"{SPACE}*[^{SPACE}]+|{SPACE}+"))
        self.size = max(vocab.values(), default=-1) + 1
        self.symbols = [None] * self.size
        for symbol, i in vocab.items():
            self.symbols[i] = symbol
        is_byte = re.compile("<0x[0-9A-F]{2}>").fullmatch
        self.byte_ids = (
            range(self.size) if byte_level else {i for s, i in vocab.items() if byte_fallback and is_byte(s)}
        )
        self.errors = "replace" if byte_level else "one_mark_per_byte"
        self._ids_of_word = WordCache(self._encode_word)

    def own_special_tokens(self):
        return [None, None, self.unk, None]

    def id_of(self, symbol):
        return self.vocab.get(symbol)

    def piece_bytes(self, token_id):
        symbol = self.symbols[token_id] if 0 <= token_id < self.size else None
        if symbol is None:
            return b""
        if self.byte_level:
            known = all(char in CHAR_BYTES for char in symbol)  # others stand for themselves
            return bytes([CHAR_BYTES[char] for char in symbol]) if known else symbol.encode()
        return bytes([int(symbol[3:5], 16)]) if token_id in self.byte_ids else symbol.replace(SPACE, " ").encode()

    def encode(self, text, at_start):
        words = [text]
        for step in self.steps:
            words = step(words, at_start)
        return list(chain.from_iterable(map(self._ids_of_word.__getitem__, words)))

    def _encode_word(self, word):
        if self.byte_level:
            word = word.encode().decode("latin-1").translate(BYTE_CHARS)
        if self.whole_words and word in self.vocab:
            return [self.vocab[word]]
        symbols = list(word)
        if not all(map(self.vocab.__contains__, symbols)):
            symbols = self._without_unknown(symbols)
        return [self.vocab[symbol] for symbol in self._joined(symbols)]

    def _without_unknown(self, characters):
        out = []
        for char in characters:
            as_bytes = [f"<0x{b:02X}>" for b in char.encode()] if self.byte_fallback else [char]
            if char in self.vocab:
                out.append(char)
            elif all(map(self.vocab.__contains__, as_bytes)):
                out += as_bytes
            elif self.unk is not None and not (self.fuse_unk and out[-1:] == [self.unk]):
                out.append(self.unk)
        return out

    def _joined(self, symbols):
        """Symbols of a word -> those after all merges. A heap of (rank, place): O(n log n), however long the word."""
        count, rank = len(symbols), self.rank
        after, before = [*range(1, count + 1)], [*range(-1, count - 1)]  # places of the neighbours that are still there
        ranks = map(rank, zip(symbols, symbols[1:]))
        heap = [(r, place) for place, r in enumerate(ranks) if r is not None]
        heapify(heap)
        while heap:
            r, left = heappop(heap)
            right = after[left]
            if symbols[left] is None or right == count or rank((symbols[left], symbols[right])) != r:
                continue  # one of the two was joined with another meanwhile
            symbols[left] += symbols[right]
            symbols[right] = None
            beyond, previous = after[right], before[left]
            after[left] = beyond
            if beyond < count:
                before[beyond] = left
                if (r := rank((symbols[left], symbols[beyond]))) is not None:
                    heappush(heap, (r, left))
            if previous >= 0 and (r := rank((symbols[previous], symbols[left]))) is not None:
                heappush(heap, (r, previous))
        return [symbol for symbol in symbols if symbol is not None]


# ---- Readers: a folder's files -> an engine ----


def tokenizer_class(folder, config):
    """(kind of file, the file, class) that a folder is read by: as transformers chooses, which prefers tokenizer.json,
    but for the classes that only ever read their own file. UserError when nothing fits."""
    name = (config.get("tokenizer_class") or "").removesuffix("Fast")
    about = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    model_type, origin = about.get("model_type"), f"{config.get('name_or_path')} {about.get('_name_or_path')}"
    present = [file for file in MODEL_FILES if (folder / file).is_file()]
    if present[:1] == ["tokenizer.json"] and (name not in SLOW_CLASSES or len(present) == 1):
        return "json", folder / present[0], name
    if "ice_text.model" in present:
        kind, file, default = "ice_text", "ice_text.model", "ChatGLMTokenizer"
    elif "qwen.tiktoken" in present:
        kind, file, default = "tiktoken", "qwen.tiktoken", "QWenTokenizer"
    elif "vocab.json" in present and "merges.txt" in present:
        kind, file = "merges", "vocab.json"
        with open(folder / file, "rb") as opened:
            begins_as_opt = re.match(rb'\s*{\s*"<s>"\s*:\s*0\b', opened.read(64))
        default = MODEL_TYPES.get(model_type, model_type) or ("OPTTokenizer" if begins_as_opt else "GPT2Tokenizer")
    elif file := next((file for file in SENTENCEPIECE_FILES if file in present), None):
        with open(folder / file, "rb") as opened:
            is_text = re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", opened.read(4096))
        kind, default = ("tiktoken", "Llama3Tokenizer") if is_text else ("sentencepiece", "LlamaTokenizer")
        if model_type == "chatglm":
            default = "ChatGLM4Tokenizer" if is_text else "ChatGLMTokenizer"
        elif not is_text:
            default = MODEL_TYPES.get(model_type, default)
    else:
        raise UserError(
            f"{folder}: no tokenizer.model, tokenizer.json, vocab.json with merges.txt, qwen.tiktoken or "
            f"ice_text.model in it; found {names_in(folder)}"
        )
    name = name or default
    if kind == "sentencepiece" and name.startswith("ChatGLM") and "chatglm3" in origin:
        name = "ChatGLM3Tokenizer"  # chatglm2 and 3 share a class name and the vocabulary, not the special tokens
    if name not in CLASSES[kind]:
        raise UserError(
            f"{folder}: tokenizer_class {name!r} is not supported for {file}; known are {', '.join(CLASSES[kind])}"
        )
    return kind, folder / file, name


def check_vocabulary_ids(vocab, where):
    """UserError unless vocab is {symbol: id}, each id once."""
    if not isinstance(vocab, dict) or not vocab:
        raise UserError(f"{where}: an object of symbols and their ids is wanted, found {brief(vocab)}")
    ids = vocab.values()
    if set(map(type, ids)) == {int} and min(ids) >= 0 and len(set(ids)) == len(vocab):
        return
    seen = {}
    for symbol, i in vocab.items():
        if type(i) is not int or i < 0:
            raise UserError(f"{where}: the id of {symbol!r} must be a number from 0 on, found {brief(i)}")
        if seen.setdefault(i, symbol) is not symbol:
            raise UserError(f"{where}: the id {i} is given twice, to {seen[i]!r} and to {symbol!r}")


def merge_ranks(merges, vocab, where):
    """[(left, right)...] in order of rank -> {(left, right): rank}. UserError from `where(rank)` for one that repeats or
    names a symbol that is not in the vocabulary."""
    ranks = dict(zip(merges, range(len(merges))))
    if len(ranks) != len(merges):
        number = next(n for n, pair in enumerate(merges) if ranks[pair] != n)
        raise UserError(
            f"{where(ranks[merges[number]])}: the merge {' '.join(merges[number])!r} has a rank already, "
            f"that of {where(number)}"
        )
    if not all(map(vocab.__contains__, chain(chain.from_iterable(merges), starmap(add, merges)))):
        number, missing = next(
            (number, symbol)
            for number, (left, right) in enumerate(merges)
            for symbol in (left, right, left + right)
            if symbol not in vocab
        )
        raise UserError(
            f"{where(number)}: the merge {' '.join(merges[number])!r} names {missing!r}, which is not in the vocabulary"
        )
    return ranks


def read_merges(path, row, add_prefix_space, unk):
    """vocab.json with merges.txt beside it -> BPE over bytes."""
    vocab, merges_path = read_json(path), path.with_name("merges.txt")
    check_vocabulary_ids(vocab, path)
    try:
        lines = merges_path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{merges_path}: not UTF-8 at byte {error.start}") from None
    first = 1 if lines[0].startswith("#version") else 0
    last = len(lines) - 1 if not lines[-1] else len(lines)  # the file ends with a line break
    merges = [tuple(line.rstrip("\r").split(" ")) for line in lines[first:last]]
    for number, pair in enumerate(merges):
        if len(pair) != 2 or not (pair[0] and pair[1]):
            raise UserError(
                f"{merges_path}:{first + number + 1}: two symbols with one space between them are wanted, "
                f"found {lines[first + number]!r}"
            )
    ranks = merge_ranks(merges, vocab, lambda number: f"{merges_path}:{first + number + 1}")
    steps = [*([prefix_step] if add_prefix_space else []), split_step(row["words"])]
    return BPE(vocab, ranks, steps, [to_nfc] if row.get("nfc") else [], unk=unk if unk in vocab else None)


def read_tiktoken(path, row):
    """Lines of base64, a space and the rank, which is the id -> BPE over bytes."""
    vocab, seen = {}, {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            symbol, rank = base64.b64decode(text, validate=True).decode("latin-1").translate(BYTE_CHARS), int(rank)
        except ValueError:
            shown = line[:40].decode("utf-8", "replace")
            raise UserError(f"{path}:{number}: base64, a space and a rank are wanted, found {shown!r}") from None
        if rank < 0 or seen.setdefault(rank, number) != number:
            found = f"the rank {rank} is that of line {seen[rank]} too" if rank >= 0 else f"the rank {rank} is below 0"
            raise UserError(f"{path}:{number}: {found}")
        if symbol in vocab:
            raise UserError(f"{path}:{number}: these bytes have the rank {vocab[symbol]} already")
        vocab[symbol] = rank
    if missing := [b for b, char in BYTE_CHARS.items() if char not in vocab]:
        raise UserError(f"{path}: no line for the byte {missing[0]:#04x}; a tiktoken vocabulary has all 256")
    return BPE(vocab, None, [split_step(row["words"])], [to_nfc] if row.get("nfc") else [], whole_words=True)


def to_nfc(text):
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def compile_words(pattern, where="the built-in pattern"):
    """Pattern of a tokenizer.json (Oniguruma's dialect) -> compiled. UserError for what the two would read differently."""
    import regex

    escaped = next((found for found in re.findall(r"\\.", pattern) if re.match(r"\\[^\W_pPsSdDrntfvux]", found)), None)
    group = re.search(r"\(\?(?!-?i?[:)]|[=!>]|<[=!])..?|--|~~|\|\|", re.sub(r"\\.", "", pattern))
    if escaped or group:
        raise UserError(f"{where}: {escaped or group[0]!r} in the pattern {pattern!r} is not supported")
    # Tried at every blank of a long run, \s+$ would take quadratic time; it can only match from the run's beginning.
    pattern = re.sub(r"^\\s\+\$$", r"(?<!\\s)\\s+$", pattern)
    try:
        return regex.compile(pattern, regex.VERSION1 | regex.MULTILINE)  # nested sets; ^ and $ are a line's, as there
    except regex.error as error:
        raise UserError(f"{where}: cannot read the pattern {pattern!r}: {error}") from None


def split_step(pattern, behavior="Isolated", invert=False, where="the built-in pattern"):
    """Step that cuts each piece at the pattern's matches. Isolated: matches and what lies between are pieces; Removed:
    only what lies between; MergedWithPrevious, MergedWithNext: a match stays with what is before or after it."""
    compiled = compile_words(pattern, where)
    findall = compiled.findall if not compiled.groups else lambda text: [match[0] for match in compiled.finditer(text)]

    def cut(text):
        at, marked = 0, []  # [piece, whether it is a match]
        for match in compiled.finditer(text):
            marked += [[text[at : match.start()], invert], [match[0], not invert]]
            at = match.end()
        marked = [mark for mark in [*marked, [text[at:], invert]] if mark[0]]
        if behavior == "Isolated":
            return [piece for piece, _ in marked]
        if behavior == "Removed":
            return [piece for piece, is_match in marked if not is_match]
        forwards = behavior == "MergedWithPrevious"
        out, after_match = [], False
        for piece, is_match in marked if forwards else reversed(marked):
            if is_match and not after_match and out:
                out[-1] = out[-1] + piece if forwards else piece + out[-1]
            else:
                out.append(piece)
            after_match = is_match
        return out if forwards else out[::-1]

    def step(texts, at_start):
        out = []
        for text in texts:
            found = findall(text) if behavior == "Isolated" else ()
            out += found if sum(map(len, found)) == len(text) else cut(text)  # no gaps: the usual case, and fast
        return out

    return step


def prefix_step(texts, at_start):
    return [text if text.startswith(" ") else f" {text}" for text in texts]


def metaspace_step(replacement, scheme, split):
    """Step that writes spaces as `replacement` and puts one before every piece (always), that at the text's beginning
    (first) or none (never); with split, each begins a new piece."""
    words = split_step(f"{re.escape(replacement)}[^{re.escape(replacement)}]*|[^{re.escape(replacement)}]+")

    def step(texts, at_start):
        texts = [text.replace(" ", replacement) for text in texts]
        for n, text in enumerate(texts):
            if not text.startswith(replacement) and (scheme == "always" or scheme == "first" and at_start and n == 0):
                texts[n] = replacement + text
        return words(texts, at_start) if split else texts

    return step


# What may stand in a tokenizer.json: part -> type -> its keys, with the default or, where one must be given, the type.
JSON_PARTS = {
    "normalizer": {
        "NFC": {}, "NFD": {}, "NFKC": {}, "NFKD": {}, "Prepend": {"prepend": str},
        "Replace": {"pattern": dict, "content": str}, "Sequence": {"normalizers": list}},
    "pre_tokenizer": {
        "ByteLevel": {"add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "Split": {"pattern": dict, "behavior": str, "invert": False}, "Digits": {"individual_digits": False},
        "Metaspace": {"replacement": SPACE, "add_prefix_space": True, "prepend_scheme": "always", "split": True,
                      "str_rep": SPACE}, "Sequence": {"pretokenizers": list}},
    "post_processor": {
        "ByteLevel": {"add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "TemplateProcessing": {"single": list, "pair": [], "special_tokens": dict}, "Sequence": {"processors": list}},
    "decoder": {
        "ByteLevel": {"add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "Metaspace": {"replacement": SPACE, "add_prefix_space": True, "prepend_scheme": "always", "split": True,
                      "str_rep": SPACE},
        "Replace": {"pattern": dict, "content": str}, "ByteFallback": {}, "Fuse": {},
        "Strip": {"content": str, "start": 0, "stop": 0}, "Sequence": {"decoders": list}},
    "model": {
        "BPE": {"vocab": dict, "merges": list, "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}},
}  # fmt: skip


def json_parts(spec, part, where):
    """A component of tokenizer.json -> [(where, type, its keys)...], sequences laid flat, [] for null. UserError for a
    type or key that is not in JSON_PARTS."""
    if spec is None:
        return []
    known, kind = JSON_PARTS[part], spec.get("type") if isinstance(spec, dict) else None
    if kind is None and part == "model" and isinstance(spec, dict) and "merges" in spec:
        kind = "BPE"  # files of 2020 do not say
    if kind not in known:
        raise UserError(f"{where}: {brief(kind or spec)} is not supported; known are {', '.join(known)}")
    values = known[kind] | {key: value for key, value in spec.items() if key != "type"}
    if unknown := sorted(set(values) - set(known[kind])):
        raise UserError(f"{where}: unknown key {unknown[0]!r} of {kind}; known are {', '.join(known[kind]) or 'none'}")
    for key, default in known[kind].items():
        wanted = default if isinstance(default, type) else type(default)
        if default is not None and not isinstance(values[key], wanted):
            found = "nothing" if values[key] is default else brief(values[key])
            raise UserError(f"{where}.{key}: a {wanted.__name__} is wanted, found {found}")
    if kind != "Sequence":
        return [(where, kind, values)]
    ((key, inner),) = values.items()
    return [found for n, one in enumerate(inner) for found in json_parts(one, part, f"{where}.{key}[{n}]")]


def pattern_text(pattern, where):
    """{"String": text} or {"Regex": text} -> a pattern."""
    (kind, text), *more = pattern.items() or [(None, None)]
    if more or kind not in ("String", "Regex") or not isinstance(text, str):
        raise UserError(f'{where}.pattern: {{"String": text}} or {{"Regex": text}} is wanted, found {brief(pattern)}')
    return re.escape(text) if kind == "String" else text


def json_normalizer(where, kind, values):
    """-> function str -> str."""
    if kind == "Prepend":
        return lambda text: values["prepend"] + text if text else text
    if kind == "Replace":
        compiled, content = compile_words(pattern_text(values["pattern"], where), where), values["content"]
        return lambda text: compiled.sub(lambda match: content, text)
    return to_nfc if kind == "NFC" else partial(unicodedata.normalize, kind)


def json_steps(parts):
    """Parts of a pre_tokenizer -> (steps, whether the last of them was ByteLevel)."""
    steps = []
    for n, (where, kind, values) in enumerate(parts):
        if kind == "ByteLevel":
            if n + 1 < len(parts):
                raise UserError(f"{where}: ByteLevel must come last; {parts[n + 1][1]} follows")
            steps += [prefix_step] if values["add_prefix_space"] else []
            steps += [split_step(GPT2_WORDS)] if values["use_regex"] else []
        elif kind == "Metaspace":
            scheme = values["prepend_scheme"] if values["add_prefix_space"] else "never"
            if scheme not in ("always", "first", "never"):
                raise UserError(f"{where}.prepend_scheme: always, first or never is wanted, found {brief(scheme)}")
            steps.append(metaspace_step(values["replacement"], scheme, values["split"]))
        elif kind == "Digits":
            steps.append(split_step(r"\p{N}" if values["individual_digits"] else r"\p{N}+"))
        elif values["behavior"] not in ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext"):
            raise UserError(
                f"{where}.behavior: {brief(values['behavior'])} is not supported; known are Isolated, Removed, "
                "MergedWithPrevious, MergedWithNext"
            )
        else:
            pattern = pattern_text(values["pattern"], where)
            steps.append(split_step(pattern, values["behavior"], values["invert"], where))
    return steps, bool(parts) and parts[-1][1] == "ByteLevel"


def json_around(parts):
    """Parts of a post_processor -> (ids before a text, ids after it)."""
    head, tail = [], []
    for where, kind, values in parts:
        if kind == "ByteLevel":
            continue  # moves offsets, which nobody here asks for
        side = None
        for n, item in enumerate(values["single"]):
            what, about = next(iter(item.items())) if isinstance(item, dict) and item else (None, None)
            token = about.get("id") if isinstance(about, dict) else None
            if what == "Sequence" and token == "A" and side is None:
                side = tail
                continue
            entry = values["special_tokens"].get(token) if what == "SpecialToken" else None
            ids = entry.get("ids") if isinstance(entry, dict) else None
            if not isinstance(ids, list):
                raise UserError(
                    f"{where}.single[{n}]: a SpecialToken of special_tokens or, once, the Sequence A is wanted, "
                    f"found {brief(item)}"
                )
            (head if side is None else tail).extend(ids)
        if side is None:
            raise UserError(f"{where}.single: it has no Sequence A, the text itself")
    return head, tail


def json_decoder(parts, where):
    """Parts of a decoder -> (whether it is ByteLevel, how many leading spaces it drops)."""
    kinds = [kind for _, kind, _ in parts]
    if kinds == ["ByteLevel"]:
        return True, 0
    lead = 0
    for at, kind, values in parts:
        if kind == "Metaspace":
            lead = int(values["add_prefix_space"] and values["prepend_scheme"] != "never")
        elif kind == "Strip":
            lead = values["start"]
        if (
            kind == "ByteLevel"
            or kind == "Replace"
            and (values["pattern"], values["content"]) != ({"String": SPACE}, " ")
            or kind == "Strip"
            and (values["content"], values["stop"]) != (" ", 0)
            or kind == "Metaspace"
            and values["replacement"] != SPACE
        ):
            raise UserError(f"{at}: this {kind} is not supported here: {brief(values)}")
    if not {"Replace", "Metaspace"} & set(kinds):
        raise UserError(
            f"{where}: ByteLevel, or a Sequence with Metaspace or with {SPACE!r} replaced by a space, is "
            f"wanted; found {', '.join(kinds) or 'null'}"
        )
    return False, lead


def read_tokenizer_json(path):
    """tokenizer.json -> (BPE, its added tokens, ids before a text, ids after it, leading spaces that decoding drops)."""
    spec = read_json(path)
    if not isinstance(spec, dict) or not spec.get("model"):
        raise UserError(f"{path}: an object with a model is wanted, found {brief(spec)}")
    parts = {name: json_parts(spec.get(name), name, f"{path}: {name}") for name in JSON_PARTS}
    where, _, model = parts["model"][0]
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[key]:
            raise UserError(f"{where}.{key}: {brief(model[key])} is not supported")
    vocab, unk = model["vocab"], model["unk_token"]
    check_vocabulary_ids(vocab, f"{where}.vocab")
    if unk is not None and (not isinstance(unk, str) or unk not in vocab):
        raise UserError(f"{where}.unk_token: {brief(unk)} is not in the vocabulary")
    merges = [
        tuple(pair.split(" ") if isinstance(pair, str) else pair if isinstance(pair, list) else ())
        for pair in model["merges"]
    ]
    if {*map(len, merges)} - {2} or {*map(type, chain.from_iterable(merges))} - {str}:
        number = next(n for n, pair in enumerate(merges) if len(pair) != 2 or {*map(type, pair)} != {str})
        raise UserError(f"{where}.merges[{number}]: two symbols are wanted, found {brief(model['merges'][number])}")
    ranks = merge_ranks(merges, vocab, lambda number: f"{where}.merges[{number}]")
    steps, byte_level = json_steps(parts["pre_tokenizer"])
    decodes_bytes, lead = json_decoder(parts["decoder"], f"{path}: decoder")
    if byte_level != decodes_bytes:
        raise UserError(
            f"{path}: pre_tokenizer and decoder must both be ByteLevel or both not; one is, the other is not"
        )
    added = spec.get("added_tokens") or []
    for n, token in enumerate(added):
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or type(token.get("id")) is not int:
            raise UserError(f"{path}: added_tokens[{n}]: an object with content and id is wanted, found {brief(token)}")
        if token.get("single_word"):
            raise UserError(f"{path}: added_tokens[{n}]: single_word of {token['content']!r} is not supported")
    engine = BPE(
        vocab,
        ranks,
        steps,
        [json_normalizer(*part) for part in parts["normalizer"]],
        byte_level,
        model["ignore_merges"],
        unk,
        model["fuse_unk"],
        model["byte_fallback"],
    )
    return engine, added, *json_around(parts["post_processor"]), lead


# ---- The door ----


def any_of(words):
    """Words -> a pattern that matches the longest of them at a place, as quickly for a thousand as for two."""
    prefix = os.path.commonprefix(words)
    rests, branches = {word[len(prefix) :] for word in words}, {}
    for rest in sorted(rests - {""}):
        branches.setdefault(rest[0], []).append(rest)
    tail = "|".join(map(any_of, branches.values()))
    return re.escape(prefix) + (f"(?:{tail})" + "?" * ("" in rests) if tail else "")


def clean_up(text):
    """transformers' clean_up_tokenization_spaces: no space before punctuation and English contractions."""
    for found in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(found, found.strip())
    return text


def token_text(token, folder):
    """A token of a side file, text or {"content": text, ...} -> text; None for null."""
    text = token.get("content") if isinstance(token, dict) else token
    if token is not None and not isinstance(text, str):
        raise UserError(
            f"{folder}: a token in {SIDE_FILES[0]} or {SIDE_FILES[1]} is text or has a content; found {brief(token)}"
        )
    return text


class StreamDecoder:
    """Ids in, text out as soon as it is certain: push(id) never returns half a character, and all pushes plus flush()
    are decode(ids)."""

    def __init__(self, tokenizer, skip_special_tokens=True):
        self.tokenizer, self.skip = tokenizer, skip_special_tokens
        self.utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer.engine.errors)
        self.lead = tokenizer.lead  # spaces at the beginning that are still to be dropped
        self.gap = None if skip_special_tokens else tokenizer.gap
        self.stretch = ""  # with a gap: text since the last special token
        self.after_special, self.is_first = False, True
        self.unclean = ""

    def push(self, token_id):
        """id -> text that became complete with it, perhaps ''."""
        tokenizer = self.tokenizer
        is_special = token_id in tokenizer.special_ids
        if self.skip and is_special:
            return ""
        piece = tokenizer.piece_bytes(token_id)
        if token_id in tokenizer.engine.byte_ids and token_id not in tokenizer.added_ids:
            text, self.lead = self.utf8.decode(piece), 0
        else:
            text = piece.decode("utf-8")
            if self.lead and text:
                kept = text[min(self.lead, len(text) - len(text.lstrip(" "))) :]
                text, self.lead = kept, 0 if kept else self.lead - len(text)
            text = self._rest_of_bytes() + text
        if self.gap:
            text = self._between_special(text, is_special)
        return self._cleaned(text) if tokenizer.cleans_up else text

    def flush(self):
        """Whatever is left; incomplete bytes become replacement characters."""
        text = self.stretch + self._rest_of_bytes()
        self.stretch = ""
        return self._cleaned(text, True) if self.tokenizer.cleans_up else text

    def _rest_of_bytes(self):
        text = self.utf8.decode(b"", True)
        self.utf8.reset()
        return text

    def _between_special(self, text, is_special):
        """Holds the text of a stretch back until it is known whether a special token ends it: only then the space that
        was put before the stretch is kept."""
        if not is_special:
            self.stretch += text
            text = ""
        else:
            keeps_space = not self.after_special and (self.gap == "always" or not self.is_first)
            text, self.stretch = " " * keeps_space + self.stretch + text, ""
            self.lead = self.tokenizer.lead_within
        self.after_special, self.is_first = is_special, False
        return text

    def _cleaned(self, text, is_last=False):
        """Text that clean_up can no longer change: all replaced texts begin with a space, and what they have before
        their last character ends in one of " 'nvr"."""
        self.unclean += text
        ready = self.unclean if is_last else self.unclean.rstrip(" 'nvr")
        self.unclean = self.unclean[len(ready) :]
        return clean_up(ready)


class Tokenizer:
    """What is around an engine: special tokens, bos and eos, decoding, chat templates.

    Special tokens written in a text become their ids, the text between them is the engine's. A folder is read as
    transformers would (tokenizer.json first), and ids and text equal its own, or those of the family's own code:
    tests/test_tokenizer.py. What differs: bytes that are no UTF-8 are one U+FFFD each wherever there is byte fallback, as
    in sentencepiece; a run of spaces that lost its first is printed as spaces; clean_up_tokenization_spaces is for
    sentencepiece models alone, as in transformers 5; Llama 3's own library cuts a text every 400,000 characters, and
    runs of letters or blanks every 25,000, this does not."""

    def __init__(self, folder):
        self.folder = Path(folder)
        config = self._read_side_files()
        self.kind, path, name = tokenizer_class(self.folder, config)
        row = CLASSES.get(self.kind, {}).get(name, {})
        settings = {**row, **config}
        tokens, legacy = (), bool(settings.get("legacy"))
        self._white_space = WHITE_SPACE if self.kind == "json" else None
        self.lead, self.gap, self.bare = row.get("lead", 0), row.get("gap") if legacy else None, row.get("bare", False)
        self.add_prefix_space = self.cleans_up = False
        if self.kind in ("sentencepiece", "ice_text"):
            for key in ("remove_space", "do_lower_case"):
                if config.get(key):
                    raise UserError(f"{self.folder / SIDE_FILES[0]}: {key}: true is not supported")
            shift = config.get("num_image_tokens", 0) if self.kind == "ice_text" else 0
            if type(shift) is not int or shift < 0:
                raise UserError(
                    f"{self.folder / SIDE_FILES[0]}: num_image_tokens: a count is wanted, found {brief(shift)}"
                )
            self.engine = SentencePieces(path, legacy, row.get("blanks", False), shift)
            if legacy:
                self.lead_within = int(self.engine.own_prefix)
                self.lead += self.lead_within
            else:
                self.add_prefix_space = bool(settings.get("add_prefix_space"))
                self.lead = int(self.add_prefix_space)
            self.cleans_up = bool(settings.get("clean_up_tokenization_spaces"))
        elif self.kind == "merges":
            unk = token_text(settings.get("unk_token"), self.folder)
            self.engine = read_merges(path, row, settings.get("add_prefix_space"), unk)
        elif self.kind == "tiktoken":
            self.engine = read_tiktoken(path, row)
        else:
            self.engine, tokens, self.head, self.tail, self.lead = read_tokenizer_json(path)
        self._collect_special_tokens(settings, row, tokens)
        says_so = [settings.get(key) for key in ("add_bos_token", "add_eos_token")]
        if self.kind != "json" or name in BOS_BY_CONFIG or says_so != [None, None]:
            adds_bos, adds_eos = name in BOS_BY_CONFIG if says_so[0] is None else says_so[0], says_so[1]
            self.head = self._ids_around(row.get("head", [self.bos_token] if adds_bos else []))
            self.tail = self._ids_around(row.get("tail", [self.eos_token] if adds_eos else []))
        self.special_ids |= {*self.head, *self.tail}
        self.vocab_size = max([self.engine.size, *(i + 1 for i in self.added.values())])
        self._chat_template = None
        self.chat_template = folder_template(self.folder)

    def _read_side_files(self):
        """tokenizer_config.json over special_tokens_map.json, {} without them."""
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder; a folder with a tokenizer's files is wanted")
        config = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (self.folder / name).is_file():
                content = read_json(self.folder / name)
                if not isinstance(content, dict):
                    raise UserError(f"{self.folder / name}: an object is wanted, found a {type(content).__name__}")
                config |= content
        return config

    def _side_tokens(self, settings):
        """added_tokens_decoder {id: token} and added_tokens.json {text: id} -> [(text, id, flags)...]."""
        path = self.folder / "added_tokens.json"
        decoder, listed = settings.get("added_tokens_decoder") or {}, read_json(path) if path.is_file() else {}
        for where, ids in ((f"{self.folder / SIDE_FILES[0]}: added_tokens_decoder", decoder), (path, listed)):
            if not isinstance(ids, dict) or not all(
                str(i).isdecimal() for i in (ids if ids is decoder else ids.values())
            ):
                raise UserError(f"{where}: an object of tokens and their ids is wanted, found {brief(ids)}")
        named = [
            (token_text(token, self.folder), int(i), token if isinstance(token, dict) else {})
            for i, token in decoder.items()
        ]
        return [*named, *((text, int(i), {}) for text, i in listed.items())]

    def _collect_special_tokens(self, settings, row, tokens):
        """Fills added {text: id}, flags {text: dict}, special (texts), special_ids, and bos, eos, unk and pad. Of two files
        that know a token, the first of tokenizer.json, added_tokens_decoder, added_tokens.json and the rest is right."""
        self.added, self.flags = {}, {}
        for text, i, flags in [
            *((token["content"], token["id"], token) for token in tokens),
            *self._side_tokens(settings),
        ]:
            self.added.setdefault(text, i)
            self.flags.setdefault(text, flags)
        special = [text for text, flags in self.flags.items() if flags.get("special")]
        taken = set(self.added.values())
        for i, text in enumerate(row.get("tokens", ()), self.engine.size):
            special.append(text)
            if text not in self.added and i not in taken:
                self.added[text] = i
        extra = settings.get("extra_special_tokens") or []  # transformers 5's name for the other list
        extra = [
            *(extra.values() if isinstance(extra, dict) else extra),
            *(settings.get("additional_special_tokens") or []),
        ]
        named = [settings.get(name) or own for name, own in zip(SPECIAL_NAMES, self.engine.own_special_tokens())]
        for name, token in [*zip(SPECIAL_NAMES, named), *((None, token) for token in extra)]:
            text = token_text(token, self.folder)
            if name:
                setattr(self, name, text)
            if text:
                special.append(text)
                self.flags.setdefault(text, token if isinstance(token, dict) else {})
        for token in special:  # with no id in any file: the vocabulary's, or else after it, as in transformers
            if token not in self.added:
                free = max([self.engine.size - 1, *self.added.values()]) + 1
                self.added[token] = free if self.engine.id_of(token) is None else self.engine.id_of(token)
        for name in SPECIAL_NAMES:
            setattr(self, f"{name}_id", self.added.get(getattr(self, name)))
        if self.pad_token_id is None:  # padding is never seen nor learnt, any id will do
            self.pad_token_id = next((i for i in (self.unk_token_id, self.eos_token_id) if i is not None), 0)
        self.special, self.special_ids = set(special), {self.added[token] for token in special}
        self.added_ids = {i: text for text, i in self.added.items()}
        if row.get("strips"):
            self.flags = {text: {"lstrip": True, "rstrip": True} | self.flags.get(text, {}) for text in self.added}
        self._prepare_split(row)

    def _prepare_split(self, row):
        """Fills _token_ids {text as it is found: id} and _patterns {special_in_text: (before normalisation, after it)}."""
        everything = [text for text in self.added if text]
        sought = {
            None: row.get("parse", everything),
            True: row.get("roles", everything),
            False: [text for text in everything if text not in self.special],
        }
        late = {
            text: self.normalize(text)
            for text in everything
            if self.kind == "json" and self.engine.normalizers and self.flags.get(text, {}).get("normalized")
        }
        self._token_ids = self.added | {found: self.added[text] for text, found in late.items()}
        self.added_ids |= {self.added[text]: found.replace(SPACE, " ") for text, found in late.items()}
        self.flags |= {found: self.flags[text] for text, found in late.items()}
        self._patterns = {}
        for mode, texts in sought.items():
            both = [text for text in texts if text not in late], [late[text] for text in texts if text in late]
            self._patterns[mode] = [re.compile(f"({any_of(words)})") if words else None for words in both]

    def _ids_around(self, tokens):
        ids = [self.token_id(token) for token in tokens if token is not None]
        if None in ids:
            raise UserError(
                f"{self.folder}: the vocabulary lacks {tokens[ids.index(None)]!r}, which stands around every text"
            )
        return ids

    @property
    def chat_template(self):
        return self._chat_template

    @chat_template.setter
    def chat_template(self, template):
        """UserError when the vocabulary lacks a token of the template: its text would otherwise be cut into ordinary
        pieces, silently."""
        if template is not None and (token := template.missing(self)):
            raise UserError(
                f"chat_template {template.name!r}: the vocabulary of {self.folder} has no token "
                f"{token!r}; give a tokenizer that has it or another chat_template"
            )
        self._chat_template = template

    def token_id(self, text):
        """The id of a token by its text, special or of the vocabulary; None if there is none."""
        return self.added.get(text, self.engine.id_of(text))

    def has_token(self, text):
        """Whether `text` becomes one token however it is written: added, or user-defined in the sentencepiece model."""
        return text in self.added or self.engine.encode(text, False) == [self.engine.id_of(text)]

    @property
    def stop_ids(self):
        """Ids that end a reply: eos, and the tokens with which the chat template ends a turn."""
        ends = self.chat_template.stops if self.chat_template else []
        ids = [self.eos_token_id, *(self.token_id(end) for end in ends if self.has_token(end))]
        return [i for i in dict.fromkeys(ids) if i is not None]

    def normalize(self, text):
        for normalizer in self.engine.normalizers:
            text = normalizer(text)
        return text

    def _cut(self, text, pattern):
        """Text -> alternating [text, token, text, ..., text], after the tokens' own rules on neighbouring spaces."""
        pieces = pattern.split(text) if pattern else [text]
        for i in range(1, len(pieces), 2):
            flags = self.flags.get(pieces[i], {})
            if flags.get("rstrip"):
                pieces[i + 1] = pieces[i + 1].lstrip(self._white_space)
            if flags.get("lstrip"):
                pieces[i - 1] = pieces[i - 1].rstrip(self._white_space)
        return pieces

    def _split(self, text, special_in_text):
        """The same of normalised text; tokens marked "normalized" are looked for in what the others leave."""
        before, after = self._patterns[special_in_text]
        pieces = self._cut(text, before)
        if self.engine.normalizers:
            pieces = [
                part
                for i, piece in enumerate(pieces)
                for part in ([piece] if i % 2 else self._cut(self.normalize(piece), after))
            ]
        return pieces

    def encode(self, text, add_special_tokens=True, special_in_text=None):
        """str -> list of ids. special_in_text: True takes special tokens that are written in the text as such, False as
        ordinary text, None as the family does. A prompt and its reply as one sequence are encode(prompt) +
        encode(reply, False) + [eos], for ChatGLM-6B's pair form too."""
        ids = []
        if text:
            prefix = self.add_prefix_space
            pieces = self._split(SPACE + text.replace(SPACE, " ") if prefix else text, special_in_text)
            if prefix and len(pieces) > 1 and pieces[0] == SPACE and pieces[1] in self.special:
                pieces[0] = ""  # a text that begins with a special token gets no space before it
            for i, piece in enumerate(pieces):
                if piece:
                    ids += [self._token_ids[piece]] if i % 2 else self.engine.encode(piece, i == 0)
        return self.head + ids + self.tail if add_special_tokens else ids

    def piece_bytes(self, token_id):
        """id -> its UTF-8 bytes, one for a byte-fallback token, none beyond the vocabulary (models pad theirs)."""
        if token_id in self.added_ids and not self.bare:
            return self.added_ids[token_id].encode()
        return self.engine.piece_bytes(token_id)

    def stream_decoder(self, skip_special_tokens=True):
        return StreamDecoder(self, skip_special_tokens)

    def decode(self, ids, skip_special_tokens=True):
        """ids -> str, by the very decoder that streaming uses."""
        decoder = self.stream_decoder(skip_special_tokens)
        return "".join([decoder.push(int(i)) for i in ids]) + decoder.flush()

    def decode_reply(self, ids):
        """Generated ids -> the text before the first of stop_ids."""
        stop = next((at for at, i in enumerate(ids) if int(i) in self.stop_ids), None)
        return self.decode(ids[:stop]).strip()

    def encode_chat(self, rounds, context=None, is_training=False):
        """[(user, bot)...] -> system ids, [(user ids, bot ids)...]. The last bot may be None: still to be generated.

        A prompt is the same ids in training and in generation, whatever reply follows it. Without a template: each user
        turn with special tokens, each bot turn followed by eos, and a context's system text on a line of its own before
        the first user turn."""
        context, template = context or {}, self.chat_template
        if template is None:
            system = f"{context['system']}\n" if context.get("system") else ""
            eos = [] if self.eos_token_id is None else [self.eos_token_id]
            users = [self.encode((system if i == 0 else "") + user) for i, (user, _) in enumerate(rounds)]
            bots = [None if bot is None else self.encode(bot, False) + eos for _, bot in rounds]
            return [], list(zip(users, bots))
        pieces = template.pieces(rounds, context, self, is_training)
        system_ids, *turns = encode_pieces(self, pieces, 1 + 2 * len(rounds))
        bots = [None if bot is None else ids for (_, bot), ids in zip(rounds, turns[1::2])]
        return system_ids, list(zip(turns[::2], bots))

    def apply_chat(self, messages, add_generation_prompt=True):
        """[{"role": "system" | "user" | "assistant", "content": str}...] -> ids by the chat template (plain text
        without one).

        UserError unless the roles are: system at most once and first, then user and assistant in turn, a user last if a
        reply is to follow."""
        context, rounds = check_messages(messages, add_generation_prompt)
        if self.chat_template is None:
            _, encoded = self.encode_chat(rounds, context)
            return [i for user, bot in encoded for i in user + (bot or [])]
        pieces = self.chat_template.pieces(rounds, context, self, split=False)
        last = 2 * len(rounds)  # only the last reply is cut off: earlier ones are read in one with what is around them
        pieces = [piece._replace(part=2 if piece.part == last else 1) for piece in pieces]
        return sum(encode_pieces(self, pieces, 3), [])

    def save(self, path):
        """Copies the tokenizer's files and writes its chat template, so that whoever opens the folder asks as it learnt."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        for source in [self.folder / name for name in (*MODEL_FILES, *SIDE_FILES) if name != TEMPLATE_FILE]:
            if source.is_file() and source.resolve() != (path / source.name).resolve():
                shutil.copyfile(source, path / source.name)
        save_chat_template(self.chat_template, path)


def load_tokenizer(path):
    """Folder with MODEL_FILES and perhaps SIDE_FILES -> Tokenizer. UserError for what CLASSES and JSON_PARTS lack."""
    return Tokenizer(path)


# ============================== supervised records ==============================


def sft_files(path, split="train"):
    """File -> [file]. Folder -> its train.json or train.jsonl, else train/*.json(l); so for "dev". UserError: none."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; a JSON-lines file or a folder with {split}.json is wanted")
    for name in (f"{split}.json", f"{split}.jsonl"):
        if (path / name).is_file():
            return [path / name]
    files = sorted([*path.glob(f"{split}/*.json"), *path.glob(f"{split}/*.jsonl")])
    if not files:
        raise UserError(f"{path}: none of {split}.json, {split}.jsonl, {split}/*.json in it; found {names_in(path)}")
    return files


def numbered_lines(file, progress=False):
    """Yields (byte offset, line number, line) of the lines that are not blank."""
    from tqdm import tqdm

    bar = tqdm(total=os.path.getsize(file), unit="B", unit_scale=True, desc=file.name, disable=not progress or None)
    with open(file, "rb") as stream, bar:
        offset = 0
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield offset, number, line
            offset += len(line)
            bar.update(len(line))


def record_at(files, place):
    """(file number, byte offset, line number) -> the JSON object that stands there."""
    number, offset, line = (int(v) for v in place)
    with open(files[number], "rb") as stream:
        stream.seek(offset)
        return parse_json_line(stream.readline(), files[number], line)


def record_rounds(record, where):
    """{"src", "tgt", "context"?} -> [(user, bot)...], context. UserError names file:line and the key that is wrong."""
    turns = []
    for key in ("src", "tgt"):
        value = record.get(key)
        if key not in record:
            raise UserError(f"{where}: key {key!r} is missing; found {', '.join(map(repr, record)) or 'no keys'}")
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise UserError(f"{where}: {key!r} must be a string or a list of strings, found {brief(record[key])}")
        turns.append(value)
    if len(turns[0]) != len(turns[1]) or not turns[0]:
        raise UserError(
            f"{where}: 'src' has {len(turns[0])} turns and 'tgt' has {len(turns[1])}; both need the same "
            "number, at least one"
        )
    context = record.get("context") or {}
    if not isinstance(context, dict) or not isinstance(context.get("system", ""), str):
        raise UserError(f"{where}: 'context' must be an object, and its 'system' a string; found {brief(context)}")
    return list(zip(*turns)), context


def shorten_user(tokenizer, user, bot, context, room, history=()):
    """User text -> ids of its rendered part in at most `room` tokens: the text loses its beginning, the template around
    it stays whole. history: the rounds before it."""
    ids, text = tokenizer.encode(user, False), user
    keep = len(ids)
    while True:
        part = tokenizer.encode_chat([*history, (text, bot)], context, True)[1][-1][0]
        if len(part) <= room or keep == 0:
            return part
        keep = max(0, keep - (len(part) - room))
        text = tokenizer.decode(ids[len(ids) - keep :], skip_special_tokens=False)


def fit_templated(tokenizer, rounds, context, src_length, max_length):
    """PaddleNLP's truncation with a template -> (system ids, [(user ids, bot ids)...]) of at most max_length tokens,
    unless the last user part alone is longer. The system stays; rounds are kept from the last to the first while they
    fit; the last one is always kept, its user part cut to src_length less the system, its reply to what is left. One
    deviation: index and is_first count the rounds that are kept, so that what a template says at the beginning (bos,
    Llama 2's system text) is there when early rounds had to go."""
    while True:
        system, encoded = tokenizer.encode_chat(rounds, context, True)
        room = max_length - len(system)
        sizes = [len(user) + len(bot) for user, bot in encoded]
        if sum(sizes) <= room:
            return system, encoded
        if len(rounds) == 1:
            break
        fits = int(np.searchsorted(np.cumsum(sizes[::-1]), room, side="right"))
        rounds = rounds[-max(1, min(fits, len(rounds) - 1)) :]
    (user, bot), user_room = encoded[0], max(0, src_length - len(system))
    if len(user) > user_room:
        user = shorten_user(tokenizer, *rounds[0], context, user_room)
    return system, [(user, bot[: max(0, room - len(user))])]


def fit_plain(tokenizer, rounds, context, src_length, max_length):
    """PaddleNLP's truncation without a template -> ([], [(src ids, tgt ids)...]). src keeps its last src_length tokens,
    special tokens included; tgt keeps its first max_length - len(src), and ends with eos only if it was not cut.
    PaddleNLP would drop all turns but the first; here the turns follow one another, and early ones go when they do not
    fit."""
    _, encoded = tokenizer.encode_chat(rounds, context, True)
    head, tail = tokenizer.head, tokenizer.tail
    room = max(0, src_length - len(head) - len(tail))
    bare = [(user[len(head) : len(user) - len(tail)], bot) for user, bot in encoded]
    cut = [(head + user[max(0, len(user) - room) :] + tail, bot) for user, bot in bare]
    user, bot = cut[-1]
    kept = [(user, bot[: max(0, max_length - len(user))])]
    total = len(user) + len(kept[0][1])
    for user, bot in reversed(cut[:-1]):
        total += len(user) + len(bot)
        if total > max_length:
            break
        kept.insert(0, (user, bot))
    return [], kept


def fit_prompt(tokenizer, rounds, context, src_length, max_length):
    """Ids up to the reply of the last round, which is to be written: the rounds that training would show, truncated as
    there (a reply given with the last round takes its part of max_length), the last in the template's query form."""
    template = tokenizer.chat_template
    fit = fit_plain if template is None else fit_templated
    system, encoded = fit(tokenizer, rounds, context, src_length, max_length)
    kept = rounds[-len(encoded) :]
    shortened = encoded[-1][0] != tokenizer.encode_chat(kept, context, True)[1][-1][0]
    if template is not None and not shortened:
        system, encoded = tokenizer.encode_chat([*kept[:-1], (kept[-1][0], None)], context)
    return system + [t for user, bot in encoded[:-1] for t in user + bot] + encoded[-1][0]


class SFTDataset:
    """Tokenised src/tgt records of one or more JSON-lines files (or folders with {split}.json).

    All records lie in one int32 array, ids of learnt tokens as they are and all others as ~id (negative), so prompt and
    reply are told apart without a second array; a record's own JSON is re-read from the file when asked for. A million
    records of 100 tokens are 400 MB, and never Python lists. Truncation: `fit_templated`, `fit_plain`. A record without
    a learnt token left is dropped and counted in .dropped. autoregressive: prompts are learnt too. UserError: missing
    or empty file, a bad line (file:line), nothing left to learn in any record."""

    def __init__(
        self, paths, tokenizer, src_length=1024, max_length=2048, split="train", autoregressive=False, progress=False
    ):
        self.tokenizer, self.src_length, self.max_length = tokenizer, src_length, max_length
        paths = [paths] if isinstance(paths, (str, Path)) else paths
        self.files = [file for path in paths for file in sft_files(path, split)]
        self.dropped = 0
        tokens, ends, places = array("i"), array("q", [0]), array("q")  # places: file number, byte offset, line number
        for number, file in enumerate(self.files):
            for offset, line_number, line in numbered_lines(file, progress):
                where = f"{file}:{line_number}"
                flat = self._flatten(*record_rounds(parse_json_line(line, file, line_number), where), autoregressive)
                if not any(token >= 0 for token in flat[1:]):
                    self.dropped += 1
                    continue
                tokens.extend(flat)
                ends.append(len(tokens))
                places.extend((number, offset, line_number))
        if not places:
            raise UserError(
                f"{self.files[0]}: "
                + (
                    f"nothing to learn is left in any of the {self.dropped} records with max_length {max_length} and "
                    f"src_length {src_length}; raise max_length or lower src_length"
                    if self.dropped
                    else "the file is empty; JSON lines with src and tgt are wanted"
                )
            )
        self._tokens, self._ends = np.frombuffer(tokens, np.int32), np.frombuffer(ends, np.int64)
        self._places = np.frombuffer(places, np.int64).reshape(-1, 3)
        self.lengths = (np.diff(self._ends) - 1).astype(np.int32)  # positions: one less than tokens

    def _fit(self, rounds, context):
        fit = fit_plain if self.tokenizer.chat_template is None else fit_templated
        return fit(self.tokenizer, rounds, context, self.src_length, self.max_length)

    def _flatten(self, rounds, context, autoregressive):
        """Rounds -> list of at most max_length tokens, ~id where nothing is learnt."""
        system, encoded = self._fit(rounds, context)
        flat = [~i for i in system]
        for user, bot in encoded:
            flat += [~i for i in user]
            flat += bot
        flat = flat[: self.max_length]
        return [i if i >= 0 else ~i for i in flat] if autoregressive else flat

    def __len__(self):
        return len(self.lengths)

    def sample(self, i):
        """Record number -> (input_ids, labels), int32 [lengths[i]]; labels[t] is the target of input_ids[t], -100 where
        nothing is learnt."""
        tokens = self._tokens[self._ends[i] : self._ends[i + 1]]
        return np.where(tokens < 0, ~tokens, tokens)[:-1], np.where(tokens < 0, IGNORED, tokens)[1:]

    def record(self, i):
        """Record number -> its JSON object, read again from the file."""
        return record_at(self.files, self._places[i])

    def prompt_ids(self, i):
        """Record number -> ids up to the last reply: the rounds that training showed, the last in the query form."""
        rounds, context = record_rounds(self.record(i), f"record {i}")
        return fit_prompt(self.tokenizer, rounds, context, self.src_length, self.max_length)

    def reference(self, i):
        """Record number -> text of its last reply."""
        return record_rounds(self.record(i), f"record {i}")[0][-1][1]


# ============================== batches of records ==============================


def epoch_order(n, seed, epoch):
    """Permutation of range(n), a function of (seed, epoch) alone."""
    return np.random.RandomState([seed & 0xFFFFFFFF, epoch]).permutation(n)


def best_fit_packs(lengths, capacity):
    """Longest first, each into the fullest pack that still has room (best-fit decreasing) -> (order, bounds): pack p
    holds order[bounds[p]:bounds[p+1]].

    Never worse than 11/9 of the optimum + 6/9 packs (Dosa 2007); on instruction data nearly always full. O(n log
    capacity): packs are kept by the room they have left, in at most `capacity` stacks. A million records take 1
    second."""
    assert len(lengths) and lengths.max() <= capacity, (len(lengths), lengths.max(initial=0), capacity)
    pack_of = np.empty(len(lengths), np.int64)
    rooms, packs_with, packs, shortest = [], {}, 0, int(lengths.min())  # rooms: sorted sizes of room that some pack has
    for i in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[i])
        k = bisect.bisect_left(rooms, length)
        if k == len(rooms):
            pack, room, packs = packs, capacity, packs + 1
        else:
            room = rooms[k]
            pack = packs_with[room].pop()
            if not packs_with[room]:
                del packs_with[room], rooms[k]
        pack_of[i] = pack
        room -= length
        if room >= shortest:
            if room not in packs_with:
                packs_with[room] = []
                bisect.insort(rooms, room)
            packs_with[room].append(pack)
    return np.argsort(pack_of, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(pack_of))])


def in_order_packs(lengths, capacity):
    """Records in their order, a new pack when the next does not fit (PaddleNLP without greedy) -> (order, bounds)."""
    assert len(lengths) and lengths.max() <= capacity, (len(lengths), lengths.max(initial=0), capacity)
    bounds, used = [0], 0
    for i, length in enumerate(lengths.tolist()):
        if used + length > capacity:
            bounds.append(i)
            used = 0
        used += length
    return np.arange(len(lengths)), np.array([*bounds, len(lengths)])


def collate(rows, sample, width, pad_token_id):
    """Record numbers of each row, sample(i) -> (input_ids, labels) -> the batch described at the top, T = width."""
    B = len(rows)
    input_ids = np.full((B, width), pad_token_id, np.int64)
    labels = np.full((B, width), IGNORED, np.int64)
    positions = np.zeros((B, width), np.int64)
    mask_rows = np.full((B, 1, width, 1), width, np.int32)
    tokens = 0
    for b, row in enumerate(rows):
        start = 0
        for i in row:
            ids, targets = sample(i)
            end = start + len(ids)
            input_ids[b, start:end], labels[b, start:end] = ids, targets
            positions[b, start:end] = np.arange(len(ids))
            mask_rows[b, 0, start:end, 0] = end
            start = end
        tokens += start
        positions[b, start:] = np.arange(width - start)  # padding: a segment of its own, from `start` to the end
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": positions,
        "startend_row_indices": mask_rows,
        "sample_ids": [[int(i) for i in row] for row in rows],
        "tokens": tokens,
    }


class SFTLoader:
    """Batches of an SFTDataset; batch(epoch, index) is a pure function of its arguments and the constructor's.

    zero_padding: records are packed into rows of max_length once, and whole packs are shuffled each epoch
    (greedy_zero_padding: best fit; else in file order). Otherwise each batch is padded to its longest record; with
    shuffle, batches are made of records of similar length (sorted inside random windows of 50 batches) and come in
    random order. UserError when drop_last leaves no batch."""

    WINDOW = 50  # batches sorted together: larger saves padding, smaller mixes lengths better

    def __init__(
        self,
        dataset,
        batch_size,
        max_length,
        zero_padding=False,
        greedy_zero_padding=False,
        seed=0,
        shuffle=True,
        pad_to_max_length=False,
        pad_to_multiple_of=None,
        drop_last=False,
        pad_token_id=0,
    ):
        assert int(dataset.lengths.max()) <= max_length, (int(dataset.lengths.max()), max_length)
        self.dataset, self.batch_size, self.pad_token_id = dataset, batch_size, pad_token_id
        self.seed, self.shuffle = seed, shuffle
        self.multiple, self.grouped = pad_to_multiple_of or 1, shuffle and not zero_padding
        self.fixed_width = max_length if zero_padding or pad_to_max_length else None
        if zero_padding:
            pack = best_fit_packs if greedy_zero_padding else in_order_packs
            self._order, self._bounds = pack(dataset.lengths, max_length)
        else:
            self._order, self._bounds = np.arange(len(dataset)), np.arange(len(dataset) + 1)
        rows = len(self._bounds) - 1
        self.batches_per_epoch = rows // batch_size if drop_last else -(-rows // batch_size)
        if not self.batches_per_epoch:
            raise UserError(f"{len(dataset)} records make {rows} rows, fewer than one batch of {batch_size}; lower it")
        self._row_lengths = np.add.reduceat(dataset.lengths[self._order].astype(np.int64), self._bounds[:-1])
        self._epoch, self._batches = None, None

    def _width(self, longest):
        width = self.fixed_width or longest
        return -(-width // self.multiple) * self.multiple

    def _epoch_batches(self, epoch):
        """List of batches of row numbers, one may be short. Kept until another epoch is asked for."""
        if self._epoch != epoch:
            rows = np.arange(len(self._bounds) - 1)
            if self.shuffle:
                rows = epoch_order(len(rows), self.seed, epoch)
            if self.grouped:
                window = self.batch_size * self.WINDOW
                rows = np.concatenate(
                    [
                        part[np.argsort(-self._row_lengths[part], kind="stable")]
                        for part in (rows[i : i + window] for i in range(0, len(rows), window))
                    ]
                )
            starts = range(0, self.batches_per_epoch * self.batch_size, self.batch_size)
            batches = [rows[start : start + self.batch_size] for start in starts]
            if self.grouped:
                batches = [batches[i] for i in epoch_order(len(batches), self.seed + 1, epoch)]
            self._epoch, self._batches = epoch, batches
        return self._batches

    def batch(self, epoch, index):
        """-> the batch described at the top of this file."""
        rows = self._epoch_batches(epoch)[index]
        records = [self._order[self._bounds[row] : self._bounds[row + 1]].tolist() for row in rows]
        return collate(records, self.dataset.sample, self._width(int(self._row_lengths[rows].max())), self.pad_token_id)

    @property
    def fill(self):
        """Share of positions that are real, over epoch 0."""
        batches = self._epoch_batches(0)
        positions = sum(len(rows) * self._width(int(self._row_lengths[rows].max())) for rows in batches)
        return float(sum(self._row_lengths[rows].sum() for rows in batches) / positions)


# ============================== preference pairs ==============================


def preference_pair(record, where):
    """{"src", "tgt"?, "response", "sort", "context"?} -> [(user, bot)... of earlier turns], user, chosen, rejected,
    context. The reply with the larger sort is the chosen one. UserError names file:line and what is wrong."""
    for key in ("src", "response", "sort"):
        if key not in record:
            raise UserError(f"{where}: key {key!r} is missing; found {', '.join(map(repr, record)) or 'no keys'}")
    turns = []
    for key in ("src", "tgt"):
        value = record.get(key) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise UserError(f"{where}: {key!r} must be a string or a list of strings, found {brief(record[key])}")
        turns.append(value)
    users, bots = turns[0] or ([""] if record["src"] == "" else []), turns[1]
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
            + ("; single replies (KTO) are not trained on here" if single else "")
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
    context = record.get("context") or {}
    if not isinstance(context, dict) or not isinstance(context.get("system", ""), str):
        raise UserError(f"{where}: 'context' must be an object, and its 'system' a string; found {brief(context)}")
    chosen, rejected = replies if sort[0] > sort[1] else replies[::-1]
    return list(zip(users, bots)), users[-1], chosen, rejected, context


def fit_pair(tokenizer, history, user, chosen, rejected, context, max_seq_len, max_prompt_len, where):
    """PaddleNLP's truncation of a pair -> ids (prompt, chosen, rejected), which take len(prompt) - 1 + len(chosen) +
    len(rejected) <= max_seq_len positions; a reply is [] when there is no room for it.

    If the last turn and both replies do not fit, the prompt (system and last turn) loses its beginning down to
    max_prompt_len; if that is not enough, both replies lose their ends in proportion to their lengths. Earlier turns
    stand before it, from the newest back, while they fit. As in `fit_templated` a template counts the turns that are
    kept. A reply that is cut has no end mark."""
    while True:
        system, encoded = tokenizer.encode_chat([*history, (user, chosen)], context, True)
        other = tokenizer.encode_chat([*history, (user, rejected)], context, True)[1][-1]
        (last, good), bad = encoded[-1], other[1]
        if last != other[0]:
            raise UserError(
                f"{where}: chat template {tokenizer.chat_template.name!r} puts the reply into the prompt, "
                "so that two replies cannot share one"
            )
        room = max_seq_len + 1 - len(system)  # + 1: the prompt's last token is counted with the chosen reply
        if len(last) + len(good) + len(bad) > room:
            if len(system) + len(last) > max_prompt_len:
                last = shorten_user(tokenizer, user, chosen, context, max(0, max_prompt_len - len(system)), history)
            if len(good) + len(bad) > room - len(last):
                left = max(0, room - len(last))
                keep = min(max(1, round(left * len(good) / (len(good) + len(bad)))), left - 1)
                good, bad = (good[:keep], bad[: left - keep]) if left >= 2 else ([], [])
        sizes = [len(turn) + len(reply) for turn, reply in encoded[:-1]]
        room -= len(last) + len(good) + len(bad)
        if not history or sum(sizes) <= room:
            return system + [i for turn, reply in encoded[:-1] for i in turn + reply] + last, good, bad
        fits = int(np.searchsorted(np.cumsum(sizes[::-1]), room, side="right"))
        history = history[len(history) - fits :]


class PreferenceDataset:
    """Tokenised pairs of replies to one prompt, from a JSON-lines file (or a folder with {split}.json).

    Prompts and replies lie one after another in one int32 array; records are re-read from the file when asked for, as
    in SFTDataset. Truncation: `fit_pair`. A pair that cannot be learned (no room for a token of each reply, no prompt,
    the same reply twice) is dropped and counted in .dropped. UserError: missing or empty file, a bad line (file:line),
    nothing left."""

    def __init__(self, path, tokenizer, max_seq_len=4096, max_prompt_len=2048, split="train", progress=False):
        self.files, self.dropped = sft_files(path, split), 0
        tokens, ends, places = array("i"), array("q", [0]), array("q")  # ends: of the prompt, the chosen, the rejected
        for number, file in enumerate(self.files):
            for offset, line_number, line in numbered_lines(file, progress):
                where = f"{file}:{line_number}"
                pair = preference_pair(parse_json_line(line, file, line_number), where)
                prompt, chosen, rejected = fit_pair(tokenizer, *pair, max_seq_len, max_prompt_len, where)
                if not (prompt and chosen and rejected) or chosen == rejected:
                    self.dropped += 1
                    continue
                for part in (prompt, chosen, rejected):
                    tokens.extend(part)
                    ends.append(len(tokens))
                places.extend((number, offset, line_number))
        if not places:
            raise UserError(
                f"{self.files[0]}: "
                + (
                    f"none of the {self.dropped} pairs can be learned with max_seq_len {max_seq_len} and max_prompt_len "
                    f"{max_prompt_len}; raise max_seq_len or lower max_prompt_len"
                    if self.dropped
                    else "the file is empty; JSON lines with src, tgt, response and sort are wanted"
                )
            )
        self._tokens, self._ends = np.frombuffer(tokens, np.int32), np.frombuffer(ends, np.int64)
        self._places = np.frombuffer(places, np.int64).reshape(-1, 3)
        self.lengths = (np.diff(self._ends[::3]) - 1).astype(np.int32)

    def __len__(self):
        return len(self.lengths)

    def pair(self, i):
        """Pair number -> ids (prompt, chosen, rejected), int32."""
        begin, *ends = self._ends[3 * i : 3 * i + 4]
        return tuple(np.split(self._tokens[begin : ends[2]], [ends[0] - begin, ends[1] - begin]))

    def sample(self, i):
        """Pair number -> input_ids, labels, position_ids, rows, replies; int32 [lengths[i]]. See `pair_sample`."""
        return pair_sample(*self.pair(i))

    def record(self, i):
        """Pair number -> its JSON object, read again from the file."""
        return record_at(self.files, self._places[i])


def pair_sample(prompt, chosen, rejected):
    """Ids of one pair -> input_ids, labels, position_ids, rows, replies as one sequence; int32 [n - 1 + a + b].

        prompt p1 .. pn, chosen c1 .. ca, rejected r1 .. rb
        input_ids     p1 .. p(n-1)   pn  c1 .. c(a-1)   pn  r1 .. r(b-1)
        labels        -100 ........  c1  c2 .. ca       r1  r2 .. rb
        position_ids  0 .... n-2     n-1 n .. n+a-2     n-1 n .. n+b-2
        rows          end of pair    end of chosen      end of pair        FlashMask: rows from there on do not see it
        replies       -1             0                  1

    Both replies' first tokens are predicted from the prompt's last one, so each reply has a copy of it that the other
    does not see. So every token sees what it would see in a sequence of prompt and one reply, at the same positions."""
    n, a, b = len(prompt) - 1, len(chosen), len(rejected)
    input_ids = np.concatenate([prompt, chosen[:-1], prompt[-1:], rejected[:-1]]).astype(np.int32)
    labels = np.concatenate([np.full(n, IGNORED), chosen, rejected]).astype(np.int32)
    position_ids = np.concatenate([np.arange(n), n + np.arange(a), n + np.arange(b)]).astype(np.int32)
    rows = np.repeat(np.array([n + a + b, n + a, n + a + b], np.int32), [n, a, b])
    return input_ids, labels, position_ids, rows, np.repeat(np.array([-1, 0, 1], np.int32), [n, a, b])


def collate_pairs(rows, sample, width, pad_token_id):
    """Pair numbers of each row, sample(i) as `pair_sample` -> the batch described at the top, T = width."""
    B = len(rows)
    batch = {
        "input_ids": np.full((B, width), pad_token_id, np.int64),
        "labels": np.full((B, width), IGNORED, np.int64),
        "position_ids": np.zeros((B, width), np.int64),
        "reply_ids": np.full((B, width), -1, np.int64),
        "startend_row_indices": np.full((B, 1, width, 1), width, np.int32),
        "sample_ids": [[int(i) for i in row] for row in rows],
        "tokens": 0,
    }
    reply_tokens = []
    for b, row in enumerate(rows):
        start = 0
        for i in row:
            ids, labels, positions, mask_rows, replies = sample(i)
            here = np.s_[b, start : start + len(ids)]
            batch["input_ids"][here], batch["labels"][here], batch["position_ids"][here] = ids, labels, positions
            batch["startend_row_indices"][b, 0, start : start + len(ids), 0] = start + mask_rows
            batch["reply_ids"][here] = np.where(replies < 0, -1, 2 * len(reply_tokens) + replies)
            reply_tokens.append([int((replies == side).sum()) for side in (0, 1)])
            start += len(ids)
        batch["tokens"] += start
        batch["position_ids"][b, start:] = np.arange(width - start)  # padding, as in `collate`
    return batch | {"reply_tokens": np.array(reply_tokens, np.int64)}


class PreferenceLoader(SFTLoader):
    """Batches of a PreferenceDataset: several pairs a row of at most max_seq_len (greedy_zero_padding: best fit, else
    in the order of the file), rows padded to the longest of their batch; else as SFTLoader with zero_padding."""

    def __init__(
        self,
        dataset,
        batch_size,
        max_seq_len,
        greedy_zero_padding=False,
        seed=0,
        shuffle=True,
        drop_last=False,
        pad_token_id=0,
    ):
        super().__init__(
            dataset,
            batch_size,
            max_seq_len,
            True,
            greedy_zero_padding,
            seed,
            shuffle,
            drop_last=drop_last,
            pad_token_id=pad_token_id,
        )
        self.fixed_width = None

    def batch(self, epoch, index):
        """-> the batch described at the top of this file, with reply_ids and reply_tokens."""
        rows = self._epoch_batches(epoch)[index]
        pairs = [self._order[self._bounds[row] : self._bounds[row + 1]].tolist() for row in rows]
        width = self._width(int(self._row_lengths[rows].max()))
        return collate_pairs(pairs, self.dataset.sample, width, self.pad_token_id)


# ============================== pretraining corpora ==============================
# PREFIX.bin: tokens of all documents, one after another. PREFIX.idx, little endian: magic, u64 version 1, u8 dtype
# code, u64 number of sequences, u64 length of doc_idx, int32 sizes[sequences], int64 pointers[sequences] (bytes into
# .bin), int64 doc_idx (sequence at which each document starts, last = all).

MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16, 9: np.uint32, 10: np.uint64}


def index_bytes(dtype, sizes):
    """Header and arrays of the .idx of documents with these token counts (one sequence each)."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    sizes = np.asarray(sizes, "<i4")
    pointers = np.zeros(len(sizes), "<i8")
    np.cumsum(sizes[:-1].astype(np.int64) * np.dtype(dtype).itemsize, out=pointers[1:])
    header = MAGIC + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1)
    return header + sizes.tobytes() + pointers.tobytes() + np.arange(len(sizes) + 1, dtype="<i8").tobytes()


def read_index(path):
    """.idx -> (dtype, sizes int32 [sequences], doc_idx int64 [documents + 1]). UserError: not one, cut off, gaps."""
    raw = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    if raw[:9].tobytes() != MAGIC or len(raw) < 34:
        raise UserError(f"{path}: not a Megatron index: it must begin with {MAGIC!r}, found {raw[:9].tobytes()!r}")
    version, code, count, documents = struct.unpack("<QBQQ", raw[9:34].tobytes())
    if version != 1 or code not in DTYPES:
        raise UserError(f"{path}: version {version}, dtype code {code}; version 1 and one of {list(DTYPES)} are wanted")
    if len(raw) != 34 + 12 * count + 8 * documents:
        raise UserError(f"{path}: {len(raw)} bytes, not {34 + 12 * count + 8 * documents} as its header says: cut off")
    sizes = raw[34 : 34 + 4 * count].view("<i4")
    pointers = raw[34 + 4 * count : 34 + 12 * count].view("<i8")
    doc_idx = raw[34 + 12 * count :].view("<i8")
    ends = np.cumsum(sizes, dtype=np.int64) * np.dtype(DTYPES[code]).itemsize
    if count and not (pointers[0] == 0 and np.array_equal(pointers[1:], ends[:-1])):
        raise UserError(f"{path}: its sequences do not follow one another without gaps; write the corpus again")
    return DTYPES[code], sizes, doc_idx


class Corpus:
    """One prefix: memory-mapped tokens and where each document starts. Only the pages that are asked for are read.

    PREFIX_ids.npy + PREFIX_idx.npz (PaddleNLP's older form: lens, docs) is taken before PREFIX.bin + PREFIX.idx, as
    upstream does."""

    def __init__(self, prefix):
        self.prefix = str(prefix)
        ids, npz, idx, data = (Path(self.prefix + end) for end in ("_ids.npy", "_idx.npz", ".idx", ".bin"))
        if npz.is_file() and ids.is_file():
            try:
                self.tokens, arrays = np.load(ids, mmap_mode="r"), np.load(npz)
                sizes, doc_idx = arrays["lens"], arrays["docs"].astype(np.int64)
            except (OSError, ValueError, KeyError, BadZipFile) as error:
                raise UserError(f"{npz} and {ids.name} cannot be read as lens, docs and tokens: {error}") from None
        elif idx.is_file() and data.is_file():
            dtype, sizes, doc_idx = read_index(idx)
            size, promised = data.stat().st_size, int(np.sum(sizes, dtype=np.int64)) * np.dtype(dtype).itemsize
            if size != promised:
                raise UserError(f"{data}: {size} bytes, {idx.name} promises {promised}: cut off or of another corpus")
            self.tokens = np.memmap(data, dtype, "r") if size else np.zeros(0, dtype)
        else:
            raise UserError(f"{prefix}: neither its .bin with .idx nor its _ids.npy with _idx.npz is there")
        ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        fits = len(doc_idx) and doc_idx[0] == 0 and doc_idx[-1] == len(sizes) and np.all(np.diff(doc_idx) >= 0)
        if not fits or ends[-1] != len(self.tokens):
            raise UserError(
                f"{prefix}: its document boundaries do not fit its {len(sizes)} sequences and "
                f"{len(self.tokens)} tokens; write the corpus again"
            )
        self.bounds = ends[doc_idx]  # (documents + 1,): document d is tokens[bounds[d]:bounds[d + 1]]


def parse_blend(source):
    """Folder | prefix | "w1 prefix1 w2 prefix2" -> [(weight, prefix)...], weights summing to 1. A folder's prefixes
    weigh the same, as upstream."""
    source = str(source)
    parts = source.split()
    if Path(source).is_dir():
        names = sorted({str(p)[: -len(end)] for end in (".idx", "_idx.npz") for p in Path(source).glob("*" + end)})
        if not names:
            raise UserError(f"{source}: no *.idx and no *_idx.npz in this folder; `python data.py corpus` writes them")
        pairs = [(1.0, name) for name in names]
    elif len(parts) < 2:
        pairs = [(1.0, source)]
    else:
        try:
            pairs = [(float(weight), prefix) for weight, prefix in zip(parts[::2], parts[1::2], strict=True)]
        except ValueError:
            raise UserError(f"{source!r}: no such folder, and not 'weight prefix weight prefix ...' either") from None
    if any(not 0 < weight < float("inf") for weight, _ in pairs):
        raise UserError(f"{source!r}: every weight must be a positive number")
    total = sum(weight for weight, _ in pairs)
    return [(weight / total, prefix) for weight, prefix in pairs]


def split_documents(split, count, which):
    """Shares like "949,50,1" -> (first, last + 1) document of `which` (train | valid | test), by cumulated shares."""
    try:
        shares = [float(share) for share in re.split("[,/]", split)]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or sum(shares) <= 0:
        raise UserError(f"split {split!r}: up to three shares are wanted: train,valid,test as in '949,50,1'")
    edges = np.concatenate([[0], np.cumsum(shares + [0.0] * (3 - len(shares)))]) / sum(shares)
    edges = np.round(edges * count).astype(np.int64)
    part = ("train", "valid", "test").index(which)
    return int(edges[part]), int(edges[part + 1])


class CorpusSamples:
    """Samples of seq_length + 1 tokens from the documents first..last of a corpus, laid end to end in an order shuffled
    anew for each pass.

    Sample k covers tokens k * seq_length ... (k + 1) * seq_length of that stream (one shared, as it is a target first
    and an input then); the samples of a pass come in shuffled order too, so nothing is seen twice before everything is
    seen once. num_samples None: one pass, the last sample padded."""

    def __init__(self, corpus, first, last, num_samples, seq_length, seed, shuffle, eos_token_id):
        sizes = np.diff(corpus.bounds[first : last + 1])
        total = int(sizes.sum())
        self.tokens, self.seq_length, self.eos_token_id = corpus.tokens, seq_length, eos_token_id
        self.num_samples = -(-(total - 1) // seq_length) if num_samples is None else num_samples
        passes = 1 if num_samples is None else -(-(num_samples * seq_length + 1) // total)
        numbers = [epoch_order(len(sizes), seed, e) if shuffle else np.arange(len(sizes)) for e in range(passes)]
        order = np.concatenate(numbers)
        self.starts = corpus.bounds[first:last][order]  # (passes * documents,) where each document of the stream lies
        self.stream = np.concatenate([[0], np.cumsum(sizes[order])])  # (passes * documents + 1,) and in the stream
        edges = np.minimum(-(-np.arange(passes + 1) * total // seq_length), self.num_samples)  # passes' first samples
        edges[-1] = self.num_samples
        self.order = np.concatenate(
            [
                a + (epoch_order(b - a, seed + 1, e) if shuffle else np.arange(b - a))
                for e, (a, b) in enumerate(zip(edges[:-1], edges[1:]))
            ]
        )

    def sample(self, index):
        """-> tokens (int64), number of the document in the stream (-1: padding), whether real; [seq_length + 1]."""
        where = int(self.order[index]) * self.seq_length + np.arange(self.seq_length + 1)
        real = where < self.stream[-1]
        where = np.minimum(where, self.stream[-1] - 1)
        document = np.searchsorted(self.stream, where, side="right") - 1
        tokens = self.tokens[self.starts[document] + where - self.stream[document]].astype(np.int64)
        return np.where(real, tokens, self.eos_token_id or 0), np.where(real, document, -1), real


class CorpusLoader:
    """Batches of [B, seq_length] over a folder of corpora, one prefix or a weighted blend; batch(epoch, index) as in
    SFTLoader.

    which: "train" | "valid" | "test" by documents. num_samples: how many samples an epoch has (a training run asks for
    all it will use, as one epoch; data shorter than that are passed over again, reshuffled); None: one pass over
    everything, the tail padded with eos and not learnt. mask_across_documents: positions restart and attention ends at
    each document's end, and the last token of a document is not asked to predict the first of the next. UserError:
    nothing there, damaged index, a split without documents."""

    def __init__(
        self,
        source,
        split,
        which,
        num_samples,
        seq_length,
        batch_size,
        seed=0,
        eos_token_id=None,
        mask_across_documents=False,
        shuffle=True,
    ):
        self.batch_size, self.seq_length, self.mask_across_documents = batch_size, seq_length, mask_across_documents
        self.args = (seq_length, shuffle, eos_token_id, seed)
        self.parts, blend = [], parse_blend(source)
        for weight, prefix in blend:
            corpus = Corpus(prefix)
            documents = len(corpus.bounds) - 1
            first, last = split_documents(split, documents, which)
            if corpus.bounds[last] - corpus.bounds[first] < 2:
                raise UserError(
                    f"{prefix}: split {split!r} leaves no text for {which!r}: {last - first} of "
                    f"{documents} documents; change the split"
                )
            self.parts.append((weight, corpus, first, last))
        if num_samples is None:
            self.counts = [None] * len(blend)
            self.num_samples = sum(-(-(int(c.bounds[b] - c.bounds[a]) - 1) // seq_length) for _, c, a, b in self.parts)
        else:
            ends = np.round(np.cumsum([weight for weight, _ in blend]) * num_samples).astype(np.int64)
            self.counts, self.num_samples = np.diff(ends, prepend=0).tolist(), num_samples
        self.batches_per_epoch = -(-self.num_samples // batch_size)
        self._epoch = None

    def _epoch_samples(self, epoch):
        """Sets the CorpusSamples and, per sample of the blend, its corpus and its number there; kept as in SFTLoader.

        Sample j of a corpus with n is due at time (j + 1/2) / n: sorted by time, every stretch of the run has the
        blend's weights."""
        if self._epoch != epoch:
            seq_length, shuffle, eos_token_id, seed = self.args
            self._samples = [
                CorpusSamples(corpus, first, last, count, seq_length, seed + 7919 * epoch, shuffle, eos_token_id)
                if count != 0
                else None
                for (_, corpus, first, last), count in zip(self.parts, self.counts)
            ]
            sizes = [part.num_samples if part else 0 for part in self._samples]
            due = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in sizes])
            order = np.argsort(due, kind="stable")
            self._corpus_of = np.repeat(np.arange(len(sizes)), sizes)[order]
            self._number_of = np.concatenate([np.arange(n) for n in sizes])[order]
            self._epoch = epoch

    def batch(self, epoch, index):
        """-> the batch described at the top of this file; the last one of an epoch may be short."""
        self._epoch_samples(epoch)
        chosen = range(index * self.batch_size, min((index + 1) * self.batch_size, self.num_samples))
        assert len(chosen), (index, self.batches_per_epoch)
        B, T = len(chosen), self.seq_length
        batch = {key: np.empty((B, T), np.int64) for key in ("input_ids", "labels", "position_ids")}
        batch |= {"startend_row_indices": np.empty((B, 1, T, 1), np.int32)}
        batch |= {"sample_ids": [[i] for i in chosen], "tokens": 0}
        for b, i in enumerate(chosen):
            tokens, document, real = self._samples[self._corpus_of[i]].sample(self._number_of[i])
            if not self.mask_across_documents:
                document = np.where(real, 0, -1)
            same = document[1:] == document[:-1]  # is position t's target of t's own document?
            begins = np.flatnonzero(np.concatenate([[True], ~same[:-1]]))  # positions at which a segment starts
            ends = np.append(begins[1:], T)
            batch["input_ids"][b] = tokens[:-1]
            batch["tokens"] += int(real[:-1].sum())
            batch["labels"][b] = np.where(same & real[1:], tokens[1:], IGNORED)
            batch["position_ids"][b] = np.arange(T) - np.repeat(begins, ends - begins)
            batch["startend_row_indices"][b, 0, :, 0] = np.repeat(ends, ends - begins)
        return batch


# ============================== python data.py corpus ==============================


def read_documents(path):
    """Yields chunks, lists of (line number, bytes) of about a megabyte: JSON lines, or the paragraphs of a .txt."""
    chunk, size, paragraph, begin = [], 0, [], 1
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if path.suffix == ".txt":
                if line.strip():
                    begin = begin if paragraph else number
                    paragraph.append(line)
                    continue
                line, paragraph, number = b"".join(paragraph), [], begin
            if line.strip():
                chunk.append((number, line))
                size += len(line)
            if size > 1 << 20 or len(chunk) >= 1024:
                yield chunk
                chunk, size = [], 0
    chunk += [(begin, b"".join(paragraph))] if paragraph else []
    if chunk:
        yield chunk


@lru_cache(maxsize=1)
def cached_tokenizer(path):
    """A worker process loads its tokenizer once."""
    return load_tokenizer(path)


def encode_documents(chunk, path, tokenizer_path, json_key, append_eos, dtype):
    """Chunk of read_documents -> (tokens as bytes, tokens per document). Runs in a worker. UserError names
    file:line."""
    tokenizer, tokens, sizes = cached_tokenizer(tokenizer_path), [], array("i")
    for number, raw in chunk:
        if path.suffix == ".txt":
            try:
                text = raw.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number + raw[: error.start].count(10)}: not UTF-8: {error.reason}") from None
        else:
            record = parse_json_line(raw, path, number)
            text = record.get(json_key)
            if not isinstance(text, str):
                raise UserError(f"{path}:{number}: key {json_key!r} must be there and a string; found {brief(record)}")
        ids = tokenizer.encode(text, add_special_tokens=False)
        if ids:  # an empty text is no document
            ids += [tokenizer.eos_token_id] if append_eos else []
            tokens.append(np.array(ids, dtype).tobytes())
            sizes.append(len(ids))
    return b"".join(tokens), sizes


def in_order(executor, function, chunks, window):
    """Like executor.map, but never more than `window` chunks ahead of the reader: the corpus is not in memory."""
    waiting = deque()
    for chunk in chunks:
        waiting.append((chunk, executor.submit(function, chunk)))
        if len(waiting) >= window:
            done, result = waiting.popleft()
            yield done, result.result()
    while waiting:
        done, result = waiting.popleft()
        yield done, result.result()


def build_corpus(path, tokenizer_path, output, workers=1, json_key="text", append_eos=True, overwrite=False):
    """Text -> output.bin and output.idx; documents in input order whatever `workers` is. -> (documents, tokens).

    Written under temporary names, flushed to disk, then renamed, the index last: a prefix with an index is complete.
    uint16 when the vocabulary is smaller than 65,535, else int32. UserError: missing or empty input, a bad line
    (file:line), an output that is there already."""
    from tqdm import tqdm

    path, output = Path(path), str(output)
    names = {end: Path(output + end) for end in (".bin", ".idx")}
    if not path.is_file():
        raise UserError(f"{path}: no such file; a .jsonl or .txt is wanted")
    if path.suffix not in (".jsonl", ".json", ".txt"):
        raise UserError(f"{path}: unknown kind of file {path.suffix!r}; .jsonl or .txt is wanted")
    if not overwrite and (found := [str(name) for name in names.values() if name.exists()]):
        raise UserError(f"{' and '.join(found)}: already there; give another --output, or --overwrite true")
    tokenizer = cached_tokenizer(str(tokenizer_path))
    if append_eos and tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer_path}: the tokenizer has no eos token to append; give --append_eos false")
    dtype = np.uint16 if tokenizer.vocab_size < 65535 else np.int32
    encode = partial(
        encode_documents,
        path=path,
        tokenizer_path=str(tokenizer_path),
        json_key=json_key,
        append_eos=append_eos,
        dtype=dtype,
    )
    names[".bin"].parent.mkdir(parents=True, exist_ok=True)
    temporary = {end: Path(f"{output}{end}.tmp-{os.getpid()}") for end in names}
    sizes = array("i")
    # spawn: a fork of a process that has threads (tqdm's, the caller's) may hang
    executor = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else None
    try:
        chunks = read_documents(path)
        results = in_order(executor, encode, chunks, 2 * workers) if executor else ((c, encode(c)) for c in chunks)
        bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc="tokenising")
        with open(temporary[".bin"], "wb") as stream, bar:
            for chunk, (tokens, counts) in results:
                stream.write(tokens)
                sizes.extend(counts)
                bar.update(sum(len(raw) for _, raw in chunk))
            stream.flush()
            os.fsync(stream.fileno())
        if not sizes:
            raise UserError(f"{path}: no text in it")
        with open(temporary[".idx"], "wb") as stream:
            stream.write(index_bytes(dtype, sizes))
            stream.flush()
            os.fsync(stream.fileno())
        names[".idx"].unlink(missing_ok=True)  # with --overwrite: never an old index beside new tokens
        for end in (".bin", ".idx"):
            os.replace(temporary[end], names[end])
    finally:
        if executor:
            executor.shutdown(cancel_futures=True)
        for name in temporary.values():
            name.unlink(missing_ok=True)
    return len(sizes), int(np.sum(np.frombuffer(sizes, np.int32), dtype=np.int64))


class OneLineParser(argparse.ArgumentParser):
    """argparse prints its usage before an error; here an error is one line."""

    def error(self, message):
        raise UserError(f"{message}; see `python data.py corpus --help`")


def parse_bool(text):
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() in ("true", "1")


def main(argv=None):
    """Exit code: 0, 2 after a user's error, 130 after Ctrl-C."""
    parser = OneLineParser(prog="data.py", description="Turn text into the token files that pretrain.py reads.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("corpus", help="text -> PREFIX.bin and PREFIX.idx")
    command.add_argument("corpus", help=".jsonl (a JSON object a line) or .txt (a document per paragraph)")
    command.add_argument("--tokenizer", required=True, help="folder with a tokenizer's files")
    command.add_argument("--output", required=True, help="prefix of the files to write")
    command.add_argument("--workers", type=int, default=1, help="processes that tokenise")
    command.add_argument("--json_key", default="text", help="key of the text in each JSON object")
    command.add_argument("--append_eos", type=parse_bool, default=True, help="end each document with eos")
    command.add_argument("--overwrite", type=parse_bool, default=False, help="replace files that are there already")
    try:
        args = parser.parse_args(argv)
        if args.workers < 1:
            raise UserError(f"--workers {args.workers}: at least 1 is wanted")
        documents, tokens = build_corpus(
            args.corpus, args.tokenizer, args.output, args.workers, args.json_key, args.append_eos, args.overwrite
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or args.output}: {error.strerror}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print(f"error: --workers {args.workers}: a worker was killed (out of memory?); use fewer", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{args.output}.bin, {args.output}.idx: {documents:,} documents, {tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
