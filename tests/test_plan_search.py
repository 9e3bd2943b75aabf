"""plan.py: which topologies it lists, what it costs them at, how it plays them, and what it prints.

python -m pytest tests/test_plan_search.py
"""

import dataclasses
import itertools
import json
import runpy
import shlex
import subprocess
import sys
import time
import xml.etree.ElementTree

import kernels

import numpy as np
import pytest
from conftest import ROOT

import data
import logger
import parallel
import plan
import pretrain
from arguments import parse_args
from distributed.pipeline import bubble_fraction, pipeline_schedule, simulate_schedule
from formats.files import UserError
from model import block_linears, build
from parallel import Degrees
from planning import auto_parallel, memory_model
from planning.auto_parallel import BATCH_SIZES, VIRTUAL, find_plans
from planning.cost_model import CostModel, Machine, StageCost
from planning.simulate import play, play_step

H100 = Machine.of_gpus(990e12, "nvlink8+400Gb")


def pretrain_args(*argv):
    return parse_args(pretrain.Args, ["--dry_run", "true", *map(str, argv)])


def small(tmp_path, **changes):
    """Arguments of a small Llama."""
    config = json.loads((ROOT / "demo" / "llama" / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return pretrain_args("--model_name_or_path", tmp_path, "--max_seq_length", 64)


@pytest.mark.parametrize("experts", [False, True])
def test_the_list_is_every_legal_combination(tmp_path, experts):
    """Against a product of all degrees, checked one by one; each plan's keys are what a run of them is."""
    moe = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
    args = small(tmp_path, **(moe | {"num_experts_per_tok": 2, "head_dim": None} if experts else {}))
    args.__dict__.pop("head_dim", None)
    world, rows = 8, 8
    plans = find_plans(args, world, 80e9, H100, rows)
    config = plans.memory.config
    legal = set()
    degrees = [1, 2, 4, 8]
    for tp, pp, sep, context, sharding in itertools.product(degrees, degrees, degrees, degrees, degrees):
        for virtual, ep, stage, sequence in itertools.product(VIRTUAL, [1, 2, 4], (None, 1, 2, 3), (False, True)):
            if world % (tp * pp * sep * context * sharding) or (stage is None) != (sharding == 1):
                continue
            if sequence and tp == 1 or virtual > 1 and pp == 1:  # means nothing without
                continue
            candidate = dataclasses.replace(
                args,
                tensor_parallel_degree=tp,
                pipeline_parallel_degree=pp,
                sep_parallel_degree=sep,
                context_parallel_degree=context,
                sharding_parallel_degree=sharding,
                virtual_pp_degree=virtual,
                expert_parallel_degree=ep,
                sharding=stage and f"stage{stage}",
                sequence_parallel=sequence,
            )
            try:
                found = Degrees.of(candidate, config, 64, world)
            except UserError:
                continue
            of_rank = rows // (found.dp * found.sharding)
            legal |= {(found, b) for b in BATCH_SIZES if of_rank % b == 0}
    assert {(p.degrees, p.batch_size) for p in plans.ranked} == legal and len(legal) > 200
    assert all(p.batch_size * p.accumulation * p.degrees.dp * p.degrees.sharding == rows for p in plans.ranked)
    for found in plans.ranked[:: len(plans.ranked) // 20]:
        again = Degrees.of(dataclasses.replace(args, **found.keys(args)), config, 64, world)
        assert again == found.degrees
    seconds = [p.cost.seconds for p in plans.ranked[auto_parallel.PLAYED :]]
    assert seconds == sorted(seconds)


def test_less_memory_fells_more_and_says_why(tmp_path):
    args = small(tmp_path)
    everything = find_plans(args, 4, 80e9, H100, 8)
    sizes = sorted(p.bytes for p in everything.ranked)
    some = find_plans(args, 4, sizes[len(sizes) // 3], H100, 8)
    assert 0 < len(some.ranked) < len(everything.ranked)
    assert all(p.bytes <= sizes[len(sizes) // 3] for p in some.ranked)
    assert any("needs more memory" in why for why in some.fallen)
    none = find_plans(args, 4, 1e6, H100, 8)
    assert not none.ranked and "no topology fits into 0.0 GiB a rank; the least is" in none.why_nothing(1e6)


@pytest.mark.parametrize("pp, virtual, accumulation", [(2, 1, 3), (4, 1, 37), (4, 2, 41), (3, 3, 50), (8, 2, 16)])
def test_micro_batches_in_flight_are_those_of_the_whole_schedule(pp, virtual, accumulation):
    for rank, steps in enumerate(pipeline_schedule(pp, virtual, accumulation)):
        now, weights = np.zeros(virtual), np.random.default_rng(rank).uniform(0.5, 2.0, virtual)
        most = 0.0
        for kind, chunk, _ in steps:
            now[chunk] += 1 if kind == "forward" else -1
            most = max(most, float(now @ weights))
        assert (memory_model.in_flight(pp, virtual, accumulation, rank) @ weights).max() == pytest.approx(most)


@pytest.mark.parametrize("pp, virtual, accumulation", [(1, 1, 3), (4, 1, 8), (4, 2, 8), (3, 2, 7), (8, 3, 24)])
def test_a_played_step_is_the_pipelines_own(pp, virtual, accumulation):
    """With equal stages it takes as long as pipeline.simulate_schedule() says, and as the bubble's formula."""
    schedule = pipeline_schedule(pp, virtual, accumulation)
    timeline = play(schedule, [StageCost(1.0, 2.0)] * (pp * virtual), 0.0)
    seconds, idle = simulate_schedule(schedule)
    assert timeline.seconds == pytest.approx(seconds)
    assert idle == pytest.approx(bubble_fraction(pp, virtual, accumulation))
    slower = play(schedule, [StageCost(1.0, 2.0)] * (pp * virtual), 0.1).seconds
    assert slower > seconds if pp > 1 else slower == seconds


def test_a_schedule_that_waits_for_itself_is_found():
    with pytest.raises(RuntimeError, match="waits for itself"):
        play([[("backward", 0, 0), ("forward", 0, 0)], [("forward", 0, 0), ("backward", 0, 0)]], [StageCost()] * 2, 0.0)


def test_collectives_by_their_formulas():
    machine = dataclasses.replace(
        H100, node_latency=1e-6, network_latency=1e-5, node_bandwidth=4e11, network_bandwidth=5e10
    )
    node, two_nodes, far = tuple(range(8)), tuple(range(16)), (0, 8, 16, 24)
    assert machine.all_reduce(node, 8e9) == pytest.approx(2 * 3 * 1e-6 + 2 * 7 / 8 * 8e9 / 4e11)
    assert machine.all_gather(two_nodes, 16e9) == pytest.approx(2 * 1e-5 + 14e-6 + 15 / 16 * 16e9 / 4e11)  # 8 x 50 GB/s
    assert machine.reduce_scatter(far, 4e9) == pytest.approx(4e-5 + 3 / 4 * 4e9 / 50e9)
    assert machine.message((0, 8), 5e9) == pytest.approx(1e-5 + 0.1) and machine.all_reduce((0,), 1e9) == 0.0
    for text in ("nvlink", "8x400", "nvlink8+400"):
        with pytest.raises(UserError, match="interconnect"):
            Machine.of_gpus(990e12, text)


def test_more_ranks_recompute_and_slow_links_cost_what_they_should(tmp_path):
    args = small(tmp_path, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8)
    args.max_seq_length = 2048
    memory = memory_model.MemoryModel(args, memory_model.planned_model(args)[1], 2048)
    cost = CostModel(memory, H100)

    def seconds(batch_size=4, accumulation=8, granularity=None, model=cost, **degrees):
        return model.step(Degrees(**degrees), batch_size, accumulation, granularity).seconds

    assert seconds(granularity="full") > seconds(granularity="full_attn") > seconds(granularity="core_attn") > seconds()
    assert seconds(accumulation=16) == pytest.approx(2 * seconds(), rel=0.05)
    assert seconds(dp=8, accumulation=1) < seconds() <= seconds(dp=8)
    assert seconds(tp=16) > seconds(tp=8)  # beyond the node
    slow = CostModel(memory, dataclasses.replace(H100, network_bandwidth=1e9))
    assert seconds(dp=16, model=slow) > seconds(dp=16) and seconds(dp=8, model=slow) == seconds(dp=8)
    assert seconds(sharding=8, stage=3) > seconds(sharding=8, stage=1)
    gloo = CostModel(memory, dataclasses.replace(H100, overlaps=False))
    assert seconds(sharding=8, stage=1, model=gloo) > seconds(sharding=8, stage=1)
    step = cost.step(Degrees(sharding=8, stage=1), 4, 8, None)
    assert 0 < step.talk["sharding"].hidden < step.talk["sharding"].seconds


def test_sixteen_thousand_ranks_are_played_in_seconds(tmp_path):
    begin = time.perf_counter()
    argv = f"""--model_name_or_path llama-3.1-405b --max_seq_length 8192 --per_device_train_batch_size 1
        --gradient_accumulation_steps 16 --tensor_parallel_degree 8 --pipeline_parallel_degree 16 --sequence_parallel
        true --virtual_pp_degree 2 --sharding stage1 --bf16 true --recompute true --simulate {tmp_path / "step.svg"}
        --script pretrain --gpus 16384 --peak_tflops 990""".split()
    plan.main(argv)
    assert time.perf_counter() - begin < 60
    root = xml.etree.ElementTree.parse(tmp_path / "step.svg").getroot()
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "stage 15 × 1,024 ranks" in texts and "tensor 8, pipeline 16, virtual 2, sharding 128" in texts[0]
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    drawn = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in drawn} == set(range(16)) and {event["tid"] for event in drawn} == {0, 1}
    assert {"forward", "backward", "communication", "gradients", "update", "weights"} == {e["cat"] for e in drawn}
    for rank in (0, 15):  # no two parts of a lane at the same time
        lane = sorted((e["ts"], e["dur"]) for e in drawn if e["pid"] == rank and e["tid"] == 0)
        assert all(a + length <= b + 0.01 for (a, length), (b, _) in itertools.pairwise(lane))


def test_the_timetable_gives_what_the_formula_gives_when_stages_are_even(tmp_path):
    args = small(tmp_path, num_hidden_layers=8, vocab_size=256)
    memory = memory_model.MemoryModel(args, memory_model.planned_model(args)[1], 64)
    degrees = Degrees(pp=4, virtual=2)
    cost = CostModel(memory, dataclasses.replace(H100, network_latency=0.0, node_latency=0.0)).step(
        degrees, 2, 16, None
    )
    by_formula = cost.seconds
    play_step(cost, degrees, 16)
    assert cost.seconds == pytest.approx(by_formula, rel=0.1)


CONFIGS = {
    "llama_pretrain": "pretrain", "llama_sft": "finetune", "llama_lora": "finetune", "llama_pt": "finetune",
    "llama_dpo": "dpo", "llama_reward": "reward", "llama_rl": "rl", "llama_ppo": "rl", "llama_sums": "rl",
    "recipes/dpo_7b": "dpo", "recipes/pretrain_7b": "pretrain",
}  # fmt: skip


@pytest.mark.sweep(keep=3)
@pytest.mark.parametrize("name, script", CONFIGS.items())
def test_every_training_config_gets_a_plan(name, script, capsys):
    """Its script is known by its keys; the first three are command lines that a run accepts."""
    path = str(ROOT / "configs" / f"{name}.json")
    model = [] if "recipes" in name else ["--model_name_or_path", str(ROOT / "demo" / "llama")]
    world = 16 if "pretrain_7b" in name else 4
    plan.main([path, *model, "--gpus", str(world), "--peak_tflops", "312", "--rows", "64"])
    text = capsys.readouterr().out
    commands = [line.strip() for line in text.splitlines() if line.startswith("    python ")]
    assert len(commands) == 3 and f": {script}.py on {world} ranks" in text and "what fell, and why" in text
    for command in commands:
        words = shlex.split(command)
        start = words.index(f"{script}.py")
        assert words[1:3] == ["-m", "paddle.distributed.launch"] and (world > 8) == ("--nnodes" in words)
        args = parse_args(plan.SCRIPTS[script].Args, [*words[start + 1 :], "--dry_run", "true"])
        found = Degrees.of(args, memory_model.planned_model(args)[1], memory_model.sequence_length(args), world)
        assert found.world == world
        if script != "rl":
            rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * found.dp * found.sharding
            assert rows == 64
        assert memory_model.dry_run(args)


@pytest.mark.parametrize(
    "argv, line",
    [
        ("", "a config of a training script is missing, or --probe FILE"),
        ("--script serve configs/llama_serve.json", "script: 'serve'; possible are pretrain, finetune"),
        ("configs/llama_pretrain.json --gpus 0", "gpus: 0; it must be above 0"),
        ("configs/llama_pretrain.json --gpus 16 --peak_tflops 312 --interconnect nvlink8", "has no network"),
        ("configs/llama_pretrain.json --gpu 16", "unknown key 'gpu'"),
        ("configs/recipes/sft_7b.json --gpus 1 --peak_tflops 312", "no topology fits into 80.0 GiB a rank; the least"),
        ("configs/llama_pretrain.json --probe nothing.json", "nothing.json: not a probe file of plan.py --probe"),
    ],
)
def test_refusals_are_one_line(argv, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        plan.main(argv.split())
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error, code, line", [(UserError("no"), 2, "error: no\n"), (KeyboardInterrupt(), 130, "interrupted\n")]
)
def test_what_ends_it_is_one_line(error, code, line, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["plan.py", *"configs/llama_pretrain.json --peak_tflops 312".split()])
    monkeypatch.setattr(auto_parallel, "find_plans", fail)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path("plan.py", run_name="__main__")
    assert stop.value.code == code and capsys.readouterr().err == line


def test_a_quantized_base_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="is quantized; a dry run is for float models"):
        args = small(
            tmp_path,
            quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True},
        )
        find_plans(args, 2, 80e9, H100, 8)


def test_a_probe_measures_and_plans_here(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan.main(["--probe", str(tmp_path / "probe.json")])
    machine = Machine.load(tmp_path / "probe.json")
    assert 1e9 < machine.peak_flops < 1e13 and 0.2 < machine.efficiency <= 1 and machine.memory_bandwidth > 1e8
    assert machine.shares_cores and not machine.overlaps
    assert machine.of_world(2).peak_flops == machine.peak_flops / 2
    plan.main(["configs/llama_pretrain.json", "--probe", str(tmp_path / "probe.json"), "--gpus", "2"])
    assert "2,200 steps: about" in (text := capsys.readouterr().out) and text.strip().endswith("hours here")


def test_auto_parallel_takes_the_first_plan(monkeypatch):
    monkeypatch.setattr(auto_parallel, "probe", lambda: H100)
    args = pretrain_args("--model_name_or_path", ROOT / "demo" / "llama")
    args.tensor_parallel_degree, args.gradient_accumulation_steps = 4, 2  # replaced
    line = auto_parallel.take_first_plan(args, None)
    assert line.startswith("auto_parallel: one process; micro-batches ") and args.tensor_parallel_degree == 1
    first = find_plans(args, 1, 80e9, H100, 16).ranked[0]
    assert args.per_device_train_batch_size == first.batch_size and args.per_device_train_batch_size == 16
    assert parallel.Degrees.of(args, world=1).world == 1


TASKS = {
    "SFT": ("finetune", "--max_length 4096"),
    "LoRA": ("finetune", "--max_length 4096 --lora true --lora_rank 8"),
    "QLoRA, nf4": ("finetune", "--max_length 4096 --lora true --lora_rank 8 --weight_quantize_algo nf4"),
    "DPO": ("dpo", "--max_seq_len 4096"),
    "DPO, LoRA": ("dpo", "--max_seq_len 4096 --lora true --lora_rank 8"),
}
LEAST_NODES = {"SFT": 12, "LoRA": 2, "QLoRA, nf4": 1, "DPO": 12, "DPO, LoRA": 2}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_fewest_nodes_for_405b(task):
    """Of 8 GPUs of 80 GB, full weights and LoRA; the plan's own dry run says that a rank of it fits."""
    script, flags = TASKS[task]
    argv = f"--model_name_or_path llama-3.1-405b --dry_run true --bf16 true {flags}".split()
    args = parse_args(plan.SCRIPTS[script].Args, argv)
    for nodes in range(max(1, LEAST_NODES[task] - 1), 33):
        plans = find_plans(args, 8 * nodes, 80 * 2**30, H100, 128)
        if plans.ranked:
            break
    first = plans.ranked[0]
    text = memory_model.dry_run(dataclasses.replace(args, **first.keys(args)))
    mode = "with" if first.granularity else "without"
    peak = float(text.split(f"in all {mode} recompute")[1].split()[0].replace(",", ""))
    print(f"\n| {task} | {nodes} | {first} | {peak:.1f} | {first.cost.seconds:.1f} | {100 * first.mfu:.1f} % |")
    assert nodes == LEAST_NODES[task]
    assert auto_parallel.with_allowance(peak * 1e9) <= 80 * 2**30


def test_a_dry_run_needs_the_sharding_degree():
    """A run takes all processes that are left; a dry run would count one."""
    argv = ("--model_name_or_path", "llama-2-7b", "--sharding", "stage2")
    with pytest.raises(UserError, match="sharding stage2 without sharding_parallel_degree takes all processes"):
        memory_model.dry_run(pretrain_args(*argv))
    assert "sharding 8, stage 2" in memory_model.dry_run(pretrain_args(*argv, "--sharding_parallel_degree", 8))


def test_the_peak_of_mfu_is_that_of_the_dtype_of_training(monkeypatch):
    """bf16 training is measured against bfloat16 products."""
    seen, linear = [], kernels.linear
    monkeypatch.setattr(kernels, "linear", lambda *args: seen.append(kernels.bf16) or linear(*args))
    kernels.configure("cpu")
    assert logger.measure_matmul_peak(0.05) > 1e9
    monkeypatch.setattr(kernels, "bf16", True)
    assert logger.measure_matmul_peak(0.05) > 1e9 and seen[0] is False and seen[-1] is True


def test_references_of_dpo_and_rl_cost_what_they_take():
    """LoRA: a forward with the adapter off each micro-batch; a reference that moves: another set of what is trained;
    rl.py's: a second model."""
    flags = "--model_name_or_path llama-3.2-1b --dry_run true --per_device_train_batch_size 1".split()

    def planned(script, *more):
        args = parse_args(plan.SCRIPTS[script].Args, [*flags, *more])
        memory = memory_model.MemoryModel(args, memory_model.planned_model(args)[1], 1024)
        return CostModel(memory, H100).step(Degrees(), 1, 4, None).seconds, memory.fullest(Degrees(), 1, 4)

    with_reference, rows = planned("dpo", "--lora", "true")
    without, _ = planned("dpo", "--lora", "true", "--loss_type", "simpo")
    assert 1.2 < with_reference / without < 1.7 and "reference" not in rows
    _, rows = planned("dpo", "--ref_model_update_steps", "64")
    assert rows["reference"] == rows["weights"]
    seconds, rows = planned("dpo", "--ref_model_update_steps", "64", "--lora", "true")
    assert rows["reference"] == rows["moments"] / 2 and seconds == with_reference
    _, rows = planned("rl", "--kl_loss_coeff", "0.01")
    assert rows["reference"] == rows["weights"] and rows["keys and values of the engine"] > 0


def test_qlora_holds_codes():
    """The base's linears at the bits of their codes and scales, cut over tp and whole over sharding; topologies that
    would cut blocks of them fall by name."""
    argv = "--model_name_or_path llama-3.2-1b --dry_run true --max_length 512 --lora true".split()
    args = parse_args(plan.SCRIPTS["finetune"].Args, argv)
    rounded = dataclasses.replace(args, weight_quantize_algo="nf4", qlora_weight_double_quant=True)
    config = memory_model.planned_model(args)[1]
    whole, codes = (memory_model.MemoryModel(a, config, 512).fullest(Degrees(), 1, 1) for a in (args, rounded))
    linears = sum(layer.n_in * layer.n_out for _, _, layer in block_linears(build(config)).values())
    saved = linears * (4 - 0.5 - (1 + 4 / 256) / 64)
    assert whole["weights"] - codes["weights"] == pytest.approx(saved, rel=1e-6)
    assert codes["a dequantized weight"] == 4 * 2048 * 8192
    model = memory_model.MemoryModel(rounded, config, 512)
    halves, shards = (
        model.fullest(degrees, 1, 1)["weights"] for degrees in (Degrees(tp=2), Degrees(sharding=2, stage=3))
    )
    codes_alone = linears * (0.5 + (1 + 4 / 256) / 64)
    assert halves - codes_alone / 2 == pytest.approx((codes["weights"] - codes_alone) / 2, rel=1e-2)
    assert shards - codes_alone == pytest.approx((codes["weights"] - codes_alone) / 2, rel=1e-2)
    plans = find_plans(rounded, 8, 80e9, H100, 8)
    assert plans.ranked and all(p.degrees.tp == 1 for p in plans.ranked)
    assert any("qlora_weight_double_quant: scales" in example for _, example in plans.fallen.values())
    wide = dataclasses.replace(rounded, qlora_weight_double_quant=False, qlora_weight_blocksize=1 << 21)
    plans = find_plans(wide, 8, 80e9, H100, 8)  # 2,048 x 512 keys on two ranks: blocks of 2^19 are whole
    assert any("tensor_parallel_degree 2 cuts blocks" in example for _, example in plans.fallen.values())
    fits = dataclasses.replace(wide, qlora_weight_blocksize=64)
    assert any(p.degrees.tp > 1 for p in find_plans(fits, 8, 80e9, H100, 8).ranked)


@pytest.mark.slow
def test_auto_parallel_on_two_processes(tmp_path):
    """The first rank measures and searches, both take its plan, and the run trains with the rows of its config."""
    records = [json.loads(line) for line in (ROOT / "demo" / "sft" / "train.json").read_text().splitlines()[:200]]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": str(record["tgt"])}) + "\n" for record in records))
    data.main(["corpus", str(corpus), "--tokenizer", str(ROOT / "demo" / "llama"), "--output", str(tmp_path / "ids")])
    launch = f"-m paddle.distributed.launch --log_dir {tmp_path / 'log'} --nproc_per_node 2 pretrain.py"
    flags = f"""--input_dir {tmp_path / "ids"} --split 80,10,10 --output_dir {tmp_path / "out"} --max_steps 3
        --logging_steps 1 --do_eval false --evaluation_strategy no --auto_parallel true --max_seq_length 64"""
    argv = [sys.executable, *launch.split(), "configs/llama_pretrain.json", *flags.split()]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    logs = [(tmp_path / "log" / f"workerlog.{rank}").read_text() for rank in (0, 1)]
    lines = [next(line for line in log.splitlines() if line.startswith("auto_parallel: ")) for log in logs]
    assert lines[0] == lines[1] and "first of" in lines[0]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["consumed_tokens"] for row in rows] == [16 * 64 * step for step in (1, 2, 3)]
