"""The catalogue of presets, dry runs, the line that says what to download, and recipes that fit their hardware.

python -m pytest tests/test_plan.py            # --slow: each recipe of RUNS trains a tiny model of every family
"""

import gc
import json
import math
import re
import subprocess
import sys
import textwrap

import kernels

import numpy as np
import paddle
import pytest
from conftest import ROOT

import data
import dpo
import export
import finetune
import model
import parallel
import pretrain
import quantize
import serve
import trainer
from adapters import from_pretrained, trainable_weights
from arguments import parse_args
from families import ModelConfig
from formats.tokenizer import load_tokenizer
from formats.weights import init_weights, named_weights, save_pretrained
from parallel import Degrees
from planning import presets
from planning.memory_model import _activations, dry_run

pytestmark = pytest.mark.sweep(keep=2)

PRESETS = presets.presets()
OWN = [name for name, preset in PRESETS.items() if "like" not in preset]
RECIPES = ROOT / "configs" / "recipes"
SCRIPTS = {"pretrain": pretrain, "sft": finetune, "lora": finetune, "prefix": finetune, "dpo": dpo}
GPU_GB, CPU_GB = 80, 24
HARDWARE = {  # recipe: (processes, GB of each, as its _doc says it)
    "lora_7b": (1, GPU_GB, "one GPU of 80 GB"),
    "prefix_7b": (1, GPU_GB, "one GPU of 80 GB"),
    "sft_7b": (8, GPU_GB, "eight GPUs of 80 GB"),
    "dpo_7b": (8, GPU_GB, "eight GPUs of 80 GB"),
    "dpo_7b_full": (8, GPU_GB, "eight GPUs of 80 GB"),
    "dpo_7b_lora": (1, GPU_GB, "one GPU of 80 GB"),
    "lora_cpu": (1, CPU_GB, "two CPU cores with 24 GB"),
    "pretrain_7b": (8, GPU_GB, "eight GPUs of 80 GB"),
    "pretrain_moe": (32, GPU_GB, "32 GPUs of 80 GB"),
    "pretrain_70b": (128, GPU_GB, "128 GPUs of 80 GB"),
}

# Parameters as published: what the safetensors files of the repository hold, a head or embedding that is tied counted
# once and DeepSeek-V3's module for further tokens left out.
PUBLISHED = """
    llama-7b 6738415616 llama-13b 13015864320 llama-30b 32528943616 llama-65b 65285660672 llama-2-7b 6738415616
    llama-2-13b 13015864320 llama-2-70b 68976648192 llama-3-8b 8030261248 llama-3-70b 70553706496
    llama-3.1-8b 8030261248
    llama-3.1-70b 70553706496 llama-3.1-405b 405853388800 llama-3.2-1b 1235814400 llama-3.2-3b 3212749824
    codellama-7b 6738546688 codellama-13b 13016028160 codellama-34b 33743970304 tinyllama-1.1b 1100048384
    open-llama-3b 3426473600 smollm2-135m 134515008 smollm2-360m 361821120 smollm2-1.7b 1711376384 yi-6b 6061035520
    yi-34b 34388917248 yi-1.5-6b 6061035520 yi-1.5-9b 8829407232 yi-1.5-34b 34388917248 deepseek-llm-7b 6910365696
    deepseek-llm-67b 67425001472 deepseek-coder-1.3b 1346471936 deepseek-coder-6.7b 6740512768
    deepseek-coder-33b 33342991360 mistral-7b-v0.1 7241732096 mistral-7b-instruct-v0.2 7241732096
    mistral-7b-v0.3 7248023552 mistral-nemo-12b 12247782400 codestral-22b 22247282688 mistral-small-24b 23572403200
    mistral-large-123b 122610069504 mixtral-8x7b 46702792704 mixtral-8x22b 140620634112
    mixtral-8x22b-instruct 140630071296 qwen-1.8b 1836828672 qwen-7b 7721324544 qwen-14b 14167290880
    qwen-72b 72287920128 qwen1.5-0.5b 463987712 qwen1.5-1.8b 1836828672 qwen1.5-4b 3950369280 qwen1.5-7b 7721324544
    qwen1.5-14b 14167290880 qwen1.5-32b 32512218112 qwen1.5-72b 72287920128 qwen1.5-110b 111209914368
    qwen2-0.5b 494032768 qwen2-1.5b 1543714304 qwen2-7b 7615616512 qwen2-72b 72706203648 qwen2.5-0.5b 494032768
    qwen2.5-1.5b 1543714304 qwen2.5-3b 3085938688 qwen2.5-7b 7615616512 qwen2.5-14b 14770033664
    qwen2.5-32b 32763876352 qwen2.5-72b 72706203648 qwen1.5-moe-a2.7b 14315784192 qwen3-0.6b 596049920
    qwen3-1.7b 1720574976 qwen3-4b 4022468096 qwen3-8b 8190735360 qwen3-14b 14768307200 qwen3-32b 32762123264
    qwen3-30b-a3b 30532122624 qwen3-235b-a22b 235093634560 qwen3-coder-480b-a35b 480154875392 baichuan-7b 7000559616
    baichuan-13b 13264901120 baichuan2-7b 7505973248 baichuan2-13b 13896668160 chatglm-6b 6173286400
    chatglm2-6b 6243584000 chatglm3-6b 6243584000 glm-4-9b 9399951360 bloom-560m 559214592 bloom-1b1 1065314304
    bloom-1b7 1722408960 bloom-3b 3002557440 bloom-7b1 7069016064 bloom-176b 176247271424 distilgpt2 81912576
    gpt2 124439808 gpt2-medium 354823168 gpt2-large 774030080 gpt2-xl 1557611200 opt-125m 125239296 opt-350m 331196416
    opt-1.3b 1315758080 opt-2.7b 2651596800 opt-6.7b 6658473984 opt-13b 12853473280 opt-30b 29974540288
    internlm-7b 7321948160 internlm2-1.8b 1889110016 internlm2-7b 7737708544 internlm2-20b 19861149696
    gemma-2b 2506172416 gemma-7b 8537680896 gemma-2-2b 2614341888 gemma-2-9b 9241705984 gemma-2-27b 27227128320
    deepseek-v2-lite 15706484224 deepseek-v2 235741434880 deepseek-v3 671026419200""".split()
PUBLISHED = dict(zip(PUBLISHED[::2], map(int, PUBLISHED[1::2])))


# ---------------------------------------------------------------------------------------------- the catalogue


def count(c):
    """Parameters by the formula of the family, written apart from model.py; c: a config.json."""
    kind, D = c["model_type"], c.get("hidden_size") or c["n_embd"]
    V = c.get("vocab_size") or c["padded_vocab_size"]
    if kind == "gpt2":  # two norms, qkv, projection, two linears of width 4 D, all with biases
        return V * D + c["n_positions"] * D + c["n_layer"] * (12 * D * D + 13 * D) + 2 * D
    if kind == "opt":
        L, F, E = c["num_hidden_layers"], c["ffn_dim"], c["word_embed_proj_dim"]
        outside = V * E + (c["max_position_embeddings"] + 2) * D + (2 * E * D if E != D else 0)
        return outside + L * (4 * D * D + 2 * D * F + 9 * D + F) + (2 * D if c["do_layer_norm_before"] else 0)
    if kind == "bloom":
        return V * D + 2 * D + c["n_layer"] * (12 * D * D + 13 * D) + 2 * D
    if kind == "chatglm" and "inner_hidden_size" in c:
        F = c["inner_hidden_size"]
        return V * D + c["num_layers"] * (4 * D * D + 2 * D * F + 9 * D + F) + 2 * D
    if kind == "chatglm":
        F, q = c["ffn_hidden_size"], (c["num_attention_heads"] + 2 * c["multi_query_group_num"]) * c["kv_channels"]
        return 2 * V * D + c["num_layers"] * (D * q + q + D * D + 3 * D * F + 2 * D) + D
    L, H, F = c["num_hidden_layers"], c["num_attention_heads"], c["intermediate_size"]
    if kind == "qwen":
        return 2 * V * D + L * (4 * D * D + 3 * D + 3 * D * F // 2 + 2 * D) + D
    outside = V * D * (1 if c["tie_word_embeddings"] else 2) + D
    if kind.startswith("deepseek"):
        plain, rotated, value, q, kv = (
            c[key] for key in "qk_nope_head_dim qk_rope_head_dim v_head_dim q_lora_rank kv_lora_rank".split()
        )
        queries = (D + 1) * q + q * H * (plain + rotated) if q else D * H * (plain + rotated)
        attention = queries + D * (kv + rotated) + kv + kv * H * (plain + value) + H * value * D + 2 * D
        E, first = c["n_routed_experts"], c["first_k_dense_replace"]
        experts = D * E + 3 * D * c["moe_intermediate_size"] * (E + c["n_shared_experts"])
        experts += E if kind == "deepseek_v3" else 0  # the correction of the router's scores
        return outside + L * attention + first * 3 * D * F + (L - first) * experts
    K, Dh = c.get("num_key_value_heads") or H, c.get("head_dim") or D // H
    block = 2 * (H + K) * Dh * D + 2 * D
    block += {"qwen2": (H + 2 * K) * Dh, "qwen2_moe": (H + 2 * K) * Dh, "qwen3": 2 * Dh, "qwen3_moe": 2 * Dh}.get(
        kind, 0
    )
    block += {"internlm": 4 * D * c.get("bias", 0), "gemma2": 2 * D}.get(kind, 0)
    E, shared = c.get("num_local_experts") or c.get("num_experts"), c.get("shared_expert_intermediate_size")
    mlp = 3 * D * F if not E else E * D + E * 3 * D * c.get("moe_intermediate_size", F)
    return outside + L * (block + mlp + (3 * D * shared + D if shared else 0))


def test_catalogue_is_whole():
    """Enough presets, of every size and family, each said once; a preset that is like another adds its repository."""
    assert len(OWN) >= 100 and len(PRESETS) - len(OWN) >= 60
    raw = json.loads(presets.CATALOGUE.read_text())
    for name, preset in raw.items():
        assert name == name.lower() and set(preset) <= {"repo", "licence", "parameters", "like", "config"}, name
        assert preset["repo"] or name.startswith("gpt3-"), name
        if "like" in preset:
            assert "like" not in raw[preset["like"]] and "parameters" not in preset, name
    repositories = [preset["repo"].lower() for preset in raw.values() if preset["repo"]]
    assert len(set(repositories)) == len(repositories)
    sizes = [PRESETS[name]["parameters"] for name in OWN]
    assert min(sizes) < 1e9 and max(sizes) > 400e9 and sum(0.4e9 < size < 420e9 for size in sizes) >= 80
    families = {PRESETS[name]["config"]["model_type"] for name in OWN}
    wanted = """llama mistral mixtral qwen qwen2 qwen3 qwen2_moe qwen3_moe baichuan chatglm bloom gpt2 opt internlm
        internlm2 gemma gemma2 deepseek_v2 deepseek_v3""".split()
    assert families == set(wanted)


@pytest.mark.parametrize("name", OWN)
def test_parameters_are_those_published(name):
    """By formula from the config; equal to the published count, or where none is known within 3 % of the name's."""
    parameters = PRESETS[name]["parameters"]
    assert count(PRESETS[name]["config"]) == parameters
    if name in PUBLISHED:
        assert parameters == PUBLISHED[name]
    else:
        number, unit = re.search(r"(?:^|-)([\d.]+)(b|m)(?:-|$)", name).groups()
        assert abs(parameters / (float(number) * {"b": 1e9, "m": 1e6}[unit]) - 1) < 0.03


def test_readme_says_how_many():
    text = (ROOT / "docs" / "models.md").read_text()
    assert f"shapes of {len(OWN)} open models" in text and f"and {len(PRESETS) - len(OWN)} further checkpoints" in text
    assert f"parameters: {PRESETS['llama-3.1-405b']['parameters']:,}" in text


def test_few_counts_are_not_known_exactly():
    unknown = set(OWN) - set(PUBLISHED)
    assert not set(PUBLISHED) - set(OWN)
    assert unknown == {
        "qwen2-57b-a14b",
        "opt-66b",
        "internlm-20b",
        "moonlight-16b-a3b",
        *(n for n in OWN if n.startswith("gpt3-")),
    }


MANY_LAYERS = ("deepseek-v2", "qwen3-235b-a22b", "qwen3-coder-480b-a35b")  # built in 5 seconds each


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in MANY_LAYERS else []) for name in PRESETS]
)
def test_the_decoder_has_as_many_parameters(name):
    """What model.py builds of every preset has the catalogue's count."""
    config = ModelConfig.from_dict(PRESETS[name]["config"], name)
    if "like" in PRESETS[name]:
        return  # the same shape, read without complaint
    built = model.build(config)
    assert sum(math.prod(weight.shape) for weight in named_weights(built)) == PRESETS[name]["parameters"]


# ------------------------------------------------------------------------------------------------- dry runs


def dry(script, *argv):
    """The text of a dry run; argv: flags and values."""
    argv = ["--dry_run", "true", *map(str, argv)]
    return dry_run(parse_args(script.Args, argv))


def memory(text):
    """{part: GB} of a dry run's text."""
    unit = {"GB": 1.0, "MB": 1e-3}[re.search(r"^memory of the fullest rank in (\w+)", text, re.M)[1]]
    return {
        name.strip(): unit * float(value.replace(",", ""))
        for name, value in re.findall(r"^  (\D+?) +([\d,.]+)$", text, re.M)
    }


def parameters(text):
    return int(re.search(r"^parameters: ([\d,]+)", text, re.M)[1].replace(",", ""))


def test_405b_in_seconds_and_little_memory(tmp_path):
    """The command of docs/models.md, as a user runs it, prints what that page shows.

    Processor seconds and peak memory are the process's own, imports included.
    """
    text = (ROOT / "docs" / "models.md").read_text()
    command, shown = re.search(
        r"^    python pretrain.py (--model_name_or_path llama-3.1.*?)  +# seconds.*?\n\n(.*?)\n\n", text, re.M | re.S
    ).groups()
    argv = command.replace("\\\n", " ").split()
    script = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
    print(used.ru_utime + used.ru_stime, peak)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT / "pretrain.py"), *argv],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    *lines, used = done.stdout.splitlines()
    assert not list(tmp_path.iterdir())
    for line in textwrap.dedent(shown).splitlines():
        assert any(found.startswith(line.removesuffix("…")) for found in lines), line
    seconds, peak = map(float, used.split())
    assert seconds < 10 and peak * 1024 < 1e9, (seconds, peak)
    print(f"{seconds:.1f} s, {peak / 1e6:.2f} GB")


def test_the_table_has_every_weight():
    text = dry(pretrain, "--model_name_or_path", "llama-2-7b")
    assert "model.layers.{i}.mlp.gate_proj.weight" in text and "11008 x 4096" in text and "0-31" in text
    sizes = [
        int(line.split()[-1].replace(",", "")) for line in text.splitlines() if re.match(r"(model|lm_head)\.", line)
    ]
    assert sum(sizes) == parameters(text) == PRESETS["llama-2-7b"]["parameters"]
    assert "FLOPs a token, forward and backward, in sequences of 1,024" in text


def test_a_folder_and_another_depth():
    text = dry(pretrain, "--model_name_or_path", ROOT / "demo" / "llama", "--num_hidden_layers", 2)
    assert "2 layers" in text and parameters(text) < 2951616


def test_degrees_share_the_memory():
    """Each stage of sharding, tensor and pipeline parallelism against what they say."""
    name = ["--model_name_or_path", "llama-2-7b", "--per_device_train_batch_size", 1]
    whole, n = memory(dry(pretrain, *name)), PRESETS["llama-2-7b"]["parameters"] / 1e9
    assert np.allclose([whole[k] for k in ("weights", "gradients", "moments")], [4 * n, 4 * n, 8 * n], atol=1e-3)
    mixed = memory(dry(pretrain, *name, "--bf16", "true"))
    # Trained weights stay float32, and each product keeps a bfloat16 copy of its own: kernels/gpu.py.
    assert np.allclose([mixed[k] for k in ("weights", "gradients", "moments")], [4 * n, 4 * n, 8 * n], atol=1e-3)
    assert mixed["half-precision weights without recompute"] == pytest.approx(2 * (n - 0.262), rel=1e-3)
    frozen = memory(dry(finetune, *name, "--bf16", "true", "--lora", "true"))["weights"]
    assert frozen == pytest.approx(2 * n + 2 * 0.131 + 4 * 0.02, rel=3e-3)  # linears in bfloat16, the embedding not
    for stage, shared in ((1, ("moments",)), (2, ("moments", "gradients")), (3, ("moments", "gradients", "weights"))):
        cut = memory(dry(pretrain, *name, "--sharding", f"stage{stage}", "--sharding_parallel_degree", 4))
        for part in ("weights", "gradients", "moments"):
            assert cut[part] == pytest.approx(whole[part] / (4 if part in shared else 1), abs=2e-3), (stage, part)
    assert memory(dry(pretrain, *name, "--sharding", "stage1 offload"))["moments"] == 0
    tensor = memory(dry(pretrain, *name, "--tensor_parallel_degree", 8))
    assert tensor["weights"] == pytest.approx(whole["weights"] / 8, rel=2e-3)  # norms stay whole
    sequence = memory(dry(pretrain, *name, "--tensor_parallel_degree", 8, "--sequence_parallel", "true"))
    assert sequence["activations without recompute"] == pytest.approx(
        whole["activations without recompute"] / 8, rel=1e-3
    )
    assert (
        whole["activations without recompute"] / 8
        < tensor["activations without recompute"]
        < whole["activations without recompute"]
    )
    pipeline = memory(dry(pretrain, *name, "--pipeline_parallel_degree", 4, "--gradient_accumulation_steps", 8))
    assert pipeline["weights"] == pytest.approx(
        4e-9 * (8 * 202383360 + 131072000), abs=2e-3
    )  # 8 blocks and the embedding
    blocks = (whole["activations without recompute"], pipeline["activations without recompute"])
    assert blocks[1] == pytest.approx(blocks[0], rel=0.01)  # a quarter of the layers for four micro-batches
    for ranks, virtual, ahead in ((2, 2, 5), (4, 1, 4), (4, 2, 11)):  # chunks whose backward is to come, at most
        flags = [
            "--pipeline_parallel_degree",
            ranks,
            "--virtual_pp_degree",
            virtual,
            "--gradient_accumulation_steps",
            8,
        ]
        found = memory(dry(pretrain, *name, *flags))["activations without recompute"]
        assert found == pytest.approx(ahead / (ranks * virtual) * blocks[0], rel=0.01)
    for key in ("context_parallel_degree", "sep_parallel_degree"):
        assert memory(dry(pretrain, *name, f"--{key}", 2))["activations with recompute"] == pytest.approx(
            whole["activations with recompute"] / 2, abs=1e-3
        )


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--tensor_parallel_degree 64", "tensor_parallel_degree 64 is more than attention heads (32)"),
        ("--pipeline_parallel_degree 64", "pipeline_parallel_degree 64 is more than layers (32)"),
        ("--sep_parallel_degree 3", "sep_parallel_degree 3 does not divide attention heads (32)"),
        ("--context_parallel_degree 2 --sep_parallel_degree 2", "exclude each other"),
        ("--sharding stage2 --pipeline_parallel_degree 2", "exclude each other: use stage1"),
        ("--sharding stage4", "sharding: 'stage4'; possible are stage1"),
        ("--expert_parallel_degree 2", "expert_parallel_degree 2 needs a model with experts, this one has none (0)"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size: 0"),
    ],
)
def test_what_does_not_divide_is_one_line(flags, line, capsys):
    error = fails(pretrain, ["--model_name_or_path", "llama-2-7b", "--dry_run", "true", *flags.split()], capsys)
    assert line in error


def fails(script, argv, capsys):
    """The one line of a run that ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        trainer.run_script(script.main, script.Args, list(map(str, argv)))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def kept_bytes():
    return paddle.base.core.host_memory_stat_current_value("Allocated", 0)


MEASURED = """llama-2-7b mistral-7b-v0.1 mixtral-8x7b qwen-7b qwen2-7b qwen3-8b qwen1.5-moe-a2.7b qwen3-30b-a3b
    baichuan-13b baichuan2-7b chatglm-6b chatglm2-6b bloom-560m gpt2 opt-1.3b opt-350m internlm-7b internlm2-7b gemma-2b
    gemma-2-2b deepseek-v2-lite deepseek-v2 deepseek-v3""".split()


@pytest.mark.parametrize(
    "name, recompute", [*((name, False) for name in MEASURED), ("llama-2-7b", True), ("deepseek-v3", True)]
)
def test_the_memory_is_that_of_a_run(name, recompute, tmp_path):
    """A small model really trains: weights, gradients and moments to the byte, activations within 4 %."""
    if paddle.device.get_device() != "cpu":
        pytest.skip("reads Paddle's count of bytes on the CPU")
    kernels.configure("cpu")
    (tmp_path / "config.json").write_text(json.dumps(shrink(PRESETS[name]["config"], MIDDLE)))
    flags = "--per_device_train_batch_size 2 --max_seq_length 512"
    said = memory(dry(pretrain, "--model_name_or_path", tmp_path, *flags.split()))
    gc.collect()
    before = kept_bytes()
    net = model.build(ModelConfig.from_json(tmp_path))
    init_weights(net, 0)
    net.train()
    net.recompute = recompute
    weights = kept_bytes() - before
    ids = paddle.to_tensor(np.random.default_rng(0).integers(5, 900, (2, 512)))
    net(ids[:, :64], labels=ids[:, :64]).sum().backward()  # what is made once
    for parameter in net.parameters():
        parameter.clear_gradient(False)
    gc.collect()
    before = kept_bytes()
    loss = net(ids, labels=ids).sum()
    activations = kept_bytes() - before
    loss.backward()
    del loss
    gradients = sum(4 * parameter.grad.size for parameter in net.parameters())
    gc.collect()
    before = kept_bytes()
    optimizer = trainer.AdamW(trainable_weights(net), pretrain.Args(output_dir="x", do_train=True))
    moments = kept_bytes() - before
    assert gradients == sum(4 * math.prod(weight.shape) for weight in optimizer.weights)
    for part, size in {"weights": weights, "gradients": gradients, "moments": moments}.items():
        assert size / 1e9 == pytest.approx(said[part], rel=2e-3), part
    wanted = said["activations " + ("with recompute" if recompute else "without recompute")]
    if recompute:  # one block's activations come and go in backward
        wanted -= max(_activations(block, net.config, parallel.Degrees()) for block in net.layers) * 4096e-9
    assert activations / 1e9 == pytest.approx(wanted, rel=0.2 if recompute else 0.04)


@pytest.mark.parametrize(
    "flags",
    [
        "--lora true --lora_rank 4",
        "--lora true --lora_rank 3 --dora true --lora_target_modules .*(q_proj|down_proj)",
        "--prefix_tuning true --num_prefix_tokens 5",
        "--prefix_tuning true --num_prefix_tokens 5 --prefix_projection true --prefix_projection_hidden_size 24",
    ],
)
def test_what_an_adapter_trains(flags):
    """The count of a dry run is that of the adapter that finetune.py puts on."""
    argv = ["--model_name_or_path", ROOT / "demo" / "llama", *flags.split()]
    text = dry(finetune, *argv)
    args = parse_args(finetune.Args, ["--dry_run", "true", *map(str, argv)])
    args.lora_alpha = 8.0
    net = from_pretrained(ROOT / "demo" / "llama")
    trainer.setup_adapter(net, args)
    trained = sum(math.prod(weight.shape) for weight in trainable_weights(net))
    assert f"trained: {trained:,} (" in text and parameters(text) == 2951616
    assert memory(text)["gradients"] == pytest.approx(4e-9 * trained, abs=1e-6)


def test_dpo_counts_too():
    assert "trained: 162,816" in dry(dpo, "--model_name_or_path", ROOT / "demo" / "llama", "--lora", "true")


# ------------------------------------------------------------------------------------------- models not here

NEEDS = {
    pretrain: "--input_dir x --output_dir OUT --do_train true --max_steps 1",
    finetune: "--dataset_name_or_path x --output_dir OUT --do_train true",
    dpo: "--train_dataset_path x --output_dir OUT --do_train true",
    quantize: "--dataset_name_or_path x --output_dir OUT --do_ptq true",
    export: "--output_dir OUT",
    serve: "--prompt hello",
}


@pytest.mark.parametrize("script", NEEDS, ids=lambda script: script.__name__)
def test_a_model_that_is_not_here(script, tmp_path, capsys, monkeypatch):
    """Preset, repository, mistyped, unknown: one line says what to download and where to put it; nothing is written."""
    monkeypatch.chdir(tmp_path)
    rest = NEEDS[script].replace("OUT", str(tmp_path / "out")).split()
    for name, *said in (
        ("llama-3.1-405b", "download meta-llama/Llama-3.1-405B", "811.7 GB", "into the folder llama-3.1-405b,"),
        (
            "Qwen/Qwen2.5-0.5B",
            "download Qwen/Qwen2.5-0.5B",
            "config.json, *.safetensors",
            "into the folder Qwen/Qwen2.5-0.5B,",
        ),
        ("Qwen1.5-7B-chat", "download Qwen/Qwen1.5-7B-Chat"),
        ("lama-3.1-8b", "no such folder, and no preset", "nearest: llama-3.1-8b"),
        ("mistralai/Mistral-7B-v0.31", "nearest: mistralai/Mistral-7B-v0.3"),
        ("./checkpoints/zzzz", "./checkpoints/zzzz: no such folder, and no preset of configs/models.json"),
        ("gpt3-1.3b-en", "no published weights"),
    ):
        line = fails(script, ["--model_name_or_path", name, *rest], capsys)
        assert line.startswith("error: model_name_or_path: ") and all(text in line for text in said), line
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_is_not_here(tmp_path, capsys):
    argv = [
        "--model_name_or_path",
        ROOT / "demo" / "llama",
        *NEEDS[finetune].replace("OUT", str(tmp_path / "out")).split(),
    ]
    line = fails(finetune, [*argv, "--tokenizer_name_or_path", "gpt2"], capsys)
    assert (
        "tokenizer_name_or_path: gpt2 is not here: download openai-community/gpt2" in line and "safetensors" not in line
    )


def test_scripts_that_do_not_train_do_not_count(capsys):
    line = fails(export, ["--model_name_or_path", "llama-2-7b", "--output_dir", "x", "--dry_run", "true"], capsys)
    assert "dry_run: only the training scripts have one" in line


# ------------------------------------------------------------------------------------------- a config a family and task

SMALL = {  # what makes a tiny model of any family's config.json
    "hidden_size": 32, "n_embd": 32, "word_embed_proj_dim": 32, "intermediate_size": 48, "ffn_dim": 64,
    "ffn_hidden_size": 48, "inner_hidden_size": 128, "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2,
    "num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 2, "multi_query_group_num": 2, "kv_channels": 8,
    "head_dim": 8, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 2,
    "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "query_pre_attn_scalar": 8, "vocab_size": 3072, "padded_vocab_size": 3072, "sliding_window": 16,
}  # fmt: skip
MIDDLE = {
    **SMALL, "hidden_size": 256, "n_embd": 256, "word_embed_proj_dim": 256, "intermediate_size": 704, "ffn_dim": 1024,
    "ffn_hidden_size": 704, "inner_hidden_size": 1024, "kv_channels": 64, "head_dim": 64,
    "moe_intermediate_size": 192, "shared_expert_intermediate_size": 384, "q_lora_rank": 96, "kv_lora_rank": 128,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "sliding_window": 256, "num_hidden_layers": 4,
    "n_layer": 4, "num_layers": 4,
}  # fmt: skip


def shrink(config, sizes=SMALL):
    """The same family and switches in a tiny size, for the demo's tokenizer."""
    small = {key: sizes[key] if key in sizes and value is not None else value for key, value in config.items()}
    if config.get("num_key_value_heads") == config.get("num_attention_heads"):
        small["num_key_value_heads"] = 4
    if config.get("qk_rope_head_dim"):
        small["num_key_value_heads"] = 4
    if config.get("inner_hidden_size"):
        small |= {"bos_token_id": 1, "mask_token_id": 3070, "gmask_token_id": 3071}
    if config["model_type"] == "qwen":
        small["intermediate_size"] *= 2
    if config.get("word_embed_proj_dim", 0) < config.get("hidden_size", 0) and "word_embed_proj_dim" in config:
        small["word_embed_proj_dim"] //= 2  # OPT 350m
    return small


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """Records and token files of the demo, few."""
    world = tmp_path_factory.mktemp("small")
    lines = (ROOT / "demo" / "sft" / "train.json").read_text().splitlines()
    records = [line for line in lines if isinstance(json.loads(line)["src"], str)][:40]
    (world / "sft").mkdir()
    for split, part in (("train", records[:12]), ("dev", records[12:16])):
        (world / "sft" / f"{split}.json").write_text("\n".join(part) + "\n")
    corpus = world / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": json.loads(record)["tgt"]}) + "\n" for record in records))
    data.main(["corpus", str(corpus), "--tokenizer", str(ROOT / "demo" / "llama"), "--output", str(world / "corpus")])
    return world


def script_of(recipe):
    """A recipe's first word names its script."""
    return SCRIPTS[recipe.split("_")[0]]


def test_every_recipe_has_its_hardware():
    assert sorted(path.stem for path in RECIPES.glob("*.json")) == sorted(HARDWARE)


@pytest.mark.parametrize("recipe", HARDWARE)
def test_a_recipe_fits_the_hardware_it_states(recipe):
    """--dry_run says how much the fullest rank needs; a tenth of the memory stays free for what it does not count.

    In bfloat16 as the recipe says, and in float32, which is what the kernels here store.
    """
    processes, gb, stated = HARDWARE[recipe]
    path, script = RECIPES / f"{recipe}.json", script_of(recipe)
    doc = json.loads(path.read_text())["_doc"]
    assert stated in doc and f"{script.__name__}.py configs/recipes/{recipe}.json" in doc
    launched = re.search(r"(?:--nnodes (\d+) )?--nproc_per_node (\d+)", doc)
    assert processes == (math.prod(int(count or 1) for count in launched.groups()) if launched else 1)
    for bf16 in ("false", "true") if gb == GPU_GB else ("false",):
        args = parse_args(script.Args, [str(path), "--dry_run", "true", "--bf16", bf16])
        Degrees.of(args, presets.model_config(args.model_name_or_path), world=processes)
        used = memory(dry_run(args))
        assert used[f"in all with{'' if args.recompute else 'out'} recompute"] <= 0.9 * gb, used


@pytest.mark.parametrize("recipe", HARDWARE)
def test_a_recipe_is_short_and_counts_its_batch(recipe):
    """At most 40 flat keys beside _doc; rows and tokens of a step as _doc multiplies them."""
    keys = json.loads((RECIPES / f"{recipe}.json").read_text())
    doc = keys.pop("_doc")
    assert len(keys) <= 40 and not any(isinstance(value, (dict, list)) for value in keys.values())
    args = parse_args(script_of(recipe).Args, [str(RECIPES / f"{recipe}.json"), "--dry_run", "true"])
    degrees = Degrees.of(args, presets.model_config(args.model_name_or_path), world=HARDWARE[recipe][0])
    replicas = HARDWARE[recipe][0] // (degrees.tp * degrees.pp * degrees.sep)
    rows = replicas * args.per_device_train_batch_size * args.gradient_accumulation_steps
    length = next(keys[key] for key in ("max_seq_length", "max_length", "max_seq_len") if key in keys)
    factors = re.search(r"A step: (.*?) = ", doc)[1]
    assert f" x {args.gradient_accumulation_steps} accumulation steps" in factors
    if recipe.startswith("dpo_7b"):
        assert f"= {rows} rows of up to {length:,} tokens" in doc
    else:
        assert f" x {length:,} tokens = {rows * length:,} tokens" in doc
    assert math.prod(int(n.replace(",", "")) for n in re.findall(r"[\d,]+", factors)) in (rows, rows * length)


def test_the_dry_run_says_what_it_assumes():
    text = dry(finetune, "--model_name_or_path", "llama-2-7b")
    assert "not in the memory below: gaps of the allocator" in text and "bfloat16" not in text
    text = dry(finetune, "--model_name_or_path", "llama-2-7b", "--bf16", "true")
    assert "trained weights and activations are float32, frozen linears bfloat16" in text


@pytest.mark.parametrize(
    "name",
    """qwen2.5-7b-instruct llama-3.1-8b-instruct qwen3-8b mistral-7b-instruct-v0.3 gemma-2-9b-it glm-4-9b-chat
    chatglm-6b bloomz-7b1-mt deepseek-v2-lite-chat Qwen/Qwen2.5-14B-Instruct""".split(),
)
def test_a_recipe_takes_another_model_by_name(name):
    text = dry(finetune, RECIPES / "lora_7b.json", "--model_name_or_path", name, "--output_dir", "checkpoints/other")
    preset = presets.find_preset(name)[1]
    assert parameters(text) == preset["parameters"] and memory(text)["in all with recompute"] <= 0.9 * GPU_GB


FAMILIES = """baichuan2-7b-chat baichuan-13b-chat bloomz-7b1-mt chatglm2-6b chatglm-6b deepseek-v2-lite-chat deepseek-r1
    gemma-2-9b-it gemma-2b-it glm-4-9b-chat gpt2-medium internlm2-chat-7b internlm-chat-7b llama-3.1-8b-instruct
    mistral-7b-instruct-v0.3 mixtral-8x7b-instruct opt-1.3b qwen2.5-7b-instruct qwen1.5-moe-a2.7b-chat qwen3-8b
    qwen3-30b-a3b qwen-7b-chat""".split()
RUNS = ("pretrain_7b", "sft_7b", "lora_7b", "prefix_7b")
ONE_PROCESS = {  # a recipe's degrees, taken back
    "tensor_parallel_degree": 1, "sequence_parallel": "false", "sharding": "", "sharding_parallel_degree": 1,
    "pipeline_parallel_degree": 1, "expert_parallel_degree": 1,
}  # fmt: skip


def test_the_families_are_those_of_the_presets():
    types = {preset["config"]["model_type"] for preset in PRESETS.values()}
    assert {PRESETS[name]["config"]["model_type"] for name in FAMILIES} == types


@pytest.mark.parametrize(
    "name, recipe",
    [
        # Families in turn take another recipe, so that the quick run sees every family and every recipe.
        pytest.param(name, recipe, marks=[pytest.mark.slow] if (i + k) % len(RUNS) else [])
        for i, name in enumerate(FAMILIES)
        for k, recipe in enumerate(RUNS)
    ],
)
def test_recipes_train_a_tiny_model_of_every_family(name, recipe, small_world, tmp_path, monkeypatch):
    train_tiny(name, recipe, small_world, tmp_path, monkeypatch)


@pytest.mark.parametrize("recipe", [recipe for recipe in HARDWARE if recipe not in RUNS])
def test_other_recipes_train_a_tiny_model_of_their_own(recipe, small_world, tmp_path, monkeypatch):
    name = json.loads((RECIPES / f"{recipe}.json").read_text())["model_name_or_path"]
    train_tiny(name, recipe, small_world, tmp_path, monkeypatch)


def train_tiny(name, recipe, small_world, tmp_path, monkeypatch):
    """Two steps of a recipe on a tiny model of a preset: the file but for paths, lengths, steps and degrees."""
    monkeypatch.setattr("logger.draw_curves", lambda folder: None)
    monkeypatch.setattr(trainer, "measure_matmul_peak", lambda: 1e11)
    script, path = script_of(recipe), RECIPES / f"{recipe}.json"
    keys = {**json.loads(path.read_text()), "model_name_or_path": name}
    folder = tmp_path / "model"
    folder.mkdir()
    config = shrink(PRESETS[keys["model_name_or_path"]]["config"])
    (folder / "config.json").write_text(json.dumps(config))
    net = model.build(ModelConfig.from_json(folder))
    init_weights(net, seed=1)
    save_pretrained(net, folder)
    load_tokenizer(ROOT / "demo" / "llama").save(folder)
    flags = {
        "model_name_or_path": folder,
        "tokenizer_name_or_path": ROOT / "demo" / "llama",
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "disable_tqdm": "true",
        "max_evaluate_steps": 1,
        **ONE_PROCESS,
    }
    if script is pretrain:
        flags |= {"input_dir": small_world / "corpus", "max_seq_length": 48, "split": "80,10,10"}
    elif script is dpo:
        flags |= {
            f"{split}_dataset_path": ROOT / "demo" / "preference" / f"{split}.jsonl" for split in ("train", "dev")
        }
        flags |= {"max_seq_len": 512, "max_prompt_len": 128, "evaluation_strategy": "no", "save_strategy": "no"}
    else:
        flags |= {
            "dataset_name_or_path": small_world / "sft",
            "src_length": 96,
            "max_length": 224,
            "evaluation_strategy": "no",
            "save_strategy": "no",
        }
    trainer.run_script(
        script.main,
        script.Args,
        [str(path), *(part for key, value in flags.items() for part in (f"--{key}", str(value)))],
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(math.isfinite(row["loss"]) for row in rows)
    assert (
        tmp_path / "out" / ("adapter_config.json" if "lora" in keys or "prefix_tuning" in keys else "config.json")
    ).is_file()


def test_a_preset_from_scratch(small_world, tmp_path, monkeypatch, capsys):
    """pretrain.py takes the shape from the catalogue and the tokenizer from elsewhere."""
    monkeypatch.setattr("logger.draw_curves", lambda folder: None)
    monkeypatch.setattr(trainer, "measure_matmul_peak", lambda: 1e11)
    tiny = {**PRESETS["llama-2-7b"], "config": shrink(PRESETS["llama-2-7b"]["config"])}
    monkeypatch.setattr(presets, "presets", lambda: {"tiny-llama": tiny})
    flags = "--split 80,10,10 --do_train true --max_steps 1 --max_seq_length 48"
    flags += f" --input_dir {small_world / 'corpus'} --output_dir {tmp_path / 'out'}"
    argv = ["--model_name_or_path", "tiny-llama", *flags.split()]
    trainer.run_script(pretrain.main, pretrain.Args, [*argv, "--tokenizer_name_or_path", str(ROOT / "demo" / "llama")])
    written = ModelConfig.from_json(tmp_path / "out")
    assert (written.family, written.hidden_size, written.vocab_size) == ("llama", 32, 3072)
    assert "from scratch" in capsys.readouterr().out
    assert "tiny-llama is not here: download" in fails(pretrain, [*argv, "--overwrite_output_dir", "true"], capsys)


THEIRS = (
    "llama mistral mixtral qwen2 qwen3 qwen2_moe qwen3_moe bloom gpt2 opt gemma gemma2 deepseek_v2 deepseek_v3".split()
)


@pytest.mark.torch
def test_transformers_builds_as_many_parameters(hf_python, tmp_path):
    """Transformers reads the presets' configs alike: its models, built without memory, have as many parameters."""
    configs = {name: PRESETS[name]["config"] for name in OWN if PRESETS[name]["config"]["model_type"] in THEIRS}
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    script = """
import json, torch
from transformers import AutoConfig, AutoModelForCausalLM
arrays = {}
for name, config in json.load(open(sys.argv[2])).items():
    config = AutoConfig.for_model(**config)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
    corrections = sum(b.numel() for n, b in net.named_buffers() if n.endswith("correction_bias"))
    arrays[name] = np.int64(sum(p.numel() for p in net.parameters()) + corrections)
"""
    found = hf_python(script, tmp_path / "configs.json")
    assert {name: int(found[name]) for name in configs} == {name: PRESETS[name]["parameters"] for name in configs}
