"""Replies of several turns: what tools return is read and not learned, and no token is encoded twice."""

import json
import re
from pathlib import Path

import numpy as np
import paddle
import pytest
from test_chat_tools import small
from test_rl import base, keys_of, logged, quick, run, world  # noqa: F401
from test_scripts import fails

import rl
from alignment import environments, rollouts
from formats.files import UserError
from serving.engine import Completion

TOOLS = '''
from typing import Literal


def add(a: int, b: int = 0, how: Literal["plain", "loud"] = "plain") -> int:
    """Add two numbers,
    exactly.

    Args:
        a: the first one
        b (int): the second one
    """
    return a + b


def bare(a):
    """No type."""


def leave(code: int):
    """End."""
    raise SystemExit(code)


class Unmade:
    def __init__(self):
        raise OSError("no room")


class Broken:
    def reset(self, **_):
        raise KeyError("board")

    def look(self) -> str:
        """See."""


class Wordless:
    def reset(self, **_):
        return [0.0, 1.0]


class Counter:
    """What a reply has counted."""

    def reset(self, src="", **_):
        self.total = 0
        return f" from {len(src)}"

    def count(self, by: int) -> str:
        """Count further.

        Args:
            by: how much
        """
        self.total += by
        return f"now {self.total}"


def totals(completions, environments, **_):
    return [float(environment.total) for environment in environments]


def turns(completions, **_):
    return [float(len(messages)) for messages in completions]
'''


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    path = tmp_path_factory.mktemp("tools") / "tools.py"
    path.write_text(TOOLS)
    return path


@pytest.mark.parametrize("timeout", [0.0, 60.0])
def test_a_function_that_exits_fails_like_any_other(tools, tmp_path, timeout):
    """sys.exit() in a user's function or file must not end a run without a word."""
    toolbox = environments.load_toolbox(f"{tools}:leave", None, small("qwen3"), timeout, 8)
    result, failed = toolbox.call({"function": {"name": "leave", "arguments": '{"code": 0}'}}, None)
    assert failed and json.loads(result) == {"error": "SystemExit: 0"}
    (tmp_path / "script.py").write_text("raise SystemExit('usage: script.py FILE')")
    with pytest.raises(UserError, match="tools: .*script.py: cannot be imported: SystemExit: usage: script.py FILE"):
        environments.load_function(f"{tmp_path}/script.py:f", "tools")


def test_a_schema_is_read_off_a_function(tools):
    add = environments.load_function(f"{tools}:add", "tools")
    assert environments.tool_schema(add)["function"] == {
        "name": "add",
        "description": "Add two numbers, exactly.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "the first one"},
                "b": {"type": "integer", "description": "the second one"},
                "how": {"type": "string", "enum": ["plain", "loud"]},
            },
            "required": ["a"],
        },
    }


@pytest.mark.sweep(keep=1)
@pytest.mark.parametrize("name", ["qwen3", "llama3.1", "mistral-v3", "deepseek-v3", "glm-4"])
def test_results_are_what_the_template_writes(name, tools):
    """results_ids() are the ids of the whole conversation behind the turn that called."""
    tokenizer = small(name)
    toolbox = environments.load_toolbox(f"{tools}:add", None, tokenizer, 0.0, 8)
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    messages = [{"role": "user", "content": "sum"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    turn = tokenizer.apply_chat(messages, add_generation_prompt=False, tools=toolbox.schemas)
    while turn[-1] not in tokenizer.stop_ids:  # a template may write a line's end behind it
        turn.pop()
    prompt = tokenizer.apply_chat(messages[:1], tools=toolbox.schemas)
    assert turn[: len(prompt)] == prompt
    (found,) = toolbox.calls_in(turn[len(prompt) :])
    assert found["function"] == call["function"]
    result, failed = toolbox.call(found, None)
    assert (result, failed) == ("3", False)
    whole = [*messages, {"role": "tool", "tool_call_id": call["id"], "name": "add", "content": result}]
    whole, ids = tokenizer.apply_chat(whole, tools=toolbox.schemas), toolbox.results_ids([call], [result])
    assert whole[-len(ids) :] == ids and whole[-len(ids) - 1] == turn[-1]


class ScriptedEngine:
    """Replies as a script has them; their log-probabilities are those of the model, without a cache."""

    def __init__(self, model, tokenizer, script):
        self.model, self.tokenizer, self.script, self.asked = model, tokenizer, script, []
        self.runner = type("Runner", (), {"model": model})

    def weights_changed(self):
        pass

    @paddle.no_grad()
    def generate(self, requests):
        return [[self._reply(request, i) for i in range(request.params.n)] for request in requests]

    def _reply(self, request, i):
        prompt = list(request.prompt_ids)
        text = self.script(self.tokenizer.decode(prompt, skip_special_tokens=False), i)
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.stop_ids[0]]
        self.asked.append((prompt, ids))
        x = self.model.hidden_states(paddle.to_tensor(np.array([prompt + ids], np.int64)))
        logits = self.model.logits(x)[0]
        logps = (logits - paddle.logsumexp(logits, -1, keepdim=True)).numpy()
        rows = [(float(logps[len(prompt) - 1 + t, token]), None) for t, token in enumerate(ids)]
        values = {"token_ids": ids, "text": text, "finish_reason": "stop", "logprobs": rows}
        return Completion(**values, entropies=[1.0] * len(ids), prompt_tokens=len(prompt), cached_tokens=0)


def played(keys, script, monkeypatch):
    """The engine and the rows of the log of a run of rl.py whose replies a script gives."""
    made = []

    def make_engine(args, model, tokenizer, *_):
        made.append(ScriptedEngine(model, tokenizer, script))
        return made[-1]

    monkeypatch.setattr(rollouts, "make_engine", make_engine)
    run(keys)
    return made[-1], logged(Path(keys["output_dir"]))


def call_text(name, **arguments):
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


def test_a_run_with_tools_learns_the_models_tokens_only(world, tools, tmp_path, monkeypatch):  # noqa: F811
    """Turns have 1, 2 or 3 calls; the trainer's log-probabilities of the packed turns are those without a cache."""

    def script(prompt, i):
        results = prompt.count("<tool_response>")
        if results == 0:
            return ["red", call_text("add", a=7, b=5), call_text("add", a=1), call_text("subtract", a=1)][i]
        return "12 it is" if "12" in prompt or results > 1 else call_text("add", a=2, b=2) + call_text("add", a=3)

    changes = {"tools": f"{tools}:add", "reward_funcs": f"{tools}:turns", "chat_template": "qwen3", "max_dec_len": 400}
    keys = keys_of(world, tmp_path / "out", **changes, max_src_len=800, do_train=True, save_rollouts=True, max_steps=2)
    engine, rows = played(keys, script, monkeypatch)
    assert rows[0]["engine_kl"] < 1e-9 and rows[0]["grad_norm"] > 0
    assert rows[0]["tools/call_frequency"] == 7 / 4 and rows[0]["tools/failure_frequency"] == 1 / 7
    assert rows[0]["reward"] == np.mean([1, 3, 6, 6])
    for group in rollouts.read_rollouts(tmp_path / "out" / "rollouts")[0]:
        for reply in group.replies:
            learned = np.ones(len(reply.token_ids), bool) if reply.learned is None else reply.learned
            spoken = [ids for prompt, ids in engine.asked if prompt[: len(group.prompt_ids)] == list(group.prompt_ids)]
            mine = np.array(reply.token_ids)[learned].tolist()
            assert len(mine) == len(reply.logps) and any(mine[: len(ids)] == ids for ids in spoken)
        roles = [[message["role"] for message in reply.messages] for reply in group.replies]
        assert roles[:2] == [["assistant"], ["assistant", "tool", "assistant"]]
        assert '"error": "LookupError: there is no tool' in group.replies[3].messages[1]["content"]
    run({**keys, "output_dir": str(tmp_path / "replayed"), "replay": str(tmp_path / "out" / "rollouts")})
    assert [row["loss"] for row in logged(tmp_path / "replayed")] == [row["loss"] for row in rows]


def test_an_environment_is_a_replys_own(world, tools, tmp_path, monkeypatch):  # noqa: F811
    def script(prompt, i):
        return call_text("count", by=i + 1) if prompt.count("now") < 2 else "done"

    changes = {"reward_funcs": f"{tools}:totals", "chat_template": "qwen3", "max_dec_len": 300, "max_src_len": 800}
    keys = keys_of(world, tmp_path / "out", **changes, environment_factory=f"{tools}:Counter", max_steps=1)
    engine, rows = played(keys, script, monkeypatch)
    assert rows[0]["reward"] == np.mean([2, 3, 4, 5]) and rows[0]["engine_kl"] < 1e-9  # by i + 1, then by 1
    texts = [engine.tokenizer.decode(prompt) for prompt, _ in engine.asked]
    assert all(re.search(r"\w from \d", text) for text in texts)
    _, rows = played({**keys, "overwrite_output_dir": True, "max_turns": 2}, script, monkeypatch)
    assert rows[0]["reward"] == np.mean([1, 2, 3, 4])


def test_bad_tools(world, tools, tmp_path, capfd):  # noqa: F811
    bad = {
        "no type": ({"tools": f"{tools}:bare", "chat_template": "qwen3"}, r"tools: bare: a has no type; .*integer|int"),
        "no format": ({"tools": f"{tools}:add", "chat_template": "llama2"}, r"tools: .*no form that is known"),
        "no file": ({"tools": "gone.py:add", "chat_template": "qwen3"}, r"tools: gone.py: no such file"),
        "not made": (
            {"environment_factory": f"{tools}:Unmade", "chat_template": "qwen3"},
            r"environment_factory: OSError: no room",
        ),
        "no text": (
            {"environment_factory": f"{tools}:Wordless", "chat_template": "qwen3"},
            r"environment_factory: \S+\.json.*: reset\(\) returned list; None or a text is needed",
        ),
        "not reset": (
            {"environment_factory": f"{tools}:Broken", "chat_template": "qwen3"},
            r"environment_factory: \S+\.json.*: reset\(\): KeyError: 'board'",
        ),
    }
    for name, (changes, message) in bad.items():
        path = tmp_path / "keys.json"
        path.write_text(json.dumps(keys_of(world, tmp_path / "out", **changes)))
        assert re.search(message, fails(rl, [path], capfd)), name
