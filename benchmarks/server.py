"""The server's part of a round at GPT-2 124M: slice, check, average, save, beside a rival and a limit in the same run.

Rivals, one thread: PyTorch's index_select and isfinite, Flower's FedAvg of as many replies of the same sizes,
torch.save. The limit is a plain copy of as many bytes as the work reads and writes, by as many threads, to memory that
is already there. For each float32 element: slice 8, check 4, add 8 for its first reply, 16 for the second, 20 for
others, finish 12 where there are sums; in one pass over replies that wait for each other (shared memory), 4 for each
and 4; checkpoint 8 (into the page cache: nothing waits for the disk).

    python benchmarks/server.py [--workers 4] [--keep 6] [--turns 5] [--out FILE]
    python benchmarks/server.py --memory 4 16 64 [--out FILE]     peak memory in copies of the state
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from twist_fl.blueprint.blocks import Layout, make_layout
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.division import Division
from twist_fl.blueprint.drawing import draw_round
from twist_fl.model.subnet import State, copy_all, slice_state, take_slice
from twist_fl.system.cores import usable_cores
from twist_fl.system.files import save_tensors, write_text
from twist_fl.system.provenance import provenance
from twist_fl.system.threads import threads
from twist_fl.training.aggregate import Memory, StreamingMean, check_state

GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257, "n_positions": 1024}


def make_round(workers: int, keep: int) -> tuple[Layout, State, list[Blueprint]]:
    layout = make_layout(GPT2)
    generator = torch.Generator().manual_seed(0)
    state = {param.name: torch.randn(param.shape, generator=generator) for param in layout.params}
    division = Division("both", ((keep, keep),) * workers, 2, 2)
    division.check(layout)
    return layout, state, draw_round(layout, division, 0, 1)


def num_bytes(state: State) -> int:
    return sum(tensor.nbytes for tensor in state.values())


class Best(dict[tuple[str, str], float]):
    """Seconds of the best turn, by operation and who did it."""

    def note(self, name: str, who: str, work: Callable[[], object]) -> None:
        begin = time.perf_counter()
        work()
        self[name, who] = min(self.get((name, who), float("inf")), time.perf_counter() - begin)


class Turn:
    """One round's work, each kind of it by us and by the rival."""

    def __init__(self, workers: int, keep: int) -> None:
        self.layout, self.state, self.drawn = make_round(workers, keep)
        self.replies = [{n: t.clone() for n, t in slice_state(self.layout, self.state, b).items()} for b in self.drawn]
        self.out = [{name: torch.zeros_like(tensor) for name, tensor in reply.items()} for reply in self.replies]
        self.records = [
            RecordDict({"p": ArrayRecord({n: Array(t.numpy()) for n, t in r.items()}), "m": MetricRecord({"w": 1})})
            for r in self.replies
        ]
        self.source, self.target = torch.ones(50_000_000), torch.zeros(50_000_000)
        self.memory: Memory = {}

    def copy(self) -> None:
        copy_all([(self.source, self.target)])

    def slice(self) -> None:
        for blueprint, out in zip(self.drawn, self.out, strict=True):
            copy_all(p for n, t in self.state.items() for p in take_slice(self.layout, blueprint, n, t, out[n]))

    def slice_rival(self) -> None:
        for blueprint, out in zip(self.drawn, self.out, strict=True):
            for param in self.layout.params:
                whole, held = self.state[param.name], self.layout.held(param, blueprint)
                if held is None:
                    out[param.name].copy_(whole)
                else:
                    torch.index_select(whole, param.dim, torch.tensor(param.index(held)), out=out[param.name])

    def check(self) -> None:
        for blueprint, reply in zip(self.drawn, self.replies, strict=True):
            check_state(self.layout, blueprint, reply)

    def check_rival(self) -> None:
        assert all(bool(torch.isfinite(tensor).all()) for reply in self.replies for tensor in reply.values())

    def average(self, best: Best, who: str) -> None:
        mean, of_waiting = (StreamingMean(self.layout, self.state, self.memory) for _ in range(2))

        def add() -> None:
            for blueprint, reply in zip(self.drawn, self.replies, strict=True):
                mean.add(blueprint, reply)

        best.note("add", who, add)
        best.note("finish", who, mean.finish)
        best["add + finish", who] = best["add", who] + best["finish", who]
        for blueprint, reply in zip(self.drawn, self.replies, strict=True):
            of_waiting.add(blueprint, reply, lasts=True)
        best.note("one pass", who, of_waiting.finish)
        assert not any(bool((tensor - tensor).any()) for tensor in self.state.values())

    def average_rival(self) -> None:
        aggregate_arrayrecords(self.records, "w")

    def measure(self, best: Best, num: int, scratch: Path) -> None:
        who = f"{num} threads"
        with threads(num):
            for name, work in (("copy", self.copy), ("slice", self.slice), ("check", self.check)):
                best.note(name, who, work)
            self.average(best, who)
            best.note("copy", who, self.copy)
        if num == 1:
            for name, rival in (("slice", self.slice_rival), ("check", self.check_rival)):
                best.note(name, "rival", rival)
            best.note("add + finish", "rival", self.average_rival)
            best.note("checkpoint", who, lambda: save_tensors(self.state, scratch / "ours"))
            best.note("checkpoint", "rival", lambda: torch.save(self.state, scratch / "rival"))
            for file in scratch.iterdir():
                file.unlink()

    def moved(self) -> dict[str, int]:
        """Bytes read and written."""
        replies, add, finish, new = sum(map(num_bytes, self.replies)), 0, 0, 0
        for param in self.layout.params:
            every = range(param.num_blocks)
            size = prod(param.shape) // param.num_blocks
            for block in every:
                holders = sum(block in (self.layout.held(param, b) or every) for b in self.drawn)
                add += size * (8 + 16 * (holders > 1) + 20 * max(0, holders - 2))
                finish += size * 12 * (holders > 1)
                new += size * 4 * (holders > 0)
        mean = {"add": add, "finish": finish, "add + finish": add + finish, "one pass": replies + new}
        return {"slice": 2 * replies, "check": replies, **mean}


def speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(1)  # the rivals too: cores are the workers'
    turn, best, nums = Turn(args.workers, args.keep), Best(), sorted({1, usable_cores()})
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(args.turns):
            for num in nums:
                turn.measure(best, num, Path(scratch))
    copied = 2 * turn.source.nbytes
    rows = []
    for num in nums:
        who, per_byte = f"{num} threads", best["copy", f"{num} threads"] / copied
        work = {name: (size, size * per_byte) for name, size in turn.moved().items()}
        if num == 1:
            work["checkpoint"] = (size := 2 * num_bytes(turn.state)), size * per_byte
        rows += [
            {
                "work": name,
                "threads": num,
                "mb": size / 1e6,
                "rival": best.get((name, "rival")) if num == 1 else None,
                "limit": limit,
                "ours": best[name, who],
                "of_limit": limit / best[name, who],
            }
            for name, (size, limit) in work.items()
        ]
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"GPT-2 124M, both {args.keep}/12, S={args.workers}, best of {args.turns}; copy by "
          + ", ".join(f"{n} threads {copied / best['copy', f'{n} threads'] / 1e9:.1f} GB/s" for n in nums)
          + f"; load {load}")  # fmt: skip
    print(f"{'':14}{'threads':>8}{'MB':>7}{'rival s':>9}{'limit s':>9}{'ours s':>8}{'of limit':>10}")
    for row in rows:
        rival = f"{row['rival']:9.3f}" if row["rival"] else " " * 9
        print(f"{row['work']:14}{row['threads']:8}{row['mb']:7.0f}{rival}{row['limit']:9.3f}{row['ours']:8.3f}"
              f"{row['of_limit']:10.2f}")  # fmt: skip
    return rows


def peak() -> int:
    """Bytes of this process's largest resident set so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def memory_of(workers: int, keep: int) -> None:
    """Three rounds of `workers` replies; slices go out and replies come in through one place, which is not counted."""
    torch.set_num_threads(1)
    layout, state, drawn = make_round(workers, keep)
    shapes = {param.name: layout.shape(param, drawn[0]) for param in layout.params}
    place = {name: torch.zeros(shape) for name, shape in shapes.items()}
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is there
    start = peak() - num_bytes(state)
    memory: Memory = {}
    for _ in range(3):
        mean = StreamingMean(layout, state, memory)
        for blueprint in drawn:
            mean.add(blueprint, place)
        state, memory = mean.finish(), mean.memory
        for blueprint in drawn:
            copy_all(p for n, t in state.items() for p in take_slice(layout, blueprint, n, t, place[n]))
            check_state(layout, blueprint, place)
    print(json.dumps({"workers": workers, "copies": (peak() - start) / num_bytes(state)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--keep", type=int, default=6, help="blocks of 12 that a worker holds")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--memory", type=int, nargs="+", help="numbers of workers to measure the peak memory at")
    parser.add_argument("--out", type=Path, help="write the results here, with commit and hardware (JSON)")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        memory_of(args.peak_of, args.keep)
        return
    if args.memory:
        rows = []
        for workers in args.memory:  # each in a process of its own: a peak never falls
            command = [sys.executable, __file__, "--peak-of", str(workers), "--keep", str(args.keep)]
            rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
            print(rows[-1])
    else:
        rows = speed(args)
    if args.out:
        settings = {"workers": args.workers, "keep": args.keep, "turns": args.turns, "load": os.getloadavg()}
        write_text(json.dumps(provenance() | settings | {"rows": rows}, indent=1), args.out)


if __name__ == "__main__":
    main()
