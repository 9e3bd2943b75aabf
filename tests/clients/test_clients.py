"""Official clients, libraries and coding agents against serve.py; each client is a script in this folder.

    python -m pytest tests/clients --client-python /path/to/venv/bin/python   # openai anthropic litellm instructor …
    python -m pytest tests/clients --lm-eval-python /path/to/venv/bin/python   # lm-eval, transformers
    python -m pytest tests/clients --client-python … --chat-model FOLDER      # and a tool loop of a real model

The agents need no package: they run by default. Tools and reasoning come from an engine that has a script for a model;
schemas, forced calls and log-probabilities from the demo's model.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from common import ANSWER, GREETING, SKIPPED, THOUGHTS
from conftest import ROOT
from test_openai_api import FakeEngine, start  # noqa: F401, a fixture

import serve
from formats.chat import load_chat_template
from formats.tokenizer import load_tokenizer

HERE, DEMO = Path(__file__).parent, ROOT / "demo" / "llama"
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


class ScriptedEngine(FakeEngine):
    """What Qwen3 would say: hello; with tools a call; after its result, which is the last message, the answer."""

    def __init__(self, tokenizer):
        super().__init__(delay=0.0001, max_model_len=8192)
        self.tokenizer, self.adapters, self.stop_texts = tokenizer, [], {}

    def reply(self, request, index):
        prompt = self.tokenizer.decode(request.prompt_ids)
        asked = prompt.rpartition("<|im_start|>user")[2]
        thoughts = "" if "<think>" in asked else f"<think>\n{THOUGHTS}\n</think>\n\n"
        if "<tool_response>" in asked:
            text = thoughts + ANSWER
        elif "# Tools" in prompt:
            text = thoughts + CALL
        else:
            text = GREETING
        data, params = text.encode(), request.params
        starts = [(at, stop) for stop in params.stop if (at := data.find(stop.encode())) >= 0]
        if starts:
            at, self.stop_texts[request.request_id] = min(starts)
            data = data[:at]
        return (data, "stop") if len(data) < params.max_tokens else (data[: params.max_tokens], "length")

    def submit(self, request, on_output):
        def tell(output):
            if output.finish_reason == "stop":
                output.stop_text = self.stop_texts.get(request.request_id)
            on_output(output)

        super().submit(request, tell)


@pytest.fixture
def scripted(start):  # noqa: F811
    tokenizer = load_tokenizer(DEMO)
    tokenizer.chat_template = load_chat_template("qwen3")
    return start(ScriptedEngine(tokenizer), tokenizer)


@pytest.fixture
def demo(start):  # noqa: F811
    args = serve.Args(model_name_or_path=str(DEMO), chat_template="qwen2.5", total_max_length=1024, kv_cache_gb=0.05)
    return start(*serve.build_engine(args))


def run_client(python, script, server, *args, timeout=280):
    """Run a client's script; skip if it says that its package is missing. Returns its lines."""
    command = [python, str(HERE / script), f"http://127.0.0.1:{server.port}", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    print(done.stdout)
    if done.returncode == SKIPPED:
        pytest.skip(f"{python} lacks a client: {done.stdout.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture
def client_scripts(request):
    """The Python that runs them; not the tests' own, so that a default run stays short."""
    python = request.config.getoption("--client-python")
    if python == sys.executable:
        pytest.skip("needs --client-python: a Python with openai, anthropic, litellm, langchain-openai and instructor")
    return python


def test_coding_agents(scripted):
    assert len(run_client(sys.executable, "agents.py", scripted)) == 3


@pytest.mark.parametrize(
    "script, args",
    [
        ("openai_chat.py", ()),
        ("openai_responses.py", ()),
        ("anthropic_messages.py", ()),
        ("other_clients.py", ("litellm",)),
        ("other_clients.py", ("langchain",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_clients_of_a_scripted_model(scripted, client_scripts, script, args):
    assert run_client(client_scripts, script, scripted, *args)


@pytest.mark.parametrize("script, args", [("openai_schema.py", ()), ("other_clients.py", ("instructor",))], ids=str)
def test_clients_get_what_they_force(demo, client_scripts, script, args):
    assert run_client(client_scripts, script, demo, *args)


def test_lm_eval(demo, request):
    """Its log-likelihoods are those of model.py."""
    python = request.config.getoption("--lm-eval-python") or pytest.skip(
        "needs --lm-eval-python: a Python with lm-eval"
    )
    import paddle
    from lm_eval_client import PAIRS

    import adapters

    lines = run_client(python, "lm_eval_client.py", demo, DEMO, demo.server.model)
    found, text, (rolling,) = json.loads(lines[-1])
    model, tokenizer = adapters.from_pretrained(str(DEMO)), demo.server.tokenizer
    cases = [*PAIRS, (None, "".join(PAIRS[0]))]
    for (context, continuation), (log_likelihood, is_greedy) in zip(cases, [*found, (rolling, None)]):
        head = tokenizer.encode(context, False) if context else tokenizer.encode("")  # rolling: bos is its context
        ids = (
            tokenizer.encode(context + continuation, False) if context else head + tokenizer.encode(continuation, False)
        )
        with paddle.no_grad():
            logits = model(paddle.to_tensor([ids]))[0].astype("float64").numpy()  # (T, V)
        logits -= logits.max(-1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = sum(logprobs[i - 1, ids[i]] for i in range(len(head), len(ids)))
        assert abs(log_likelihood - expected) < 1e-3, (context, continuation)
        greedy = all(logprobs[i - 1].argmax() == ids[i] for i in range(len(head), len(ids)))
        assert is_greedy in (None, greedy), (context, continuation)


@pytest.mark.slow
def test_tool_loop_of_a_real_model(start, client_scripts, request):  # noqa: F811
    """SmolLM2 or another small chat model; the transcript is printed (-s)."""
    folder = request.config.getoption("--chat-model") or pytest.skip("needs --chat-model: the folder of a chat model")
    args = serve.Args(model_name_or_path=folder, chat_template="qwen2.5", total_max_length=1024, kv_cache_gb=0.2)
    assert run_client(client_scripts, "tool_loop.py", start(*serve.build_engine(args)))
