"""Chat formats: a conversation -> prompt segments -> ids.

    template = load_chat_template("chatml")              # or a folder, a .jinja file, PaddleNLP's chat_template.json
    segments = template.segments([("Hi", "Hello!"), ("Bye", None)], {"system": "Be brief."}, tokenizer)
    system_ids, *ids_of_turns = encode_conversation(tokenizer, segments, parts=5)

Three kinds of templates have the same four methods: ChatFormat (built in, for folders that ship none), JinjaTemplate
(Hugging Face) and ChatTemplate (PaddleNLP). A segment knows whether it is a reply, which training learns, or a prompt.
"""

import json
import re
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path

import jinja2

from formats.chat_formats import FORMATS, JINJA_FILE, TEMPLATE_FILE, ChatFormat
from formats.files import UserError, brief, read_json, read_text
from formats.messages import conversation, is_plain, plain_rounds, without_thoughts
from formats.messages import parse_messages as parse_messages
from formats.rendering import PromptSegment, RenderedTemplate, compile_template, one_line

PLAIN = {"chat_format": "plain"}  # what TEMPLATE_FILE holds where plain text is meant, and a template is not missing


# ============================== templates of PaddleNLP ==============================


class ChatTemplate:
    """PaddleNLP's chat_template.json: {"system": text, "conversation": [user text, bot text], "query": text}.

    Only the bot text is learned; "query" takes the place of the user text when an answer is to be generated. Variables:
    the keys of the record's context (system, …), user, bot, query, index, is_first, is_last, length, is_training,
    bos_token and eos_token. UserError names the file and what is wrong in it.
    """

    not_learned = 0  # as in RenderedTemplate: here all replies are learned

    def __init__(self, config, where: str):
        config = config if isinstance(config, dict) else {}
        system, turn, query = config.get("system") or "", config.get("conversation"), config.get("query")
        texts = [system, *turn, query] if isinstance(turn, list) else []
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
        turns = plain_rounds(turns, context, self.name)
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


# ============================== templates of Hugging Face tokenizers ==============================

# Conversations by which the built-in format is found that writes what a template writes. Each shows one difference.
PROBES = (
    ([("question", None)], {}),
    ([("question", None)], {"system": "rules"}),
    ([(" first", "<think>\nthoughts\n</think>\n\nreply "), ("second", None)], {}),
)


THOUGHTS = re.compile(r"""[.'"](?:reasoning_content|thinking)\b""")  # in a template that reads them by this name


class JinjaTemplate(RenderedTemplate):
    """The chat_template of a Hugging Face tokenizer."""

    def __init__(self, source: str, where: str):
        super().__init__(source, where)
        self._formats = {}

    @cached_property
    def stops(self) -> list[str]:
        """The texts that follow a reply and a tool call, without surrounding white space."""
        user, bot = {"role": "user", "content": "question"}, {"role": "assistant", "content": "reply"}
        function = {"name": "function", "arguments": {"key": "reply"}}
        call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        ends = {}
        for message in (bot, call):
            try:
                prompt, finished = self.render([user], None, True), self.render([user, message], None, False)
            except UserError:
                continue
            follows = finished.removeprefix(prompt) if finished.startswith(prompt) else ""
            ends[follows.rpartition("reply")[2].lstrip(" \n\"'}])").rstrip()] = None  # behind a call's JSON
        return [end for end in ends if end]

    def files(self) -> dict[str, str]:
        return {JINJA_FILE: self.source}

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
            return self.render(conversation(turns, context)[0], tokenizer, True)
        except UserError:
            return None

    def segments(self, rounds: list, context: dict, tokenizer, is_training=False, split=True) -> list[PromptSegment]:
        """As ChatTemplate.segments, for all that parse_messages gives. A built-in format that writes the same prompt
        tells the replies apart; otherwise they are found in the rendered text (formats/rendering.py)."""
        if not THOUGHTS.search(self.source):
            rounds = without_thoughts(rounds, self.name, is_training, inside="</think>" in self.source)
        messages, starts = conversation(rounds, context)
        equal = None
        if is_plain(rounds, context) and not self.marks_replies:
            equal = self.equal_format(tokenizer)
        if equal is not None and not _of_tuples(equal):
            prompt = self.render(messages[: starts[-1]], tokenizer, True)
            equal = equal if _text(equal, [*rounds[:-1], (rounds[-1][0], None)], context, tokenizer) == prompt else None
        if equal is not None:
            return equal.segments(rounds, context, tokenizer)
        return self.divided(messages, starts, context, tokenizer, is_training, split)


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


def is_plain_folder(folder: Path) -> bool:
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


def encode_segments(tokenizer: object, run: list[PromptSegment]) -> list[tuple[int, list[int]]]:
    """Adjacent "text" segments, read as one text, -> [(part, ids), …], divided where the parts change.

    A token across a boundary belongs to the part after it. Before a reply the text itself is divided: a reply is
    learned as it would be generated, after its prompt's ids."""
    run = [
        (part, "".join(segment.text for segment in same)) for part, same in groupby(run, lambda segment: segment.part)
    ]
    encoded, start = [], 0
    for end in range(1, len(run) + 1):  # a special token separates the texts around it: no beginning is encoded twice
        if end == len(run) or starts_with_special(run[end][1], tokenizer):
            encoded += _encode_long_stretch(tokenizer, run[start:end])
            start = end
    return encoded


EXACT_PARTS = 32  # up to here every beginning of a stretch without special tokens is encoded


def _encode_long_stretch(tokenizer, run):
    """[(part, text), …] -> [(part, ids), …] as encode_segments, in a time that grows with the length.

    It is cut before replies, where the ids of a prompt end, but not where the reply by itself would have others."""
    replies = [i for i, (part, _) in enumerate(run) if i and part % 2 == 0] if len(run) > EXACT_PARTS else []
    encoded, start = [], 0
    for cut, end in zip([*replies, len(run)], [*replies[1:], len(run), len(run)]):
        if cut < len(run):
            before, behind = ("".join(text for _, text in run[i:j]) for i, j in ((start, cut), (cut, end)))
            encode = (
                partial(encode_continuation, tokenizer)
                if start
                else partial(tokenizer.encode, add_special_tokens=False)
            )
            ids, all_ids = encode(before), encode(before + behind)
            if all_ids[: len(ids)] == ids and all_ids[len(ids) :] != encode_continuation(tokenizer, behind):
                continue
        encoded += _encode_stretch(tokenizer, run[start:cut], behind=start > 0)
        start = cut
    return encoded


def _encode_stretch(tokenizer, run, behind=False):
    """The same, by encoding every beginning. behind: the stretch continues an earlier text."""
    encode = partial(encode_continuation, tokenizer) if behind else partial(tokenizer.encode, add_special_tokens=False)
    encoded = []
    while run:
        all_ids, done, text, restart = encode("".join(text for _, text in run)), 0, "", None
        for i, (part, part_text) in enumerate(run[:-1]):
            text += part_text
            head = encode(text)
            if head[:done] != all_ids[:done]:
                restart = i
                break
            same = next((j for j, (a, b) in enumerate(zip(head, all_ids)) if a != b), min(len(head), len(all_ids)))
            if same < len(head) and run[i + 1][0] % 2 == 0:
                encoded.append((part, head[done:]))
                restart = i + 1
                break
            encoded.append((part, all_ids[done:same]))
            done = same
        if restart is None:
            return [*encoded, (run[-1][0], all_ids[done:])]
        run, encode = run[restart:], partial(encode_continuation, tokenizer)
    return encoded


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
