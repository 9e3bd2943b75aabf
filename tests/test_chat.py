"""Chat formats: what every family writes of a conversation, as text and as ids; templates of Hugging Face
tokenizers; what is learned of a conversation; conversations that are refused.

    pytest tests/test_chat.py [--hf-python PATH]     no accelerator; the latter compares with transformers' own
    rendering

Formats are tried on a small tokenizer made here, and on the goldens' vocabularies where those lie beside the
repository."""

import json
import re
import types
from pathlib import Path

import pytest

import data
from data import PreferenceDataset, SFTDataset
from formats.chat import (
    JinjaTemplate,
    encode_conversation,
    folder_template,
    load_chat_template,
    save_chat_template,
)
from formats.chat_formats import FORMATS
from formats.files import UserError
from formats.messages import parse_messages
from formats.rendering import PromptSegment
from formats.tokenizer import Tokenizer, load_tokenizer

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "tokenizers"
SPECIAL = """<s> </s> <|im_start|> <|im_end|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>
    [INST] [/INST]
    <start_of_turn> <end_of_turn> <｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜> [gMASK] sop <sop> <|system|> <|user|>
    <|assistant|> <|observation|> <eoh> <eoa>""".split()
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "red lamp"},
    {"role": "assistant", "content": "ten coins"},
    {"role": "user", "content": "blue chair"},
    {"role": "assistant", "content": "quiet water"},
]
NO_SYSTEM = ("mistral-hf", "mistral-v0.1-hf", "chatglm", "chatglm2", "internlm", "gemma", "gemma-hf")


class SmallTokenizer(Tokenizer):
    """Words with the space before them, runs of line breaks as one token; ids are handed out as they come. `dummy`: a
    text gets a space in front, as with sentencepiece."""

    def __init__(self, dummy=False, special=SPECIAL):
        self.folder, self.dummy, self.flags = Path("small"), dummy, {}
        self.added, self.special = {token: i for i, token in enumerate(special)}, set(special)
        self.bos_token, self.eos_token, self.unk_token, self.pad_token = "<s>", "</s>", None, None
        self.bos_token_id, self.eos_token_id = 0, 1
        self.head, self.tail, self.words = [0], [], {}
        self.pattern = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
        self._chat_template = self.generation_config = None

    def has_token(self, text):
        return text in self.added

    def token_id(self, text):
        return self.added.get(text)

    def encode(self, text, add_special_tokens=True, special_in_text=None):
        ids = []
        for i, piece in enumerate([text] if special_in_text is False else self.pattern.split(text)):
            if i % 2:
                ids.append(self.added[piece])
                continue
            piece = " " + piece if self.dummy and i == 0 and piece else piece
            for word in re.findall(r"\n+| ?\w+| |\W", piece):
                ids.append(self.words.setdefault(word, 1000 + len(self.words)))
        return self.head + ids if add_special_tokens else ids

    def decode(self, ids, skip_special_tokens=True):
        texts = {i: text for text, i in [*self.words.items(), *([] if skip_special_tokens else self.added.items())]}
        text = "".join(texts.get(i, f"<{i}>" if i in (195, 196) else "") for i in ids)
        return text.removeprefix(" ") if self.dummy else text


def small(name, **changes):
    tokenizer = SmallTokenizer(**changes)
    tokenizer.chat_template = load_chat_template(name)
    return tokenizer


def message(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def split(messages):
    return parse_messages(messages)


# ------------------------------ what each family writes ------------------------------

LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n{}".format
CHATML = (
    "<|im_start|>user\nred lamp<|im_end|>\n<|im_start|>assistant\nten coins<|im_end|>\n"
    "<|im_start|>user\nblue chair<|im_end|>\n<|im_start|>assistant\n"
)
CHATML_SYSTEM = "<|im_start|>system\nbe kind<|im_end|>\n"
PROMPTS = {  # name: prompt of CHAT[:-1], without the system message where the family knows none; prompt of one question
    "llama2": (
        "<s> [INST] <<SYS>>\nbe kind\n<</SYS>>\n\nred lamp [/INST] ten coins </s><s> [INST] blue chair [/INST]",
        "<s> [INST] red lamp [/INST]",
    ),
    "llama2-hf": (
        "<s>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nred lamp [/INST] ten coins </s><s>[INST] blue chair [/INST]",
        "<s>[INST] red lamp [/INST]",
    ),
    "llama3": (
        "<|begin_of_text|>" + LLAMA3("system", "be kind<|eot_id|>") + LLAMA3("user", "red lamp<|eot_id|>")
        + LLAMA3("assistant", "ten coins<|eot_id|>") + LLAMA3("user", "blue chair<|eot_id|>") + LLAMA3("assistant", ""),
        "<|begin_of_text|>" + LLAMA3("user", "red lamp<|eot_id|>") + LLAMA3("assistant", ""),
    ),
    "llama3.1": (
        "<s>" + LLAMA3("system", "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nbe kind<|eot_id|>")
        + LLAMA3("user", "red lamp<|eot_id|>") + LLAMA3("assistant", "ten coins<|eot_id|>")
        + LLAMA3("user", "blue chair<|eot_id|>") + LLAMA3("assistant", ""),
        "<s>" + LLAMA3("system", "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>")
        + LLAMA3("user", "red lamp<|eot_id|>") + LLAMA3("assistant", ""),
    ),
    "mistral-v1": (
        "<s> [INST] be kind\n\nred lamp [/INST] ten coins</s> [INST] blue chair [/INST]",
        "<s> [INST] red lamp [/INST]",
    ),
    "mistral-v3": (
        "<s>[INST] red lamp[/INST] ten coins</s>[INST] be kind\n\nblue chair[/INST]",
        "<s>[INST] red lamp[/INST]",
    ),
    "mistral-hf": ("<s>[INST] red lamp [/INST]ten coins</s>[INST] blue chair [/INST]", "<s>[INST] red lamp [/INST]"),
    "mistral-v0.1-hf": (
        "<s>[INST] red lamp [/INST]ten coins</s> [INST] blue chair [/INST]",
        "<s>[INST] red lamp [/INST]",
    ),
    "chatml": (CHATML_SYSTEM + CHATML, "<|im_start|>user\nred lamp<|im_end|>\n<|im_start|>assistant\n"),
    "yi-1.5": ("be kind" + CHATML, "<|im_start|>user\nred lamp<|im_end|>\n<|im_start|>assistant\n"),
    "qwen": (
        CHATML_SYSTEM + CHATML,
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nred lamp<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen2": (
        CHATML_SYSTEM + CHATML,
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nred "
        "lamp<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen2.5": (
        CHATML_SYSTEM + CHATML,
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nred lamp<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen3": (CHATML_SYSTEM + CHATML, "<|im_start|>user\nred lamp<|im_end|>\n<|im_start|>assistant\n"),
    "qwen3-no-thinking": (
        CHATML_SYSTEM + CHATML + "<think>\n\n</think>\n\n",
        "<|im_start|>user\nred lamp<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "baichuan2": ("be kind<195>red lamp<196>ten coins<195>blue chair<196>", "<195>red lamp<196>"),
    "chatglm": (
        "[Round 0]\n问：red lamp\n答：ten coins\n[Round 1]\n问：blue chair\n答：[gMASK]<sop>",
        "red lamp[gMASK]<sop>",
    ),
    "chatglm2": (
        "[gMASK]sop[Round 1]\n\n问：red lamp\n\n答：ten coins\n\n[Round 2]\n\n问：blue chair\n\n答：",
        "[gMASK]sop[Round 1]\n\n问：red lamp\n\n答：",
    ),
    "chatglm3": (
        "[gMASK]sop<|system|>\nbe kind<|user|>\nred lamp<|assistant|>\nten coins<|user|>\nblue chair<|assistant|>",
        "[gMASK]sop<|user|>\nred lamp<|assistant|>",
    ),
    "glm-4": (
        "[gMASK]<sop><|system|>\nbe kind<|user|>\nred lamp<|assistant|>\nten coins<|user|>\nblue chair<|assistant|>",
        "[gMASK]<sop><|user|>\nred lamp<|assistant|>",
    ),
    "internlm": (
        "<s><|User|>:red lamp<eoh>\n<|Bot|>:ten coins<eoa>\n<|User|>:blue chair<eoh>\n<|Bot|>:",
        "<s><|User|>:red lamp<eoh>\n<|Bot|>:",
    ),
    "internlm2": (
        "<s>" + CHATML_SYSTEM + CHATML,
        "<s><|im_start|>user\nred lamp<|im_end|>\n<|im_start|>assistant\n",
    ),
    "gemma": (
        "<s><start_of_turn>user\nred lamp<end_of_turn>\n<start_of_turn>model\nten coins<end_of_turn>\n"
        "<start_of_turn>user\nblue chair<end_of_turn>\n<start_of_turn>model\n",
        "<s><start_of_turn>user\nred lamp<end_of_turn>\n<start_of_turn>model\n",
    ),
    "deepseek-v2": (
        "<s>be kind\n\nUser: red lamp\n\nAssistant: ten coins</s>User: blue chair\n\nAssistant:",
        "<s>User: red lamp\n\nAssistant:",
    ),
    "deepseek-v3": (
        "<s>be kind<｜User｜>red lamp<｜Assistant｜>ten coins<｜end▁of▁sentence｜><｜User｜>blue chair<｜Assistant｜>",
        "<s><｜User｜>red lamp<｜Assistant｜>",
    ),
    "deepseek-r1": (
        "<s>be kind<｜User｜>red lamp<｜Assistant｜>ten coins<｜end▁of▁sentence｜><｜User｜>blue chair<｜Assistant｜><think>\n",
        "<s><｜User｜>red lamp<｜Assistant｜><think>\n",
    ),
}  # fmt: skip
ENDS = {  # what the last reply is learned with, beside its text and the end-of-turn token
    "llama2": " quiet water </s>", "llama2-hf": " quiet water </s>", "llama3": "quiet water<|eot_id|>",
    "llama3-hf": "quiet water<|eot_id|>", "llama3.1": "quiet water<|eot_id|>", "llama3.2": "quiet water<|eot_id|>",
    "mistral-v1": " quiet water</s>", "mixtral": " quiet water</s>", "mistral-v3": " quiet water</s>",
    "mistral-hf": "quiet water</s>", "mistral-v0.1-hf": "quiet water</s> ", "baichuan2": "quiet water</s>",
    "chatglm": "quiet water</s>", "chatglm2": "quiet water</s>", "chatglm3": "\nquiet water</s>",
    "glm-4": "\nquiet water<|user|>", "internlm": "quiet water<eoa>\n", "internlm2": "quiet water<|im_end|>\n</s>",
    "gemma": "quiet water<end_of_turn>\n", "gemma-hf": "quiet water<end_of_turn>\n", "deepseek-v2": " quiet water</s>",
    "deepseek-v3": "quiet water<｜end▁of▁sentence｜>",
    "deepseek-r1": "\n</think>\n\nquiet water<｜end▁of▁sentence｜>",
    "qwen3": "<think>\n\n</think>\n\nquiet water<|im_end|>\n",
}  # fmt: skip


def test_every_format_is_tried():
    variants = {"llama3-hf", "llama3.2", "mixtral", "qwen1.5", "gemma-hf"}
    assert set(PROMPTS) | variants == set(FORMATS) and all(FORMATS[name].name == name for name in FORMATS)
    chat = split(CHAT[1:4])
    for a, b in (("mixtral", "mistral-v1"), ("llama3-hf", "llama3"), ("gemma-hf", "gemma")):
        one, two = ("".join(p.text for p in FORMATS[name].segments(chat[1], {}, SmallTokenizer())) for name in (a, b))
        assert one.removeprefix("<s>") == two.removeprefix("<s>").removeprefix("<|begin_of_text|>")


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name):
    tokenizer, chat = small(name), CHAT[1:-1] if name in NO_SYSTEM else CHAT[:-1]
    for messages, expected in zip((chat, CHAT[1:2]), PROMPTS[name]):
        ids = tokenizer.apply_chat(messages, True)
        assert tokenizer.decode(ids, False) == expected
        context, rounds = split(messages)
        pieces = FORMATS[name].segments(rounds, context, tokenizer)
        if all(piece.kind == "text" for piece in pieces):
            assert ids == tokenizer.encode(expected, False)  # as a rendered template is read
    if name in NO_SYSTEM:
        with pytest.raises(UserError) as error:
            tokenizer.apply_chat(CHAT[:2], True)
        assert "no system message" in message(error) and name in message(error)


def test_texts_between_spaces_and_braces():
    """Texts are taken as they are, except where the family strips them."""
    wholes = {
        "chatml": "user\n {x} {user} %s\n<|im_end|>",
        "llama3": "\n\n{x} {user} %s<|eot_id|>",
        "gemma": "user\n{x} {user} %s<end_of_turn>",
        "mistral-v3": "[INST]  {x} {user} %s\n[/INST]",
        "qwen": "user\n {x} {user} %s\n<|im_end|>",
    }
    for name, text in wholes.items():
        tokenizer = small(name)
        assert text in tokenizer.decode(tokenizer.apply_chat([{"role": "user", "content": " {x} {user} %s\n"}]), False)


def test_llama32_has_todays_date():
    import datetime

    today = datetime.datetime.now().strftime("%d %b %Y")
    assert (
        f"Today Date: {today}\n\n<|eot_id|>"
        in FORMATS["llama3.2"].segments([("a", None)], {}, SmallTokenizer())[1].text
    )


def test_thoughts():
    """Earlier replies lose their reasoning where the family's template takes it away; the last keeps it."""
    rounds = [("a", "<think>\nhm\n</think>\n\nb"), ("c", "<think>\nso\n</think>\n\nd")]

    def text(name):
        return "".join(p.text for p in FORMATS[name].segments(rounds, {}, SmallTokenizer()))

    assert "assistant\nb<|im_end|>" in text("qwen3") and "assistant\n<think>\nso\n</think>\n\nd<|im_end|>" in text(
        "qwen3"
    )
    assert "hm" not in text("deepseek-v3") and text("deepseek-v3").endswith(
        "<think>\nso\n</think>\n\nd<｜end▁of▁sentence｜>"
    )
    assert text("deepseek-r1").endswith("<｜Assistant｜><think>\nso\n</think>\n\nd<｜end▁of▁sentence｜>")
    rounds[1] = ("c", "d")
    assert text("qwen3-no-thinking").endswith("assistant\n<think>\n\n</think>\n\nd<|im_end|>\n")
    with pytest.raises(UserError, match="tool"):
        FORMATS["qwen3"].segments([("<tool_response>x</tool_response>", None)], {}, SmallTokenizer())


def test_special_tokens_in_what_a_user_writes():
    """The first Qwen, ChatGLM3 and Baichuan encode texts apart: no user ends a turn there. Rendered templates are read
    with their tokens, the user's too, as their own code does."""
    chat = [{"role": "user", "content": "x<|im_end|>"}]
    tokenizer = small("qwen")
    end = tokenizer.added["<|im_end|>"]
    assert tokenizer.apply_chat(chat).count(end) == 2  # the system's and the user's
    assert small("qwen2").apply_chat(chat).count(end) == 3


# ------------------------------ the goldens' ids ------------------------------


@pytest.mark.parametrize(
    "folder, file, name, config",
    [
        ("baichuan2", "chat.json", "baichuan2", None),
        ("qwen1", "chat.json", "qwen", None),
        ("qwen2", "chat.json", "qwen2", None),
        ("qwen2", "chat.json", None, None),  # the folder's own template, recognized or rendered
        ("chatglm2_3", "chat_chatglm2.json", "chatglm2", "tokenizer_config.chatglm2.json"),
        ("chatglm2_3", "chat_chatglm3.json", "chatglm3", "tokenizer_config.chatglm3.json"),
    ],
)
def test_golden_chats(tmp_path, folder, file, name, config):
    if not (GOLDEN / folder).is_dir():
        pytest.skip(f"{GOLDEN / folder} is not beside this repository")
    for path in (GOLDEN / folder).iterdir():
        if not path.name.startswith("tokenizer_config.chatglm"):
            (tmp_path / path.name).symlink_to(path)
    if config:
        (tmp_path / "tokenizer_config.json").symlink_to(GOLDEN / folder / config)
    tokenizer = load_tokenizer(tmp_path)
    if name:
        tokenizer.chat_template = load_chat_template(name)
    for chat in json.loads((GOLDEN / folder / file).read_bytes())["chats"]:
        messages = chat.get("messages")
        if messages is None:
            turns = [*chat["history"], [chat["query"], None]]
            messages = [
                {"role": role, "content": text}
                for turn in turns
                for role, text in zip(("user", "assistant"), turn)
                if text
            ]
        generate = messages[-1]["role"] == "user"
        ids = tokenizer.apply_chat(messages, generate)
        if not generate and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]  # Baichuan's own code ends a finished conversation in training only
        assert ids == chat["ids"]


# ------------------------------ what is learned ------------------------------


def write_lines(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("dummy", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_only_replies_are_learned(tmp_path, name, dummy):
    tokenizer = small(name, dummy=dummy)
    system = {} if name in NO_SYSTEM else {"context": {"system": "be kind"}}
    record = {"src": ["red lamp", "blue chair"], "tgt": ["ten coins", "quiet water"], **system}
    dataset = SFTDataset(write_lines(tmp_path / "train.json", [record]), tokenizer)
    ids, labels = dataset.sample(0)
    whole, learned = [*ids.tolist(), int(labels[-1])], [int(i) for i in labels if i != data.IGNORED]
    messages = CHAT[1:] if name in NO_SYSTEM else CHAT
    assert whole == tokenizer.apply_chat(messages, False)
    prompt = tokenizer.apply_chat(messages[:-1], True)
    assert whole[: len(prompt)] == prompt == dataset.prompt_ids(0)
    reply = whole[len(prompt) :]
    end = ENDS.get(name, "quiet water<|im_end|>\n")
    shown = tokenizer.decode(reply, False)
    assert shown == end or dummy and shown.split() == end.split()  # with a space wherever a text is read by itself
    assert learned[-len(reply) :] == reply
    earlier = tokenizer.decode(learned[: -len(reply)], False)
    if FORMATS[name].reply_in_prompt:
        assert earlier == ""
    else:
        assert earlier.split("<")[0].strip() == "ten coins" and "red" not in earlier and "blue" not in earlier
    assert set(reply) & set(tokenizer.stop_ids)


@pytest.mark.parametrize("name", FORMATS)
def test_pairs_share_their_prompt(tmp_path, name):
    tokenizer = small(name)
    record = {
        "src": ["red lamp", "blue chair"],
        "tgt": ["ten coins"],
        "response": ["\nquiet water", "loud"],
        "sort": [1, 0],
    }
    dataset = PreferenceDataset(write_lines(tmp_path / "train.json", [record]), tokenizer, 256, 128)
    prompt = tokenizer.apply_chat(CHAT[1:4], True)
    assert dataset.sample(0)[0][: len(prompt)].tolist() == prompt


def test_a_reply_that_would_melt_into_its_prompt():
    """ChatML's header ends in a line break; a reply that begins with one would make them a single token. What is
    learned is what can be generated: the prompt's ids, then the reply's. In a prompt earlier replies are read as the
    family's own code reads the rendered text."""
    tokenizer = small("chatml")
    rounds = [("a", "\nb"), ("c", "\n\nd")]
    _, encoded = tokenizer.encode_chat(rounds, {}, True)
    for k, (user, bot) in enumerate(encoded):
        assert tokenizer.decode(bot, False) == rounds[k][1] + "<|im_end|>\n"
        assert tokenizer.decode(user, False).endswith("assistant\n")
    assert encoded[0][0] == tokenizer.encode_chat([("a", None)], {})[1][0][0]
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "\nb"},
        {"role": "user", "content": "c"},
    ]
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n\nb<|im_end|>\n"
    text += "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat(messages) == tokenizer.encode(text, False)
    trained = tokenizer.encode_chat([rounds[0], ("c", None)], {})[1]
    assert len(tokenizer.apply_chat(messages)) == len([*trained[0][0], *trained[0][1], *trained[1][0]]) - 1


@pytest.mark.parametrize("name", ["chatglm3", "qwen", "glm-4", "baichuan2", "qwen3", "chatglm2", "mistral-v3"])
def test_truncation_keeps_the_frame(tmp_path, name):
    tokenizer = small(name)
    record = {"src": [f"question {i} " + "word " * 20 for i in range(4)], "tgt": [f"answer {i}" for i in range(4)]}
    path = write_lines(tmp_path / "train.json", [record])
    for max_length in (200, 120, 90, 60):
        dataset = SFTDataset(path, tokenizer, 50, max_length)
        ids, labels = dataset.sample(0)
        whole = [*ids.tolist(), int(labels[-1])]
        shown = tokenizer.decode(whole, False)
        first = int(re.search(r"question (\d)", shown)[1]) if "question" in shown else 3
        assert len(whole) <= max_length and "answer 3" in shown
        if "question" in shown:
            _, kept = split(
                [
                    {"role": role, "content": text}
                    for i in range(first, 4)
                    for role, text in (("user", record["src"][i]), ("assistant", record["tgt"][i]))
                ]
            )
            expected = FORMATS[name].segments(kept, {}, tokenizer)
            assert whole == sum(encode_conversation(tokenizer, expected, 1 + 2 * len(kept)), [])


def test_ends_of_replies():
    stops = {
        "chatglm3": ["<|user|>", "<|observation|>"],
        "gemma": ["<end_of_turn>"],
        "qwen": ["<|im_end|>"],
        "llama2": [],
        "deepseek-v3": ["<｜end▁of▁sentence｜>"],
    }
    for name, texts in stops.items():
        tokenizer = small(name)
        assert tokenizer.stop_ids == [tokenizer.eos_token_id, *(tokenizer.added[text] for text in texts)]


# ------------------------------ conversations that are refused ------------------------------

USER, BOT, SYSTEM = CHAT[1], CHAT[2], CHAT[0]


@pytest.mark.parametrize("template", [None, "qwen2", "chatglm3"])
@pytest.mark.parametrize(
    "messages, generate, words",
    [
        ([], True, "at least one message"),
        ("hello", True, "at least one message"),
        (None, True, "at least one message"),
        ([SYSTEM], True, "the last must be the user's"),
        (["hello"], True, "messages[0]"),
        ([USER, {"role": "tool", "content": "x"}], True, "messages[1]"),
        ([{"content": "x"}], True, "messages[0]"),
        ([{"role": ["user"], "content": "x"}], True, "messages[0]"),
        ([{"role": "user", "content": None}], True, "content must be a string"),
        ([{"role": "user", "content": ["x"]}], True, "content must be a string"),
        ([{"role": "user"}], True, "content must be a string"),
        ([USER, SYSTEM], True, "messages[1]: a system message can only be the first"),
        ([SYSTEM, SYSTEM, USER], True, "messages[1]: a system message can only be the first"),
        ([BOT, USER], True, "messages[0]: the roles must be"),
        ([SYSTEM, BOT], False, "messages[1]: the roles must be"),
        ([USER, USER], True, "messages[1]: the roles must be"),
        ([USER, BOT], True, "the last must be the user's"),
        ([USER], False, "the last must be the user's"),
    ],
)
def test_bad_conversations(template, messages, generate, words):
    with pytest.raises(UserError) as error:
        small(template).apply_chat(messages, generate)
    assert words in message(error)


# ------------------------------ templates of Hugging Face tokenizers ------------------------------

SHORT = (
    "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


def golden_template(folder):
    path = GOLDEN / folder / "tokenizer_config.json"
    if not path.is_file():
        pytest.skip(f"{path} is not beside this repository")
    return json.loads(path.read_bytes())["chat_template"]


@pytest.mark.parametrize("folder, name", [("qwen2", "qwen2"), ("mistral_v3", "mistral-v3")])
def test_the_format_that_writes_what_a_template_writes_is_found(folder, name):
    template, turns = JinjaTemplate(golden_template(folder), "t"), [("red lamp", "ten coins"), ("blue chair", None)]
    assert template.equal_format(SmallTokenizer()) is FORMATS[name]
    for context in ({}, {"system": "be kind"}):
        segments = template.segments(turns, context, SmallTokenizer())
        assert segments == FORMATS[name].segments(turns, context, SmallTokenizer())
    for changed in ("x" + template.source, template.source.replace("content", "role")):
        assert JinjaTemplate(changed, "t").equal_format(SmallTokenizer()) is None


REASONING = """{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% set text = m.content.split('</think>')[-1].lstrip('\n') %}{% if loop.last %}<think>
{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content }}
</think>

{% endif %}{{ text }}{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_replies_of_a_template_that_drops_earlier_reasoning_are_told_apart():
    """As Qwen3's: beginnings of the conversation are no beginnings of its text, but an equal format knows the
    replies."""
    template = JinjaTemplate(REASONING, "t")
    assert template.equal_format(SmallTokenizer()) is FORMATS["qwen3"]
    turns = [("a", "<think>\nx\n</think>\n\nb"), ("c", "<think>\ny\n</think>\n\nd")]
    segments = template.segments(turns, {}, SmallTokenizer())
    replies = [segment.text for segment in segments if segment.part % 2 == 0 and segment.part]
    assert replies == ["b<|im_end|>\n", "<think>\ny\n</think>\n\nd<|im_end|>\n"]
    chat = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]
    assert "".join(segment.text for segment in segments) == template.render(chat, SmallTokenizer(), False)


def test_a_template_without_an_equal_format_is_rendered(tmp_path):
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": SHORT}))
    tokenizer = small(tmp_path)
    assert tokenizer.decode(tokenizer.apply_chat(CHAT[:4]), False) == (
        "system:\nbe kind</s>user:\nred lamp</s>assistant:\nten coins</s>user:\nblue chair</s>assistant:\n"
    )
    assert tokenizer.stop_ids == [tokenizer.eos_token_id]
    record = {"src": ["red lamp", "blue chair"], "tgt": ["ten coins", "quiet water"], "context": {"system": "be kind"}}
    dataset = SFTDataset(write_lines(tmp_path / "train.json", [record]), tokenizer)
    ids, labels = dataset.sample(0)
    assert tokenizer.decode([i for i in labels if i != data.IGNORED], False) == "ten coins</s>quiet water</s>"
    assert [*ids.tolist(), labels[-1]] == tokenizer.apply_chat(CHAT, False)


@pytest.mark.parametrize(
    "source, words",
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}", "replies cannot be told apart"),
        ("{{ raise_exception('no\nsystem') }}", "refuses this conversation: no system"),
        ("{{ messages[0]['content'] + 1 }}", "refuses this conversation"),
        ("{{ messages.append(1) }}", "refuses this conversation"),
        ("{{ ''.__class__.__mro__ }}", "refuses this conversation"),
        ("{% for m in messages %}", "not a Jinja template"),
    ],
)
def test_templates_that_fail(source, words):
    tokenizer = SmallTokenizer()
    tokenizer.chat_template = JinjaTemplate(source, "t.jinja")
    with pytest.raises(UserError) as error:
        tokenizer.encode_chat([("a", "b"), ("c", "d")], {}, True)
    assert words in message(error) and "t.jinja" in message(error)


def test_a_reply_without_an_end_gets_one():
    tokenizer = SmallTokenizer()
    tokenizer.chat_template = JinjaTemplate(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        "t",
    )
    _, encoded = tokenizer.encode_chat([("a", "b"), ("c", "d")], {}, True)
    assert [tokenizer.decode(bot, False) for _, bot in encoded] == ["b", "d</s>"]


def test_a_template_is_rendered_and_its_equal_format_only_divides_the_text(monkeypatch):
    tokenizer = SmallTokenizer()
    tokenizer.chat_template = JinjaTemplate(golden_template("qwen2"), "t")
    _, encoded = tokenizer.encode_chat([("a", "b"), ("c", "d")], {}, True)
    assert [tokenizer.decode(bot, False) for _, bot in encoded] == ["b<|im_end|>\n", "d<|im_end|>\n"]
    ids = tokenizer.apply_chat(CHAT[:4])
    assert tokenizer.decode(ids, False) == PROMPTS["qwen2"][0]
    broken = types.SimpleNamespace(
        segments=lambda *args: [PromptSegment(0, "text", "else")], user="", begin="", stops=()
    )
    monkeypatch.setattr(JinjaTemplate, "equal_format", lambda *args: broken)  # it writes something else: it is not used
    assert tokenizer.apply_chat(CHAT[:4]) == ids


def test_where_a_template_is_found(tmp_path):
    assert folder_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        json.dumps({"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": SHORT}]})
    )
    assert folder_template(tmp_path).source == SHORT
    config.write_text(json.dumps({"chat_template": [{"name": "tool_use", "template": "x"}]}))
    with pytest.raises(UserError, match="named default"):
        folder_template(tmp_path)
    config.write_text(json.dumps({"chat_template": SHORT}))
    (tmp_path / "chat_template.jinja").write_text(SHORT + "!")
    assert load_chat_template(str(tmp_path)).source == SHORT + "!"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_format": "qwen3"}))
    assert folder_template(tmp_path) is FORMATS["qwen3"]
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_format": "qwen9"}))
    with pytest.raises(UserError, match="qwen9"):
        folder_template(tmp_path)
    config.write_text(json.dumps({"chat_template": 3}))
    (tmp_path / "chat_template.json").unlink()
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="must be a text"):
        folder_template(tmp_path)


def test_saving_leaves_one_template(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    files = lambda: sorted(path.name for path in tmp_path.iterdir())
    config.write_text(json.dumps({"chat_template": SHORT, "bos_token": "<s>"}))
    template = folder_template(tmp_path)
    save_chat_template(template, tmp_path)  # the folder's own: as transformers has it, old and new
    assert files() == ["chat_template.jinja", "tokenizer_config.json"] and folder_template(tmp_path).source == SHORT
    assert json.loads(config.read_bytes())["chat_template"] == SHORT
    save_chat_template(FORMATS["chatglm3"], tmp_path)
    assert files() == ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"]
    assert folder_template(tmp_path) is FORMATS["chatglm3"]  # the other is for transformers
    assert (tmp_path / "chat_template.jinja").read_text() == FORMATS["chatglm3"].jinja()
    assert json.loads(config.read_bytes()) == {"bos_token": "<s>"}
    save_chat_template(None, tmp_path)
    assert files() == ["tokenizer_config.json"] and folder_template(tmp_path) is None


def test_a_format_needs_its_tokens():
    with pytest.raises(UserError) as error:
        small("chatglm3", special=["<s>", "</s>", "[gMASK]"])
    assert "'sop'" in message(error) and "chatglm3" in message(error)


# ------------------------------ against transformers ------------------------------

RENDER = """
import json
from transformers.utils.chat_template_utils import render_jinja_template
templates, chats = json.load(open(sys.argv[2])), json.load(open(sys.argv[3]))
texts = {}
for name, source in templates.items():
    texts[name] = []
    for chat in chats:
        try:
            text = render_jinja_template([chat], chat_template=source, add_generation_prompt=True, bos_token="<s>",
                eos_token="</s>")[0][0]
        except Exception as error:
            text = None
        texts[name].append(text)
arrays = {"texts": np.array(json.dumps(texts))}
"""


@pytest.mark.torch
def test_published_templates_write_what_transformers_renders(request, hf_python, tmp_path):
    import random

    folder = request.config.getoption("--chat-templates")
    if folder is None:
        pytest.skip(
            "needs --chat-templates: a folder of published templates, one .jinja file each, which are not ours to copy"
        )
    draw = random.Random(0)
    words = [
        "hello",
        " ",
        "\n",
        "  two",
        "é汉字",
        "<think>",
        "</think>",
        "<|im_end|>",
        "{x}",
        "{{ y }}",
        "%",
        "[INST]",
        "<s>",
        "\t",
        "'\"",
    ]
    text = lambda: "".join(draw.choice(words) for _ in range(draw.randint(0, 6)))
    chats = []
    for _ in range(300):
        chat = [{"role": "system", "content": text()}] if draw.random() < 0.5 else []
        chat += [{"role": ("user", "assistant")[i % 2], "content": text()} for i in range(draw.choice([1, 3, 5, 7]))]
        chats.append(chat)
    templates = {path.name: path.read_bytes().decode() for path in sorted(Path(folder).glob("*.jinja"))}
    (tmp_path / "templates").write_text(json.dumps(templates))
    (tmp_path / "chats").write_text(json.dumps(chats))
    rendered = json.loads(str(hf_python(RENDER, tmp_path / "templates", tmp_path / "chats")["texts"]))
    published = {name: JinjaTemplate(source, name) for name, source in templates.items()}
    equal = {name: template.equal_format(SmallTokenizer()) for name, template in published.items()}
    assert len(published) >= 30 and all(equal.values()), equal
    for name, template in published.items():
        if equal[name].name == "chatglm3":
            continue  # its code encodes item by item: the golden ids are the measure
        for chat, expected in zip(chats, rendered[name]):
            context, turns = split(chat)
            try:
                ours = "".join(segment.text for segment in template.segments(turns, context, SmallTokenizer()))
            except UserError:
                ours = None
            assert ours == expected, (name, chat)
