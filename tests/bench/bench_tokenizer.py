"""Tokenizers: strings tried against the reference, mismatches, and how fast they are.

    python tests/bench/bench_tokenizer.py                     two minutes, one core; needs ../shared for real
    vocabularies

English is the demo's conversations and this repository's LICENSE and README, a megabyte of it; "cold" is the first
time this text is seen, "warm" the best of five passes after that. Code is this repository's Python. The long word has
a million random letters. All by the processor's time that it took, so another program that runs disturbs little."""

import json
import random
import sys
import tempfile
import time
from pathlib import Path

import paths  # noqa: F401

import test_tokenizer
from test_tokenizer import CASES, REPO, golden_tokenizer, mismatches


def texts():
    """(English, code), a megabyte or so each."""
    told = [json.loads(line) for line in open(REPO / "demo" / "sft" / "train.json", encoding="utf-8")]
    turns = [
        text
        for record in told
        for key in ("src", "tgt")
        for text in ([record[key]] if isinstance(record[key], str) else record[key])
    ]
    english = "\n".join([*turns, (REPO / "LICENSE").read_text(), (REPO / "README.md").read_text(encoding="utf-8")])
    code = "".join(path.read_text(encoding="utf-8") for path in sorted(REPO.glob("**/*.py")))
    return (english * (1 + 1_000_000 // len(english)))[:1_000_000], code[:1_000_000]


def seconds(function, times=1):
    best = float("inf")
    for _ in range(times):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best


def main():
    english, code = texts()
    long_word = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=1_000_000))
    print(
        f"{'family':20} {'kind':13} {'strings':>7} {'mismatches':>10} {'load s':>7} {'cold':>6} {'warm':>6} "
        f"{'code':>6} "
        f"{'decode':>7} MB/s {'long word s':>11}"
    )
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            tokenizer, golden, modes = golden_tokenizer(name, Path(folder))
            loaded = time.process_time() - start
        tried = len(golden["cases"]) * len(modes)
        wrong = len(mismatches(tokenizer, golden, modes))

        def rate(text, times=5):
            return len(text.encode()) / seconds(lambda: tokenizer.encode(text, False), times) / 1e6

        cold, warm, of_code = rate(english, 1), rate(english), rate(code)
        ids = tokenizer.encode(english, False)
        back = len(english.encode()) / seconds(lambda: tokenizer.decode(ids)) / 1e6
        long = seconds(lambda: tokenizer.encode(long_word, False))
        print(
            f"{name:20} {tokenizer.kind:13} {tried:7} {wrong:10} {loaded:7.2f} {cold:6.1f} {warm:6.1f} {of_code:6.1f} "
            f"{back:7.1f}      {long:11.2f}",
            flush=True,
        )


if __name__ == "__main__":
    if not test_tokenizer.GOLDEN.is_dir():
        sys.exit(f"{test_tokenizer.GOLDEN} is not beside this repository")
    main()
