"""Parity of parallel runs with one process, as README's tables: the real scripts on tiny models, step by step.

    python tests/bench/parallel_table.py                                      # everything: Llama's topologies, then
    the families python tests/bench/parallel_table.py --part llama --only tp2 --tasks sft,lora python
    tests/bench/parallel_table.py --part families --worlds 2 python tests/bench/parallel_table.py --readme
    # everything, and into tests/RESULTS.md between its two marks

A cell is the largest relative difference, over the losses of STEPS steps and the last gradient norm, between a run on
several ranks (tests/ranks/pool.py) and one process with the same batches in a step; or what the run failed with. LIMIT
decides; the exit code is 1 if any cell is above it or failed. Batches have the lengths of their own samples, so ranks
of the data axes work on different lengths, and the last step of an epoch has fewer micro-batches than ranks."""

import argparse
import json
import math
import re
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import paths

import tiny_models
from family_cells import give_tokenizer, make_world
from pool import Ranks

STEPS, LIMIT = 10, 1e-5
# With Adam's usual 1e-8 an element whose gradient is rounding alone moves as far as any other, this way or that: on 4
# ranks of tensor parallelism that makes 1e-4 of the norm after 10 steps.
EPSILON = 1e-5
# At a learning rate of 5e-3 LoRA amplifies: one process whose weights are moved by one rounding (6e-8) ends with a
# gradient norm 2e-6 to 6e-6 away, and one cell was at 1.0e-5; TASKS has 2e-3.
EACH = 4  # micro-batches of a step, over all ranks

Way = namedtuple("Way", "world data keys")  # processes; how many of them have batches of their own; arguments


def _way(world, data=1, **degrees):
    names = {"tp": "tensor", "pp": "pipeline", "shards": "sharding", "sep": "sep", "context": "context", "ep": "expert"}
    return Way(
        world, data, {f"{names[key]}_parallel_degree" if key in names else key: value for key, value in degrees.items()}
    )


TOPOLOGIES = {
    "tp2": _way(2, tp=2),
    "tp2 sequence parallel": _way(2, tp=2, sequence_parallel=True),
    "pp2": _way(2, pp=2),
    "pp2, 2 stages a rank": _way(2, pp=2, virtual_pp_degree=2),
    "dp2": _way(2, 2),
    "sharding2 stage1": _way(2, 2, shards=2, sharding="stage1"),
    "sharding2 stage2": _way(2, 2, shards=2, sharding="stage2"),
    "sharding2 stage2 offload": _way(2, 2, shards=2, sharding="stage2 offload"),
    "sharding2 stage3": _way(2, 2, shards=2, sharding="stage3"),
    "sep2": _way(2, sep=2),
    "context2": _way(2, context=2),
    "tp4": _way(4, tp=4),
    "tp4 sequence parallel": _way(4, tp=4, sequence_parallel=True),
    "pp4": _way(4, pp=4),
    "dp4": _way(4, 4),
    "sharding4 stage1": _way(4, 4, shards=4, sharding="stage1"),
    "sharding4 stage3": _way(4, 4, shards=4, sharding="stage3"),
    "sep4": _way(4, sep=4),
    "context4": _way(4, context=4),
    "tp2 dp2": _way(4, 2, tp=2),
    "tp2 pp2": _way(4, tp=2, pp=2),
    "tp2 sharding2 stage1": _way(4, 2, tp=2, shards=2, sharding="stage1"),
    "tp2 sharding2 stage2": _way(4, 2, tp=2, shards=2, sharding="stage2"),
    "tp2 sharding2 stage3": _way(4, 2, tp=2, shards=2, sharding="stage3"),
    "pp2 sharding2": _way(4, 2, pp=2, shards=2, sharding="stage1"),
    "pp2 sharding2, sharding first": _way(4, 2, pp=2, shards=2, sharding="stage1",
        hybrid_parallel_topo_order="sharding_first"),
    "pp2 dp2": _way(4, 2, pp=2),
    "sharding2 stage2 dp2": _way(4, 4, shards=2, sharding="stage2"),
    "sep2 tp2": _way(4, sep=2, tp=2),
    "context2 dp2": _way(4, 2, context=2),
    "tp2 pp2 dp2": _way(8, 2, tp=2, pp=2),
    "tp2 pp2 sharding2": _way(8, 2, tp=2, pp=2, shards=2, sharding="stage1"),
    "tp2 pp2 dp2 sequence parallel": _way(8, 2, tp=2, pp=2, sequence_parallel=True),
    "tp2 context2 sharding2 stage3": _way(8, 2, tp=2, context=2, shards=2, sharding="stage3"),
    "tp8": _way(8, tp=8),
}  # fmt: skip

# name: (script, keys); the data of both is that of family_cells.make_world().
_TUNE = {"src_length": 20, "max_length": 44, "max_new_tokens": 4, "zero_padding": True, "flash_mask": True}
TASKS = {
    "pretrain": ("pretrain", {"split": "90,10,0", "max_seq_length": 41, "mask_across_documents": True,
        "learning_rate": 1e-3}),
    "sft": ("finetune", {**_TUNE, "learning_rate": 1e-3}),
    "lora": ("finetune", {**_TUNE, "lora": True, "lora_rank": 3, "lora_dropout": 0.1, "learning_rate": 2e-3}),
    "prefix": ("finetune", {**_TUNE, "prefix_tuning": True, "num_prefix_tokens": 3, "learning_rate": 1e-2}),
}  # fmt: skip
# Where tokens are sharded each rank draws the dropout mask of its own: there LoRA is compared without dropout.
WITHOUT_DROPOUT = {"sep_parallel_degree", "context_parallel_degree", "expert_parallel_degree"}

# The model of the first table, and of every other family one or two: as in families.py, with heads that can be halved.
LLAMA = dict(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
FAMILIES = {
    "llama_bias_tied": {},
    "mistral": {},
    "mixtral": dict(num_key_value_heads=2, num_local_experts=4),
    "qwen": {},
    "qwen2": dict(num_key_value_heads=2),
    "qwen2_moe": dict(num_experts=6),
    "qwen3": dict(num_attention_heads=4, num_key_value_heads=2),
    "qwen3_moe": dict(num_experts=8),
    "baichuan_7b": {},
    "baichuan2_13b": dict(num_attention_heads=4, hidden_size=48),
    "chatglm": {},
    "chatglm2": {},
    "chatglm3": {},
    "glm": dict(num_attention_heads=4, num_key_value_heads=2),
    "glm4": {},
    "bloom": {},
    "gpt2": dict(n_head=4),
    "opt": {},
    "opt_350m": {},
    "internlm": {},
    "internlm2": {},
    "gemma": dict(num_attention_heads=4, num_key_value_heads=2),
    "gemma2": {},
    "deepseek_v2": dict(num_attention_heads=4, num_key_value_heads=4),
    "deepseek_v3": dict(num_attention_heads=4, num_key_value_heads=4),
}
FAMILY_TOPOLOGIES = ("tp2", "tp2 sequence parallel", "pp2", "sharding2 stage3", "sep2", "context2", "tp2 pp2")
MOE_TOPOLOGIES = {"ep2": _way(2, 2, ep=2), "ep2 tp2": _way(4, 2, tp=2, ep=2)}


class Bench:
    """A world of data and models in a folder, and ranks to run scripts on."""

    def __init__(self, folder):
        self.folder, self.pools, self.references = Path(folder), {}, {}
        self.world = make_world(self.folder / "world")

    def model(self, name, changes):
        """The folder of a family's model, with a tokenizer."""
        folder = self.folder / name
        if not folder.is_dir():
            tiny_models.write(folder, name, **changes)
            give_tokenizer(folder, self.world)
        return folder

    def run(self, way, model, task, **more):
        """The rows of metrics.jsonl of a run."""
        script, keys = TASKS[task]
        out = self.folder / "out"
        source = (
            {"input_dir": self.world / "corpus"}
            if script == "pretrain"
            else {"dataset_name_or_path": self.world / "sft"}
        )
        keys = {
            "model_name_or_path": model,
            "output_dir": out,
            "do_train": True,
            "overwrite_output_dir": True,
            "max_steps": STEPS,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": EACH // way.data,
            "lr_scheduler_type": "constant",
            "adam_epsilon": EPSILON,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            **source,
            **keys,
            **way.keys,
            **more,
        }
        argv = self.folder / "args.json"
        argv.write_text(json.dumps(keys, default=str))
        rows, _ = self.pool(way.world).run("jobs_parallel:script", script, [str(argv)])[0]
        return rows

    def cell(self, way, model, task):
        """The largest relative difference, or the line that the run failed with."""
        more = {"lora_dropout": 0.0} if task == "lora" and WITHOUT_DROPOUT & way.keys.keys() else {}
        key = (model, task, *more)
        if key not in self.references:
            self.references[key] = self.run(Way(1, 1, {}), model, task, **more)
        try:
            return difference(self.run(way, model, task, **more), self.references[key])
        except RuntimeError as error:
            return failure(str(error))

    def pool(self, world):
        if world not in self.pools:
            for other in [other for other in self.pools if other > 1]:  # two cores hold one of them
                self.pools.pop(other).stop()
            self.pools[world] = Ranks(world)
        return self.pools[world]

    def close(self):
        for pool in self.pools.values():
            pool.stop()


def difference(rows, expected):
    """Relative: the largest of all losses' and of the last gradient norm's."""
    assert len(rows) == len(expected) == STEPS, (len(rows), len(expected))
    losses = [row["loss"] for row in expected]
    assert max(losses) - min(losses) > 1e-3, f"nothing is learned: {losses}"
    pairs = [(row["loss"], other["loss"]) for row, other in zip(rows, expected)] + [
        (rows[-1]["grad_norm"], expected[-1]["grad_norm"])
    ]
    return max(abs(a / b - 1) if math.isfinite(a) else math.inf for a, b in pairs)


def failure(text):
    """The last line of the traceback of the first rank that did not just lose its company."""
    lines = [part.strip().splitlines()[-1] for part in re.split(r"^rank \d+: ", text, flags=re.M) if part.strip()]
    own = [line for line in lines if not re.search(r"gloo|Timed out|closed by peer|no answer|it ended", line)]
    return (own or lines)[0]


def shown(cell):
    return f"{cell:.1e}" if isinstance(cell, float) else f"fails: {cell[:120]}"


def fine(cell):
    return isinstance(cell, float) and cell <= LIMIT


def report(row, column, cell, begin):
    mark = "" if fine(cell) else "   <-- ABOVE THE LIMIT" if isinstance(cell, float) else "   <-- FAILS"
    print(f"{row:32} {column:24} {shown(cell)}  ({time.time() - begin:.1f} s){mark}", file=sys.stderr, flush=True)


def llama_table(bench, names, tasks):
    """({topology: {task: cell}}, lines of markdown)."""
    model, found = bench.model("llama", LLAMA), {}
    for name in names:
        found[name] = {}
        for task in tasks:
            begin = time.time()
            found[name][task] = bench.cell(TOPOLOGIES[name], model, task)
            report(name, task, found[name][task], begin)
    lines = [f"| topology | processes | {' | '.join(tasks)} |", "|---|---|" + "---|" * len(tasks)]
    lines += [
        f"| {name} | {TOPOLOGIES[name].world} | {' | '.join(shown(cells[task]) for task in tasks)} |"
        for name, cells in found.items()
    ]
    return found, lines


def family_table(bench, names, topologies):
    """({family: {topology: cell}}, lines of markdown), of sft."""
    ways, found = {**{name: TOPOLOGIES[name] for name in topologies if name in TOPOLOGIES}, **MOE_TOPOLOGIES}, {}
    for topology in sorted(topologies, key=lambda topology: ways[topology].world):
        for name in names:
            if topology in MOE_TOPOLOGIES and name not in tiny_models.MOE:
                continue
            begin = time.time()
            cell = bench.cell(ways[topology], bench.model(name, FAMILIES[name]), "sft")
            found.setdefault(name, {})[topology] = cell
            report(name, topology, cell, begin)
    lines = [f"| model | {' | '.join(topologies)} |", "|---|" + "---|" * len(topologies)]
    lines += [
        f"| `{name}` | {' | '.join(shown(cells[t]) if t in cells else '' for t in topologies)} |"
        for name, cells in found.items()
    ]
    return found, lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("llama", "families", "all"), default="all")
    parser.add_argument("--only", default="", help="topologies whose name holds one of these, separated by commas")
    parser.add_argument("--exactly", default="", help="the same, whole names separated by semicolons")
    parser.add_argument("--models", default="", help="of the families: those whose name holds one of these")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--worlds", default="2,4,8", help="numbers of processes")
    parser.add_argument("--readme", action="store_true", help="write the tables into tests/RESULTS.md")
    options = parser.parse_args(argv)
    worlds = [int(world) for world in options.worlds.split(",")]

    def wanted(name):
        way = TOPOLOGIES.get(name) or MOE_TOPOLOGIES[name]
        if options.exactly and name not in [part.strip() for part in options.exactly.split(";")]:
            return False
        return way.world in worlds and any(part.strip() in name for part in options.only.split(","))

    bad, cells = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder)
        try:
            tables = []
            if options.part != "families":
                tables.append(llama_table(bench, [n for n in TOPOLOGIES if wanted(n)], options.tasks.split(",")))
            if options.part != "llama":
                names = [name for name in FAMILIES if any(part in name for part in options.models.split(","))]
                tables.append(
                    family_table(bench, names, [n for n in (*FAMILY_TOPOLOGIES, *MOE_TOPOLOGIES) if wanted(n)])
                )
        finally:
            bench.close()
    for found, lines in tables:
        print("\n".join(lines), end="\n\n")
        cells += sum(map(len, found.values()))
        bad += sum(not fine(cell) for row in found.values() for cell in row.values())
    if options.readme:
        path = paths.TESTS / "RESULTS.md"
        before, _, rest = path.read_text(encoding="utf-8").partition("<!-- parity -->")
        inner = "\n\n".join("\n".join(lines) for _, lines in tables)
        after = rest.partition("<!-- parity end -->")[2]
        path.write_text(f"{before}<!-- parity -->\n{inner}\n<!-- parity end -->{after}", encoding="utf-8")
    print(f"{cells} cells, {bad} of them above {LIMIT:g} or failed")
    sys.exit(1 if bad or not cells else 0)


if __name__ == "__main__":
    main()
