"""Everything that needs a GPU, in pieces of minutes: each writes PIECE.json and is skipped where that file is.

GPT-2 124M, 2 x 1024 tokens, random tokens and weights except in `perplexity`. See the README beside this file.

    python benchmarks/gpu/run.py [PIECE ...] [--out results/gpu] [--force] [--tiny]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from common import gpt2_config, job_without_text, save, show
from steps import ddp_steps, random_model, subnet_steps
from torch import distributed
from transformers import AutoTokenizer, GPT2Config

from twist_fl.blueprint.blocks import make_layout
from twist_fl.blueprint.blueprint import Blueprint
from twist_fl.blueprint.cost import step_flops
from twist_fl.blueprint.division import Division, Setting
from twist_fl.blueprint.drawing import draw_round, full_blueprint
from twist_fl.config.schema import Precision, load_config
from twist_fl.model.subnet import check_compiler
from twist_fl.rounds import RoundMean, RunState, dispatch, plan, start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.system.errors import ConfigError
from twist_fl.system.memory import Peak
from twist_fl.system.provenance import provenance
from twist_fl.tickets import evaluate
from twist_fl.training.client_state import MomentShelf
from twist_fl.training.job import Job
from twist_fl.training.precision import check_precision
from twist_fl.training.worker import Worker

WORKERS = 4
PLAIN = 10**9
"""A loss chunk of more tokens than any batch has: the model's own loss."""
Case = tuple[Setting, int] | None
EVERY: list[Case] = [None, *((setting, keep) for setting in ("attn", "ffn", "both") for keep in (10, 8, 6, 4))]
FEW: list[Case] = [None, ("attn", 4), ("ffn", 4), ("both", 6), ("both", 4)]


class LeftOutError(Exception):
    """This machine, or this call, lacks what the piece needs."""


class Bench:
    """The model, the job and the device that all pieces share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch, self.window, self.steps, self.warm_up = (2, 16, 2, 1) if args.tiny else (2, 1024, 20, 5)
        sizes = {"n_embd": 24, "n_layer": 5, "vocab_size": 400, "n_positions": 16} if args.tiny else {}
        self.model = gpt2_config(**sizes)
        self.interval = 2 if args.tiny else 15
        self._made: Job | None = None

    def job(self, *overrides: str) -> Job:
        """GPT-2's job; its few made-up sentences are read once."""
        budget = (f"train.workers={WORKERS}", f"train.interval={self.interval}", f"train.batch_size={self.batch}")
        ends = ("eval.every=0", "eval.max_windows=2", "checkpoint_every=1000", "train.threads=1")
        given = (*budget, *ends, f"data.window={self.window}", "blueprint.num_sub=4", *overrides)
        if self._made is None:
            with tempfile.TemporaryDirectory() as scratch:
                self._made = job_without_text(self.model, Path(scratch), *given)
        return replace(self._made, config=load_config(overrides=["eval.sizes=[]", *given]))

    def blueprint(self, job: Job, case: Case) -> Blueprint:
        if case is None:
            return full_blueprint(job.layout)
        setting, keep = case
        return draw_round(job.layout, Division(setting, ((keep, keep),) * WORKERS), 0, 1)[0]

    def batches(self, count: int) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(count):
            yield torch.randint(self.model.vocab_size, (self.batch, self.window), generator=generator).to(self.device)

    def step(self, case: Case, *overrides: str) -> dict[str, Any]:
        """Time and peak memory of a training step: weights, gradients, Adam and activations."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        job = self.job(*overrides)
        blueprint, peak = self.blueprint(job, case), Peak(str(self.device))
        seconds = subnet_steps(
            random_model(job, blueprint), self.batches(self.warm_up + self.steps), job.config.train, self.warm_up
        )
        flops = step_flops(job.layout, blueprint, self.batch, self.window)
        return {"setting": case[0] if case else "full", "keep": case[1] if case else 12,
                "seconds": seconds, "peak_mb": peak.num_bytes() / 1e6,
                "flops": flops, "tflop_per_second": flops / seconds / 1e12}  # fmt: skip


# The pieces


def steps(precision: Precision, compile: bool = False) -> Callable[[Bench], dict[str, Any]]:
    """Every setting and size, or a few where each has to be compiled."""

    def piece(bench: Bench) -> dict[str, Any]:
        try:
            check_precision(precision, bench.device.type)
            if compile:
                check_compiler(bench.device.type)
        except ConfigError as error:
            raise LeftOutError(str(error)) from error
        cases = (FEW if compile else EVERY)[: 2 if bench.args.tiny else None]
        rows: list[dict[str, Any]] = []
        for case in cases:
            torch.compiler.reset()
            row = bench.step(case, f"train.precision={precision}", f"train.compile={compile}")
            first = rows[0] if rows else row
            row["speed_up"] = first["seconds"] / row["seconds"]
            row["flop_ratio"] = first["flops"] / row["flops"]
            # On a CPU a small model may fit into what the process held before.
            row["memory"] = row["peak_mb"] / first["peak_mb"] if first["peak_mb"] else None
            rows.append(row)
        show(
            (precision, "ms", "TFLOP/s", "speed-up", "FLOPs", "peak MB", "of full"),
            [(f"{r['setting']} {r['keep']}/12", 1e3 * r["seconds"], r["tflop_per_second"], r["speed_up"],
              r["flop_ratio"], r["peak_mb"], r["memory"]) for r in rows],
        )  # fmt: skip
        return {"precision": precision, "compile": compile, "rows": rows}

    return piece


def loss(bench: Bench) -> dict[str, Any]:
    """Chunked against plain, of the full model."""
    rows = []
    chunks = (PLAIN, 8) if bench.args.tiny else (PLAIN, 128, 256, 512, 1024)
    for precision in ("float32", "bfloat16"):
        for chunk in chunks:
            row = bench.step(None, f"train.precision={precision}", f"train.loss_chunk={chunk}")
            rows.append({"precision": precision, "chunk": None if chunk == PLAIN else chunk} | row)
    show(("chunk", "precision", "ms", "peak MB"),
         [(str(r["chunk"]), r["precision"], 1e3 * r["seconds"], r["peak_mb"]) for r in rows])  # fmt: skip
    return {"rows": rows}


def ddp(bench: Bench) -> dict[str, Any]:
    """DistributedDataParallel under torchrun on all GPUs, by NCCL (of one process too); by gloo without a GPU."""
    ranks = torch.cuda.device_count() or 2
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "ddp.json"
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
        words = ["--rank-to", str(out), *(["--tiny"] if bench.args.tiny else [])]
        subprocess.run([sys.executable, *launch, *words], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    show(("DDP", "ms", "peak MB"), [(row["precision"], 1e3 * row["seconds"], row["peak_mb"]) for row in rows])
    return {"ranks": ranks, "backend": "nccl" if bench.device.type == "cuda" else "gloo", "rows": rows}


def ddp_rank(bench: Bench) -> None:
    on_gpu = bench.device.type == "cuda"
    if on_gpu:
        bench.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(bench.device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    rows = []
    for precision in ("float32", "tf32", "bfloat16") if on_gpu else ("float32", "bfloat16"):
        job = bench.job(f"train.precision={precision}", f"train.device={bench.device}")
        gc.collect()
        peak, batches = Peak(str(bench.device)), bench.batches(bench.warm_up + bench.steps)
        seconds = ddp_steps(random_model(job), batches, job.config.train, bench.warm_up)
        rows.append({"precision": precision, "seconds": seconds, "peak_mb": peak.num_bytes() / 1e6})
    if distributed.get_rank() == 0:
        save({"rows": rows}, bench.args.rank_to)
    distributed.destroy_process_group()


def rounds(bench: Bench) -> dict[str, Any]:
    """Whole rounds without Flower, four workers one after the other: TwIST `both` 4/12 and FedAvg."""
    rows = []
    for algorithm in ("twist", "fedavg"):
        for precision in ("float32", "bfloat16"):
            job = bench.job(f"algorithm={algorithm}", f"train.precision={precision}", "train.rounds=3")
            with tempfile.TemporaryDirectory() as scratch:
                worker, state = Worker(job, MomentShelf(Path(scratch))), start(job)
                for _ in range(3):  # the first builds models, the last counts
                    state, row = timed_round(job, state, worker)
            rows.append({"algorithm": algorithm, "precision": precision} | row)
    show(("algorithm", "precision", "s a round", "dispatch", "train, return", "aggregate"),
         [tuple(r[k] for k in ("algorithm", "precision", "seconds", "dispatch", "train", "aggregate"))
          for r in rows])  # fmt: skip
    return {"workers": WORKERS, "interval": bench.interval, "rows": rows}


def timed_round(job: Job, state: RunState, worker: Worker) -> tuple[RunState, dict[str, float]]:
    """`rounds.twist_round`, with a clock."""
    times = dict.fromkeys(("dispatch", "train", "aggregate"), 0.0)
    begin = now = time.perf_counter()

    def lap(phase: str) -> None:
        nonlocal now
        now, before = time.perf_counter(), now
        times[phase] += now - before

    tasks = plan(job, state)
    mean = RoundMean(job, state, tasks)
    for task in tasks:
        given = dispatch(job, state, task)
        lap("dispatch")
        reply = worker.train(task, *given)
        lap("train")
        mean.add(task, reply)
        lap("aggregate")
    state = mean.finish()
    lap("aggregate")
    assert not mean.report.dropped, mean.report.dropped
    return state, {"seconds": time.perf_counter() - begin} | times


def flower(bench: Bench) -> dict[str, Any]:
    """The same rounds by Flower's simulation, the workers on one GPU at once."""
    if find_spec("flwr") is None or find_spec("ray") is None:
        raise LeftOutError("Flower's simulation is not installed here")
    from twist_fl.federation.simulation import flower_run

    rows = []
    share = 1 / WORKERS if bench.device.type == "cuda" else 0
    for algorithm in ("twist", "fedavg"):
        with tempfile.TemporaryDirectory() as scratch:
            wanted = (f"algorithm={algorithm}", "train.rounds=4", f"flower.gpus_per_worker={share}")
            job = bench.job(*wanted, "flower.cpus_per_worker=1", f"dir={scratch}/run")
            folder = RunFolder(Path(scratch) / "run")
            folder.create(job)
            with flower_run(folder, job.config, WORKERS, {"mode": "train"}) as process:
                process.begin()
                process.wait(500)
            if not folder.events("done"):
                raise SystemExit((folder.path / "flower.log").read_text()[-4000:])
            seconds = [{key: event[key] for key in ("seconds", "training_seconds")} for event in folder.events("round")]
        rows.append({"algorithm": algorithm, "rounds": seconds} | seconds[-1])
    show(("algorithm", "s a round", "slowest worker"),
         [(r["algorithm"], r["seconds"], r["training_seconds"]) for r in rows])  # fmt: skip
    return {"workers": WORKERS, "interval": bench.interval, "gpus_per_worker": share, "rows": rows}


def perplexity(bench: Bench) -> dict[str, Any]:
    """A pretrained GPT-2 on a text, windows of its context: 29.94 for GPT-2 124M on raw WikiText-103's test split."""
    weights, text = bench.args.weights, bench.args.text
    if weights is None or text is None:
        raise LeftOutError("needs --weights FOLDER of a GPT-2 and --text FILE")
    job = bench.job()
    config = GPT2Config.from_pretrained(weights)
    job.config.model.pretrained = str(weights)
    job = replace(job, model_fields=config.to_dict(), layout=make_layout(config.to_dict()))
    tokens: list[int] = AutoTokenizer.from_pretrained(weights)(text.read_text(encoding="utf-8"))["input_ids"]
    window = config.n_positions
    windows = torch.tensor(tokens[: len(tokens) // window * window], dtype=torch.int32).view(-1, window).numpy()
    model = job.models().load(full_blueprint(job.layout), job.initial_state())
    value = evaluate.perplexity(model, windows, 8)
    print(f"perplexity {value:.3f} on {windows.size:,} tokens")
    return {"perplexity": value, "tokens": int(windows.size), "window": window}


PIECES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "step-float32": steps("float32"),
    "step-tf32": steps("tf32"),
    "step-bfloat16": steps("bfloat16"),
    "step-float32-compile": steps("float32", compile=True),
    "step-tf32-compile": steps("tf32", compile=True),
    "step-bfloat16-compile": steps("bfloat16", compile=True),
    "loss": loss,
    "ddp": ddp,
    "rounds": rounds,
    "flower": flower,
    "perplexity": perplexity,
}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=f"default: all of {', '.join(PIECES)}")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "results" / "gpu")
    parser.add_argument("--force", action="store_true", help="measure again what is there")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few steps: does every piece run?")
    parser.add_argument("--weights", type=Path, help="perplexity: folder of a pretrained GPT-2 with its tokenizer")
    parser.add_argument("--text", type=Path, help="perplexity: UTF-8 text")
    parser.add_argument("--rank-to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if unknown := set(args.pieces) - set(PIECES):
        parser.error(f"no piece {min(unknown)!r}; there are {', '.join(PIECES)}")
    bench = Bench(args)
    if args.rank_to:
        ddp_rank(bench)
        return
    for name in args.pieces or PIECES:
        file = args.out / f"{name}.json"
        if file.is_file() and not args.force:
            print(f"{name}: there already, {file}")
            continue
        print(f"{name} …", flush=True)
        begin = time.perf_counter()
        try:
            found = PIECES[name](bench)
        except LeftOutError as reason:
            print(f"{name}: left out, {reason}")
            continue
        seconds = time.perf_counter() - begin
        save(provenance() | {"piece": name, "tiny": args.tiny, "piece_seconds": seconds} | found, file)
        print(f"{name}: {seconds:.0f} s, {file}", flush=True)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main()
