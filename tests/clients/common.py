"""Shared by the clients: what they ask, and how a script that lacks its package says so.

A client is a script of its own, `python tests/clients/openai_chat.py http://127.0.0.1:8011`: it needs the client's
package and no Paddle. It prints a line for each thing that held, and ends with an AssertionError where one did not.
"""

import importlib
import json
import sys

SKIPPED = 77  # exit status where the client's package is missing
QUESTION = "How warm is it in Oslo?"
WEATHER = {
    "name": "weather",
    "description": "The temperature in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
TOOL = {"type": "function", "function": WEATHER}
# What the server of test_clients.py replies; it has a script in place of a model.
THOUGHTS, ANSWER, GREETING, CITY = "The user wants the weather.", "It is 7 degrees in Oslo.", "Hello there.", "Oslo"


def package(name: str) -> object:
    """The client's package; without it the script ends with SKIPPED."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"pip install {name.partition('.')[0]}")
        sys.exit(SKIPPED)


def base_url() -> str:
    return sys.argv[1].rstrip("/")


def run_tool(name: str, arguments: str | dict) -> str:
    """The weather tool's result."""
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert name == "weather" and arguments in ({"city": "Oslo"}, {"city": "Rome"}), (name, arguments)
    return json.dumps({"degrees": 7})


def held(line: str) -> None:
    print(f"held: {line}", flush=True)
