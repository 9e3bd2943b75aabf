"""Speed of the ops of kernels/ beside torch's and beside the processor's peak.

    python tests/bench/bench_kernels.py                                     # only ours
    python tests/bench/bench_kernels.py --torch /path/to/venv/bin/python    # and torch's, in an interpreter that has it
    python tests/bench/bench_kernels.py --only gemm                         # or attention, others

Ours and torch's alternate in one run, each with all cores; a figure is the median of --turns turns. Ours takes and
returns float32, also with products in bfloat16: conversion and packing are included. torch's bfloat16 takes and returns
bfloat16. --small is for tests: tiny sizes whose figures mean nothing. The last line is a JSON object with all rows.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

import paths  # noqa: F401

if __name__ == "__main__":  # read once, when Paddle is first imported; its own default is one thread
    os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))

import kernels

import ops as table

GEMMS = [(2048, 768, 2048), (2048, 2048, 768), (2048, 32000, 768), (16, 4096, 4096), (4096, 4096, 4096)]  # M, K, N
LENGTHS, DOCUMENT, HEADS, HEAD_DIM = (512, 2048, 8192), 512, 12, 64
SPARSE_LENGTH, DOCUMENTS = 8192, (8192, 4096, 2048, 1024, 512, 256)
OTHERS = {
    "rms_norm": dict(rows=4096, D=768),
    "swiglu": dict(rows=2048, F=2048),
    "rope": dict(T=2048, heads=12, Dh=64),
    "linear_cross_entropy": dict(N=2048, D=768, V=32000),
    "linear_cross_entropy, bf16": dict(N=2048, D=768, V=32000, kind="bfloat16"),
    "adamw": dict(size=1 << 22),
}
REST = 0.25  # seconds before a turn: idle threads of the other's last one spin for as long


class Torch:
    """Another process, with torch, that runs one turn per request: bench_torch.py has the ops."""

    def __init__(self, python):
        script = Path(__file__).with_name("bench_torch.py")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")
        self.process = subprocess.Popen([python, str(script)], **pipes)
        self.version = self.ask(version=True)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"torch's process ended at {request}")
        return json.loads(line)

    def case(self, **request):
        """A function that measures {"op", "part", …} in one turn: seconds per call."""
        return lambda at_least: self.ask(**request, at_least=at_least)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def alternate(cases, turns):
    """{name: function(seconds of a turn) -> seconds per call} -> {name: median}; the cases alternate."""
    found = {name: [] for name in cases}
    for i in range(turns + 1):
        for name, run in cases.items():
            time.sleep(REST if i else 0)
            seconds = run(0.05 if i else 0.0)
            if i:  # the first is a warm-up
                found[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def ours(op, **shape):
    """({part: function for alternate()}, {part: work}) of an op's cases in tests/bench/ops.py."""
    cases = list(table.CASES[op](**shape))
    runs = {case.part: lambda at_least, run=case.run: table.turn(run, at_least) for case in cases}
    return runs, {case.part: case.work for case in cases}


def ratio(row):
    """torch's time over ours, if both were measured."""
    return f"{row['torch'] / row['ours']:7.2f}x" if "torch" in row else ""


def milliseconds(row, name):
    return f"{row[name] * 1e3:10.2f}" if name in row else f"{'':10}"


# ================================================================================================== the tables


def gemm(torch, peak_rates, options):
    print(
        "\nproducts, GFLOP/s: M x K x N; bf16: float32 in and out, products in bfloat16;\nratio and share are of "
        "bf16, of frozen where there is no other"
    )
    names = ("bf16", "bf16, frozen", "fp32", "fp32, frozen", "torch bf16")
    print(f"{'':20} {'':8}" + "".join(f"{name:>14}" for name in names) + f"{'over torch':>12}{'of peak':>9}")
    found = []
    for M, K, N in [(32, 64, 32)] if options.small else GEMMS:
        runs, work = {}, {}
        for name, kind in (("fp32", "float32"), ("bf16", "bfloat16")):
            if kind == "bfloat16" and kernels.bf16_missing():
                continue
            for frozen in (False, True):
                made = ours("linear", M=M, K=K, N=N, kind=kind, frozen=frozen)
                runs[name + (", frozen" if frozen else "")] = made[0]
                work |= made[1]
        for part in ("forward", "dx", "dw", "dx, dw"):
            cases = {name: of[part] for name, of in runs.items() if part in of}
            if torch:
                cases["torch bf16"] = torch.case(op="linear", part=part, M=M, K=K, N=N)
            rate = {name: 1e-9 * work[part] / s for name, s in alternate(cases, options.turns).items()}
            best = rate.get("bf16", rate.get("bf16, frozen"))
            over = f"{best / rate['torch bf16']:11.2f}x" if torch and best else ""
            share = f"{best * 1e9 / peak_rates['bfloat16']:9.0%}" if best and "bfloat16" in peak_rates else ""
            figures = "".join(f"{rate[name]:14.0f}" if name in rate else f"{'':14}" for name in names)
            print(f"{f'{M} x {K} x {N}':20} {part:8}{figures}{over:>12}{share}", flush=True)
            found.append({"M": M, "K": K, "N": N, "part": part, **{name: round(r, 1) for name, r in rate.items()}})
    return found


def attention(torch, peak_rates, options):
    lengths, document = ((96,), 32) if options.small else (LENGTHS, DOCUMENT)
    H, Dh = (2, 16) if options.small else (HEADS, HEAD_DIM)
    print(f"\nattention, ms: {H} heads x {Dh}; packed: documents of {document}, a dense mask for torch")
    bf16 = "bfloat16" in peak_rates
    names = ["ours"] + ["ours bf16"] * bf16 + ["torch", "torch bf16"] * bool(torch)
    print(f"{'':31}" + "".join(f"{name:>11}" for name in names) + f"{'over torch':>11}{'of bf16':>9}" * bool(torch))
    found = []
    for T in lengths:
        for packed in (None, document):
            kinds = ("float32", "bfloat16") if bf16 else ("float32",)
            runs = [ours("attention", T=T, H=H, Dh=Dh, document=packed, kind=kind)[0] for kind in kinds]
            for part in ("forward", "backward"):
                cases = {name: run[part] for name, run in zip(("ours", "ours bf16"), runs)}
                for name, kind in (("torch", "float32"), ("torch bf16", "bfloat16")) if torch else ():
                    cases[name] = torch.case(op="attention", part=part, kind=kind, T=T, H=H, Dh=Dh, document=packed)
                row = alternate(cases, options.turns)
                label = f"{T} {'packed' if packed else 'full causal'}"
                figures = "".join(f"{1e3 * row[name]:11.2f}" for name in names)
                if torch:
                    in_bf16 = row["torch bf16"] / row.get("ours bf16", row["ours"])
                    figures += f"{row['torch'] / row['ours']:10.2f}x{in_bf16:8.2f}x"
                print(f"{label:22}{part:9}{figures}", flush=True)
                found.append({"T": T, "packed": packed, "part": part, **row})
            if torch:
                torch.ask(forget=True)
    T, documents = (96, (96, 32)) if options.small else (SPARSE_LENGTH, DOCUMENTS)
    print(f"\nattention over documents that do not see each other, ms: {T} tokens; time falls with what is visible")
    print(f"{'documents of':14}{'visible':>9}{'forward':>10}{'of all':>9}{'backward':>10}{'of all':>9}")
    full = {}
    for document in documents:
        runs, work = ours("attention", T=T, H=H, Dh=Dh, document=document)
        seconds = alternate(runs, options.turns)
        full = full or {part: (seconds[part], work[part]) for part in runs}
        share = {part: seconds[part] / full[part][0] for part in runs}
        visible = work["forward"] / full["forward"][1]
        figures = "".join(f"{milliseconds(seconds, part)}{share[part]:9.1%}" for part in ("forward", "backward"))
        print(f"{document:<14}{visible:9.1%}{figures}", flush=True)
        found.append({"T": T, "document": document, "visible": visible, **seconds})
    return found


def others(torch, peak_rates, options):
    print("\nthe rest, ms; torch in float32 (and its losses of bfloat16 logits beside ours with products in bfloat16)")
    print(f"{'':28}{'':36}{'':9}{'ours':>10}{'torch':>10}{'over torch':>11}")
    small = {"rows": 8, "D": 16, "F": 16, "T": 8, "heads": 2, "Dh": 8, "N": 8, "V": 32, "size": 64}
    found = []
    for name, shape in OTHERS.items():
        op = name.split(",")[0]
        if "kind" in shape and kernels.bf16_missing():
            continue
        shape = {key: small.get(key, value) for key, value in shape.items()} if options.small else shape
        runs, _ = ours(op, **shape)
        for part, run in runs.items():
            row = alternate(
                {"ours": run, **({"torch": torch.case(op=op, part=part, **shape)} if torch else {})}, options.turns
            )
            words = " ".join(f"{key} {value}" for key, value in shape.items() if key != "kind")
            print(
                f"{name:28}{words:36}{part:9}{milliseconds(row, 'ours')}{milliseconds(row, 'torch')}   {ratio(row)}",
                flush=True,
            )
            found.append({"op": name, "part": part, **shape, **row})
        if torch:
            torch.ask(forget=True)
    return found


# ======================================================================================================== main


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="a Python that has torch")
    parser.add_argument("--only", choices=["gemm", "attention", "others"])
    parser.add_argument("--turns", type=int, default=5, help="of each thing that is timed")
    parser.add_argument("--kernels", default="auto", help="back ends, see kernels/__init__.py")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    kernels.configure("cpu", options.kernels)
    print(table.hardware())
    peak_rates, method = table.peaks(1 if options.small else 7)
    print(
        "peak: "
        + " · ".join(f"{kind} {table.amount(kind, rate)}" for kind, rate in peak_rates.items())
        + f" ({method})"
    )
    torch = Torch(options.torch) if options.torch else None
    result = {"threads": len(os.sched_getaffinity(0)), "turns": options.turns, "peak": peak_rates}
    if torch:
        result["torch"] = torch.version
        print(f"torch {torch.version}")
    for run in (gemm, attention, others):
        if options.only in (None, run.__name__):
            result[run.__name__] = run(torch, peak_rates, options)
    if torch:
        torch.close()
    print(json.dumps(result), flush=True)
    return result


if __name__ == "__main__":
    main()
