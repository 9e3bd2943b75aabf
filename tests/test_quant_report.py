"""quantize.py's report, its going on after a kill, mixed bits, and PaddleNLP's quantization files.

python -m pytest tests/test_quant_report.py                 # CPU, some seconds
python -m pytest tests/test_quant_report.py --sweeps        # kill -9 at many places, all files of PaddleNLP
"""

import itertools
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import paddle
import pytest
import tiny_models
from conftest import ROOT, SHARED
from test_quantize import fails, keys_of, logits, run, tiny_model, world  # noqa: F401, world is a fixture

import export
import finetune
import model
import quantize
import trainer
from adapters import from_pretrained
from arguments import parse_args
from distributed.tensor import packed_channels
from formats.quantization_config import all_bits, bits_of, runs_as_integers
from formats.tokenizer import load_tokenizer
from quantization import divergence, mixed_bits, progress
from serving.engine import Engine, Request
from serving.fused import FusedRunner
from serving.runners import PagedRunner
from serving.sampling import SamplingParams

EVAL = {"do_eval": True, "max_evaluate_steps": 1}


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def report_of(folder):
    return json.loads((folder / "quant_report.json").read_text())


# -------------------------------------------------------------------------------------------------------- the report


def test_scores_are_those_of_whole_distributions(monkeypatch):
    """Piece by piece, from hidden states, beside plain float64 over all logits."""
    net, rng = tiny_model(num_hidden_layers=1), np.random.default_rng(0)
    states, other = (rng.standard_normal((11, 32)).astype(np.float32) for _ in range(2))
    other = states + 0.1 * other
    targets = rng.integers(0, 3072, 11)
    monkeypatch.setattr(divergence, "LOGITS", 3072 * 4)  # pieces of 4, 4 and 3 tokens
    found = divergence.token_scores(net, *map(paddle.to_tensor, (other, targets, states)))
    right, ours = (log_softmax(net.logits(paddle.to_tensor(x)).numpy()) for x in (states, other))
    expected = [
        -ours[np.arange(11), targets],
        ours.argmax(-1) == targets,
        (np.exp(right) * (right - ours)).sum(-1),
        ours.argmax(-1) == right.argmax(-1),
    ]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-4, atol=1e-5)
    same = divergence.token_scores(net, *map(paddle.to_tensor, (states, targets, states)))
    assert not same[2].any() and same[3].all()


def test_the_report_is_what_was_written(world, tmp_path, capfd):  # noqa: F811
    """Bits a weight are those of the file; the divergence that of the two folders' models."""
    out = tmp_path / "out"
    run(keys_of(world, out, do_ptq=True, bits=4, group_size=32, **EVAL))
    report, printed = report_of(out), capfd.readouterr().out
    stored = {}
    for weight in quantize.named_weights(from_pretrained(out)):
        if weight.stored:
            path = weight.name.rpartition(".")[0]
            stored[path] = stored.get(path, 0) + 8 * np.prod(weight.shape) * np.dtype(weight.stored).itemsize
    for row in report["linears"]:
        n_in, n_out = row["shape"]
        assert row["bits_per_weight"] == pytest.approx(stored[row["linear"]] / (n_in * n_out), abs=1e-4)
        assert stored[row["linear"]] == mixed_bits.packed_bits(n_in, n_out, 4, 32) and row["scheme"] == "w4"
    assert report["bits_per_weight"] == pytest.approx(
        sum(stored.values()) / sum(np.prod(row["shape"]) for row in report["linears"]), abs=1e-4
    )
    after, plain = report["dev_after"], from_pretrained(world / "base")
    assert 0 < after["kl_median"] < after["kl_p99"] < after["kl_max"] and 0.2 < after["top1_agreement"] < 1
    _, _, dev = quantize.loaders(parse_args(quantize.Args, [str(tmp_path / "out.json")]), load_tokenizer(out))
    batch, kl = dev.batch(0, 0), []
    ours = from_pretrained(out)
    for net in (plain, ours):
        inputs = trainer.model_inputs(batch)
        labels = inputs.pop("labels").numpy()
        with trainer.eval_mode(net):
            kl.append(log_softmax(net(**inputs).numpy()[labels != -100]))
    assert after["kl_mean"] == pytest.approx((np.exp(kl[0]) * (kl[0] - kl[1])).sum(-1).mean(), rel=1e-3)
    assert after["top1_agreement"] == pytest.approx((kl[0].argmax(-1) == kl[1].argmax(-1)).mean())
    assert "dev KL divergence to the float model: mean" in printed and "bits a weight" in printed


# --------------------------------------------------------------------------------------------------- kill and resume

RESUMED = {
    "gptq": {"do_gptq": True, **EVAL},
    "a8w8": {"do_ptq": True, "shift": True, "smooth": True, "smooth_all_linears": True},
    "autoround": {"do_autoround": True, "do_awq": True, "autoround_iters": 4},  # targets are the float model's
    "mixed": {"do_ptq": True, "bits": 7.5, "group_size": 32, **EVAL},
}


class Killed(BaseException):
    """Nothing in the product catches it, as nothing catches a kill."""


def same_result(one, two):
    """The models' files byte for byte, and the reports without seconds and memory."""
    for name in ("model.safetensors", "config.json", "tokenizer_config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    found = [report_of(folder) for folder in (one, two)]
    for report in found:
        for row in (report, *report["linears"]):
            row.pop("seconds")
        report.pop("peak_memory_bytes")
    assert found[0] == found[1]


@pytest.mark.sweep(keep=1)
@pytest.mark.parametrize("kind", RESUMED)
def test_a_killed_run_goes_on_and_ends_the_same(kind, world, tmp_path, monkeypatch, capfd):  # noqa: F811
    keys = keys_of(world, tmp_path / "out", **RESUMED[kind])
    run(keys | {"output_dir": str(tmp_path / "whole")})

    def kill_after(count, original=progress.Progress.save):
        def save(self, index, block, rows):
            original(self, index, block, rows)
            if index + 1 == count:
                raise Killed

        return save

    monkeypatch.setattr(progress.Progress, "save", kill_after(1))
    with pytest.raises(Killed):
        run(keys)
    monkeypatch.undo()
    line = fails(keys | {"group_size": 16} if kind == "gptq" else keys | {"seed": 7}, capfd)
    assert "1 blocks are finished" in line and ("group_size: -1, now 16" in line or "seed: 42, now 7" in line)
    # killed again, while the model is written: what lies there is this run's own
    monkeypatch.setattr(quantize, "rest_dtype", lambda model: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        run(keys)
    monkeypatch.undo()
    assert (tmp_path / "out" / "tokenizer_config.json").is_file() and not (tmp_path / "out" / "config.json").exists()
    capfd.readouterr()
    run(keys)
    assert "goes on behind 2 finished blocks" in capfd.readouterr().out
    same_result(tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / "out" / progress.FOLDER).exists()


def test_other_files_and_told_to_start_anew(world, tmp_path, monkeypatch, capfd):  # noqa: F811
    base = shutil.copytree(world / "base", tmp_path / "base")
    keys = keys_of(world, tmp_path / "out", model_name_or_path=str(base), do_ptq=True, bits=8)
    keys |= {"dataset_name_or_path": ""}
    monkeypatch.setattr(quantize, "save_pretrained", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        run(keys)
    monkeypatch.undo()
    (base / "README.md").write_text("another")
    assert "2 blocks are finished of a run with another" in fails(keys, capfd)
    run(keys | {"overwrite_output_dir": True})
    assert "starts anew" in capfd.readouterr().out and report_of(tmp_path / "out")["bits_per_weight"] > 8


@pytest.mark.sweep(keep=0)
@pytest.mark.parametrize("seed", range(4))
def test_kill_9_anywhere(seed, world, tmp_path):  # noqa: F811
    """The process is killed at random times until it ends by itself."""
    rng, kind = np.random.default_rng(seed), list(RESUMED.values())[seed % 3]
    whole, keys = tmp_path / "whole", keys_of(world, tmp_path / "out", **kind)
    run(keys | {"output_dir": str(whole)})
    (tmp_path / "run.json").write_text(json.dumps(keys))
    command = [sys.executable, str(ROOT / "quantize.py"), str(tmp_path / "run.json")]
    start = time.perf_counter()
    subprocess.run([*command, f"--output_dir={tmp_path / 'timed'}"], check=True, capture_output=True)
    length = time.perf_counter() - start
    kills = 0
    while kills < 8:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            output, _ = process.communicate(timeout=length * rng.uniform(0.4, 1.0))
            assert process.returncode == 0, output
            if kills:
                break
            shutil.rmtree(tmp_path / "out")  # it was faster than the first time
            length *= 0.8
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            if (tmp_path / "out" / "quant_report.json").exists() and not (tmp_path / "out" / "tmp-quantize").exists():
                break  # it was done
    else:
        subprocess.run(command, check=True, capture_output=True)
    assert kills
    same_result(tmp_path / "out", whole)


# ------------------------------------------------------------------------------------------------------- mixed bits


def units_of(rng, count, formats=(3, 4, 8)):
    """Made-up units whose divergence falls by about 4 a bit."""
    units = []
    for i in range(count):
        weights, size = int(rng.integers(4, 9)) * 100, rng.lognormal(0, 1.5)
        kl = {str(b): float(size * 4.0**-b * rng.uniform(0.5, 2)) for b in formats}
        units.append(
            {"linears": [f"l{i}"], "weights": weights, "kl": kl, "bits": {str(b): b * weights for b in formats}}
        )
    return units


@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_near_the_best_of_all(seed):
    """Beside all 3^6 choices: within the size, and no worse than the best whose size is less by the largest step."""
    units = units_of(np.random.default_rng(seed), 6)
    total = sum(unit["weights"] for unit in units)

    def size_and_loss(bits):
        pairs = [(unit["bits"][str(b)], unit["kl"][str(b)]) for unit, b in zip(units, bits)]
        return sum(size for size, _ in pairs) / total, sum(loss for _, loss in pairs)

    size, loss = size_and_loss(mixed_bits.choose_bits(units, 5))
    largest = max(5 * unit["weights"] for unit in units) / total
    every = [size_and_loss(bits) for bits in itertools.product((3, 4, 8), repeat=6)]
    assert size <= 5 and loss <= min(own for s, own in every if s <= 5 - largest)
    assert set(mixed_bits.choose_bits(units, 8)) == {8} and set(mixed_bits.choose_bits(units, 3)) == {3}


def test_a_mixed_folder_is_opened_by_every_reader(world, tmp_path, monkeypatch, capfd):  # noqa: F811
    kept, out = [], tmp_path / "out"
    original = quantize.save_pretrained
    monkeypatch.setattr(quantize, "save_pretrained", lambda net, *rest: (kept.append(net), original(net, *rest)))
    run(keys_of(world, out, do_gptq=True, bits=7.5, group_size=32, src_length=64, max_length=128, gptq_step=1))
    report, again = report_of(out), from_pretrained(out)
    again.eval()
    expected, quantization = logits(kept[0]), again.config.quantization
    np.testing.assert_allclose(logits(again), expected, rtol=0, atol=1e-6)
    schemes = {row["linear"]: row["scheme"] for row in report["linears"]}
    assert set(schemes.values()) == {"w4", "w8"} and all_bits(quantization) == [4, 8]
    assert report["bits_per_weight"] <= 7.5 < report["bits_per_weight"] + 2  # the largest step has less than 2
    for path, (_, _, layer) in model.block_linears(again).items():
        assert layer.scheme == schemes[path] == f"w{bits_of(quantization, path)}"
    fused = "model.layers.0.self_attn.qkv_proj"
    assert bits_of(quantization, fused) == bits_of(quantization, "model.layers.0.self_attn.q_proj")
    assert packed_channels(again.config) == 8  # words of the smallest: whole words of the others, too
    for unit in report["sensitivity"]:
        assert unit["kl"]["8"] < unit["kl"]["4"] and len({schemes[path] for path in unit["linears"]}) == 1
    # serving: a block as one call, and layer by layer
    request = Request(list(range(5, 30)), SamplingParams(max_tokens=6, temperature=0.0))
    replies = {}
    for runner in (PagedRunner, FusedRunner):
        engine = Engine(runner(from_pretrained(out), 16, 16), num_blocks=16, block_size=16)
        replies[runner] = engine.generate([request])[0][0].token_ids
    assert replies[PagedRunner] == replies[FusedRunner]
    # other layouts, read as floats
    for name, flags in {"ct": ["--format=compressed-tensors"], "floats": ["--dequantize=true"]}.items():
        trainer.run_script(
            export.main, export.Args, [f"--model_name_or_path={out}", f"--output_dir={tmp_path / name}", *flags]
        )
        np.testing.assert_allclose(logits(from_pretrained(tmp_path / name)), expected, rtol=0, atol=2e-4)


def test_patterns_that_are_not_ours_are_opened_as_floats():
    config = {"bits": 4, "checkpoint_format": "gptq", "dynamic": {"+:^a$": {"bits": 8}}}
    assert runs_as_integers(config) and bits_of(config, "a") == 8 and bits_of(config, "ab") == 4
    for dynamic in ({"-:^a$": {}}, {"+:^a$": {"bits": 8, "group_size": 32}}, {"+:^a$": {"bits": 5}}):
        assert not runs_as_integers({**config, "dynamic": dynamic})


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({"do_ptq": True, "bits": 4, "quant_type": "a8w8"}, "bits 4 contradicts quant_type a8w8"),
        ({"do_ptq": True, "bits": 3.5}, "bits: 3.5; it must be more than 4"),
        ({"do_gptq": True, "bits": 4.5, "quant_type": "wint8"}, "bits 4.5 contradicts quant_type wint8"),
        ({"do_ptq": True, "bits": 4.5, "dataset_name_or_path": ""}, "bits with a fraction needs records"),
        ({"do_ptq": True, "quant_type": "weight_only_mixed"}, "weight_only_mixed"),
        (
            {"do_ptq": True, "bits": 4.1, "group_size": 32},
            "4.1 a weight is too small; scales and zeros counted, this model has 5.",
        ),
    ],
)
def test_sizes_that_cannot_be_are_named(keys, expected, world, tmp_path, capfd):  # noqa: F811
    assert expected in fails(keys_of(world, tmp_path / "out", **keys), capfd)


# ------------------------------------------------------------------------------------- PaddleNLP's quantization files

UPSTREAM = SHARED / "upstream" / "configs"
FILES = """llama/gptq llama/ptq llama/awq llama/fp8_ptq llama/ptq_c8 llama/qlora llama/wint8_lora baichuan/gptq
    baichuan/ptq baichuan/awq baichuan/qlora bloom/gptq bloom/ptq chatglm/gptq chatglm/ptq chatglm2/gptq
    chatglm2/ptq""".split()
MODELS = {  # a tiny model of the family, and the key of its vocabulary
    "llama": ("llama", "vocab_size"),
    "baichuan": ("baichuan2_7b", "vocab_size"),
    "bloom": ("bloom", "vocab_size"),
    "chatglm": ("chatglm", "vocab_size"),
    "chatglm2": ("chatglm2", "padded_vocab_size"),
}
SHORT = """--src_length=48 --max_length=64 --gptq_step=1 --ptq_step=1 --smooth_step=1 --search_tokens=32
    --search_alpha_step=0.3 --max_evaluate_steps=1 --per_device_train_batch_size=2""".split()
SHORT_LORA = "--src_length=48 --max_length=64 --max_steps=1 --max_evaluate_steps=1 --warmup_steps=0".split()


@pytest.mark.sweep(keep=0)
@pytest.mark.parametrize("name", FILES)
def test_paddlenlp_s_files_run(name, world, tmp_path):  # noqa: F811
    """With other paths, lengths and step counts alone."""
    if not UPSTREAM.is_dir():
        pytest.skip("PaddleNLP's configs are not on this machine")
    family, kind = name.split("/")
    tiny, vocabulary = MODELS[family]
    base = tiny_models.write(tmp_path / "base", tiny, **{vocabulary: 3072})
    load_tokenizer(world / "base").save(base)
    paths = {"model_name_or_path": base, "dataset_name_or_path": world / "sft", "output_dir": tmp_path / "out"}
    flags = [f"--{key}={path}" for key, path in paths.items()]
    lora = kind.endswith("lora")
    script, more = (finetune, SHORT_LORA) if lora else (quantize, SHORT)
    trainer.run_script(script.main, script.Args, [str(UPSTREAM / f"{name}_argument.json"), *flags, *more])
    opened = from_pretrained(tmp_path / "out")
    assert lora or opened.config.quantization is not None and report_of(tmp_path / "out")["dev_after"]
