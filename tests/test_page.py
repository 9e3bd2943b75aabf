"""serving/page.html in Chromium: tool calls and reasoning, what fails, and the demo as README's commands make it.

The other tests of the page are in test_openai_api.py. All need chromium (apt install chromium).
"""

import http.server
import json
import threading

import pytest
from test_agent_api import ScriptEngine, ToolTokenizer
from test_openai_api import SAY, TEXTS, Running, browser, eventually, server, start  # noqa: F401, fixtures

FAKE_FETCH = """
window.sent = [];
window.reply = [];
const real = window.fetch;
window.fetch = async (path, options) => {
  if (!path.endsWith("completions")) return real(path, options);
  window.sent.push(JSON.parse(options.body));
  const deltas = window.reply.shift();
  if (deltas === null) throw new TypeError("Failed to fetch");
  const rows = deltas.map(delta => ({choices: [{index: 0, delta, finish_reason: null}]}));
  const text = rows.map(row => `data: ${JSON.stringify(row)}\\n\\n`).join("") + "data: [DONE]\\n\\n";
  return new Response(text, {headers: {"Content-Type": "text/event-stream"}});
};
"""
CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
SECOND = {"index": 1, "id": "call_2", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
CALLS = [
    {"role": "assistant", "content": ""},
    {"reasoning_content": "The user asks "},
    {"reasoning_content": "for the weather."},
    {"tool_calls": [CALL]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '"<b>Paris</b>"}'}}]},
    {"tool_calls": [SECOND]},
    {},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("width, height", [(1200, 800), (375, 667)])
def test_tool_calls_and_reasoning_are_folded(server, browser, tmp_path, width, height):  # noqa: F811
    browser.show(f"http://127.0.0.1:{server.port}/", width, height)
    browser.js(FAKE_FETCH)
    replies = [CALLS, [{"content": "It is "}, {"content": "sunny."}], None]
    browser.js(f"window.reply = {json.dumps(replies)}")
    browser.js(f"document.querySelector('#tools').value = {json.dumps(json.dumps(TOOLS))}")
    idle = "!document.querySelector('.busy')"
    browser.js(SAY.format("'Weather in Paris?'"))
    assert eventually(lambda: browser.js(f"document.querySelectorAll('details').length === 3 && {idle}"))
    assert browser.js("[...document.querySelectorAll('details')].some(fold => fold.open)") is False
    assert browser.js("[...document.querySelectorAll('summary')].map(n => n.innerText)") == [
        "Reasoning",
        "Calls weather",
        "Calls clock",
    ]
    assert browser.js("document.querySelector('details .text').textContent") == "The user asks for the weather."
    assert browser.js("document.querySelector('details pre').textContent") == '{"city": "<b>Paris</b>"}'
    browser.screenshot(tmp_path / "folded.png")
    browser.js("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    assert browser.js("document.documentElement.scrollWidth") <= width
    browser.screenshot(tmp_path / "open.png")
    for name, result in (("weather", "22 degrees"), ("clock", "noon")):
        assert browser.js("document.querySelector('#input').placeholder") == f"Result of {name}"
        browser.js(SAY.format(json.dumps(result)))
    assert eventually(lambda: browser.js(f"{TEXTS}.at(-1) === 'It is sunny.' && {idle}"))
    first, second = browser.js("window.sent")
    assert first["tools"] == TOOLS and first["messages"] == [{"role": "user", "content": "Weather in Paris?"}]
    question, reply, *results = second["messages"]
    assert [call["function"]["arguments"] for call in reply["tool_calls"]] == ['{"city": "<b>Paris</b>"}', "{}"]
    assert results == [
        {"role": "tool", "content": "22 degrees", "tool_call_id": "call_1"},
        {"role": "tool", "content": "noon", "tool_call_id": "call_2"},
    ]
    browser.js(SAY.format("'And now?'"))
    assert eventually(lambda: browser.js("document.querySelectorAll('.error').length") == 1)
    assert "The server does not answer: Failed to fetch" in browser.js("document.querySelector('.error').innerText")
    browser.screenshot(tmp_path / "failed.png")
    browser.js("document.querySelector('#tools').value = '{'")
    browser.js(SAY.format("'Once more?'"))
    assert eventually(lambda: "Tools are not JSON" in browser.js("document.querySelector('.error')?.innerText ?? ''"))
    assert len(browser.js("window.sent")) == 3


FROM_OUTSIDE = """fetch("http://127.0.0.1:%d/v1/completions", {
  method: "POST",
  body: JSON.stringify({prompt: "x", max_tokens: 9}),
  headers: {"Content-Type": "application/json", Authorization: "Bearer k"},
}).then(
  async answer => [answer.status, (await answer.json()).choices[0].text, answer.headers.get("X-Request-Id") !== null],
  error => [error.name])"""


class BlankPage(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<!doctype html>")

    def log_message(self, *args):
        pass


def test_a_page_of_another_origin_is_a_client_where_it_is_allowed(start, browser):  # noqa: F811
    with http.server.HTTPServer(("127.0.0.1", 0), BlankPage) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        page = f"http://127.0.0.1:{other.server_port}"
        allowed, closed = start(allowed_origins=page, api_key="k"), start(api_key="k")
        browser.call("Page.navigate", url=page)
        assert eventually(lambda: browser.js("location.href") == f"{page}/")
        assert browser.js(FROM_OUTSIDE % allowed.port) == [200, "base0: XX", True]  # after a preflight
        assert browser.js(FROM_OUTSIDE % closed.port) == ["TypeError"]
        other.shutdown()


def test_the_servers_own_thoughts_and_calls(browser, tmp_path):  # noqa: F811
    running = Running(ScriptEngine(), ToolTokenizer())
    try:
        browser.show(f"http://127.0.0.1:{running.port}/", 375, 667)
        browser.js(f"document.querySelector('#tools').value = {json.dumps(json.dumps(TOOLS))}")
        idle = "!document.querySelector('.busy')"
        browser.js(SAY.format("'both'"))
        assert eventually(lambda: browser.js(f"document.querySelectorAll('details').length === 3 && {idle}"))
        folds = browser.js("[...document.querySelectorAll('details')].map(fold => fold.textContent)")
        assert folds[0].split() == ["Reasoninghm"] and "Oslo" in folds[1] and "Bergen" in folds[2]
        for result in ("rain", "sun"):
            browser.js(SAY.format(json.dumps(result)))
        assert eventually(lambda: browser.js(f"{TEXTS}.at(-1)?.startsWith('You said: tool: sun') && {idle}"))
        assert browser.js("document.querySelectorAll('.error').length") == 0
        browser.screenshot(tmp_path / "calls.png")
    finally:
        running.stop()
