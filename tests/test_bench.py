"""The benchmark scripts keep to their contract: one JSON line last, with these keys, on a size that takes no time."""

import json

import kernels

import bench_kernels
import bench_qlora
import bench_train
import numpy as np
import pytest
import tiny_models
from language_scores import Scores

TINY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
            vocab_size=64)  # fmt: skip


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.setenv("PEERS", str(tmp_path))  # no models there: the weights are drawn
    monkeypatch.setitem(bench_train.SHAPES, "B", TINY)


def result_of(capsys, *argv):
    bench_train.main([*argv, "--config", "B"])
    captured = capsys.readouterr()
    return json.loads(captured.out.splitlines()[-1]), captured


@pytest.mark.parametrize("task", ["train_full", "train_lora"])
def test_train(task, tiny, capsys):
    result, _ = result_of(capsys, "--task", task, "--dtype", "bf16", "--batch", "2", "--seq", "16", "--reps", "2")
    expected = {
        "peer": "ours",
        "task": task,
        "config": "B",
        "dtype": "bf16",
        "mode": "",
        "compute": "fp32" if kernels.bf16_missing() else "bf16",
        "threads": bench_train.THREADS,
        "weights": "drawn",
    }
    assert {key: result[key] for key in expected} == expected
    rate = result["tok_s"]
    assert rate["n"] == 2 and 0 < rate["min"] <= rate["median"] <= rate["max"]
    assert result["tokens"] == result["positions"] == 32 and result["steps"] == 1
    assert result["loss"][1] < result["loss"][0] and result["peak_rss_mb"] > 0


def test_train_on_a_rounded_base_of_a_folder(tmp_path, capsys):
    folder = str(tiny_models.write(tmp_path, "llama"))
    argv = ["--task", "train_lora", "--weight_quantize_algo", "nf4", "--batch", "2", "--seq", "16", "--reps", "1"]
    bench_train.main([*argv, "--model", folder, "--profile"])
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert result["base"] == "nf4" and result["weights"] == folder and "in nf4, 4." in captured.out
    assert "forward  dequantize_table" in captured.err


@pytest.mark.parametrize("with_torch", [False, pytest.param(True, marks=pytest.mark.torch)])
def test_bases_of_lora_side_by_side(with_torch, request, tmp_path, capsys, monkeypatch):
    """Each case is a process that takes steps in turn."""
    monkeypatch.setattr(bench_qlora, "REST", 0.0)
    python = request.config.getoption("--hf-python")
    if with_torch and python is None:
        pytest.skip("needs --hf-python: a Python with torch and peft")
    wanted = ["ours fp32", "ours nf4"] + ["peft bf16"] * with_torch
    argv = ["--model", str(tiny_models.write(tmp_path, "llama")), "--batch", "1", "--seq", "16", "--reps", "2"]
    result = bench_qlora.main([*argv, "--cases", *wanted, *(["--peft", python] if with_torch else [])])
    rows = result["rows"]
    assert list(rows) == wanted and rows["ours fp32"]["ratio"] == 1.0
    assert all(len(row["seconds"]) == 2 and row["tok_s"] > 0 and row["peak_rss_mb"] > 0 for row in rows.values())
    assert len({row["trainable"] for row in rows.values()}) == 1


def test_sft_counts_only_real_tokens_and_profiles_every_op(tiny, capsys):
    lengths = bench_train.Samples("B").lengths
    result, captured = result_of(capsys, "--task", "sft", "--mode", "zero_padding", "--profile", "--reps", "1")
    assert result["mode"] == "zero_padding" and result["eff_tok_s"]["n"] == 1 and "tok_s" not in result
    assert result["tokens"] == lengths.sum() and result["positions"] % (2 * 1024) in (0, 1024)
    assert result["tokens"] / result["positions"] > 0.9
    for row in ("forward  attention", "backward _Attention", "backward the rest", "adamw", "gradient norm"):
        assert row in captured.err, captured.err


def test_dpo_counts_the_prompt_twice_and_pads_nothing(tiny, capsys):
    pairs = bench_train.Pairs("B").pairs
    result, _ = result_of(capsys, "--task", "dpo", "--reps", "1")
    assert result["tokens"] == sum(2 * len(p) + len(c) + len(r) for p, c, r in pairs) and len(pairs) == 32
    assert result["positions"] == sum(len(p) - 1 + len(c) + len(r) for p, c, r in pairs) and result["steps"] == 8
    assert result["eff_tok_s"]["n"] == 1 and "tok_s" not in result
    assert abs(result["loss"][0] - 0.693) < 0.02 and result["loss"][1] < result["loss"][0]


def test_samples_equal_those_of_the_peers():
    """Their lengths, ids and targets, so that tokens per second mean the same work."""
    samples = bench_train.Samples("A")
    assert len(samples) == 32 and samples.lengths[:6].tolist() == [144, 117, 218, 142, 85, 174]
    assert samples.ids[0][:4].tolist() == [15147, 16383, 24167, 30415]
    ids, labels = samples.sample(1)
    half = len(ids) // 2
    assert (labels[: half - 1] == -100).all() and labels[-1] == -100
    assert (labels[half - 1 : -1] == ids[half:]).all()
    pairs = bench_train.Pairs("A").pairs
    assert len(pairs) == 16 and [[len(part) for part in pair] for pair in pairs[:2]] == [[27, 67, 64], [36, 193, 150]]
    assert pairs[0][0][:4].tolist() == [26804, 8378, 3506, 9558]


@pytest.mark.parametrize("with_torch", [False, pytest.param(True, marks=pytest.mark.torch)])
def test_kernels(with_torch, request, capsys, monkeypatch):
    """Every row is there, with a time of ours and, in the same run, of torch's."""
    monkeypatch.setattr(bench_kernels, "REST", 0.0)
    python = request.config.getoption("--hf-python")
    if with_torch and python is None:
        pytest.skip("needs --hf-python: a Python with torch")
    bench_kernels.main(["--small", "--turns", "1", *(["--torch", python] if with_torch else [])])
    text = capsys.readouterr().out
    result = json.loads(text.splitlines()[-1])
    bf16 = kernels.bf16_missing() is None
    assert result["turns"] == 1 and result["peak"]["memory"] > 0 and ("torch" in result) == with_torch
    assert [row["part"] for row in result["gemm"]] == ["forward", "dx", "dw", "dx, dw"]
    assert all(row["fp32, frozen" if row["part"] == "dx" else "fp32"] > 0 for row in result["gemm"])
    assert all((row["bf16, frozen" if row["part"] == "dx" else "bf16"] > 0) == bf16 for row in result["gemm"] if bf16)
    full, packed, sparse = result["attention"][:2], result["attention"][2:4], result["attention"][4:]
    assert [row["packed"] for row in full + packed] == [None, None, 32, 32]
    assert [row["visible"] for row in sparse] == [1.0, 3 * 32 * 33 / (96 * 97)]
    names = {row["op"] for row in result["others"]}
    assert names == {name for name in bench_kernels.OTHERS if bf16 or "bf16" not in name}
    for row in full + packed + result["others"]:
        assert row["ours"] > 0 and (row.get("torch", 0) > 0) == with_torch


def test_only_one_table(capsys):
    result = bench_kernels.main(["--small", "--turns", "1", "--only", "gemm"])
    assert "gemm" in result and not {"attention", "others"} & set(result)
    assert "attention" not in capsys.readouterr().out


def test_scores_of_quantized_models():
    """Two tokens, a vocabulary of two: by hand."""
    right, found = np.log([[0.4, 0.6], [0.3, 0.7]]), np.log([[0.25, 0.75], [0.6, 0.4]])
    scores = Scores()
    scores.add(found.astype(np.float32), right.astype(np.float32), np.array([1, 0]))
    losses, float_losses = -np.log([0.75, 0.6]), -np.log([0.6, 0.3])
    first = 0.4 * np.log(0.4 / 0.25) + 0.6 * np.log(0.6 / 0.75)
    second = 0.3 * np.log(0.3 / 0.6) + 0.7 * np.log(0.7 / 0.4)
    expected = {"ppl": np.exp(losses.mean()), "kl": (first + second) / 2, "accuracy": 100.0, "top1": 50.0}
    expected["ppl_ratio_se"] = 100 * np.std(losses - float_losses) / np.sqrt(2)
    expected["kl_p99"] = np.percentile([first, second], 99)
    assert scores.figures() == pytest.approx(expected, abs=1e-3)
