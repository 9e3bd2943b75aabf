"""Plays one step of a pipeline from the product's own timetable, without processes; draws it.

    timeline = play_step(cost, degrees, accumulation)        # when each part begins and ends
    write_svg("step.svg", …); write_trace("step.json", …)    # a picture; the format of Chrome's tracing and Perfetto

Ranks that differ only in their data, heads or tokens do the same at the same times, so one of each stage of the
pipeline is played for all of them: 16,384 ranks cost as much as their pipeline.
"""

import dataclasses
import json
from collections.abc import Iterable
from html import escape
from pathlib import Path

from distributed.pipeline import pipeline_schedule
from formats.files import atomic_file
from parallel import Degrees
from planning.cost_model import StageCost, StepCost

COLORS = {
    "forward": "#4c78a8", "backward": "#59a14f", "communication": "#e45756", "gradients": "#f28e2b",
    "update": "#9c755f", "weights": "#edc948",
}  # fmt: skip
DRAWN = 200_000  # parts of a step: with more, a chunk's communication is one part, not one for each layer


@dataclasses.dataclass
class Timeline:
    """What one rank of each pipeline stage does in a step."""

    starts: list[list[float]]  # of each rank's steps, in the order of its schedule: seconds
    ends: list[list[float]]
    schedule: list[list[tuple]]

    @property
    def seconds(self) -> float:
        return max(row[-1] for row in self.ends)


def play(schedule: list[list[tuple]], stages: list[StageCost], transfer: float) -> Timeline:
    """Times of a pipeline_schedule().

    A forward waits for that of the stage before it and its message, a backward for that of the stage behind it. A
    rank does its steps in their order. RuntimeError: the schedule waits for itself.
    """
    ranks, last = len(schedule), len(stages) - 1
    forward = [stage.forward + stage.forward_talk for stage in stages]
    backward = [stage.backward + stage.backward_talk for stage in stages]
    done: dict[tuple, float] = {}
    clocks, places = [0.0] * ranks, [0] * ranks
    starts: list[list[float]] = [[] for _ in schedule]
    ends: list[list[float]] = [[] for _ in schedule]
    ready, waiting = list(range(ranks)), {}  # waiting: {what a rank waits for: the rank}
    while ready:
        rank = ready.pop()
        steps, clock, place = schedule[rank], clocks[rank], places[rank]
        while place < len(steps):
            kind, chunk, batch = steps[place]
            stage = chunk * ranks + rank
            if kind == "forward":
                needed, cost = (("forward", stage - 1, batch) if stage else None), forward[stage]
            else:
                needed, cost = (("backward", stage + 1, batch) if stage < last else None), backward[stage]
            if needed is not None and needed not in done:
                waiting[needed] = rank
                break
            begin = clock if needed is None else max(clock, done.pop(needed) + (transfer if ranks > 1 else 0.0))
            clock = begin + cost
            starts[rank].append(begin)
            ends[rank].append(clock)
            what = (kind, stage, batch)
            done[what] = clock
            if what in waiting:
                ready.append(waiting.pop(what))
            place += 1
        clocks[rank], places[rank] = clock, place
    if any(place < len(steps) for place, steps in zip(places, schedule)):
        raise RuntimeError("the schedule waits for itself")
    return Timeline(starts, ends, schedule)


def play_step(cost: StepCost, degrees: Degrees, accumulation: int) -> Timeline:
    """Plays a step, and sets cost.seconds and cost.bubble to what the timetable gives."""
    timeline = play(pipeline_schedule(degrees.pp, degrees.virtual, accumulation), cost.stages, cost.transfer)
    busy = sum(s.forward + s.backward + s.forward_talk + s.backward_talk for s in cost.stages) * accumulation
    cost.bubble = 1 - busy / (degrees.pp * timeline.seconds)
    cost.seconds = timeline.seconds + cost.reduction + cost.update + cost.gather
    return timeline


# =========================================================================================================== drawing


def parts(timeline: Timeline, cost: StepCost) -> Iterable[tuple[int, str, str, float, float, str]]:
    """Yields (rank of the pipeline, lane, name, begin, seconds, kind) of all that is drawn; lane: compute or talk."""
    ranks = len(timeline.schedule)
    for rank, steps in enumerate(timeline.schedule):
        for (kind, chunk, batch), begin, end in zip(steps, timeline.starts[rank], timeline.ends[rank]):
            stage = cost.stages[chunk * ranks + rank]
            talk = stage.forward_talk if kind == "forward" else stage.backward_talk
            pieces = max(1, stage.layers) if len(steps) * ranks * max(1, stage.layers) * 2 < DRAWN else 1
            share, of_talk = (end - begin) / pieces, talk / pieces
            for piece in range(pieces):
                at = begin + piece * share
                yield rank, "compute", f"{kind} {batch}, chunk {chunk}", at, share - of_talk, kind
                if talk:
                    yield rank, "communication", f"{kind} {batch}", at + share - of_talk, of_talk, "communication"
        at = timeline.seconds
        for name, seconds, lane in (
            ("gradients", cost.reduction, "communication"),
            ("update", cost.update, "compute"),
            ("weights", cost.gather, "communication"),
        ):
            if seconds:
                yield rank, lane, name, at, seconds, name
            at += seconds


def write_trace(path: str | Path, timeline: Timeline, cost: StepCost, degrees: Degrees) -> None:
    """Chrome trace events: a process for each pipeline rank, which stands for its copies."""
    copies, events = degrees.world // degrees.pp, []
    for rank in range(degrees.pp):
        name = f"pipeline rank {rank} (the same on {copies:,} ranks)"
        events.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": name}})
        for lane, title in enumerate(("compute", "communication")):
            events.append({"ph": "M", "pid": rank, "tid": lane, "name": "thread_name", "args": {"name": title}})
    for rank, lane, name, begin, seconds, kind in parts(timeline, cost):
        events.append(
            {
                "ph": "X",
                "pid": rank,
                "tid": int(lane == "communication"),
                "name": name,
                "cat": kind,
                "ts": round(begin * 1e6, 3),
                "dur": round(seconds * 1e6, 3),
            }
        )
    with atomic_file(Path(path)) as file:
        json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file, separators=(",", ":"))


def write_svg(path: str | Path, timeline: Timeline, cost: StepCost, degrees: Degrees, title: str) -> None:
    """A picture: a row for each pipeline rank, time to the right; parts narrower than half a pixel are joined."""
    width, row, left, top = 1200, 22, 150, 46
    total = timeline.seconds + cost.reduction + cost.update + cost.gather
    scale, copies = width / total, degrees.world // degrees.pp
    height = top + row * degrees.pp + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 20}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<text x="8" y="16" font-size="13">{escape(title)}</text>',
    ]
    for i, (name, color) in enumerate(COLORS.items()):
        lines.append(f'<rect x="{left + 110 * i}" y="24" width="10" height="10" fill="{color}"/>')
        lines.append(f'<text x="{left + 110 * i + 14}" y="33">{name}</text>')
    for rank in range(degrees.pp):
        y = top + rank * row
        lines.append(f'<text x="8" y="{y + 14}">stage {rank} × {copies:,} ranks</text>')
        lines.append(f'<rect x="{left}" y="{y}" width="{width}" height="{row - 4}" fill="#eeeeee"/>')
    last: dict[tuple, list] = {}  # the part of each lane that was drawn last, to be widened
    for rank, lane, name, begin, seconds, kind in parts(timeline, cost):
        key, x = (rank, lane), begin * scale
        before = last.get(key)
        if before and before[3] == kind and x - (before[0] + before[1]) < 0.5 and before[1] + seconds * scale < 0.5:
            before[1] = x + seconds * scale - before[0]
            continue
        if before:
            lines.append(_rectangle(before, left, top + rank * row, row, lane))
        last[key] = [x, seconds * scale, name, kind]
    for (rank, lane), part in last.items():
        lines.append(_rectangle(part, left, top + rank * row, row, lane))
    y = top + row * degrees.pp + 16
    for i in range(11):
        lines.append(
            f'<text x="{left + width * i / 10:.0f}" y="{y}" text-anchor="middle">{total * i / 10:.3g} s</text>'
        )
    with atomic_file(Path(path)) as file:
        file.write("\n".join([*lines, "</svg>\n"]))


def _rectangle(part, left, y, row, lane):
    x, width, name, kind = part
    half = (row - 4) / 2
    place = y if lane == "compute" else y + half
    high = row - 4 if lane == "compute" else half
    return (
        f'<rect x="{left + x:.2f}" y="{place:.0f}" width="{max(width, 0.2):.2f}" height="{high:.0f}" '
        f'fill="{COLORS[kind]}"><title>{escape(name)}</title></rect>'
    )
