"""torch's side of bench_kernels.py, which starts it: a request a line on stdin, the seconds of a call a line on stdout.

A request names an op, a part of it (forward, backward, …), its shape and the least seconds of the turn; what it needs
is made at the first such request and kept until {"forget": true}."""

import json
import os
import sys
import time

import torch
import torch.nn.functional as F

torch.set_num_threads(len(os.sched_getaffinity(0)))


def values(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def parts(function, inputs, wanted):
    """{"forward": …, part: …} of function(*inputs); wanted {part: indices of the inputs that have gradients}."""
    found = {"forward": torch.no_grad()(lambda: function(*inputs))}
    for part, chosen in wanted.items():
        leaves = [tensor.detach().requires_grad_(i in chosen) for i, tensor in enumerate(inputs)]
        out = function(*leaves)
        upstream = torch.randn(out.shape).to(out.dtype)
        how = out, [leaves[i] for i in chosen], upstream
        found[part] = lambda how=how: torch.autograd.grad(*how, retain_graph=True)
    return found


def linear(M, K, N):
    x, weight = values(M, K, dtype=torch.bfloat16), values(N, K, dtype=torch.bfloat16)
    return parts(F.linear, [x, weight], {"dx": [0], "dw": [1], "dx, dw": [0, 1]})


def attention(T, H, Dh, document, kind):
    q, k, v = (values(1, H, T, Dh, dtype=getattr(torch, kind)) for _ in range(3))
    mask = None
    if document:
        of = torch.arange(T) // document
        mask = ((of[:, None] == of) & (torch.arange(T)[:, None] >= torch.arange(T)))[None, None]
    function = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
    return parts(function, [q, k, v], {"backward": [0, 1, 2]})


def rms_norm(rows, D):
    x, weight = values(rows, D), values(D)
    return parts(lambda x, weight: F.rms_norm(x, (D,), weight, 1e-5), [x, weight], {"backward": [0, 1]})


def swiglu(rows, F):
    gate, up = values(rows, F), values(rows, F)
    return parts(lambda gate, up: torch.nn.functional.silu(gate) * up, [gate, up], {"backward": [0, 1]})


def rope(T, heads, Dh):
    x, (cos, sin) = values(1, heads, T, Dh), (values(1, 1, T, Dh) for _ in range(2))

    def rotate(x):
        a, b = x[..., : Dh // 2], x[..., Dh // 2 :]
        return x * cos + torch.cat([-b, a], -1) * sin

    return parts(rotate, [x], {"backward": [0]})


def linear_cross_entropy(N, D, V, kind="float32"):
    dtype = getattr(torch, kind)
    hidden, weight, labels = values(N, D, dtype=dtype), values(V, D, dtype=dtype) * D**-0.5, torch.randint(0, V, (N,))
    function = lambda h, w: F.cross_entropy(F.linear(h, w), labels, reduction="none")
    return parts(function, [hidden, weight], {"backward": [0, 1]})


def adamw(size):
    parameter = torch.nn.Parameter(values(size))
    parameter.grad = values(size)
    optimizer = torch.optim.AdamW([parameter], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    return {"step": optimizer.step}


OPS = {f.__name__: f for f in (linear, attention, rms_norm, swiglu, rope, linear_cross_entropy, adamw)}


def main():
    made = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "version" in request:
            answer = torch.__version__
        elif "forget" in request:
            made.clear()
            answer = None
        else:
            op, part, at_least = (request.pop(key) for key in ("op", "part", "at_least"))
            key = op, *sorted(request.items(), key=str)
            if key not in made:
                made[key] = OPS[op](**request)
            run, calls, start = made[key][part], 0, time.perf_counter()
            while not calls or time.perf_counter() - start < at_least:
                run()
                calls += 1
            answer = (time.perf_counter() - start) / calls
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
