"""What /metrics says: Prometheus text under vLLM's names, so that its Grafana board works, and under llm_*.

metrics = Metrics("llama", max_model_len=4096)
metrics.token(0.02)                            # seconds since the reply's token before
metrics.request(prompt_tokens=9, ...)          # at its end
text = metrics.text(engine.stats(), connections=3)
"""

import time
from collections.abc import Iterator

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
CHOICES = (1, 2, 5, 10, 20, 50, 100)
FINISH_REASONS = ("stop", "length", "abort", "error")

# name under vllm: -> (what it measures, what of Engine.stats() it is)
GAUGES = {
    "num_requests_running": ("Replies that are being computed.", lambda stats: stats["running"]),
    "num_requests_waiting": ("Replies that wait for their turn.", lambda stats: stats["waiting"]),
    "kv_cache_usage_perc": (
        "Share of the cache's blocks in use, 1 is all of them.",
        lambda stats: blocks_in_use(stats),
    ),
    "gpu_cache_usage_perc": ("The same, under vLLM's older name.", lambda stats: blocks_in_use(stats)),
}
COUNTERS = {
    "prompt_tokens_total": ("Tokens of prompts.", "prompt_tokens_total"),
    "generation_tokens_total": ("Tokens of replies.", "generation_tokens_total"),
    "prefix_cache_queries_total": ("Tokens of prompts looked for in the cache.", "prompt_tokens_total"),
    "prefix_cache_hits_total": ("Tokens of prompts found in the cache.", "cached_tokens_total"),
    "spec_decode_num_drafts_total": ("Drafts of speculative decoding.", "spec_decode_num_drafts_total"),
    "spec_decode_num_draft_tokens_total": ("Tokens that were guessed.", "spec_decode_num_draft_tokens_total"),
    "spec_decode_num_accepted_tokens_total": (
        "Guessed tokens that the model chose.",
        "spec_decode_num_accepted_tokens_total",
    ),
    "num_preemptions_total": ("Times a reply was set aside for want of blocks.", "preemptions_total"),
}
OWN = {  # of Engine.stats()
    "running": "Replies that are being computed.",
    "waiting": "Replies that wait for their turn.",
    "blocks_total": "Blocks of the cache.",
    "blocks_free": "Blocks that no reply uses.",
    "blocks_cached": "Free blocks whose tokens can be found again.",
    "requests_total": "Requests that the engine took.",
    "prompt_tokens_total": "Tokens of prompts.",
    "cached_tokens_total": "Tokens of prompts found in the cache.",
    "generation_tokens_total": "Tokens of replies.",
    "preemptions_total": "Times a reply was set aside for want of blocks.",
    "aborted_total": "Requests that were ended early.",
    "errors_total": "Replies that ended with an error.",
    "steps_total": "Steps of the engine.",
}


def blocks_in_use(stats: dict) -> float:
    return 1 - stats["blocks_free"] / stats["blocks_total"]


def token_bounds(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, … up to `most`."""
    bounds = [mantissa * 10**exponent for exponent in range(len(str(most))) for mantissa in (1, 2, 5)]
    return tuple(bound for bound in bounds if bound <= most)


class Histogram:
    """Prometheus' cumulative histogram."""

    def __init__(self, about: str, bounds: tuple):
        self.about, self.bounds, self.counts, self.total, self.count = about, bounds, [0] * len(bounds), 0.0, 0

    def add(self, value: float) -> None:
        self.total, self.count = self.total + value, self.count + 1
        for i, bound in enumerate(self.bounds):
            self.counts[i] += value <= bound

    def lines(self, name: str, labels: str = "") -> Iterator[str]:
        yield from head(name, self.about, "histogram")
        for bound, count in (*zip(self.bounds, self.counts), ("+Inf", self.count)):
            yield f'{name}_bucket{{{labels}{"," if labels else ""}le="{bound}"}} {count}'
        labels = f"{{{labels}}}" if labels else ""
        yield f"{name}_sum{labels} {self.total:.6f}"
        yield f"{name}_count{labels} {self.count}"


def head(name: str, about: str, kind: str) -> tuple[str, str]:
    return f"# HELP {name} {about}", f"# TYPE {name} {kind}"


def label_text(value: str) -> str:
    """A label's value as Prometheus reads it."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class Metrics:
    def __init__(self, model: str, max_model_len: int):
        self.labels = f'model_name="{label_text(model)}",engine="0"'
        tokens = token_bounds(max_model_len)
        self.histograms = {
            "time_to_first_token_seconds": Histogram("Seconds from a request to its first token.", SECONDS),
            "inter_token_latency_seconds": Histogram("Seconds between two tokens of a reply.", TOKEN_SECONDS),
            "time_per_output_token_seconds": Histogram("The same, under vLLM's older name.", TOKEN_SECONDS),
            "request_time_per_output_token_seconds": Histogram("Seconds a token after the first.", TOKEN_SECONDS),
            "e2e_request_latency_seconds": Histogram("Seconds from a request to its end.", SECONDS),
            "request_queue_time_seconds": Histogram("Seconds until a request was admitted.", SECONDS),
            "request_prefill_time_seconds": Histogram("Seconds from admission to the first token.", SECONDS),
            "request_decode_time_seconds": Histogram("Seconds from the first token to the last.", SECONDS),
            "request_inference_time_seconds": Histogram("Seconds from admission to the last token.", SECONDS),
            "request_prompt_tokens": Histogram("Tokens of a request's prompts.", tokens),
            "request_generation_tokens": Histogram("Tokens of a request's replies.", tokens),
            "request_max_num_generation_tokens": Histogram("Tokens of a request's longest reply.", tokens),
            "request_params_max_tokens": Histogram("max_tokens of a request.", tokens),
            "request_params_n": Histogram("n of a request.", CHOICES),
        }
        self.finished = dict.fromkeys(FINISH_REASONS, 0)
        self.responses = {}  # (path, status): count

    def add(self, name: str, value: float | None) -> None:
        """To the histogram of this name; None is not known and not counted."""
        if value is not None:
            self.histograms[name].add(value)

    def token(self, seconds: float) -> None:
        """Seconds since the token before it of the same reply."""
        self.add("inter_token_latency_seconds", seconds)
        self.add("time_per_output_token_seconds", seconds)

    def request(self, call: object, start: float) -> None:
        """At the end of a call (openai_api.APICall) that began at `start` of time.monotonic()."""
        params, lengths = call.requests[0].params, call.lengths.values()
        self.add("time_to_first_token_seconds", call.first_token - start)
        self.add("e2e_request_latency_seconds", time.monotonic() - start)
        self.add("request_decode_time_seconds", call.last_token - call.first_token)
        if call.admitted is not None:
            self.add("request_queue_time_seconds", max(0.0, call.admitted - start))
            self.add("request_prefill_time_seconds", call.first_token - call.admitted)
            self.add("request_inference_time_seconds", call.last_token - call.admitted)
        if max(lengths) > 1:
            self.add("request_time_per_output_token_seconds", (call.last_token - call.first_token) / (max(lengths) - 1))
        self.add("request_prompt_tokens", call.prompt_tokens)
        self.add("request_generation_tokens", call.completion_tokens)
        self.add("request_max_num_generation_tokens", max(lengths))
        self.add("request_params_max_tokens", params.max_tokens)
        self.add("request_params_n", params.n)

    def response(self, path: str, status: int) -> None:
        self.responses[path, status] = self.responses.get((path, status), 0) + 1

    def text(self, stats: dict, connections: int) -> str:
        """stats: of Engine.stats()."""
        lines = []
        for name, (about, value) in GAUGES.items():
            lines += [*head(f"vllm:{name}", about, "gauge"), f"vllm:{name}{{{self.labels}}} {value(stats)}"]
        for name, (about, key) in COUNTERS.items():
            if key in stats:
                lines += [*head(f"vllm:{name}", about, "counter"), f"vllm:{name}{{{self.labels}}} {stats[key]}"]
        lines += head("vllm:request_success_total", "Requests that ended, by how.", "counter")
        for reason, count in self.finished.items():
            lines.append(f'vllm:request_success_total{{{self.labels},finished_reason="{reason}"}} {count}')
        for name, histogram in self.histograms.items():
            lines += histogram.lines(f"vllm:{name}", self.labels)
        for key, value in stats.items():
            if key in COUNTERS and key not in OWN:  # under vLLM's name alone
                continue
            kind = "counter" if key.endswith("_total") and key != "blocks_total" else "gauge"
            name = "llm_" + ("blocks" if key == "blocks_total" else key)
            lines += [*head(name, OWN.get(key, key.replace("_", " ")), kind), f"{name} {value}"]
        lines += [*head("llm_connections", "Connections of clients.", "gauge"), f"llm_connections {connections}"]
        lines += head("llm_http_responses_total", "Replies by path and status.", "counter")
        for (path, status), count in sorted(self.responses.items()):
            lines.append(f'llm_http_responses_total{{path="{label_text(path)}",status="{status}"}} {count}')
        lines += self.histograms["e2e_request_latency_seconds"].lines("llm_request_seconds")
        lines += self.histograms["time_to_first_token_seconds"].lines("llm_time_to_first_token_seconds")
        return "\n".join(lines) + "\n"
