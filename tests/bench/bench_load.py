"""How the server holds under load: time to first token and between tokens of clients that come at random, and memory.

    python tests/bench/bench_load.py --model checkpoints/smollm2 --clients 64 --seconds 120
    python tests/bench/bench_load.py --model … --peer vllm --python ~/.cache/llm-peers/vllm/bin/python --rate 6.1
    python tests/bench/bench_load.py --model … --server "--speculate_method ngram"     # more keys of serve.py

The server runs in a process of its own. First `clients` at once, each with one request after another, measure what it
can do: requests/s. Then, for each load, requests arrive as a Poisson process at that share of it, or of --rate: the
same rate is the same trace for every server. Prompts and replies have exponential lengths. A request that finds
`clients` in flight waits for one to end; its waiting counts as time to the first token. Replies are streamed; the time
between tokens is that between events that bring text. The last line of the output is one JSON object.
"""

import argparse
import asyncio
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--peer", default="ours", choices=["ours", "vllm"])
    parser.add_argument("--python", default=sys.executable, help="of the server")
    parser.add_argument("--server", default="", help="more of the server's options, in one string")
    parser.add_argument("--clients", type=int, default=64, help="requests in flight at most")
    parser.add_argument("--loads", default="0.5,0.8,1.2", help="shares of the measured capacity")
    parser.add_argument("--rate", type=float, help="requests/s at load 1; default: the measured capacity")
    parser.add_argument("--seconds", type=float, default=120.0, help="of arrivals at each load")
    parser.add_argument("--warmup", type=float, default=40.0, help="seconds in which the capacity is measured")
    parser.add_argument("--prompt", type=int, default=128, help="mean tokens of a prompt; at most four times as many")
    parser.add_argument("--new", type=int, default=64, help="mean tokens of a reply; at most four times as many")
    parser.add_argument("--port", type=int, default=8017)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    options.model = os.path.abspath(options.model)
    if min(options.clients, options.prompt, options.new) < 1 or min(options.seconds, options.warmup) <= 0:
        parser.error("--clients, --prompt, --new, --seconds and --warmup must be positive")
    return options


# ========================================================================================================== the server


def start_server(options):
    """The process, once it answers; what it prints is shown only if it does not."""
    longest, name = 4 * (options.prompt + options.new) + 8, f"bench_load_{options.peer}.log"
    common = ["--port", str(options.port), *shlex.split(options.server)]
    env = dict(os.environ)
    if options.peer == "vllm":
        env |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        command = ["-m", "vllm.entrypoints.openai.api_server", "--model", options.model, "--dtype", "bfloat16"]
        command += ["--max-model-len", str(longest), "--max-num-seqs", str(options.clients)]
    else:
        command = [str(ROOT / "serve.py"), str(ROOT / "configs" / "llama_serve.json"), "--dtype", "auto"]
        command += ["--model_name_or_path", options.model, "--total_max_length", str(longest)]
        command += ["--batch_size", str(options.clients), "--max_queue", str(4 * options.clients)]
    log = open(os.path.join(os.environ.get("TMPDIR", "/tmp"), name), "w+")
    command, folder = [options.python, *command, *common], os.path.dirname(log.name)  # not ours: it has a kernels/ too
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=folder)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if asyncio.run(is_up(options.port)):
            return process
        time.sleep(0.5)
    process.kill()
    log.seek(0)
    sys.exit(f"the server did not come up: {log.read()[-2000:]}")


async def is_up(port):
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        status = await reader.readline()
        writer.close()
        return b" 200 " in status
    except OSError:
        return False


def resident_mb(pid):
    """Of a process and its children."""
    total, processes = 0, [pid]
    while processes:
        pid = processes.pop()
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            total += next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")), 0)
            processes += [int(x) for task in Path(f"/proc/{pid}/task").iterdir() for x in children(task)]
        except OSError:
            continue
    return round(total / 1024)


def children(task):
    return (task / "children").read_text().split()


# ======================================================================================================== the requests


def lengths(generator, mean, count):
    """Exponential, between 1 and four times the mean."""
    return np.clip(np.ceil(generator.exponential(mean, count)), 1, 4 * mean).astype(int)


def trace_of(options, count, seed):
    """[(ids of the prompt, tokens of the reply)]"""
    generator = np.random.default_rng([options.seed, seed])
    prompts, news = lengths(generator, options.prompt, count), lengths(generator, options.new, count)
    vocabulary = json.loads((Path(options.model) / "config.json").read_text())["vocab_size"]
    return [(generator.integers(10, vocabulary - 10, n).tolist(), int(new)) for n, new in zip(prompts, news)]


async def request(options, prompt, new, began):
    """(seconds from `began` to the first token, seconds between the later ones, tokens), or an error's text."""
    body = {"model": options.name, "prompt": prompt, "max_tokens": new, "temperature": 0.8, "top_p": 0.95}
    body |= {"stream": True, "ignore_eos": True, "stream_options": {"include_usage": True}}
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    times, tokens = [], 0
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", options.port, limit=1 << 20)
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        status = await reader.readline()
        if b" 200 " not in status:
            return (status + await reader.read()).decode(errors="replace")[-300:]
        async for line in reader:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if event.get("choices"):
                    times.append(time.monotonic())
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
        writer.close()
    except (OSError, ValueError) as error:
        return repr(error)
    if tokens != new:
        return f"{tokens} tokens in place of {new}"
    return times[0] - began, np.diff(times).tolist(), tokens


async def model_name(options):
    reader, writer = await asyncio.open_connection("127.0.0.1", options.port)
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return json.loads(text[text.index("{") : text.rindex("}") + 1])["data"][0]["id"]


async def closed_loop(options):
    """Requests/s and tokens/s of `clients` that each send one request after another, in the second half of the warm-up.

    A request's tokens count as spread evenly over its time; so those that are cut by the end count in part.
    """
    trace, start = iter(trace_of(options, 100_000, 0)), time.monotonic()
    middle, end, results = start + options.warmup / 2, start + options.warmup, []

    async def client():
        while (began := time.monotonic()) < end:
            result = await request(options, *next(trace), began)
            if isinstance(result, str):
                sys.exit(f"a request failed while the capacity was measured: {result}")
            results.append((began, time.monotonic(), result[2]))

    await asyncio.gather(*(client() for _ in range(options.clients)))
    shares = [max(0.0, min(end, last) - max(middle, began)) / (last - began) for began, last, _ in results]
    requests, tokens = sum(shares), sum(share * tokens for share, (_, _, tokens) in zip(shares, results))
    return requests / (end - middle), tokens / (end - middle)


async def open_loop(options, rate, seed):
    """The results of requests that arrive at `rate` a second, and the seconds until the last is answered."""
    generator, room = np.random.default_rng([options.seed, seed]), asyncio.Semaphore(options.clients)
    gaps = generator.exponential(1 / rate, int(2 * rate * options.seconds) + 10)
    arrivals = [at for at in gaps.cumsum() if at < options.seconds]

    async def one(at, prompt, new, start):
        await asyncio.sleep(max(0.0, start + at - time.monotonic()))
        async with room:
            return await request(options, prompt, new, start + at)

    start = time.monotonic()
    trace = trace_of(options, len(arrivals), seed)
    results = await asyncio.gather(*(one(at, *entry, start) for at, entry in zip(arrivals, trace)))
    return results, time.monotonic() - start


def row_of(results, seconds):
    good = [result for result in results if not isinstance(result, str)]
    errors = [result for result in results if isinstance(result, str)]
    firsts, between = [first for first, _, _ in good], [gap for _, gaps, _ in good for gap in gaps]

    def ms(values, share):
        return round(1000 * float(np.percentile(values, share)), 1) if values else None

    return {
        "requests": len(results),
        "errors": len(errors),
        "error": errors[0] if errors else None,
        "tok_s": round(sum(tokens for _, _, tokens in good) / seconds, 1),
        "first_ms_p50": ms(firsts, 50),
        "first_ms_p99": ms(firsts, 99),
        "between_ms_p50": ms(between, 50),
        "between_ms_p99": ms(between, 99),
    }


def main(argv=None):
    options = parse(argv)
    process = start_server(options)
    try:
        options.name = asyncio.run(model_name(options))
        rate, tokens = asyncio.run(closed_loop(options))
        print(f"capacity: {rate:.2f} requests/s, {tokens:.0f} tokens/s with {options.clients} clients", flush=True)
        rss, rows = [resident_mb(process.pid)], {}
        for seed, load in enumerate(options.loads.split(","), 1):
            results, seconds = asyncio.run(open_loop(options, float(load) * (options.rate or rate), seed))
            rss.append(resident_mb(process.pid))
            rows[load] = row_of(results, seconds)
            print(load, rows[load], f"{rss[-1]} MB", flush=True)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
    result = {
        "peer": options.peer,
        "task": "load",
        "model": Path(options.model).name,
        "clients": options.clients,
        "seconds": options.seconds,
        "capacity_requests_s": round(rate, 2),
        "rate_at_load_1": round(options.rate or rate, 2),
        "capacity_tok_s": round(tokens, 1),
        "loads": rows,
        "rss_mb": rss,
        "load": [round(x, 2) for x in os.getloadavg()],
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    print(json.dumps(result), flush=True)
    return result


if __name__ == "__main__":
    main()
