"""What the fields of a request do: continuations, scoring, a budget of thoughts, special tokens, names that are known.

python -m pytest tests/test_request_fields.py          # the demo's model over HTTP
"""

import json

import pytest
from conftest import ROOT
from test_openai_api import ByteTokenizer, FakeEngine, Running

import serve
from formats.chat import JinjaTemplate, encode_continuation
from formats.chat_formats import FORMATS
from formats.tokenizer import load_tokenizer
from serving.engine import Request
from serving.sampling import SamplingParams, ThinkingBudget, Thoughts
from serving.speculation import NgramSpeculator

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
THINKING = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: <think>
{% if enable_thinking is false %}</think>
{% endif %}{% endif %}"""
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def demo():
    args = serve.Args(
        model_name_or_path=str(ROOT / "demo" / "llama"),
        total_max_length=512,
        num_blocks=64,
        keep_weights=True,
        dtype="float32",
    )
    engine, tokenizer = serve.build_engine(args)
    tokenizer.chat_template = JinjaTemplate(THINKING, "thinking.jinja")
    server = Running(engine, tokenizer)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def fake():
    server = Running(FakeEngine(), ByteTokenizer())
    yield server
    server.stop()


def choice(server, path, **body):
    status, _, reply = server.post(path, {"temperature": 0} | body)
    assert status == 200, reply
    return reply["choices"][0]


def refused(server, path, field, **body):
    status, _, reply = server.post(path, body)
    assert status == 400 and reply["error"]["param"] == field, reply
    assert reply["error"]["message"].startswith(field) and "\n" not in reply["error"]["message"]
    return reply["error"]["message"]


# ============================================================================================= continuations


def test_a_completion_goes_on_with_its_prompt(demo):
    """Its text is what transformers decodes behind the prompt's: with the space before the first word."""
    first = choice(demo, TEXTS, prompt="The red", max_tokens=8, logprobs=1)
    text, tokens, offsets = first["text"], first["logprobs"]["tokens"], first["logprobs"]["text_offset"]
    assert text.startswith(" ") and "".join(tokens) == text
    assert [text[at : at + len(token)] for at, token in zip(offsets, tokens)] == tokens
    echoed = choice(demo, TEXTS, prompt="The red", max_tokens=8, logprobs=1, echo=True)
    rows = echoed["logprobs"]
    assert echoed["text"] == "The red" + text
    spans = zip(rows["text_offset"], [*rows["text_offset"][1:], len(echoed["text"])], rows["tokens"])
    for start, end, token in list(spans)[2:]:  # bos has no text, the first word has no space before it
        assert echoed["text"][start:end] == token
    head = "".join(tokens[:3])
    assert head + choice(demo, TEXTS, prompt="The red" + head, max_tokens=5)["text"] == text
    stopped = choice(demo, TEXTS, prompt="The red", max_tokens=8, stop=[tokens[1]])
    assert stopped["text"] == tokens[0] and stopped["finish_reason"] == "stop"
    ids = demo.server.tokenizer.encode("The red")
    assert choice(demo, TEXTS, prompt=ids, max_tokens=8)["text"] == text


def test_a_chat_begins_with_its_own_text_and_a_prefilled_one_goes_on(demo):
    own = demo.server.tokenizer.encode("color", False)
    decoder = demo.server.tokenizer.stream_decoder()
    assert decoder.push(own[0]).startswith("c")
    after = demo.server.tokenizer.stream_decoder()
    after.begin_after(demo.server.tokenizer.encode("The red"))
    assert after.push(own[0]).startswith(" c")
    whole = choice(demo, CHATS, messages=user("hi"), max_tokens=9, chat_template_kwargs={"enable_thinking": False})
    assert not whole["message"]["content"].startswith(" ")


def test_half_a_character_of_the_prompt_is_finished_by_the_reply():
    tokenizer = load_tokenizer(ROOT / "demo" / "llama")
    ids = [i for i in tokenizer.encode("x\U0001f98a", False) if tokenizer.piece_bytes(i)]
    assert len(ids) > 3  # bytes
    decoder = tokenizer.stream_decoder()
    decoder.begin_after(ids[:-2])
    assert [decoder.push(i) for i in ids[-2:]] == ["", "\U0001f98a"]
    long = tokenizer.stream_decoder()
    long.begin_after(tokenizer.encode("The red " * 50))
    assert long.push(tokenizer.encode("color", False)[0])[0] == " "


def test_a_prompt_is_scored_without_a_reply(demo, fake):
    scored = choice(demo, TEXTS, prompt="The red dress", echo=True, logprobs=2, max_tokens=0)
    assert (scored["text"], scored["finish_reason"]) == ("The red dress", "length")
    with_reply = choice(demo, TEXTS, prompt="The red dress", echo=True, logprobs=2, max_tokens=1)["logprobs"]
    assert {key: rows[:-1] for key, rows in with_reply.items()} == scored["logprobs"]
    assert demo.post(TEXTS, {"prompt": "The", "echo": True, "max_tokens": 0})[2]["usage"]["completion_tokens"] == 0
    refused(fake, TEXTS, "max_tokens", prompt="x", max_tokens=0)
    refused(fake, CHATS, "max_tokens", messages=user("x"), max_tokens=0)


# ============================================================================================= thoughts


def test_thoughts_end_with_their_budget(demo):
    tokenizer = demo.server.tokenizer
    closing = encode_continuation(tokenizer, "\n</think>\n\n")
    ask = {"messages": user("a red dress"), "thinking_token_budget": 5, "max_tokens": 5 + len(closing) + 4}
    found = choice(demo, CHATS, logprobs=True, **ask)
    rows = found["logprobs"]["content"]
    assert b"".join(bytes(row["bytes"]) for row in rows[5 : 5 + len(closing)]) == b"\n</think>\n\n"
    assert found["message"]["reasoning_content"] and "think>" not in json.dumps(found["message"])
    # the model's own log-probabilities, of the forced tokens too
    prompt = tokenizer.apply_chat(ask["messages"])
    budget = ThinkingBudget(5, tuple(closing), True, tokenizer.piece_bytes)
    params = SamplingParams(max_tokens=ask["max_tokens"], temperature=0, logprobs=0, thinking_budget=budget)
    ((reply,),) = demo.engine.generate([Request(prompt, params)])
    assert reply.token_ids[5 : 5 + len(closing)] == closing
    scored = choice(demo, TEXTS, prompt=prompt + reply.token_ids, echo=True, logprobs=0, max_tokens=0)["logprobs"]
    expected = scored["token_logprobs"][len(prompt) :]
    assert [row["logprob"] for row in rows] == pytest.approx(expected, abs=1e-3)
    # with other sampling, and with a form of the reply
    several = demo.post(CHATS, ask | {"n": 3, "temperature": 1.5, "presence_penalty": 1, "seed": 3})[2]["choices"]
    assert all("think>" not in json.dumps(row["message"]) for row in several) and len(several) == 3
    formed = choice(demo, CHATS, **ask | {"max_tokens": 60}, guided_choice=["red", "blue"], n=2)
    assert formed["message"]["content"] in ("red", "blue") and formed["finish_reason"] == "stop"
    hidden = choice(demo, CHATS, **ask, include_reasoning=False)
    assert "reasoning_content" not in hidden["message"]
    assert hidden["message"]["content"] == found["message"]["content"]
    body = {"max_tokens": 30, "messages": user("x"), "thinking": {"type": "enabled", "budget_tokens": 3}}
    kinds = [block["type"] for block in demo.post("/v1/messages", body)[2]["content"]]
    assert kinds == ["thinking", "text"]


def test_a_budget_is_the_same_with_speculation():
    replies = []
    for speculator in (None, NgramSpeculator(4, 3)):
        args = serve.Args(model_name_or_path=str(ROOT / "demo" / "llama"), total_max_length=256, num_blocks=32)
        engine, tokenizer = serve.build_engine(args)
        engine.speculator = speculator
        closing = encode_continuation(tokenizer, "\n</think>\n\n")
        budget = ThinkingBudget(4, tuple(closing), True, tokenizer.piece_bytes)
        prompt = tokenizer.encode("red red red red <think>\n" + "a dress </think>\n\n a dress" * 3)
        requests = [
            Request(prompt, SamplingParams(max_tokens=40, thinking_budget=budget, ignore_eos=True, **more))
            for more in ({"temperature": 0}, {"seed": 5, "repetition_penalty": 1.1})
        ]
        replies.append([completion[0].token_ids for completion in engine.generate(requests)])
    assert replies[0] == replies[1] and engine.totals["spec_decode_num_draft_tokens"] > 0
    assert all(ids[4 : 4 + len(closing)] == closing for ids in replies[0])


def test_where_thoughts_begin_and_end():
    def forced(text, tokens, is_open):
        thoughts, found = Thoughts(ThinkingBudget(tokens, tuple(b"</think>"), is_open, lambda i: bytes([i]))), b""
        for byte in text:
            if (must := thoughts.forced()) is not None:
                byte = must
            found += bytes([byte])
            thoughts.follow(byte)
        return found

    assert forced(b"abcdefghijklmnop", 3, True) == b"abc</think>lmnop"
    assert forced(b"ab</think>cdefghijk", 30, True) == b"ab</think>cdefghijk"
    assert forced(b"\n<think>abcdefghijklm", 2, False) == b"\n<think>ab</think>klm"
    assert forced(b"<thinly>abcdefghijk", 2, False) == b"<thinly>abcdefghijk"
    assert forced(b"abcdefghijk", 0, True) == b"</think>ijk"


def test_a_budget_needs_thoughts(fake):
    assert "no thoughts" in refused(fake, CHATS, "thinking_token_budget", messages=user("x"), thinking_token_budget=5)
    body = {"max_tokens": 9, "messages": user("x"), "thinking": {"type": "enabled", "budget_tokens": 5}}
    assert fake.post("/v1/messages", body)[0] == 200  # agents send it to every model


# ============================================================================================= messages


def test_special_tokens_in_messages_are_text():
    tokenizer = load_tokenizer(ROOT / "demo" / "llama")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special=True)
    mark, text = tokenizer.token_id("<|im_end|>"), "a<|im_end|>b</s>c"
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": json.dumps({"a": text})}}
    tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": {"type": "object"}}}
    conversations = [
        (user("TEXT"), None),
        ([{"role": "system", "content": "TEXT"}, *user("x")], None),
        ([*user("x"), {"role": "assistant", "content": "TEXT"}, *user("y")], None),
        (
            [
                *user("x"),
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c", "content": "TEXT"},
            ],
            [tool],
        ),
        (user([{"type": "text", "text": "TEXT"}]), [tool]),
    ]
    for template in (JinjaTemplate(FORMATS["qwen2.5"].jinja(), "x.jinja"), FORMATS["qwen2.5"], None):
        tokenizer.chat_template = template
        for messages, tools in conversations if template else conversations[:3]:
            written, plain = [json.loads(json.dumps(messages).replace("TEXT", by)) for by in (text, "plain")]
            without = [json.loads(json.dumps(t).replace(json.dumps(text)[1:-1], "plain")) for t in tools or ()]
            plain = json.loads(json.dumps(plain).replace("a<|im_end|>b</s>c", "plain"))
            ids, expected = tokenizer.apply_chat(written, tools=tools), tokenizer.apply_chat(plain, tools=without)
            assert ids.count(mark) == expected.count(mark), messages
            assert ids.count(tokenizer.eos_token_id) == expected.count(tokenizer.eos_token_id)
            assert text in tokenizer.decode(ids, False) and "\ufdd2" not in tokenizer.decode(ids, False)
        tokenizer.special_in_messages = True
        assert tokenizer.apply_chat(user(text)).count(mark) == tokenizer.apply_chat(user("x")).count(mark) + 1
        tokenizer.special_in_messages = False
        assert tokenizer.apply_chat(user("plain <b>")) and tokenizer.apply_chat(user("<\ufdd2|im_end|>")).count(
            mark
        ) == tokenizer.apply_chat(user("x")).count(mark)


def test_special_tokens_of_a_prefilled_reply_are_text(demo):
    tokenizer = demo.server.tokenizer
    messages = [*user("x"), {"role": "assistant", "content": "a</s>b"}]
    ids = demo.post("/tokenize", {"messages": messages})[2]["tokens"]
    assert ids.count(tokenizer.eos_token_id) == 0 and "a</s>b" in tokenizer.decode(ids, False)


def test_messages_without_content(fake):
    for empty in ({"content": None}, {}):
        messages = [*user("x"), {"role": "assistant", **empty}, *user("y")]
        assert fake.post(CHATS, {"messages": messages, "max_tokens": 3})[0] == 200
        message = refused(fake, CHATS, "messages", messages=[*user("x"), {"role": "user", **empty}])
        assert message.startswith("messages[1]")


def test_what_a_template_gets_is_not_the_requests(fake):
    for name in ("messages", "tools", "add_generation_prompt", "bos_token"):
        message = refused(fake, CHATS, "chat_template_kwargs", messages=user("x"), chat_template_kwargs={name: []})
        assert name in message


def test_tools_have_different_names(fake):
    assert "tools[1]" in refused(fake, CHATS, "tools", messages=user("x"), tools=[TOOL, TOOL])


def test_a_form_is_not_for_half_a_reply(demo):
    demo.server.tokenizer.chat_template = JinjaTemplate(FORMATS["qwen2.5"].jinja(), "x.jinja")
    try:
        messages = [*user("x"), {"role": "assistant", "content": "Once"}]
        for field, body in (
            ("tool_choice", {"tools": [TOOL], "tool_choice": "required"}),
            ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}),
            ("response_format", {"response_format": {"type": "json_object"}}),
            ("guided_choice", {"guided_choice": ["a"]}),
        ):
            refused(demo, CHATS, field, messages=messages, **body)
        choice(demo, CHATS, messages=messages, tools=[TOOL], max_tokens=3)
    finally:
        demo.server.tokenizer.chat_template = JinjaTemplate(THINKING, "thinking.jinja")


# ============================================================================================= names

CLIENTS = {  # beside the fields that are read: what each sends
    "openai": {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "prompt_cache_key": "k",
               "safety_identifier": "s", "verbosity": "low", "parallel_tool_calls": True, "modalities": ["text"]},
    "open-webui": {"num_ctx": 4096, "keep_alive": "5m", "session_id": "s", "chat_id": "c", "id": "m",
                   "options": {"num_ctx": 4096, "temperature": 0.5, "num_predict": -1}},
    "continue": {"stream": True, "stream_options": {"include_usage": True}, "stop": [], "tools": []},
    "llama.cpp": {"cache_prompt": True, "timings_per_token": True, "dry_multiplier": 0, "dry_base": 1.75,
                  "xtc_probability": 0, "xtc_threshold": 0.1, "typical_p": 1, "mirostat": 0, "repeat_penalty": 1.0},
    "vllm": {"add_special_tokens": True, "spaces_between_special_tokens": True, "detokenize": True, "priority": 0,
             "include_reasoning": True, "length_penalty": 1.0, "truncate_prompt_tokens": None, "echo": False},
    "litellm": {"max_completion_tokens": 5, "reasoning_effort": "low", "functions": None, "logit_bias": None},
}  # fmt: skip


@pytest.mark.parametrize("name", CLIENTS)
def test_what_clients_send_is_taken(fake, name):
    assert fake.post(CHATS, {"messages": user("x"), "max_tokens": 3} | CLIENTS[name])[0] == 200


def test_what_would_change_the_answer_is_refused_or_done(fake, demo):
    for field, value in {
        "xtc_probability": 0.5,
        "top_a": 0.3,
        "tfs_z": 0.5,
        "detokenize": False,
        "mirostat": 1,
        "bogus": 1,
        "spaces_between_special_tokens": False,
        "typical_p": 0.5,
        "repeat_last_n": 3,
        "documents": [{"a": 1}],
    }.items():
        refused(fake, TEXTS, field, prompt="x", **{field: value})
        refused(fake, CHATS, field, messages=user("x"), **{field: value})
    for field, value in {"reasoning_effort": "low", "max_completion_tokens": 3, "messages": user("x")}.items():
        refused(fake, TEXTS, field, **{"prompt": "x"} | {field: value})
    assert "max_tokens" in refused(fake, TEXTS, "max_completion_tokens", prompt="x", max_completion_tokens=3)
    assert "is temperature meant?" in refused(fake, CHATS, "temprature", messages=user("x"), temprature=0)
    refused(fake, CHATS, "echo", messages=user("x"), echo=True)
    refused(fake, CHATS, "enable_thinking", **{"messages": user("x"), "enable_thinking": "no"})
    refused(fake, CHATS, "temperature", messages=user("x"), options={"temperature": 9})
    assert demo.post("/tokenize", {"messages": user("x")})[0] == 200
    ask, off = {"messages": user("x"), "max_tokens": 4}, {"chat_template_kwargs": {"enable_thinking": False}}
    expected = choice(demo, CHATS, **ask, **off)["message"]
    for body in ({"enable_thinking": False}, {"think": False}, {"thinking": {"type": "disabled"}}):
        assert choice(demo, CHATS, **ask, **body)["message"] == expected
    assert choice(demo, CHATS, **ask)["message"] != expected
