"""trainer.py: arguments, output folder, schedule, AdamW, checkpoints under kill -9 and on a full disk, log, metrics.

python -m pytest tests/test_trainer.py              # two CPU cores, about a minute
export PYTHONPATH=.:tests/golden:tests/ranks:tests/bench
python tests/test_trainer.py FOLDER 300      # the kill -9 harness alone, with as many kills as you like
"""

import dataclasses
import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path

import numpy as np
import paddle
import pytest
from bench_train import global_grad_norm

import dpo
import finetune
import parallel
import pretrain
import trainer
from arguments import REPORTS, TrainingArgs, parse_args
from checkpoint import (
    DONE,
    CheckpointManager,
    SavePlan,
    TrainState,
    find_checkpoint,
    incomplete,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    update_best,
)
from formats.files import UserError
from formats.paddlenlp import ALIASES, HARMLESS, IGNORED, OPTIONS, REFUSED, SHORTHANDS
from formats.tensor_files import read_safetensors
from formats.weights import SaveEntry, Weight
from logger import WRITERS, Log, find_writers
from parallel import Degrees, Topology
from trainer import AdamW

REPO = Path(__file__).resolve().parents[1]
CONFIGS = REPO.parent / "shared" / "upstream" / "configs" / "llama"

# Every key of PaddleNLP's JSON files for Llama that is neither a field of TrainingArgs nor one of every script.
UPSTREAM_KEYS = """act_quant_method actor_model_name_or_path attention_probs_dropout_prob auto_clip autoclip_step
    autotuner_benchmark benchmark beta cachekv_quant_method clip_range_ratio clip_range_score clip_range_value
    continue_training critic_learning_rate critic_lr_scheduler_type critic_min_learning_rate critic_recompute
    critic_recompute_granularity critic_warmup_ratio critic_weight_decay dataloader_num_workers dataset_name_or_path
    dev_dataset_path distributed_dataloader do_awq do_gptq do_ptq eval_accumulation_steps eval_datasets eval_mode
    eval_with_do_generation flash_mask fp16_opt_level fused_linear gptq_step greedy_zero_padding hidden_dropout_prob
    input_dir intervention_type kl_coeff kl_loss_coeff label_smoothing lazy lokr lora lora_rank loss_type max_dec_len
    max_length max_prompt_len max_seq_len max_seq_length min_dec_len normalize_advantage normalize_reward
    normalize_score_during_training normalizer_momentum normalizer_type offload_level per_device_prompt_batch_size
    min_lr pipeline_parallel_config pissa placeholder_token prefix_tuning process_reward prompt_key ptq_step ptx_coeff
    ptx_datasets quant_type regularization release_grads remove_unused_columns repetition_penalty response_key
    reward_model_name_or_path reward_server reward_tokens recompute_use_reentrant reft rl_algorithm rollout_n
    rslora_plus simpo_gamma skip_profile_timer smooth smooth_all_linears smooth_k_piece
    smooth_piecewise_search smooth_search_piece smooth_step src_length temperature tensor_parallel_output top_p
    train_dataset_path train_datasets update_iters use_flash_attention use_fused_head_and_loss_fn
    ref_model_update_steps unified_checkpoint use_fused_rms_norm use_fused_rope use_fusemt use_mora use_rm_server vera
    weight_quant_method
    weight_quantize_algo zero_padding""".split()


@dataclasses.dataclass
class Args(TrainingArgs):
    """As a script has it: own fields beside the shared ones."""

    model_name_or_path: str = ""
    tokenizer_name_or_path: str | None = None
    dataset_name_or_path: str = ""
    zero_padding: bool = False
    lora: bool = False
    lora_target_modules: list[str] | None = None


def make_args(folder, **values):
    """A checked Args with short steps."""
    values = {"output_dir": str(folder), "do_train": True, "logging_steps": 1, "seed": 7, **values}
    args = Args(**values)
    args.check()
    return args


def parse(tmp_path, *cli, **keys):
    """parse_args of a JSON file with these keys, then the command line."""
    path = tmp_path / "args.json"
    path.write_text(json.dumps({"output_dir": "out", "do_train": True, **keys}))
    return parse_args(Args, [str(path), *cli])


# ---------------------------------------------------------------------------------------------- arguments


def test_json_then_command_line_later_wins(tmp_path, capsys):
    (tmp_path / "base.json").write_text('{"_doc": "text", "learning_rate": 1, "seed": 3, "do_train": 1, "bf16": false}')
    (tmp_path / "more.json").write_text('{"seed": 4, "save_total_limit": null, "resume_from_checkpoint": true}')
    files = [str(tmp_path / "base.json"), str(tmp_path / "more.json")]
    cli = "--output_dir out --recompute --max_steps -1 --do_eval=1 --logging_dir= --save_total_limit none"
    more = "--warmup_ratio 1e-1 --lora_target_modules q_proj v_proj --seed 5 --seed 6"
    args = parse_args(Args, [*files, *cli.split(), *more.split()])
    assert (args.seed, args.learning_rate, args.do_train, args.recompute, args.do_eval) == (6, 1.0, True, True, True)
    assert type(args.learning_rate) is float and args.do_train is True
    assert args.resume_from_checkpoint is True and args.save_total_limit is None and args.logging_dir == ""
    assert args.max_steps == -1 and args.warmup_ratio == 0.1 and args.lora_target_modules == ["q_proj", "v_proj"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ({"learning_rate": "1e-4"}, 'learning_rate: "1e-4" is the wrong type; a number is needed'),
        ({"max_steps": 1.5}, "max_steps: 1.5 is the wrong type; a whole number is needed"),
        ({"max_steps": True}, "max_steps: true is the wrong type"),
        ({"do_eval": 2}, "do_eval: 2 is the wrong type; true or false is needed"),
        ({"do_eval": "true"}, 'do_eval: "true" is the wrong type'),
        ({"seed": None}, "seed: null is the wrong type"),
        ({"lora_target_modules": [1]}, "lora_target_modules: [1] is the wrong type; a list of text or null is needed"),
        ({"tensor_parallel_degree": 8}, "tensor_parallel_degree 8 x pipeline_parallel_degree 1 x sharding"),
        ({"expert_parallel_degree": 4}, "expert_parallel_degree: 4, but this run has 1 process"),
        ({"bf16": True, "fp16": True}, "fp16 and bf16 are both true"),
        ({"device": "abacus"}, "device: 'abacus' is not in this Paddle"),
        ({"output_dir": ""}, "output_dir: missing"),
        ({"do_train": False}, "nothing to do"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: 0; it must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate: -1.0; it must not be negative"),
        ({"adam_beta2": 1.0}, "adam_beta2: 1.0; it must be at least 0 and below 1"),
        ({"num_train_epochs": 0}, "num_train_epochs: 0.0; it must be positive"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type: 'cosin'; possible are linear, cosine"),
        ({"save_strategy": "epochs"}, "save_strategy: 'epochs'; possible are no, steps, epoch"),
        ({"metric_for_best_model": "acc"}, "metric_for_best_model: 'acc'; possible are loss, accuracy"),
        ({"report_to": "mlflow"}, "report_to: 'mlflow'; possible are visualdl, tensorboard, wandb, all and none"),
        ({"report_to": ["wandb", "board"]}, "report_to: 'board'; possible are visualdl"),
        (
            {"min_lr": 1e-6, "min_learning_rate": 1e-7},
            "min_learning_rate: min_lr sets it to 1e-06, min_learning_rate to 1e-07",
        ),
        ({"min_learning_rate": 1e-3}, "learning_rate 5e-05 is below 0.001"),
        ({"warmup_steps": 10, "decay_steps": 10}, "decay_steps 10 must be more than warmup_steps 10"),
        ({"load_best_model_at_end": True, "evaluation_strategy": "epoch"}, "needs save_strategy (steps) to equal eval"),
        (
            {"load_best_model_at_end": True, "evaluation_strategy": "steps", "eval_steps": 200},
            "save_steps (500) to be a multiple of eval_steps (200)",
        ),
        ({"tensor_parallel_degree": 2, "sharding_parallel_degree": 4}, "= 8 processes, but this run has 1"),
        ({"vera": True}, "vera: True: this adapter is not supported"),
        ({"do_ptq": 1}, "do_ptq: 1: use quantize.py to quantize"),
        ({"optim": "sgd"}, "optim: 'sgd': the only optimizer is adamw"),
        ({"dataloader_shuffle": False}, "dataloader_shuffle: False: training data is always shuffled"),
    ],
)
def test_bad_arguments(tmp_path, capsys, keys, message):
    with pytest.raises(UserError) as error:
        parse(tmp_path, **keys)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "args.json: no such file"),
        ('{"seed": 1,\n "max_steps" 2}', "args.json:2: not JSON"),
        ('{"seed": 1,\n "max_steps": 2,\n "seed": 1}', "args.json:3: key 'seed' is given 2 times"),
        ("[1]", "args.json: holds a list; an object is needed"),
        ('{"learning_rate": NaN}', "args.json: NaN is not a JSON number"),
        (b"\xff\xfe", "args.json: not readable as UTF-8 text"),
    ],
)
def test_bad_files(tmp_path, text, message):
    if text is not None:
        (tmp_path / "args.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        parse_args(Args, [str(tmp_path / "args.json")])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "cli, message",
    [
        ("--seed", "--seed: a value is missing"),
        ("--seed x", 'command line: seed: "x" is the wrong type; a whole number'),
        ("--learning_rate inf", 'learning_rate: "inf" is the wrong type'),
        ("--sed 1", "command line: unknown key 'sed'; did you mean 'seed'?"),
    ],
)
def test_bad_command_line(tmp_path, cli, message):
    with pytest.raises(UserError) as error:
        parse(tmp_path, *cli.split())
    assert message in str(error.value)


def test_ignored_and_notes_are_one_line_each(tmp_path, capsys):
    keys = {"use_flash_attention": True, "sharding": "stage2", "vera": False, "optim": "adamw", "fp16": True}
    parse(tmp_path, load_best_model_at_end=True, recompute=True, recompute_granularity="full_attn", **keys)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0] == "ignored: use_flash_attention: the key `kernels` chooses which kernels run"
    assert [line.split(":")[1].strip() for line in lines[:3]] == ["use_flash_attention", "vera", "optim"]
    assert "float32 is used" in lines[3] and lines[4] == "ignored: sharding: this run has one process"
    assert "last model is kept" in lines[5]


def test_every_upstream_key_is_known():
    fields = {field.name for field in dataclasses.fields(TrainingArgs)}
    tables = {**IGNORED, **REFUSED, **OPTIONS, **ALIASES}
    assert not set(UPSTREAM_KEYS) - set(tables)
    sizes = len(IGNORED) + len(REFUSED) + len(OPTIONS)
    assert not fields & set(tables) and len({**IGNORED, **REFUSED, **OPTIONS}) == sizes
    assert set(HARMLESS) <= set(REFUSED) and all(why for why in tables.values())
    for path in CONFIGS.glob("**/*.json"):
        keys = set(json.loads(path.read_text())) - fields - {"model_name_or_path", "tokenizer_name_or_path"}
        assert not keys - set(UPSTREAM_KEYS), path


def test_no_field_exists_only_to_be_ignored_or_refused():
    """--help lists what a script uses: a key of the tables is not a field of any training script."""
    for script in (pretrain, finetune, dpo):
        fields = {field.name for field in dataclasses.fields(script.Args)}
        assert not fields & {*SHORTHANDS, *OPTIONS}
        assert not fields & {"flash_mask", "unified_checkpoint", "min_lr", "rslora_plus"}
    assert {"pissa", "lora_dropout"}.isdisjoint(field.name for field in dataclasses.fields(dpo.Args))
    for targets in SHORTHANDS.values():
        assert any(set(targets) <= {f.name for f in dataclasses.fields(s.Args)} for s in (pretrain, finetune, dpo))


def test_aliases_and_shorthands_set_our_keys(tmp_path, capsys):
    args = parse(tmp_path, "--min_lr", "2e-6", min_learning_rate=1e-6, gradient_checkpointing=True)  # later wins
    assert args.min_learning_rate == 2e-6 and args.recompute is True and capsys.readouterr().out == ""
    assert parse(tmp_path, min_lr=1e-6, min_learning_rate=1e-6).min_learning_rate == 1e-6
    assert parse(tmp_path, "--eval_strategy", "epoch").evaluation_strategy == "epoch"
    with pytest.raises(UserError, match='args.json:1: min_lr: "low" is the wrong type; a number is needed'):
        parse(tmp_path, min_lr="low")
    keys = {"model_name_or_path": "m", "train_dataset_path": "t", "output_dir": "out", "do_train": True, "lora": True}
    path = tmp_path / "dpo.json"
    for more in ({"rslora_plus": True, "dpo_beta": 0.3}, {"rslora_plus": False}):
        path.write_text(json.dumps(keys | more))
        args = parse_args(dpo.Args, [str(path)])
        on = more["rslora_plus"]
        assert (args.rslora, args.lora_plus_scale, args.lora_alpha) == ((True, 4.0, 4.0) if on else (False, 1.0, 16.0))
        assert args.beta == (0.3 if on else 0.1)
    path.write_text(json.dumps(keys | {"rslora_plus": True, "lora_alpha": 8}))
    with pytest.raises(UserError, match="lora_alpha: rslora_plus sets it to 4.0, lora_alpha to 8; give one"):
        parse_args(dpo.Args, [str(path)])
    path.write_text(json.dumps(keys | {"flash_mask": True, "unified_checkpoint": True, "ref_model_update_steps": -1}))
    capsys.readouterr()
    parse_args(dpo.Args, [str(path)])
    assert [line.split(":")[1] for line in capsys.readouterr().out.splitlines()] == [
        " flash_mask",
        " unified_checkpoint",
    ]


def test_derived_values(tmp_path):
    args = parse(tmp_path, do_eval=True, eval_steps=20, metric_for_best_model="accuracy", min_lr=1e-6)
    assert (args.evaluation_strategy, args.greater_is_better, args.min_learning_rate) == ("steps", True, 1e-6)
    args = parse(tmp_path, evaluation_strategy="epoch", metric_for_best_model="no", sharding_parallel_degree=-1)
    assert (args.do_eval, args.metric_for_best_model, args.greater_is_better) == (True, "loss", False)
    assert parse(tmp_path, do_eval=True).evaluation_strategy == "no"


def test_run_script_exit_codes(tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"output_dir": str(tmp_path / "out"), "do_train": True}))

    def run(error, argv=(str(path),)):
        def main(args):
            raise error

        with pytest.raises(BaseException) as caught:
            trainer.run_script(main, Args, list(argv))
        return getattr(caught.value, "code", caught.value), capsys.readouterr().err

    assert run(UserError("data.json:3: no src")) == (2, "error: data.json:3: no src\n")
    code, line = run(None, ["missing.json"])
    assert code == 2 and line.startswith("error: missing.json: no such file") and line.count("\n") == 1
    code, line = run(OSError(errno.ENOSPC, "No space left on device", "out/metrics.jsonl"))
    assert code == 2 and line == "error: out/metrics.jsonl: the disk is full; free some space, then resume\n"
    assert run(KeyboardInterrupt())[0] == 130
    bug = ZeroDivisionError()
    assert run(bug)[0] is bug  # a bug keeps its traceback
    other = OSError(errno.EIO, "Input/output error")
    assert run(other)[0] is other
    trainer.run_script(lambda args: None, Args, ["--help"])
    assert "output_dir = ''" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- output folder


def test_output_dir_of_another_run_is_refused_then_replaced(tmp_path, capsys):
    out = tmp_path / "out"
    args = make_args(out)
    trainer.prepare_output_dir(args)
    assert json.loads((out / "run_args.json").read_text())["seed"] == 7
    printed = capsys.readouterr().out.replace("\n", " ")
    assert printed.startswith(f"arguments: output_dir={str(out)!r} seed=7 do_train=True logging_steps=1 ")
    assert "learning_rate" not in printed and "=None" not in printed  # what has its default is only in run_args.json
    trainer.prepare_output_dir(args)  # nothing was trained: no other run
    (out / "checkpoint-3").mkdir()
    (out / "metrics.jsonl").write_text("")
    (out / "notes.txt").write_text("the user's own")
    before = sorted(out.rglob("*"))
    with pytest.raises(UserError, match="holds another run .*checkpoint-3.*overwrite_output_dir"):
        trainer.prepare_output_dir(args)
    inside = make_args(out, overwrite_output_dir=True, model_name_or_path=str(out / "checkpoint-3"))
    with pytest.raises(UserError, match="model_name_or_path: .*checkpoint-3 is inside output_dir"):
        trainer.prepare_output_dir(inside)
    assert sorted(out.rglob("*")) == before
    trainer.prepare_output_dir(make_args(out, do_train=False, do_eval=True))  # reads a trained run: leaves it as it is
    trainer.prepare_output_dir(make_args(out, resume_from_checkpoint=True, overwrite_output_dir=True))
    assert sorted(out.rglob("*")) == before
    trainer.prepare_output_dir(make_args(out, overwrite_output_dir=True))
    assert sorted(path.name for path in out.iterdir()) == [".run_lock", "notes.txt", "run_args.json"]


def test_output_dir_that_is_a_model_or_a_file_is_never_emptied(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json, but no run of these scripts"):
        trainer.prepare_output_dir(make_args(tmp_path, overwrite_output_dir=True))
    with pytest.raises(UserError, match="is a file; a folder is needed"):
        trainer.prepare_output_dir(make_args(tmp_path / "config.json"))
    with pytest.raises(UserError, match="cannot be written to"):
        trainer.prepare_output_dir(make_args("/proc/nowhere"))


# ---------------------------------------------------------------------------------------------- schedule


def test_steps_and_micro_batches(tmp_path):
    args = make_args(tmp_path, gradient_accumulation_steps=4, num_train_epochs=2.5)
    assert trainer.total_steps(args, 10) == (8, 3)  # ceil(10 / 4) = 3 steps an epoch; ceil(2.5 * 3) = 8
    assert trainer.total_steps(dataclasses.replace(args, max_steps=5), 10) == (5, 3)
    assert trainer.micro_batches(0, args, 10) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert trainer.micro_batches(2, args, 10) == [(0, 8), (0, 9)]
    every = [pair for step in range(6) for pair in trainer.micro_batches(step, args, 10)]
    assert every == [(epoch, i) for epoch in (0, 1) for i in range(10)]
    with pytest.raises(UserError, match="less than one batch"):
        trainer.total_steps(args, 0)
    assert [step for step in range(8) if trainer.is_due("steps", 3, step, 4)] == [3, 6]
    assert [step for step in range(9) if trainer.is_due("epoch", 3, step, 4)] == [4, 8]
    assert not any(trainer.is_due("no", 1, step, 1) for step in range(3))


@pytest.mark.parametrize(
    "kind, keys, expected",  # step -> rate, by hand, for a peak of 1 and 100 steps
    [
        ("linear", {"warmup_steps": 10}, {0: 0, 5: 0.5, 10: 1, 55: 0.5, 99: 1 / 90, 100: 0}),
        ("linear", {"warmup_ratio": 0.041}, {4: 0.8, 5: 1, 100: 0}),  # ceil(4.1) = 5 steps
        ("linear", {"warmup_ratio": 0.5, "warmup_steps": 10}, {5: 0.5, 10: 1}),
        ("linear", {"min_learning_rate": 0.2, "decay_steps": 50}, {0: 1, 25: 0.6, 50: 0.2, 80: 0.2}),
        ("cosine", {"warmup_steps": 20}, {10: 0.5, 20: 1, 40: (1 + math.sqrt(0.5)) / 2, 60: 0.5, 100: 0}),
        ("cosine", {"min_learning_rate": 0.1, "decay_steps": 80}, {0: 1, 40: 0.55, 80: 0.1, 99: 0.1}),
        ("cosine", {"min_learning_rate": 0.1, "decay_steps": 0}, {50: 0.55, 100: 0.1}),
        ("cosine", {"num_cycles": 1.0}, {25: 0.5, 50: 0, 75: 0.5, 90: (1 + math.cos(1.8 * math.pi)) / 2}),
        ("constant", {"warmup_steps": 10}, {0: 1, 99: 1}),
        ("constant_with_warmup", {"warmup_steps": 10}, {0: 0, 5: 0.5, 10: 1, 99: 1}),
        ("polynomial", {"power": 2.0, "lr_end": 0.2}, {0: 1, 50: 0.4, 75: 0.25, 100: 0.2, 120: 0.2}),
    ],
)
def test_learning_rate(tmp_path, kind, keys, expected):
    args = make_args(tmp_path, learning_rate=1.0, lr_scheduler_type=kind, **keys)
    for step, rate in expected.items():
        assert trainer.learning_rate(step, args, 100) == pytest.approx(rate, abs=1e-12), step


# ---------------------------------------------------------------------------------------------- optimizer


def tiny(seed):
    """Three raw parameters as Weights, one of them in the transposed layout, and one frozen that is no Weight."""
    generator = np.random.default_rng(seed)

    def parameter(*shape):
        found = paddle.create_parameter(list(shape), "float32")
        found.set_value(generator.standard_normal(shape).astype("float32"))
        return found

    weights = [Weight("a.weight", parameter(5, 7), True), Weight("a.bias", parameter(7), False)]
    return weights + [Weight("b.weight", parameter(7, 3), False)]


def tiny_loss(weights, step, micro, dropout=0.5):
    """A number that depends on all three, with dropout."""
    a, bias, b = (weight.parameter for weight in weights)
    x = paddle.to_tensor(np.random.default_rng([step, micro]).standard_normal((4, 5)).astype("float32"))
    hidden = paddle.nn.functional.dropout(paddle.tanh(x @ a + bias), dropout)
    return ((hidden @ b) ** 2).mean()


def test_adamw_is_paddles_with_decay_groups_and_rates(tmp_path):
    args = make_args(tmp_path, weight_decay=0.1, learning_rate=0.01, adam_beta2=0.95)
    ours, theirs = tiny(0), tiny(0)
    optimizer = AdamW(ours, args, lr_scale={"b.weight": 4.0})
    for weight in theirs:
        weight.parameter.optimize_attr["learning_rate"] = 4.0 if weight.name == "b.weight" else 1.0
    matrices = [weight.parameter.name for weight in theirs if weight.parameter.ndim >= 2]
    constants = {"beta2": 0.95, "weight_decay": 0.1, "apply_decay_param_fun": lambda name: name in matrices}
    reference = paddle.optimizer.AdamW(0.01, parameters=[weight.parameter for weight in theirs], **constants)
    for step in range(5):
        for weights in (ours, theirs):
            (tiny_loss(weights, step, 0, dropout=0.0) * (2.0 if weights is ours else 1.0)).backward()
        optimizer.step(0.01, grad_scale=0.5)
        reference.step()
        optimizer.zero_grad()
        reference.clear_grad()
    for mine, other in zip(ours, theirs):
        np.testing.assert_allclose(mine.parameter.numpy(), other.parameter.numpy(), rtol=2e-6, atol=2e-7)
        assert mine.parameter.grad is None


def test_adamw_leaves_what_has_no_gradient(tmp_path):
    weights = tiny(0)
    before = [weight.parameter.numpy() for weight in weights]
    optimizer = AdamW(weights, make_args(tmp_path, weight_decay=0.5))
    (weights[0].parameter ** 2).sum().backward()
    optimizer.step(0.1)
    same = [np.array_equal(a, weight.parameter.numpy()) for a, weight in zip(before, weights)]
    assert same == [False, True, True]


def test_grad_norm_and_clipping():
    weights = tiny(0)
    assert global_grad_norm(weights) == 0.0
    (3 * weights[0].parameter.sum() + 4 * weights[1].parameter.sum()).backward()
    assert global_grad_norm(weights) == pytest.approx(math.sqrt(9 * 35 + 16 * 7), rel=1e-7)
    assert [trainer.clip_scale(norm, 1.0) for norm in (0.5, 1.0, 4.0)] == [1.0, 1.0, 0.25]
    assert trainer.clip_scale(4.0, 0.0) == 1.0


def test_seed_step_is_a_function_of_all_three():
    def draw(*key):
        trainer.seed_step(*key)
        return paddle.rand([4]).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({tuple(draw(*key)) for key in ((1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (3, 2, 1))}) == 5


# ---------------------------------------------------------------------------------------------- checkpoints


OPTIMIZER = "optimizer-00001-of-00001.safetensors"


class Plain(CheckpointManager):
    """Saves of {name: array} in place of a model, and of what else a function writes."""

    def __init__(self, args, arrays, optimizer=None, shards=None, write=lambda folder: None):
        super().__init__(args, None, None, optimizer=optimizer, shards=shards)
        self.arrays, self.write = arrays, write

    def tensors_to_save(self, dtype=None):
        return SavePlan({"model": [constant(name, array) for name, array in self.arrays().items()]}, {}, self.write)


def constant(name, array):
    return SaveEntry({name: (array.shape, array.dtype)}, [], lambda: [array])


def whole(weights):
    """ZeroOptimizer of one process: nothing is sharded."""
    nowhere = types.SimpleNamespace(elsewhere=frozenset())
    return types.SimpleNamespace(
        weights=weights,
        model=nowhere,
        topology=parallel.SINGLE,
        place_of=lambda w: (),
        held=lambda w: (w.parameter,),
        laid=lambda w, m: m,
        extent=lambda w: None,
    )


def train(folder, weights, stop, resume=False, save=(), **keys):
    """A script's loop in small: accumulation of 2, dropout, cosine, clipping. Returns (losses, final arrays)."""
    keys |= {"lr_scheduler_type": "cosine", "learning_rate": 0.05, "warmup_steps": 2, "weight_decay": 0.1}
    args = make_args(folder, max_grad_norm=0.5, save_total_limit=2, resume_from_checkpoint=resume or None, **keys)
    optimizer, state, losses = AdamW(weights, args), TrainState(), []
    path = find_checkpoint(args)
    if path:
        state = load_checkpoint(path, optimizer, whole(weights))
        arrays = read_safetensors(path / "model.safetensors")
        for weight in weights:
            weight.parameter.set_value(weight.from_numpy(arrays[weight.name]))

    checkpoints = Plain(args, lambda: {weight.name: weight.to_numpy() for weight in weights}, optimizer, whole(weights))
    while state.step < stop:
        total = 0.0
        for micro in range(2):
            trainer.seed_step(args.seed, state.step, micro)
            loss = tiny_loss(weights, state.step, micro)
            loss.backward()
            total += float(loss)
        norm = global_grad_norm(weights) * 0.5
        optimizer.step(trainer.learning_rate(state.step, args, 9), 0.5 * trainer.clip_scale(norm, args.max_grad_norm))
        optimizer.zero_grad()
        losses.append(total)
        state.step += 1
        state.consumed_tokens += 11
        if state.step in save:
            checkpoints.save(state)
    checkpoints.wait()
    return losses, [weight.to_numpy() for weight in weights]


def test_resume_is_bitwise(tmp_path, capsys):
    losses, final = train(tmp_path / "whole", tiny(1), 9)
    train(tmp_path / "cut", tiny(1), 7, save=(3, 5))  # steps 6 and 7 are lost
    more, resumed = train(tmp_path / "cut", tiny(2), 9, resume=True)  # other initial weights: none survive
    assert more == losses[5:]
    for a, b in zip(final, resumed):
        assert np.array_equal(a, b)
    assert capsys.readouterr().out == f"resume: from {tmp_path / 'cut' / 'checkpoint-5'}\n"
    earlier, _ = train(tmp_path / "branch", tiny(2), 9, resume=str(tmp_path / "cut" / "checkpoint-3"))
    assert earlier == losses[3:]
    train(tmp_path / "cut", tiny(2), 6, resume=True, adam_beta2=0.9)
    assert "not an exact continuation, changed: adam_beta2 0.999 -> 0.9" in capsys.readouterr().out


def test_checkpoint_layout(tmp_path):
    weights = tiny(1)
    train(tmp_path, weights, 3, save=(3,))
    path = tmp_path / "checkpoint-3"
    index = json.loads((path / "optimizer.safetensors.index.json").read_text())
    arrays = read_safetensors(path / OPTIMIZER)
    assert set(index["weight_map"]) == set(arrays) and set(index["weight_map"].values()) == {OPTIMIZER}
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    keys = ("moment1_0", "moment2_0", "beta1_pow_acc_0", "beta2_pow_acc_0")
    assert set(arrays) == {f"{weight.name}/{key}" for weight in weights for key in keys}
    assert arrays["a.weight/moment1_0"].shape == (7, 5)  # as the weight lies in the file: [out, in]
    assert arrays["a.weight/beta1_pow_acc_0"] == np.float32(0.9**4)  # Paddle's is one ahead
    saved = json.loads((path / "trainer_state.json").read_text())
    assert saved["step"] == saved["optimizer_steps"] == 3 and saved["consumed_tokens"] == 33
    assert saved["data_position"] == {"epoch": 0, "next_step": 3, "seed": 7} and saved["args"]["learning_rate"] == 0.05
    assert saved["files"].keys() == {"model.safetensors", OPTIMIZER, "optimizer.safetensors.index.json"}
    for name, written in saved["files"].items():
        content = (path / name).read_bytes()
        assert written == {"size": len(content), "crc32": zlib.crc32(content)}


def test_optimizer_state_that_does_not_fit(tmp_path):
    train(tmp_path, tiny(1), 3, save=(3,))
    path = tmp_path / "checkpoint-3"
    args = make_args(tmp_path)
    with pytest.raises(UserError, match="missing none; unexpected b.weight"):
        load_checkpoint(path, AdamW(tiny(1)[:2], args), whole(tiny(1)[:2]))
    turned = [Weight(weight.name, weight.parameter, not weight.transposed) for weight in tiny(1)]
    with pytest.raises(UserError, match="optimizer state: a.weight: .* found, .* needed"):
        load_checkpoint(path, AdamW(turned, args), whole(turned))
    (path / OPTIMIZER).unlink()
    with pytest.raises(UserError, match="names the file optimizer-00001-of-00001.safetensors, which is not there"):
        load_checkpoint(path, AdamW(tiny(1), args), whole(tiny(1)))
    (path / "optimizer.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="without optimizer state; resume with ignore_load_lr_and_optim"):
        load_checkpoint(path, AdamW(tiny(1), args), whole(tiny(1)))
    assert load_checkpoint(path).step == 3


class FakeOptimizer:
    """Moments that are a function of the step alone."""

    def __init__(self, step, size=1000):
        self.steps, self.size = step, size

    def entries(self, shards, moment_bits):
        return [constant(f"w/moment{i}_0", content(step, self.size)) for i, step in ((1, self.steps), (2, -self.steps))]


def content(step, size=1000):
    return np.arange(size, dtype=np.float32) + step


def save(folder, step, best=None, size=1000, **keys):
    """A checkpoint whose content follows from its step."""
    args = TrainingArgs(output_dir=str(folder), **keys)
    state = TrainState(step=step, best_checkpoint=best)

    return Plain(args, lambda: {"w": content(step, size)}, FakeOptimizer(step, size)).save(state)


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def find(folder, wanted=True):
    return find_checkpoint(TrainingArgs(output_dir=str(folder), resume_from_checkpoint=wanted))


def test_find_passes_over_what_is_not_complete(tmp_path, capsys):
    assert find(tmp_path) is None and "starting at step 0" in capsys.readouterr().out
    for step in (2, 10, 30, 40, 50):
        save(tmp_path, step)
    with open(tmp_path / "checkpoint-50" / "model.safetensors", "r+b") as file:
        file.truncate(100)
    (tmp_path / "checkpoint-40" / DONE).unlink()
    (tmp_path / "checkpoint-30" / OPTIMIZER).unlink()
    (tmp_path / "checkpoint-final").mkdir()
    capsys.readouterr()
    assert find(tmp_path) == tmp_path / "checkpoint-10"
    lines = capsys.readouterr().out.splitlines()
    assert "checkpoint-50 is passed over: model.safetensors has 100 bytes, 4" in lines[0]
    assert "checkpoint-40 is passed over: it has no completion marker" in lines[1]
    assert "checkpoint-30 is passed over: optimizer-00001-of-00001.safetensors is missing" in lines[2]
    assert find(tmp_path, str(tmp_path / "checkpoint-2")) == tmp_path / "checkpoint-2"
    with pytest.raises(UserError, match="checkpoint-40: it has no completion marker; give a complete one"):
        find(tmp_path, str(tmp_path / "checkpoint-40"))
    with pytest.raises(UserError, match="there is no such folder"):
        find(tmp_path, str(tmp_path / "checkpoint-3"))


def test_an_older_checkpoint_beside_newer_ones_is_refused_when_pruning(tmp_path):
    """What the run saved next would have the lower number, and pruning would remove it first."""
    for step in (2, 4):
        save(tmp_path, step)
    args = TrainingArgs(
        output_dir=str(tmp_path), resume_from_checkpoint=str(tmp_path / "checkpoint-2"), save_total_limit=1
    )
    with pytest.raises(UserError, match="checkpoint-2: output_dir also holds the later checkpoint-4"):
        find_checkpoint(args)
    args.save_total_limit = None
    assert find_checkpoint(args) == tmp_path / "checkpoint-2"


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, best="checkpoint-1", save_total_limit=2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]
    save(tmp_path, 10, best="checkpoint-1", save_total_limit=1)  # one is too few for both: both stay
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-10"]
    save(tmp_path, 9, save_total_limit=0)
    save(tmp_path, 9)  # again, as after resuming from an older one
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-10", "checkpoint-9"]
    assert find(tmp_path).name == "checkpoint-10"


def test_interrupted_deletion_never_looks_complete(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)
    for name in ("rename", "rmtree"):
        with monkeypatch.context() as patch:
            stop = lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
            patch.setattr(*((Path, "rename", stop) if name == "rename" else (shutil, "rmtree", stop)))
            with pytest.raises(KeyboardInterrupt):
                prune_checkpoints(tmp_path, 1)
        complete = [path.name for path in tmp_path.glob("checkpoint-*") if incomplete(path) is None]
        assert complete == ["checkpoint-2"]
    save(tmp_path, 3, save_total_limit=1)  # takes the remains away
    assert names(tmp_path) == ["checkpoint-3"]


def test_a_failing_save_leaves_nothing(tmp_path):
    save(tmp_path, 1)
    args = TrainingArgs(output_dir=str(tmp_path))

    def fail(error):
        def write(target):
            (target / "half").write_text("x")
            raise error

        return lambda: Plain(args, lambda: {}, FakeOptimizer(2), write=write).save(TrainState(step=2))

    with pytest.raises(UserError, match="checkpoint-2: the disk is full .*earlier ones are intact"):
        fail(OSError(errno.ENOSPC, "No space left on device"))()
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())()
    assert names(tmp_path) == ["checkpoint-1"] and incomplete(tmp_path / "checkpoint-1") is None


def test_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small tmpfs needs root")
    try:
        save(disk, 1, size=100_000)  # 1.2 MB, about 0.8 MB stay free
        files, full = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}, 0
        for size in [300_000, 100_000, *range(74_000, 64_000, -100)]:  # full in weights, optimizer, small files
            try:
                save(disk, 2, size=size)
                break
            except UserError as error:
                assert "checkpoint-2: the disk is full (" in str(error) and "\n" not in str(error)
                full += 1
            assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()} == files
            assert names(disk) == ["checkpoint-1"] and find(disk).name == "checkpoint-1"
        assert full > 10 and names(disk) == ["checkpoint-1", "checkpoint-2"] and find(disk).name == "checkpoint-2"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---------------------------------------------------------------------------------------------- kill -9

KILL_SIZE = 50_000  # floats in each of three tensors


def saving_child(folder, first, pipe):
    """Save checkpoints one after the other until killed; the pipe gets each step whose save has returned."""
    for step in range(first, first + 100_000):
        best = f"checkpoint-{step // 4 * 4}" if step >= 4 else None
        save(folder, step, best, KILL_SIZE, save_total_limit=3)
        os.write(pipe, step.to_bytes(8, "little"))


def check_after_kill(folder, last):
    """The newest complete checkpoint, all complete ones verified to the last number; `last` was reported as saved."""
    for path in list_checkpoints(folder):
        if incomplete(path) is None:
            step, optimizer = int(path.name[11:]), read_safetensors(path / OPTIMIZER)
            assert np.array_equal(read_safetensors(path / "model.safetensors")["w"], content(step, KILL_SIZE)), path
            assert np.array_equal(optimizer["w/moment1_0"], content(step, KILL_SIZE)), path
            assert np.array_equal(optimizer["w/moment2_0"], content(-step, KILL_SIZE)), path
    found = find(folder)
    step = 0 if found is None else load_checkpoint(found).step
    assert step in (last, last + 1), (step, last)
    best = load_checkpoint(found).best_checkpoint if found else None
    assert best is None or incomplete(Path(folder) / best) is None, best
    return step


def kill_saves(folder, kills, seed):
    """Kill a saving process `kills` times at random moments and check what it left; returns figures.

    The children are forked from this process, which has paddle imported but has run nothing with it.
    """
    generator, last, in_save, saved = random.Random(seed), 0, 0, 0
    for _ in range(kills):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            try:
                saving_child(folder, last + 1, write)
            finally:
                os._exit(1)
        os.close(write)
        time.sleep(generator.uniform(0.005, 0.25))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child failed by itself"
        with os.fdopen(read, "rb") as pipe:
            done = [int.from_bytes(step, "little") for step in iter(lambda: pipe.read(8), b"")]
        in_save += any(Path(folder).glob("tmp-checkpoint-*"))
        saved += len(done)
        last = check_after_kill(folder, done[-1] if done else last)
    return {"kills": kills, "saves": saved, "killed_with_a_half_folder": in_save, "last": last}


def test_kill_at_any_moment(tmp_path):
    command = [sys.executable, __file__, str(tmp_path / "out"), "30"]
    path = os.pathsep.join([str(REPO), *(str(REPO / "tests" / name) for name in ("ranks", "bench"))])
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["kills"] == 30 and figures["saves"] >= 30 and figures["killed_with_a_half_folder"] >= 5, figures


def test_update_best(tmp_path):
    args, state = make_args(tmp_path, metric_for_best_model="accuracy"), TrainState(step=10)
    save(tmp_path, 10)
    save(tmp_path, 20)
    saves = Plain(args, dict)
    assert update_best(args, state, {"eval_accuracy": 0.5}, saves)
    state.step = 20
    assert not update_best(args, state, {"eval_accuracy": 0.5}, saves)
    assert not update_best(args, state, {"eval_accuracy": math.nan}, saves)
    assert (state.best_metric, state.best_checkpoint) == (0.5, "checkpoint-10")
    state.step = 30  # not saved: better, but nothing to go back to
    assert not update_best(args, state, {"eval_accuracy": 0.9}, saves)
    state.step = 20
    args = make_args(tmp_path, metric_for_best_model="loss")
    assert update_best(args, state, {"eval_loss": 0.4}, saves) and state.best_checkpoint == "checkpoint-20"
    with pytest.raises(UserError, match="eval_bleu4 is not computed here; there are eval_loss"):
        update_best(make_args(tmp_path, metric_for_best_model="bleu4"), state, {"eval_loss": 1.0}, saves)


# ---------------------------------------------------------------------------------------------- log and metrics


def log_steps(args, first, last, **more):
    state = TrainState(step=first)
    log = Log(args, 10, state, **more)
    while state.step < last:
        state.step += 1
        log.step(state, loss=1.0 / state.step, lr=0.1, grad_norm=2.0, tokens=100, seconds=0.5)
    return log, state


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_log_lines_and_files(tmp_path, capsys):
    args = make_args(tmp_path, disable_tqdm=True)
    log, state = log_steps(args, 0, 7, flops_per_token=1e6, peak_flops=1e9)
    log.evaluation(4, {"eval_loss": 0.5, "eval_ppl": math.inf})
    log.evaluation(6, {"eval_loss": 0.4})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # cut off by a kill
    line = capsys.readouterr().out.splitlines()[4]
    parts = "step 5/10 (50.0 %) | loss 0.2000 | lr 1.000e-01 | grad_norm 2.000 | 200 tokens/s | mfu 20.0 % | "
    assert line.startswith(parts + "eta 0:00:02 | peak ") and line.endswith(" GB")
    log, state = log_steps(args, 5, 10)  # resumed at 5
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == list(range(1, 11))
    keys = "step epoch loss lr grad_norm tokens_per_second consumed_tokens eta_seconds peak_memory_gb"
    assert set(rows(tmp_path / "metrics.jsonl")[-1]) == set(keys.split())
    assert rows(tmp_path / "eval_metrics.jsonl") == [{"step": 4, "eval_loss": 0.5, "eval_ppl": None}]
    log.evaluation(4, {"eval_loss": 0.5})  # again after resuming: still one line
    assert rows(tmp_path / "eval_metrics.jsonl") == [{"step": 4, "eval_loss": 0.5}]
    assert len(state.log_history) == 5
    log.close()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))


def test_logging_steps(tmp_path, capsys):
    log_steps(make_args(tmp_path, disable_tqdm=True, logging_steps=4, logging_first_step=True), 0, 10)
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 4, 8, 10]


def test_communication_is_of_steps_only(tmp_path):
    """Shares of the steps' time since the last line, axis by axis, without communication between steps."""
    topology, state = Topology(Degrees(dp=2, tp=2)), TrainState()
    log = Log(make_args(tmp_path, disable_tqdm=True, logging_steps=2), 4, state, topology=topology)
    for talked in (0.1, 0.2, 0.3, 0.5):
        topology.dp.seconds += 7  # evaluation
        log.begin()
        topology.tp.seconds, topology.dp.seconds = topology.tp.seconds + talked, topology.dp.seconds + 0.05
        state.step += 1
        log.step(state, loss=1.0, lr=0.1, grad_norm=2.0, tokens=100, seconds=0.5)
    assert [row["communication"] for row in rows(tmp_path / "metrics.jsonl")] == [
        {"dp": 0.1, "tp": 0.3},
        {"dp": 0.1, "tp": 0.8},
    ]


def test_bar_and_missing_matplotlib(tmp_path, capsys, monkeypatch):
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    log, _ = log_steps(make_args(tmp_path, disable_tqdm=False), 0, 10)
    log.print("between")
    log.close()
    out, err = capsys.readouterr()
    assert "10/10" in err and "loss 0.1000, lr 1.00e-01, 200 tokens/s" in err
    assert "curves.png is not drawn: it needs matplotlib: pip install matplotlib" in out and "| loss" not in out


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_that_is_not_installed(name, tmp_path, monkeypatch):
    for writer in WRITERS.values():
        for module in writer.modules:
            monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"report_to: {name} is not installed: pip install {WRITERS[name].install}$"):
        Log(make_args(tmp_path, report_to=["none", name]), 10, TrainState())
    assert find_writers(make_args(tmp_path, report_to="all")) == []  # of those that are installed, as in transformers


class FakeWriter:
    """visualdl's LogWriter, tensorboardX's SummaryWriter, and a run of wandb."""

    def __init__(self, *args, **kwargs):
        self.made, self.values, self.closed = (args, kwargs), [], False

    def add_scalar(self, name, value, step):
        self.log({name: value}, step)

    def log(self, values, step):
        self.values += [(step, name, value) for name, value in values.items()]

    def close(self):
        self.closed = True

    finish = close


def test_report_to_several_writers(tmp_path, monkeypatch, capsys):
    """A list, text with commas or blanks, and "all" make the same writers, which get the same numbers."""
    made = {}
    for module, name in (("visualdl", "LogWriter"), ("tensorboardX", "SummaryWriter"), ("wandb", "init")):
        fake = types.ModuleType(module)
        setattr(fake, name, lambda *args, _name=module, **kwargs: made.setdefault(_name, FakeWriter(*args, **kwargs)))
        monkeypatch.setitem(sys.modules, module, fake)
    assert tuple(WRITERS) == REPORTS
    for names in ("tensorboard, wandb visualdl", list(REPORTS), "all"):
        made.clear()
        args = make_args(tmp_path, report_to=names, run_name="first", disable_tqdm=True)
        log, state = log_steps(args, 0, 2)
        log.evaluation(2, {"eval_loss": 0.5, "eval_note": "text"})
        log.close()
        assert made.keys() == {"visualdl", "tensorboardX", "wandb"}
        for writer in made.values():
            assert writer.closed and (2, "train/loss", 0.5) in writer.values and (2, "eval/loss", 0.5) in writer.values
            assert not any(name == "eval/note" for _, name, _ in writer.values)
        assert made["visualdl"].made == ((), {"logdir": str(tmp_path / "vdl_log")})
        assert made["tensorboardX"].made == ((str(tmp_path / "tensorboard_log"),), {})
        keys = made["wandb"].made[1]
        assert keys["name"] == "first" and keys["dir"] == str(tmp_path) and keys["config"]["seed"] == 7
    made.clear()
    log_steps(make_args(tmp_path, report_to="none", disable_tqdm=True), 0, 1)
    assert not made


class FakeModel:
    """Loss 0.5 at every target, always predicting token 1."""

    training = True

    def eval(self):
        self.training = False

    def train(self):
        self.training = True

    def __call__(self, input_ids, labels, return_predictions):
        assert not self.training and return_predictions
        target = (labels != -100).astype("float32")
        return target * 0.5 * input_ids.astype("float32"), paddle.ones_like(labels)


class FakeLoader:
    """Two batches with 3 and 1 targets and different losses."""

    batches_per_epoch = 2

    def batch(self, epoch, index):
        labels = [[1, 2, 1, -100], [-100, -100, -100, 1]][index]
        return {"input_ids": np.full((1, 4), index + 1), "labels": np.array([labels]), "sample_ids": [[index]]}


def test_evaluate_is_a_mean_over_tokens():
    model = FakeModel()
    found = trainer.evaluate(model, FakeLoader())  # (3 * 0.5 + 1 * 1.0) / 4, and 3 of 4 are 1
    assert found == {"eval_loss": 0.625, "eval_accuracy": 0.75, "eval_ppl": math.exp(0.625), "eval_tokens": 4}
    assert trainer.evaluate(model, FakeLoader(), 1)["eval_tokens"] == 3 and model.training
    assert trainer.evaluate(model, FakeLoader(), -1)["eval_tokens"] == 4


def test_bleu4_by_hand():
    reference = "the cat sat on the mat today"
    assert trainer.bleu4([reference], [reference]) == pytest.approx(1.0)
    other = trainer.bleu4(["the cat sat on the mat now"], [reference])  # all n-grams but the last match
    assert other == pytest.approx((6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25)
    assert trainer.bleu4(["the cat sat on"], [reference]) == pytest.approx(math.exp(1 - 7 / 4))  # brevity alone
    # counts are clipped: "the" matches twice of four; and pooled over the corpus, not averaged over pairs
    pair = trainer.bleu4(["the the the the", reference], ["the cat the dog", reference])
    assert pair == pytest.approx(((2 + 7) / 11 * (0 + 6) / 9 * 5 / 7 * 4 / 5) ** 0.25)
    assert trainer.bleu4(["我爱北京天安门"], ["我爱北京天安门。"]) == pytest.approx(math.exp(1 - 8 / 7))
    assert trainer.bleu4(["a b c"], ["a b c"]) == trainer.bleu4([""], ["a"]) == trainer.bleu4([], []) == 0.0


def test_rouge_by_hand():
    # 3 of 4 found, 3 of 5 wanted -> 6/9; bigrams: "the cat" of 3 and 4 -> 2/7; subsequence the cat mat: 6/9
    found = trainer.rouge(["the cat ate mat"], ["the cat on the mat"])
    assert found == pytest.approx({"rouge-1": 6 / 9, "rouge-2": 2 / 7, "rouge-l": 6 / 9})
    found = trainer.rouge(["b a", "天气 good"], ["a b", "天气好"])  # second: two of three tokens, one of two pairs
    assert found == pytest.approx({"rouge-1": (1 + 2 / 3) / 2, "rouge-2": 1 / 2 / 2, "rouge-l": (1 / 2 + 2 / 3) / 2})
    assert trainer.rouge([""], [""]) == {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0}


def test_longest_common_subsequence_against_the_table():
    generator = random.Random(0)
    for _ in range(200):
        a, b = ([generator.choice("abc") for _ in range(generator.randrange(90))] for _ in range(2))
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
        assert trainer._lcs_length(a, b) == table[-1, -1]


def test_matmul_peak_is_quick():
    begin = time.perf_counter()
    peak = trainer.measure_matmul_peak()
    assert peak > 1e9 and time.perf_counter() - begin < 1.5


def test_nonfinite_report(tmp_path):
    path = trainer.save_nonfinite_report(tmp_path, 12, FakeLoader().batch(0, 1))
    assert json.loads(path.read_text()) == {
        "step": 12,
        "input_ids": [[2, 2, 2, 2]],
        "labels": [[-100, -100, -100, 1]],
        "sample_ids": [[1]],
    }
    assert path.name == "nonfinite-step-12.json"
    trainer.check_finite(1.0, tmp_path, 13, {})
    with pytest.raises(UserError, match="step 14: the loss or its gradient is nan; .*nonfinite-step-14.json"):
        trainer.check_finite(math.nan, tmp_path, 14, FakeLoader().batch(0, 1))
    assert names(tmp_path) == ["nonfinite-step-12.json", "nonfinite-step-14.json"]


def test_vocabulary_and_results(tmp_path):
    model = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=128))
    trainer.check_vocabulary(model, types.SimpleNamespace(vocab_size=128), "llama")
    with pytest.raises(UserError, match="llama: vocab_size 128 in config.json, but the tokenizer has 129 ids"):
        trainer.check_vocabulary(model, types.SimpleNamespace(vocab_size=129), "llama")
    trainer.write_results(tmp_path, "dev", {"eval_loss": 0.5})
    assert json.loads((tmp_path / "dev_results.json").read_text()) == {"eval_loss": 0.5}


if __name__ == "__main__":
    print(json.dumps(kill_saves(sys.argv[1], int(sys.argv[2]), seed=0)))
