"""The server's part of a round at GPT-2 124M: slice, check, add, finish, against a plain copy in the same run.

`before` is the implementation by element indices (index_select, index_add_) that twist_fl had first; it lives
here only. GB/s count the bytes an operation must read and write: 8 a float32 parameter for a copy and a slice, 4
for a check, 20 for an add (12 where the sum is new), 12 for the new state. `copy` writes to memory that is
already there, `clone` to new memory, which the system first has to hand out; so do `slice` and `finish`.

    python benchmarks/server.py [--workers 4] [--keep 6] [--turns 5]
    python benchmarks/server.py --memory 4 16 64     peak memory in copies of the state
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

import torch

from twist_fl.aggregate import StreamingMean, check_state
from twist_fl.blocks import Layout, Param, make_layout
from twist_fl.blueprint import Blueprint, Division, draw_round
from twist_fl.subnet import State, slice_state, take_blocks

GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257, "n_positions": 1024}


class IndexedMean:
    """The streaming mean as it was: one index per element, float64 copies, new memory every round."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.sums: State = {}
        self.weights: State = {}

    def add(self, blueprint: Blueprint, state: State) -> None:
        for param in self.layout.params:
            if param.name not in self.sums:
                self.sums[param.name] = torch.zeros(param.shape, dtype=torch.float64)
                num = param.shape[param.dim] if param.kind else 1
                self.weights[param.name] = torch.zeros(num, dtype=torch.float64)
            held = self.layout.held(param, blueprint)
            if held is None:
                self.sums[param.name].add_(state[param.name])
                self.weights[param.name].add_(1)
            else:
                index = torch.tensor(param.index(held))
                self.sums[param.name].index_add_(param.dim, index, state[param.name].to(torch.float64))
                self.weights[param.name][index] += 1

    def finish(self, state: State) -> State:
        return {param.name: self._mean(param, state[param.name]) for param in self.layout.params}

    def _mean(self, param: Param, old: torch.Tensor) -> torch.Tensor:
        along = [1] * len(param.shape)
        along[param.dim] = -1
        weights = self.weights[param.name].view(along)
        mean = (self.sums[param.name] / weights.clamp_min(1)).to(old.dtype)
        return mean if bool((weights > 0).all()) else torch.where(weights > 0, mean, old)


def indexed_slice(layout: Layout, state: State, blueprint: Blueprint) -> State:
    sliced = {}
    for param in layout.params:
        held = layout.held(param, blueprint)
        tensor = state[param.name]
        sliced[param.name] = tensor if held is None else tensor.index_select(param.dim, torch.tensor(param.index(held)))
    return sliced


def finite_before(layout: Layout, blueprint: Blueprint, state: State) -> None:
    layout.check_names({name: tuple(tensor.shape) for name, tensor in state.items()}, blueprint)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


def make_round(workers: int, keep: int) -> tuple[Layout, State, list[Blueprint]]:
    layout = make_layout(GPT2)
    generator = torch.Generator().manual_seed(0)
    state = {param.name: torch.randn(param.shape, generator=generator) for param in layout.params}
    division = Division("both", ((keep, keep),) * workers, 2, 2)
    division.check(layout)
    return layout, state, draw_round(layout, division, 0, 1)


def size(state: State) -> int:
    return sum(tensor.numel() for tensor in state.values())


def copy_into(state: State, out: State) -> None:
    for name, tensor in state.items():
        out[name].copy_(tensor)


def slice_into(layout: Layout, state: State, blueprint: Blueprint, out: State) -> None:
    """As a transport with memory of its own does."""
    for param in layout.params:
        held = layout.held(param, blueprint)
        if held is not None:
            take_blocks(param, held, state[param.name], out[param.name])


class Best(dict[str, float]):
    """Seconds of the best turn of each operation, over all workers."""

    def note(self, name: str, work: Callable[[], object]) -> None:
        begin = time.perf_counter()
        work()
        self[name] = min(self.get(name, float("inf")), time.perf_counter() - begin)


def for_each(pairs: Iterable[tuple[Blueprint, State]], work: Callable[[Blueprint, State], object]) -> None:
    for blueprint, state in pairs:
        work(blueprint, state)


def one_turn(layout: Layout, state: State, drawn: list[Blueprint], mean: StreamingMean, best: Best) -> None:
    pairs = [(blueprint, slice_state(layout, state, blueprint)) for blueprint in drawn]
    out = {name: torch.zeros_like(tensor) for name, tensor in pairs[0][1].items()}
    best.note("copy", lambda: copy_into(pairs[0][1], out))
    best.note("clone", lambda: [tensor.clone() for tensor in pairs[0][1].values()])
    best.note("slice before", lambda: for_each(pairs, lambda b, _: indexed_slice(layout, state, b)))
    best.note("slice now", lambda: for_each(pairs, lambda b, _: slice_state(layout, state, b)))
    best.note("slice into now", lambda: for_each(pairs, lambda b, _: slice_into(layout, state, b, out)))
    best.note("check before", lambda: for_each(pairs, lambda b, s: finite_before(layout, b, s)))
    best.note("check now", lambda: for_each(pairs, lambda b, s: check_state(layout, b, s)))
    old = IndexedMean(layout)
    best.note("add before", lambda: for_each(pairs, old.add))
    best.note("add now", lambda: for_each(pairs, mean.add))
    results: list[State] = []
    best.note("finish before", lambda: results.append(old.finish(state)))
    best.note("finish now", lambda: results.append(mean.finish(state)))
    mean.emptied()
    assert all(torch.equal(results[0][name], results[1][name]) for name in state)


def speed(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # as in the server, where the workers have the cores
    layout, state, drawn = make_round(args.workers, args.keep)
    mean, best = StreamingMean(layout), Best()
    for _ in range(args.turns):
        one_turn(layout, state, drawn, mean, best)
    subnets = [slice_state(layout, state, blueprint) for blueprint in drawn]
    replies = sum(size(subnet) for subnet in subnets)
    sliced = sum(size({n: t for n, t in subnet.items() if t is not state[n]}) for subnet in subnets)
    moved = {"slice": 8 * sliced, "slice into": 8 * sliced, "check": 4 * replies}
    moved |= {"add": 20 * replies - 8 * size(state), "finish": 12 * size(state)}
    copy, clone = (8 * size(subnets[0]) / best[name] / 1e9 for name in ("copy", "clone"))
    print(f"GPT-2 124M, both {args.keep}/12, S={args.workers}, one thread, best of {args.turns}; "
          f"copy {copy:.2f} GB/s, clone {clone:.2f} GB/s")  # fmt: skip
    print(
        f"{'':10} {'MB':>6} {'before s':>9} {'now s':>8} {'speed-up':>9} {'GB/s now':>9} {'of copy':>8} {'of clone':>9}"
    )
    for name, num_bytes in moved.items():
        before, now = best[f"{name.split()[0]} before"], best[f"{name} now"]
        rate = num_bytes / now / 1e9
        print(f"{name:10} {num_bytes / 1e6:6.0f} {before:9.3f} {now:8.3f} {before / now:9.1f} {rate:9.2f} "
              f"{rate / copy:8.2f} {rate / clone:9.2f}")  # fmt: skip


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory(workers: int, keep: int) -> None:
    """Two rounds of `workers` replies that arrive one at a time; the state it began with is let go."""
    torch.set_num_threads(1)
    start = peak()
    layout, state, drawn = make_round(workers, keep)
    num_bytes, mean = 4 * size(state), StreamingMean(layout)
    for _ in range(2):
        for blueprint in drawn:
            mean.add(blueprint, slice_state(layout, state, blueprint))
        state = mean.finish(state)
        mean.emptied()
    print(
        f"S={workers:3}: peak {(peak() - start) / num_bytes:.2f} copies of the float32 state ({num_bytes / 1e6:.0f} MB)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--keep", type=int, default=6, help="blocks of 12 that a worker holds")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--memory", type=int, nargs="+", help="numbers of workers to measure the peak memory at")
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        memory(args.peak_of, args.keep)
    elif args.memory:
        for workers in args.memory:  # each in a process of its own: a peak never falls
            command = [sys.executable, __file__, "--peak-of", str(workers), "--keep", str(args.keep)]
            subprocess.run(command, check=True)
    else:
        speed(args)


if __name__ == "__main__":
    main()
