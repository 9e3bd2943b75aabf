"""Chat templates beyond plain texts: tools, thoughts, generation blocks; what is learned of them; every format as a
Jinja template; long conversations.

    pytest tests/test_chat_tools.py [--hf-python PATH]     no accelerator; the latter compares with transformers and
    with the templates that TRL ships
"""

import json
import random
import re
import time

import pytest
from test_chat import CHAT, GOLDEN, NO_SYSTEM, SHORT, SPECIAL, SmallTokenizer, message

import data
from formats import chat, rendering
from formats.chat import JinjaTemplate, encode_segments
from formats.chat_formats import FORMATS
from formats.files import UserError
from formats.messages import parse_messages
from formats.rendering import PromptSegment, RenderedTemplate
from formats.tokenizer import load_tokenizer

TOOL_TOKENS = """[AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]
    <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> <｜tool▁call▁begin｜>
    <｜tool▁call▁end｜> <｜tool▁sep｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜>""".split()
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "é"}}},
    },
}
SYSTEM, USER, BOT = CHAT[0], CHAT[1], CHAT[2]


def call(city="Oslo", content="", number=1, **extra):
    function = {"name": "weather", "arguments": {"city": city}}
    one = {"id": f"call{number:05}", "type": "function", "function": function}
    return {"role": "assistant", "content": content, "tool_calls": [one], **extra}


def result(text="3 degrees", number=1):
    return {"role": "tool", "content": text, "tool_call_id": f"call{number:05}", "name": "weather"}


def thinking(text, reasoning):
    return {"role": "assistant", "content": text, "reasoning_content": reasoning}


CONVERSATIONS = {
    "tools": [SYSTEM, USER, BOT],
    "call": [SYSTEM, USER, call()],
    "answer": [USER, call(), result(), BOT],
    "chain": [USER, call(), result(), call("Bergen", number=2), result("rain", 2), BOT],
    "two questions": [SYSTEM, USER, call(), result(), BOT, CHAT[3], call("Bergen", number=2), result("rain", 2), BOT],
    "text and call": [USER, call(content="let me see"), result(), BOT],
    "two users": [USER, CHAT[3], BOT],
}
WITH_TOOLS = [name for name, chat_format in FORMATS.items() if chat_format.template]


def small(template):
    """A SmallTokenizer with the tokens that all formats need."""
    tokenizer = SmallTokenizer(special=SPECIAL + TOOL_TOKENS)
    names = {"<reserved_106>": 195, "<reserved_107>": 196}  # Baichuan's
    tokenizer.added |= names
    tokenizer.special |= set(names)
    texts = sorted(tokenizer.added, key=len, reverse=True)
    tokenizer.pattern = re.compile("(" + "|".join(map(re.escape, texts)) + ")")
    tokenizer.chat_template = FORMATS[template] if isinstance(template, str) else template
    return tokenizer


def trained(tokenizer, messages, tools=None, kwargs=None):
    """-> (ids up to the last reply, [text that is learned of each reply, …])."""
    context, rounds = parse_messages(messages, tools)
    context |= {"chat_template_kwargs": kwargs} if kwargs else {}
    system, encoded = tokenizer.encode_chat(rounds, context, True)
    prompt = system + [i for user, bot in encoded[:-1] for i in user + bot] + encoded[-1][0]
    return prompt, [tokenizer.decode(bot, False) for _, bot in encoded]


# ------------------------------ every format as a template ------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_the_saved_template_writes_the_same_ids(name):
    """As transformers renders and reads it. What differs is in docs/chat.md: a text is divided before a reply."""
    tokenizer, template = small(name), RenderedTemplate(FORMATS[name].jinja(), name)
    spaces = [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": " b "}, USER]
    thoughts = [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"}, CHAT[3]]
    for messages in (CHAT[1:2], CHAT[:2], CHAT[:4], CHAT, CHAT[1:3], CHAT[1:4], spaces, thoughts):
        if name in NO_SYSTEM and messages[0]["role"] == "system":
            with pytest.raises(UserError, match="no system message"):
                template.render(messages, tokenizer, True)
            continue
        generate = messages[-1]["role"] == "user"
        text, ids = template.render(messages, tokenizer, generate), tokenizer.apply_chat(messages, generate)
        assert text == tokenizer.decode(ids, False).replace("<195>", "<reserved_106>").replace(
            "<196>", "<reserved_107>"
        )
        if name != "deepseek-r1" or generate:
            assert tokenizer.encode(text, False) == ids
    with pytest.raises(UserError, match="no tools") if name not in WITH_TOOLS else pytest.raises(ZeroDivisionError):
        template.render([USER], tokenizer, True, {"tools": [TOOL]})
        raise ZeroDivisionError


# ------------------------------ tools ------------------------------

HERMES = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": {"type": \
"object", "properties": {"city": {"type": "string", "description": "é"}}}}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
<|im_start|>user
red lamp<|im_end|>
<|im_start|>assistant
<tool_call>
{"name": "weather", "arguments": {"city": "Oslo"}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
3 degrees
</tool_response><|im_end|>
<|im_start|>assistant
"""
LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>".format
DEEPSEEK_CALL = (
    "<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "Oslo"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
    "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>3 degrees<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
)
TOOL_PROMPTS = {  # of CONVERSATIONS["answer"] without its last message: the whole text, or how it ends
    "chatml": "<|im_start|>system\n" + HERMES,
    "qwen3": "<|im_start|>system\n" + HERMES,
    "qwen2.5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n" + HERMES,
    "llama3.1": "Do not use variables.\n\n" + json.dumps(TOOL, ensure_ascii=False, indent=4)
    + "\n\nred lamp<|eot_id|>" + LLAMA3("assistant", '{"name": "weather", "parameters": {"city": "Oslo"}}')
    + LLAMA3("ipython", '"3 degrees"') + "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral-v3": f"<s>[AVAILABLE_TOOLS] [{json.dumps(TOOL, ensure_ascii=False)}][/AVAILABLE_TOOLS]"
    '[INST] red lamp[/INST][TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo"}, "id": "call00001"}]</s>'
    '[TOOL_RESULTS] {"content": 3 degrees, "call_id": "call00001"}[/TOOL_RESULTS]',
    "deepseek-v3": "<｜User｜>red lamp" + DEEPSEEK_CALL,
    "deepseek-r1": "<｜User｜>red lamp" + DEEPSEEK_CALL,
    "glm-4": "\n\n# 可用工具\n\n## weather\n\n" + json.dumps(TOOL["function"], ensure_ascii=False, indent=4)
    + "\n在调用上述函数时，请使用 Json 格式表示调用的参数。<|user|>\nred lamp<|assistant|>weather\n"
    '{"city": "Oslo"}<|observation|>\n3 degrees<|assistant|>',
}  # fmt: skip


@pytest.mark.parametrize("name", TOOL_PROMPTS)
def test_tools_are_written_as_the_family_does(name):
    tokenizer = small(name)
    text = tokenizer.decode(tokenizer.apply_chat(CONVERSATIONS["answer"][:-1], tools=[TOOL]), False)
    assert text.endswith(TOOL_PROMPTS[name])
    if TOOL_PROMPTS[name].startswith(("<s>", "<|im_start|>system")):
        assert text == TOOL_PROMPTS[name]


@pytest.mark.parametrize("name", [*FORMATS, "rendered"])
def test_the_prompt_trained_on_is_the_prompt_served(name):
    template = JinjaTemplate(SHORT, "t") if name == "rendered" else name
    plain = [CHAT[1:3], CHAT[1:]] + ([CHAT[:3], CHAT] if name not in NO_SYSTEM else [])
    for messages, tools in [*((m, None) for m in plain), *((m, [TOOL]) for m in CONVERSATIONS.values())]:
        if tools and name not in WITH_TOOLS:
            with pytest.raises(UserError, match="no tools"):
                small(template).apply_chat(messages[:-1], tools=tools)
            continue
        tokenizer = small(template)
        prompt, learned = trained(tokenizer, messages, tools)
        assert prompt == tokenizer.apply_chat(messages[:-1], tools=tools)
        assert learned[-1] and not any(word in "".join(learned) for word in ("red", "blue", "degrees", "rain"))


def test_calls_are_learned_and_results_are_not():
    ends = {
        "chatml": ["}}\n</tool_call><|im_end|>\n", "coins<|im_end|>\n"],
        "llama3.1": ["}}<|eot_id|>", "coins<|eot_id|>"],
        "mistral-v3": ["]</s>", "coins</s>"],
        "glm-4": ["}<|observation|>", "coins<|user|>"],
        "deepseek-v3": ["<｜tool▁calls▁end｜><｜end▁of▁sentence｜>", "coins<｜end▁of▁sentence｜>"],
        "qwen3": ["}}\n</tool_call><|im_end|>\n", "coins<|im_end|>\n"],
    }
    for name, (call_end, reply_end) in ends.items():
        _, learned = trained(small(name), CONVERSATIONS["chain"], [TOOL])
        assert [text.endswith(end) for text, end in zip(learned, (call_end, call_end, reply_end))] == [True] * 3
        assert "Oslo" in learned[0] and "Bergen" in learned[1]


def test_what_formats_with_tools_refuse():
    for name, messages, words in (
        ("llama3.1", [USER, call() | {"tool_calls": call()["tool_calls"] * 2}, result()], "one tool call"),
        ("qwen2", [USER, call(), result()], "messages[1]: chat format 'qwen2' has no tool_calls; formats with tools: "),
        ("llama3", [USER, BOT, result()], "messages[2]: chat format 'llama3' has no tool results"),
    ):
        with pytest.raises(UserError) as error:
            small(name).apply_chat(messages)
        assert words in message(error)
    with pytest.raises(UserError) as error:
        trained(small("chatml"), [USER, thinking("a", "b")])
    assert "reply 1 has reasoning_content" in message(error)
    tokenizer = SmallTokenizer()
    tokenizer.chat_template = FORMATS["mistral-v3"]
    with pytest.raises(UserError) as error:
        tokenizer.apply_chat([USER], tools=[TOOL])
    assert "[AVAILABLE_TOOLS]" in message(error)


def test_thoughts_sent_back_are_left_out_where_a_format_has_none():
    for name in ("chatml", "llama3"):
        plain, sent_back = [USER, BOT, USER], [USER, thinking("ten coins", "hm"), USER]
        assert small(name).apply_chat(sent_back) == small(name).apply_chat(plain)


# ------------------------------ templates of folders ------------------------------


def test_thoughts_follow_the_template():
    """Qwen3: of earlier turns nothing is left but the text; the last keeps its thoughts."""
    tokenizer = small("qwen3")
    prompt, learned = trained(tokenizer, [USER, thinking("a", "hm"), CHAT[3], thinking("b", "so")])
    assert learned == ["a<|im_end|>\n", "<think>\nso\n</think>\n\nb<|im_end|>\n"]
    assert "hm" not in tokenizer.decode(prompt, False)
    chain = [USER, call(reasoning_content="hm"), result(), thinking("b", "so")]
    _, learned = trained(tokenizer, chain, [TOOL])
    assert learned[0].startswith("<think>\nhm\n</think>\n\n<tool_call>") and learned[1].startswith("<think>\nso\n")


def test_arguments_for_the_template_are_passed_on():
    tokenizer = small(JinjaTemplate(FORMATS["qwen3"].jinja(), "t"))
    served = tokenizer.apply_chat([USER], template_kwargs={"enable_thinking": False})
    assert tokenizer.decode(served, False).endswith("assistant\n<think>\n\n</think>\n\n")
    prompt, learned = trained(tokenizer, [USER, BOT], kwargs={"enable_thinking": False})
    assert prompt == served and learned == ["ten coins<|im_end|>\n"]
    assert trained(tokenizer, [USER, BOT])[1] == ["<think>\n\n</think>\n\nten coins<|im_end|>\n"]


def test_a_reply_behind_another_prompt_is_not_learned():
    """Mistral v3 lists its tools with the last question: what was answered before was answered to another prompt."""
    template = JinjaTemplate(FORMATS["mistral-v3"].jinja(), "t")
    _, learned = trained(small(template), CONVERSATIONS["two questions"], [TOOL])
    assert learned[:2] == ["", ""] and "Bergen" in learned[2] and learned[3] == " ten coins</s>"
    assert template.not_learned == 2


def test_a_data_set_counts_what_is_shown_and_not_learned(tmp_path, capsys):
    record = {"messages": CONVERSATIONS["two questions"], "tools": [TOOL]}
    (tmp_path / "train.json").write_text(json.dumps(record) + "\n")
    dataset = data.SFTDataset(tmp_path, small(JinjaTemplate(FORMATS["mistral-v3"].jinja(), "t")))
    assert dataset.not_learned == 2
    data.show_counts(dataset)
    assert "2 replies are shown but not learned" in capsys.readouterr().out


def test_an_end_that_only_the_last_reply_has():
    """Phi-3's template writes eos behind the last reply; <|im_end|> stands here for its <|end|>."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant:{% else %}{{ eos_token }}{% endif %}"
    )
    tokenizer = small(JinjaTemplate(source, "t"))
    prompt, learned = trained(tokenizer, [*CHAT, USER, BOT])
    assert learned == ["ten coins<|im_end|>\n", "quiet water<|im_end|>\n", "ten coins<|im_end|>\n</s>"]
    assert prompt == tokenizer.apply_chat([*CHAT, USER])
    assert tokenizer.stop_ids == [1, tokenizer.added["<|im_end|>"]]


def test_thoughts_for_templates_that_do_not_read_them_by_name():
    """They become a <think> block where the template looks for one; elsewhere they would be lost."""
    chat = [USER, thinking("a", "hm"), CHAT[3], thinking("b", "so")]
    text = "{{ (m.content if loop.last else m.content.split('</think>')[-1]) }}"
    tokenizer = small(JinjaTemplate(SHORT.replace("{{ m['content'] }}", text), "t"))
    assert trained(tokenizer, chat)[1][-1] == "<think>\nso\n</think>\n\nb</s>"
    with pytest.raises(UserError) as error:
        trained(small(JinjaTemplate(SHORT, "t.jinja")), chat)
    assert "reply 1 has reasoning_content, which t.jinja does not write" in message(error)
    tokenizer = small(JinjaTemplate(SHORT, "t"))
    assert tokenizer.apply_chat(chat[:3]) == tokenizer.apply_chat([USER, {**BOT, "content": "a"}, CHAT[3]])


GENERATION = """{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant
{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}

{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_generation_blocks_say_what_is_learned():
    """ChatML whose line break behind a reply is not learned."""
    tokenizer = small(JinjaTemplate(GENERATION, "t"))
    prompt, learned = trained(tokenizer, CHAT)
    assert learned == ["ten coins<|im_end|>", "quiet water<|im_end|>"]
    assert prompt == tokenizer.apply_chat(CHAT[:-1]) == small("chatml").apply_chat(CHAT[:-1])
    once = GENERATION.replace("{% generation %}", "{% if loop.last %}{% generation %}", 1)
    once = once.replace("{% endgeneration %}", "{% endgeneration %}{% endif %}")
    with pytest.raises(UserError) as error:
        trained(small(JinjaTemplate(once, "t.jinja")), CHAT)
    assert "t.jinja: its generation blocks mark 1 stretches in a conversation of 2 replies" in message(error)


def test_templates_that_want_calls_in_another_form_get_it():
    """DeepSeek's own add the arguments to a text, and write calls only beside a content of null."""
    source = (
        "{% for m in messages %}[{{ m.role }}]{% if m.content is none %}"
        "{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer = small(JinjaTemplate(source, "t"))
    text = tokenizer.decode(tokenizer.apply_chat([USER, call(), result()]), False)
    assert text == '[user]red lamp[assistant]weather{"city": "Oslo"}[tool]3 degrees[assistant]'
    with pytest.raises(UserError) as error:
        small(JinjaTemplate(SHORT, "t.jinja")).apply_chat([USER, call(), result()])
    assert "t.jinja refuses this conversation: it writes no tool calls" in message(error)


def test_templates_that_want_text_parts_get_them():
    parts = "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    tokenizer = small(JinjaTemplate(parts + "{% if add_generation_prompt %}[assistant]{% endif %}", "t"))
    assert tokenizer.decode(tokenizer.apply_chat([SYSTEM, USER]), False) == "[system]be kind[user]red lamp[assistant]"


def test_an_opening_reply_is_shown_and_not_learned():
    for name in ("chatml", "deepseek-v3"):
        prompt, learned = trained(small(name), [BOT, USER, BOT])
        assert learned[0] == "" and learned[1].startswith("ten coins")
        assert prompt == small(name).apply_chat([BOT, USER])
    with pytest.raises(UserError) as error:
        trained(small("chatml"), [BOT])
    assert "messages[0]" in message(error)


def test_ids_that_end_a_reply():
    end = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>\n{{ eos_token }}{% endfor %}"
    tokenizer = small(JinjaTemplate(end + "{% if add_generation_prompt %}[assistant]{% endif %}", "t"))
    assert tokenizer.stop_ids == [1, tokenizer.added["<|im_end|>"]]
    tokenizer = small(JinjaTemplate(FORMATS["glm-4"].jinja(), "t"))
    assert tokenizer.stop_ids == [1, tokenizer.added["<|user|>"], tokenizer.added["<|observation|>"]]


# ------------------------------ long conversations ------------------------------


def long_chat(rounds):
    texts = [SYSTEM]
    for i in range(rounds):
        texts += [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {i}"}]
    return texts


def long_chain(rounds):
    texts = [SYSTEM, USER]
    for i in range(rounds):
        texts += [call(f"city {i}"), result(f"{i} degrees")]
    return [*texts, BOT]


@pytest.mark.parametrize("source", [SHORT, SHORT.replace("eos_token", "'.'"), GENERATION, "qwen3"])
def test_windows_find_the_replies_that_all_beginnings_find(source, monkeypatch):
    tokenizer = small(JinjaTemplate(FORMATS[source].jinja() if source in FORMATS else source, "t"))
    monkeypatch.setattr(JinjaTemplate, "equal_format", lambda *args: None)
    conversations = [(long_chat(20), None)] + ([(long_chain(20), [TOOL])] if source == "qwen3" else [])
    for messages, tools in conversations:
        by_windows = trained(tokenizer, messages, tools)
        monkeypatch.setattr(rendering, "EXACT_ROUNDS", 100)
        monkeypatch.setattr(chat, "EXACT_PARTS", 1000)
        assert trained(tokenizer, messages, tools) == by_windows
        assert by_windows[0] == tokenizer.apply_chat(messages[:-1], tools=tools) and all(by_windows[1])
        monkeypatch.undo()
        monkeypatch.setattr(JinjaTemplate, "equal_format", lambda *args: None)


def test_a_conversation_of_many_rounds():
    """No recursion, and a time that grows with the length: a quadratic one would take minutes."""
    begun = time.monotonic()
    for name in ("chatml", "llama2", JinjaTemplate(SHORT.replace("eos_token", "'.'"), "t")):
        tokenizer, messages = small(name), long_chat(1000)
        prompt, learned = trained(tokenizer, messages)
        assert len(learned) == 1000 and "789" in learned[789] and prompt == tokenizer.apply_chat(messages[:-1])
    assert time.monotonic() - begun < 60


def test_odd_messages_are_refused_in_one_line():
    """Any JSON in any place: ids or a UserError, never another exception."""
    draw = random.Random(0)
    deep = json.loads("[" * 500 + "]" * 500)
    odd = [
        None,
        3,
        True,
        "",
        "{",
        '{"a": "\\ud800"}',
        [],
        {},
        [1],
        {"a": 1},
        deep,
        [{"type": "text"}],
        "\ufdd0",
        "\ud800",
    ]
    tokenizers = [
        small(name) for name in ("chatml", "qwen3", "llama3.1", "mistral-v3", "glm-4", "deepseek-r1", "llama2")
    ]
    tokenizers += [small(JinjaTemplate(SHORT, "t")), small(JinjaTemplate(GENERATION, "t")), SmallTokenizer()]
    outcomes = []
    for _ in range(600):
        messages = json.loads(json.dumps(draw.choice([*CONVERSATIONS.values(), CHAT])))
        for _ in range(draw.choice([0, 1, 1, 2])):
            keys = ["role", "content", "tool_calls", "name", "tool_call_id", "reasoning_content", "function_call", "x"]
            draw.choice(messages)[draw.choice(keys)] = draw.choice(odd)
        tools = draw.choice([None, [TOOL], draw.choice(odd), [draw.choice(odd)]])
        kwargs = draw.choice([None, None, {"enable_thinking": False}, {"messages": 3}, draw.choice(odd)])
        try:
            draw.choice(tokenizers).apply_chat(messages[:-1], tools=tools, template_kwargs=kwargs)
            outcomes.append("ids")
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 900
            outcomes.append("refused")
    assert outcomes.count("ids") > 60 and outcomes.count("refused") > 60


def test_long_stretches_have_the_ids_of_short_ones(monkeypatch):
    tokenizer = SmallTokenizer(dummy=True)
    run = [PromptSegment(1 + i, "text", ("a lamp\n", "\nten", " x ")[i % 3]) for i in range(40)]
    by_pieces = encode_segments(tokenizer, run)
    monkeypatch.setattr(chat, "EXACT_PARTS", 1000)
    joined = lambda encoded: [[i for part, ids in encoded if part == k for i in ids] for k in range(41)]
    assert joined(by_pieces) == joined(encode_segments(tokenizer, run))


# ------------------------------ against transformers and TRL ------------------------------

RENDER = """
import json
from pathlib import Path
import trl
from transformers.utils.chat_template_utils import render_jinja_template
chats, tools = json.load(open(sys.argv[2]))
extra = json.load(open(sys.argv[3]))
folder = Path(trl.__file__).parent / "chat_templates"
sources = extra | {path.stem: path.read_text() for path in sorted(folder.glob("*.jinja"))}
out = {"sources": sources, "texts": {}, "spans": {}}
for name, source in sources.items():
    for key, chat in chats.items():
        for tools_ in (None, tools):
            for generate in (True, False):
                try:
                    texts, spans = render_jinja_template([chat], tools_, chat_template=source,
                        return_assistant_tokens_mask=True, add_generation_prompt=generate, bos_token="<s>",
                        eos_token="</s>")
                except Exception as error:
                    texts, spans = [None], [[]]
                place = f"{name}|{key}|{tools_ is not None}|{generate}"
                out["texts"][place], out["spans"][place] = texts[0], [texts[0][a:b] for a, b in spans[0]]
arrays = {"out": np.array(json.dumps(out))}
"""


@pytest.mark.torch
def test_templates_of_trl_and_published_ones(hf_python, tmp_path):
    """All templates that TRL ships, rendered by transformers and here, with and without tools; what their generation
    blocks mark is what is learned; and the built-in formats write what their families' templates write."""
    thoughts = {
        "thoughts": [USER, thinking("a", "hm"), CHAT[3], thinking("b", "so")],
        "thoughts and call": [USER, call(reasoning_content="hm"), result(), thinking("b", "so")],
    }
    chats = {"plain": CHAT, "short": CHAT[1:3], "system in the middle": [USER, BOT, SYSTEM, *CHAT[3:]]}
    chats |= CONVERSATIONS | thoughts
    chats |= {f"{name}, prompt": messages[:-1] for name, messages in chats.items()}
    (tmp_path / "chats").write_text(json.dumps([chats, [TOOL]]))
    ours = {f"ours {name}": FORMATS[name].jinja() for name in FORMATS}
    (tmp_path / "ours").write_text(json.dumps(ours))
    out = json.loads(str(hf_python(RENDER, tmp_path / "chats", tmp_path / "ours")["out"]))
    rendered = marked = 0
    for place, expected in out["texts"].items():
        name, key, with_tools, generate = place.split("|")
        template, tools = JinjaTemplate(out["sources"][name], name), [TOOL] if with_tools == "True" else None
        tokenizer, messages = small(template), chats[key]
        if expected is None:
            continue
        if "Oslo" not in expected and "Oslo" in json.dumps(messages):
            continue  # calls left out, always or beside a content of "": refused here, or written beside null
        if name.startswith(("smolvlm", "idefics3", "llava_next")):
            continue  # of a content that is a text nothing is written; here it has text parts
        text = template.render(messages, tokenizer, generate == "True", {"tools": tools})
        assert text == expected, place
        rendered += 1
        if template.marks_replies and generate == "False" and messages[-1]["role"] == "assistant":
            if tools and "tools" not in template.source or name == "diffusion_gemma_training" and "text" in key:
                continue  # refused: a conversation with tools; two marked stretches in one reply
            if "thoughts" in key and not chat.THOUGHTS.search(template.source):
                continue  # left out there; refused here, or put into the content
            learned = trained(tokenizer, messages, tools)[1]
            assert "".join(learned) == "".join(out["spans"][place]), place
            marked += 1
    print(f"{len(out['sources'])} templates: {rendered} texts and {marked} conversations with masks are equal")
    assert rendered > 3000 and marked > 300
    pairs = {"qwen2.5": "qwen2_5", "qwen3": "qwen3", "chatml": "qwen3_instruct_2507", "llama3.1": "llama3_1"}
    pairs |= {"llama3.2": "llama3_2"}
    for (ours, theirs), key in ((pair, key) for pair in pairs.items() for key in chats):
        for end in ("True|True", "True|False", "False|True", "False|False"):
            a, b = out["texts"][f"ours {ours}|{key}|{end}"], out["texts"][f"{theirs}|{key}|{end}"]
            assert a == b, (ours, key, end)


APPLY = """
import json, os
from transformers import AutoTokenizer
root, chats, tools = sys.argv[2], *json.load(open(sys.argv[3]))
ids = {}
for name in sorted(os.listdir(root)):
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(root, name))
    for key, chat in chats.items():
        for with_tools in (False, True):
            try:
                out = tokenizer.apply_chat_template(chat, tools=tools if with_tools else None,
                    add_generation_prompt=chat[-1]["role"] != "assistant", return_dict=False)
            except Exception:
                out = None
            ids[f"{name}|{key}|{with_tools}"] = out
arrays = {"out": np.array(json.dumps(ids))}
"""


@pytest.mark.torch
@pytest.mark.parametrize("folder", ["qwen2", "mistral_v3"])
def test_saved_folders_chat_in_transformers(folder, hf_python, tmp_path):
    """AutoTokenizer of a saved folder gives our ids for every format that the vocabulary has the tokens of."""
    if not (GOLDEN / folder).is_dir():
        pytest.skip(f"{GOLDEN / folder} is not beside this repository")
    chats = {"plain": CHAT[:4], "short": CHAT[1:2], "finished": CHAT, **CONVERSATIONS}
    chats |= {f"{name}, prompt": messages[:-1] for name, messages in CONVERSATIONS.items()}
    tokenizers = {}
    for name, chat_format in FORMATS.items():
        tokenizer = load_tokenizer(GOLDEN / folder)
        if chat_format.missing(tokenizer) is None and not any(isinstance(i, int) for i in chat_format.user):
            tokenizer.chat_template = chat_format
            tokenizer.save(tmp_path / "saved" / name)
            tokenizers[name] = load_tokenizer(tmp_path / "saved" / name)
            assert tokenizers[name].chat_template is chat_format
    (tmp_path / "chats").write_text(json.dumps([chats, [TOOL]]))
    theirs = json.loads(str(hf_python(APPLY, tmp_path / "saved", tmp_path / "chats")["out"]))
    equal = 0
    for place, expected in theirs.items():
        name, key, with_tools = place.split("|")
        messages, tools = chats[key], [TOOL] if with_tools == "True" else None
        generate = messages[-1]["role"] != "assistant"
        try:
            ours = tokenizers[name].apply_chat(messages, generate, tools=tools)
        except UserError:
            continue  # refused there too, or tokens of tools that this vocabulary lacks
        if generate or name != "deepseek-r1":
            assert ours == expected, place
            equal += 1
    assert equal > 60, equal
