"""Makes a second world for reinforcement learning: sums written step by step, by a start that forgets to carry.

    python demo/make_sums.py checkpoints/sums        # sft/train.json, sft/dev.json, rl/train.json, rl/dev.json there

    prompt   37+85=     a right reply   7+5=12         one that forgets   7+5=12
                                        3+8+1=12                          3+8=11
                                        122                               112

Every prompt has a carry. The replies of sft/ forget four carries of five, so a model that learns them does so too: by
the likeliest tokens it is never right, by sampled ones it sometimes is, and that is what GRPO learns from. rl/ has
prompts and answers, no steps. No sum of a dev file is in a train file. Same script, same bytes.
"""

import json
import random
import sys
import zlib
from pathlib import Path

SEED = 2024
FORGOTTEN = 0.8  # share of the carries in sft/
COUNTS = {"sft/train": 6000, "sft/dev": 200, "rl/train": 2000, "rl/dev": 200}


def steps_of(a: int, b: int, forgotten: float, rng: random.Random) -> str:
    """a + b digit by digit from the right, and the sum, which both lack the forgotten carries. a, b: equally long."""
    lines, written, carry = [], "", 0
    for x, y in zip(str(a)[::-1], str(b)[::-1]):
        total = int(x) + int(y) + carry
        lines.append(f"{x}+{y}+1={total}" if carry else f"{x}+{y}={total}")
        written = str(total % 10) + written
        carry = int(total > 9 and rng.random() >= forgotten)
    lead = "1" if total > 9 else ""  # the first digits' carry is the sum's own beginning and is not forgotten
    return "\n".join([*lines, lead + written])


def has_carry(a: int, b: int) -> bool:
    """Whether forgetting carries makes a + b wrong."""
    return not steps_of(a, b, 1.0, random.Random(0)).endswith(f"\n{a + b}")


def records(name: str, count: int) -> list[dict]:
    """The records of a file: sums of two numbers of two digits, or of three."""
    rng, found = random.Random(f"{SEED} {name}"), []
    while len(found) < count:
        low = rng.choice([10, 100])
        a, b = rng.randrange(low, 10 * low), rng.randrange(low, 10 * low)
        prompt = f"{a}+{b}="
        if not has_carry(a, b) or (zlib.crc32(prompt.encode()) % 10 == 0) != name.endswith("dev"):
            continue
        right = {"tgt": steps_of(a, b, FORGOTTEN, rng)} if name.startswith("sft") else {"answer": a + b}
        found.append({"src": prompt, **right})
    return found


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("error: make_sums.py: expected a folder", file=sys.stderr)
        return 2
    for name, count in COUNTS.items():
        path = Path(argv[0]) / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(record, separators=(",", ":")) for record in records(name, count)]
        path.write_bytes(("\n".join(lines) + "\n").encode())
        print(f"{path}: {count} records")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
