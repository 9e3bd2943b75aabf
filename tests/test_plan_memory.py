"""Memory that planning/memory_model.py says of a rank, against what ranks of really trained tiny models hold.

python -m pytest tests/test_plan_memory.py --sweeps -s          # -s prints the table of docs/plan.md
"""

import types

import pytest
from pool import Ranks

from families import ModelConfig
from parallel import Degrees
from planning.memory_model import MemoryModel

LLAMA = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"],
}  # fmt: skip
MOE = {
    **LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None,
    "architectures": ["MixtralForCausalLM"],
}  # fmt: skip
KEYS = {
    "device": "cpu", "bf16": False, "lora_rank": 8, "lora_target_modules": None, "dora": False,
    "no_recompute_layers": None,
}  # fmt: skip
# degrees, batch size, T, accumulation, more
CASES = [
    ({}, 2, 256, 2, {}),
    ({"dp": 2}, 2, 256, 1, {}),
    ({"sharding": 2, "stage": 1}, 2, 256, 2, {}),
    ({"sharding": 2, "stage": 2}, 2, 256, 2, {"recompute": "full"}),
    ({"sharding": 2, "stage": 3}, 2, 256, 2, {}),
    ({"tp": 2}, 2, 256, 2, {}),
    ({"tp": 2, "sequence_parallel": True}, 2, 256, 2, {}),
    ({"pp": 2}, 2, 256, 4, {}),
    ({"sep": 2}, 2, 256, 2, {}),
    ({"sep": 2, "context": True}, 2, 256, 2, {}),
    ({"sharding": 2, "ep": 2, "stage": 1}, 2, 256, 2, {"model": MOE}),
    ({"sharding": 2, "stage": 1}, 2, 256, 2, {"lora": True}),
    ({"pp": 2, "virtual": 2, "tp": 2}, 1, 256, 4, {}),
    ({"tp": 2, "dp": 2}, 2, 256, 2, {"recompute": "core_attn"}),
    ({"sharding": 2, "pp": 2, "tp": 2, "stage": 1}, 1, 256, 4, {}),
    ({"sharding": 8, "stage": 3}, 1, 256, 1, {}),
]


def said(model_config, degrees, batch_size, T, accumulation, lora, recompute):
    """Bytes of the fullest rank."""
    args = types.SimpleNamespace(**KEYS, lora=lora, recompute=recompute is not None)
    args.recompute_granularity = recompute or "full"
    rows = MemoryModel(args, ModelConfig.from_dict(model_config), T).fullest(
        Degrees(**degrees), batch_size, accumulation
    )
    return rows["in all with recompute" if recompute else "in all without recompute"]


@pytest.fixture(scope="module")
def pools():
    """{world: Ranks}, one at a time: started when a case is the first to need so many."""
    held = {}
    yield held
    for ranks in held.values():
        ranks.stop()


@pytest.mark.sweep(keep=1)
@pytest.mark.parametrize("number", sorted(range(len(CASES)), key=lambda i: Degrees(**CASES[i][0]).world))
def test_memory_is_within_a_tenth_of_what_ranks_hold(number, pools):
    """All of a rank's peak: weights, gradients, moments, activations, logits and communication buffers."""
    degrees, *shape, more = CASES[number]
    more = {"lora": False, "recompute": None, "model": LLAMA, **more}
    config, world = more.pop("model"), Degrees(**degrees).world
    for other in [other for other in pools if other != world]:
        pools.pop(other).stop()
    ranks = pools.setdefault(world, Ranks(world))
    measured = max(ranks.run("jobs_plan:peak", config, degrees, *shape, **more))
    found = said(config, degrees, *shape, **more)
    what = ", ".join(filter(None, [str(Degrees(**degrees)), "LoRA" * more["lora"], more["recompute"]]))
    print(f"| {what} | {measured / 1e6:.2f} | {found / 1e6:.2f} | {100 * (found / measured - 1):+.1f} % |")
    assert found == pytest.approx(measured, rel=0.1)
