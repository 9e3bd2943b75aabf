"""How fast small models of each family train beside transformers: forward and backward of 4 x 512 random ids, float32.

    python tests/bench/bench_families.py --peer PYTHON                       # PYTHON has torch and transformers
    python tests/bench/bench_families.py --peer PYTHON --only mixtral,gpt2 --rounds 3

Each side runs in its own processes, alternating, on two threads, with the same config.json and its own random weights.
Prints a line per family: tokens/s here and there, the best of --steps steps, medians over --rounds turns, and the
ratio with its range. Without the optimizer, which bench_train.py measures.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

THREADS, ROWS, LENGTH, VOCABULARY = 2, 4, 512, 4096
SMALL = dict(
    vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, max_position_embeddings=2048
)
LLAMA = dict(
    SMALL,
    num_key_value_heads=4,
    intermediate_size=688,
    hidden_act="silu",
    rope_theta=10000.0,
    tie_word_embeddings=False,
)
GEMMA = dict(
    LLAMA,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    hidden_act="gelu_pytorch_tanh",
    tie_word_embeddings=True,
)
CONFIGS = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": dict(LLAMA, head_dim=32),
    "mistral": dict(LLAMA, sliding_window=256),
    "gemma": GEMMA,
    "gemma2": dict(GEMMA, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=64, sliding_window=256,
                   attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    "glm4": dict(LLAMA, head_dim=32, attention_bias=True, partial_rotary_factor=0.5),
    "gpt2": dict(vocab_size=VOCABULARY, n_embd=256, n_layer=4, n_head=8, n_positions=2048, attn_pdrop=0.0,
        embd_pdrop=0.0, resid_pdrop=0.0),
    "bloom": dict(vocab_size=VOCABULARY, hidden_size=256, n_layer=4, n_head=8),
    "opt": dict(SMALL, ffn_dim=1024, dropout=0.0, word_embed_proj_dim=256),
    "mixtral": dict(LLAMA, intermediate_size=512, num_local_experts=8, num_experts_per_tok=2, sliding_window=None),
    "qwen2_moe": dict(LLAMA, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=256,
        shared_expert_intermediate_size=512),
    "deepseek_v2": dict(LLAMA, num_key_value_heads=8, q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=32,
        qk_rope_head_dim=16, v_head_dim=32,
                        n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4, moe_intermediate_size=256,
                            first_k_dense_replace=1,
                        topk_method="greedy", n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0),
}  # fmt: skip


def best_step(step, steps):
    """Tokens/s of the fastest of `steps` calls after one that warms up."""
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return ROWS * LENGTH / min(seconds[1:])


def run_here(config, steps):
    os.environ["OMP_NUM_THREADS"] = str(THREADS)  # read when Paddle is first imported
    import paths  # noqa: F401

    import kernels

    import numpy as np
    import paddle

    import families
    import formats.weights
    import model as M

    kernels.configure(device="cpu", choice="auto")
    model = M.build(families.ModelConfig.from_dict(config))
    formats.weights.init_weights(model, seed=0)
    model.train()
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, LENGTH))
    ids, labels = paddle.to_tensor(ids), paddle.to_tensor(np.roll(ids, -1, 1))

    def step():
        loss = model(
            ids, labels=labels, auxiliary_losses=False
        ).mean()  # the peer has no balancing loss by default either
        loss.backward()
        model.clear_gradients()
        float(loss)

    return best_step(step, steps)


def run_there(config, steps):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    config = dict(config)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), pad_token_id=0, **config)
    ).train()
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))

    def step():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad()
        loss.item()

    return best_step(step, steps)


def in_process(python, role, family, steps):
    """Tokens/s that a new process of this file found; it runs elsewhere, as our kernels/ would hide the peer's."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [python, str(Path(__file__).resolve()), "--role", role, "--only", family, "--steps", str(steps)],
            capture_output=True,
            text=True,
            cwd=folder,
        )
    if done.returncode:
        sys.exit(f"{family}, {role}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer", help="a Python with torch and transformers; without it, only this repository is timed"
    )
    parser.add_argument("--only", default=",".join(CONFIGS), help="families, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--role", choices=["here", "there"], help=argparse.SUPPRESS)  # of a process that times one side
    args = parser.parse_args()
    families = args.only.split(",")
    if unknown := set(families) - set(CONFIGS):
        parser.error(f"--only: {', '.join(sorted(unknown))}; there are {', '.join(CONFIGS)}")
    if args.role:
        config = {"model_type": families[0], **CONFIGS[families[0]]}
        print(json.dumps((run_here if args.role == "here" else run_there)(config, args.steps)))
        return
    print(f"| {ROWS} x {LENGTH} ids | here, tokens/s | transformers | ratio |\n|---|---|---|---|")
    for family in families:
        turns = [
            (
                in_process(sys.executable, "here", family, args.steps),
                in_process(args.peer, "there", family, args.steps) if args.peer else None,
            )
            for _ in range(args.rounds)
        ]
        here = statistics.median(turn[0] for turn in turns)
        if args.peer:
            there, ratios = statistics.median(turn[1] for turn in turns), sorted(a / b for a, b in turns)
            more = f"{there:,.0f} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {family} | {here:,.0f} | {more if args.peer else ' | '} |", flush=True)


if __name__ == "__main__":
    main()
