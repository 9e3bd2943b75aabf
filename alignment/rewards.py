"""Rewards of replies: Python functions with TRL's signature, their weighted sum, and what is done to it.

    functions = load_reward_functions("rewards.py:accuracy,rewards.py:format", weights=[1.0, 0.2])
    scores = functions[0](prompts, completions, completion_ids, columns, where)        # a float or None for each

A function gets prompts, completions and completion_ids, one for each reply, and the records' keys by name. None means
that it does not apply to that reply.
"""

import dataclasses
import functools
import http.client
import importlib.util
import json
import math
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np

from formats.files import UserError, brief

# A user's function may fail in any way. sys.exit() in it, or in a library of it, must not end the run without a word.
FAILURES = (Exception, SystemExit)


@dataclasses.dataclass
class RewardFunction:
    """f(prompts=…, completions=…, completion_ids=…, **columns) -> list of a float or None for each completion.

    The signature is TRL's. Columns are the keys of the records, one value for each completion.
    """

    name: str  # in the log
    fn: Callable
    weight: float = 1.0
    timeout: float = 0.0  # seconds of one call; 0: no limit

    def __call__(self, prompts: list, completions: list, completion_ids: list, columns: dict, where: list) -> list:
        """The rewards. UserError with the function, the record (of `where`) and what is wrong."""
        results = self._call(prompts, completions, completion_ids, columns, where)
        if not isinstance(results, (list, tuple, np.ndarray)) or len(results) != len(completions):
            found = f"{len(results)} values" if isinstance(results, (list, tuple, np.ndarray)) else brief(repr(results))
            raise UserError(
                f"reward_funcs: {self.name}: returned {found}; a list of {len(completions)} rewards is needed"
            )
        for place, value in zip(where, results):
            is_number = isinstance(value, (int, float, np.number)) and math.isfinite(value)
            if value is not None and not is_number:
                raise UserError(
                    f"reward_funcs: {self.name}: {place}: returned {value!r}; a finite number, or None, is needed"
                )
        return [None if value is None else float(value) for value in results]

    def _call(self, prompts, completions, completion_ids, columns, where):
        def call(part=slice(None)):
            some = {key: values[part] for key, values in columns.items()}
            return self.fn(
                prompts=prompts[part], completions=completions[part], completion_ids=completion_ids[part], **some
            )

        try:
            return within(self.timeout, call, f"reward_funcs: {self.name}")
        except UserError:
            raise
        except FAILURES as raised:
            error, culprit = self._first_failure(call, where) or (raised, where[0])
            text = f"{_line_of(error, self.fn)}{type(error).__name__}: {error}"
            raise UserError(f"reward_funcs: {self.name}: {culprit}: {text}") from error

    @staticmethod
    def _first_failure(call, where):
        """(exception, record) of the first record with which the function fails alone; None: it does with none."""
        for i, place in enumerate(where):
            try:
                call(slice(i, i + 1))
            except FAILURES as error:
                return error, place
        return None


def _line_of(error, fn):
    """'file:line: ' of the innermost frame of the function's own file."""
    file, line, traceback = getattr(fn, "__code__", None) and fn.__code__.co_filename, None, error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == file:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f"{file}:{line}: " if line else ""


def within(seconds: float, call: Callable, name: str) -> object:
    """call(), or UserError after so many seconds; 0: no limit."""
    if not seconds:
        return call()
    outcome = []

    def run():
        try:
            outcome.append((call(), None))
        except BaseException as error:  # raised again by the thread that waits, whatever it is
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True, name=name)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise UserError(f"{name}: no result after {seconds:g} s (reward_timeout)")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def load_function(name: str, key: str) -> Callable:
    """The function "FILE.py:NAME" that an argument `key` names. UserError for what cannot be loaded."""
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not function:
        raise UserError(f"{key}: {name!r}: FILE.py:NAME is needed")
    if not Path(path).is_file():
        raise UserError(f"{key}: {path}: no such file")
    module = _load_module(Path(path).resolve(), key)
    found = getattr(module, function, None)
    if not callable(found):
        offered = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UserError(f"{key}: {path}: has no function {function!r}; it has {', '.join(offered) or 'none'}")
    return found


def load_reward_functions(
    funcs: str | list[str] | None, weights: list[float] | None, timeout: float = 0.0
) -> list[RewardFunction]:
    """Functions named "FILE.py:NAME", separated by commas or in a list. UserError for what cannot be loaded."""
    names = [part.strip() for part in (funcs.split(",") if isinstance(funcs, str) else funcs or [])]
    if weights is not None and len(weights) != len(names):
        raise UserError(f"reward_weights: {len(weights)} numbers for {len(names)} reward_funcs")
    functions = []
    for name, weight in zip(names, weights or [1.0] * len(names)):
        function = load_function(name, "reward_funcs")
        functions.append(RewardFunction(name.rpartition(":")[2], function, weight, timeout))
    if len({function.name for function in functions}) < len(functions):
        raise UserError(f"reward_funcs: {', '.join(names)}: each function needs its own name, which the log shows")
    return functions


def server_reward(url: str, timeout: float = 0.0) -> RewardFunction:
    """A reward server of PaddleNLP's: POST {"src", "tgt", "response"}, lists of text -> {"score": [number, …]}."""

    def reward_server(prompts, completions, tgt=None, **_):
        body = {"src": prompts, "tgt": tgt or [""] * len(prompts), "response": completions}
        data, headers = json.dumps(body, ensure_ascii=False).encode(), {"Content-Type": "application/json"}
        try:
            request = urllib.request.Request(url, data, headers)
            with urllib.request.urlopen(request, timeout=timeout or None) as answer:
                return json.loads(answer.read())["score"]
        except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or f"{type(error).__name__}: {error}"
            raise UserError(f'reward_server: {url}: {reason}; an answer like {{"score": [1.0, …]}} is needed') from None

    return RewardFunction("reward_server", reward_server)


@functools.lru_cache(16)
def _load_module(path, key):
    spec = importlib.util.spec_from_file_location(f"{key}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except FAILURES as error:
        raise UserError(f"{key}: {path}: cannot be imported: {type(error).__name__}: {error}") from error
    return module
