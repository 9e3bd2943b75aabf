"""serving/loras.py and pooling.py: adapters that come and go while requests run, and embeddings, on a tiny model."""

import json
import shutil
import threading
import time

import numpy as np
import paddle
import pytest
from conftest import ROOT

import model as M
from adapters import apply_lora, from_pretrained, load_adapter, lora_layers, merge, save_adapter
from formats.files import UserError
from formats.tensor_files import read_safetensors, write_safetensors
from serving.engine import Engine, Request, UnknownAdapter
from serving.loras import load_lora, unload_lora
from serving.pooling import embed
from serving.sampling import SamplingParams

DEMO = ROOT / "demo" / "llama"
PROMPT = list(range(20, 40))
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def demo():
    return from_pretrained(DEMO)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: folder} of two LoRAs of the demo model, with B that does something."""
    folder, found = tmp_path_factory.mktemp("loras"), {}
    for name, targets in (("a", ["q_proj", "down_proj"]), ("b", ["v_proj", "up_proj"])):
        model = apply_lora(demo(), rank=3, alpha=12, targets=targets)
        for i, layer in enumerate(lora_layers(model).values()):
            values = np.random.default_rng([i, ord(name)]).standard_normal(layer.lora_B.shape) * 0.3
            M.set_parameter(layer.lora_B, values.astype(np.float32))
        save_adapter(model, folder / name)
        found[name] = str(folder / name)
    return found


@pytest.fixture(scope="module")
def expected(folders):
    """{adapter: the greedy reply to PROMPT by the merged model}"""
    models = {None: demo(), **{name: merge(load_adapter(demo(), path)) for name, path in folders.items()}}
    ids = np.array([PROMPT])
    replies = {name: M.generate(model, ids, 8)[0, len(PROMPT) :].tolist() for name, model in models.items()}
    assert len({str(reply) for reply in replies.values()}) == 3
    return replies


def reply(engine, adapter=None, params=GREEDY):
    return engine.generate([Request(PROMPT, params, adapter)])[0][0].token_ids


def wait(engine, future):
    while not future.done() and engine.thread is None:
        engine.step()
    return future.result(20)


def test_adapters_come_and_go(folders, expected):
    engine = Engine(demo(), num_blocks=64)
    for _ in range(2):  # the second time in the place of the first
        assert reply(engine) == expected[None]
        for name in ("a", "b"):
            wait(engine, load_lora(engine, name, folders[name]))
        requests = [Request(PROMPT, GREEDY, name) for name in (None, "a", "b", "a")]
        found = [completions[0].token_ids for completions in engine.generate(requests)]
        assert found == [expected[request.adapter] for request in requests]
        wait(engine, unload_lora(engine, "a"))
        with pytest.raises(UnknownAdapter):
            engine.submit(Request(PROMPT, GREEDY, "a"), print)
        assert (reply(engine, "b"), reply(engine)) == (expected["b"], expected[None])
        wait(engine, unload_lora(engine, "b"))
    wait(engine, load_lora(engine, "a", folders["b"]))  # another adapter under a name that was used
    assert reply(engine, "a") == expected["b"] and engine.adapters == ["a"]


def test_a_running_reply_keeps_its_adapter(folders, expected):
    engine, outputs, done = Engine(demo(), num_blocks=64), [], threading.Event()
    engine.start()
    wait(engine, load_lora(engine, "a", folders["a"]))
    long = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)

    def collect(output):
        outputs.append(output.token_id)
        if output.finish_reason:
            done.set()

    engine.submit(Request(PROMPT, long, "a"), collect)
    while not outputs:
        time.sleep(0.001)
    wait(engine, unload_lora(engine, "a"))
    with pytest.raises(UserError, match="'a' is being unloaded"):
        wait(engine, load_lora(engine, "a", folders["a"]))
    wait(engine, load_lora(engine, "b", folders["b"]))
    assert done.wait(30) and outputs[:8] == expected["a"] and len(outputs) == 60
    wait(engine, engine.between_steps(lambda: None))
    assert engine.runner.adapters == ["b"] and reply(engine, "b") == expected["b"]
    wait(engine, load_lora(engine, "a", folders["a"]))
    assert reply(engine, "a") == expected["a"]
    engine.shutdown(False)


def test_a_folder_that_does_not_fit_changes_nothing(folders, expected, tmp_path):
    engine = Engine(demo(), num_blocks=64)
    wait(engine, load_lora(engine, "a", folders["a"]))
    cases = {}
    for case in ("rank", "shape", "whole", "bias", "module", "prefix"):
        folder = cases[case] = tmp_path / case
        shutil.copytree(folders["b"], folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = read_safetensors(folder / "adapter_model.safetensors")
        first = next(iter(tensors))
        if case == "rank":
            config["r"] = 5
        elif case == "shape":
            tensors[first] = tensors[first][:, :-1]
        elif case == "whole":
            tensors["base_model.model.model.embed_tokens.weight"] = np.zeros((2, 2), np.float32)
        elif case == "module":
            tensors[first.replace("layers.0", "layers.99")] = tensors.pop(first)
        elif case == "bias":
            config["bias"] = "all"
        else:
            config["peft_type"] = "PREFIX_TUNING"
        (folder / "adapter_config.json").write_text(json.dumps(config))
        write_safetensors(folder / "adapter_model.safetensors", tensors)
    cases["missing"] = tmp_path / "missing"
    for folder in cases.values():
        with pytest.raises(UserError):
            wait(engine, load_lora(engine, "b", str(folder)))
    with pytest.raises(UserError, match="is loaded already"):
        wait(engine, load_lora(engine, "a", folders["a"]))
    with pytest.raises(UserError, match="'b' is not loaded; loaded are a"):
        wait(engine, unload_lora(engine, "b"))
    assert (reply(engine, "a"), reply(engine), engine.adapters) == (expected["a"], expected[None], ["a"])


def test_embeddings_are_the_hidden_states(folders):
    engine = Engine(demo(), num_blocks=64)
    wait(engine, load_lora(engine, "a", folders["a"]))
    for adapter, model in ((None, demo()), ("a", load_adapter(demo(), folders["a"]))):
        model.eval()
        with paddle.no_grad():
            hidden = model.hidden_states(paddle.to_tensor([PROMPT]))[0].numpy()
        for pooling, vector in (("last", hidden[-1]), ("mean", hidden.mean(0))):
            found = wait(engine, embed(engine, PROMPT, adapter, pooling))
            assert found.dtype == np.float32 and found.shape == (hidden.shape[1],)
            np.testing.assert_allclose(found, vector / np.linalg.norm(vector), atol=2e-6)
