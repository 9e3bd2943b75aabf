"""Draws numbers of a run's log over its steps as an SVG picture, one panel a number. Needs only the standard library.

    python demo/draw_curves.py checkpoints/llama_rl docs/rl_grpo.svg reward kl completions/mean_length

Names are keys of RUN/metrics.jsonl, or of RUN/eval_metrics.jsonl where they begin with eval_.
"""

import json
import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 270, 170, 46, 26, 22  # of a panel and its margins, in pixels
STYLE = "text{font:11px sans-serif;fill:#333}path{fill:none;stroke:#1f77b4;stroke-width:1.6}line{stroke:#ccc}"


def read_points(folder: Path, name: str) -> list[tuple[int, float]]:
    """(step, number) of the lines that have the number."""
    file = folder / ("eval_metrics.jsonl" if name.startswith("eval_") else "metrics.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if not points:
        raise SystemExit(f"error: {file}: no line has {name!r}; it has {', '.join(rows[-1]) if rows else 'no lines'}")
    return points


def panel(name: str, points: list[tuple[int, float]], offset: int) -> str:
    """SVG of one number: a frame of its least and largest value, the first and last step, and the curve."""
    (first, *_), (last, *_) = points[0], points[-1]
    low, high = min(value for _, value in points), max(value for _, value in points)
    right, floor = WIDTH - 10, HEIGHT - BOTTOM

    def place(step, value):
        x = LEFT + (right - LEFT) * (step - first) / max(1, last - first)
        return f"{x:.1f},{floor - (floor - TOP) * (value - low) / ((high - low) or 1):.1f}"

    parts = [f'<text x="{LEFT}" y="14" font-weight="bold">{name}</text>']
    for y, value in ((TOP, high), (floor, low)):
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y + 4}" text-anchor="end">{value:.3g}</text>')
    for x, step, anchor in ((LEFT, first, "start"), (right, last, "end")):
        parts.append(f'<text x="{x}" y="{floor + 15}" text-anchor="{anchor}">{step}</text>')
    parts.append(f'<path d="M{" ".join(place(*point) for point in points)}"/>')
    return f'<g transform="translate({offset},0)">{"".join(parts)}</g>'


def main(argv: list[str]) -> int:
    if len(argv) < 3:
        print("error: draw_curves.py: expected RUN PICTURE.svg NAME …", file=sys.stderr)
        return 2
    folder, picture, names = Path(argv[0]), Path(argv[1]), argv[2:]
    panels = [panel(name, read_points(folder, name), i * WIDTH) for i, name in enumerate(names)]
    size = f'viewBox="0 0 {WIDTH * len(names)} {HEIGHT}" width="{WIDTH * len(names)}" height="{HEIGHT}"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{STYLE}</style>{background}", *panels, "</svg>"]
    picture.write_text("\n".join(svg) + "\n", encoding="utf-8")
    print(f"{picture}: {picture.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
