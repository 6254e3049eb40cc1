"""What weights of 16 bits on the wire cost in perplexity: the `wikitext2` preset with every flower.wire_dtype.

Tasks and replies go through the app's own records, in one process and without Flower's network. Twice: from random
weights at the preset's learning rate, and from what float32 came to by then at a tenth of it, as in fine-tuning, where
what an interval changes is small beside what rounding does. The app's replies carry what training has changed, which
the server adds to the float32 weights that it has kept; the rival, "bfloat16, weights", sends the weights themselves.

    python benchmarks/wire.py --data FOLDER_OF_WIKITEXT_2 [--rounds 20] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import save, show

from twist_fl.blueprint.drawing import full_blueprint
from twist_fl.config.schema import load_config
from twist_fl.config.sizes import ticket_size
from twist_fl.experiments.lab import ALIKE
from twist_fl.federation import wire
from twist_fl.rounds import RoundMean, RunState, plan, start
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.tickets import evaluate
from twist_fl.training.client_state import MomentShelf
from twist_fl.training.job import Job, make_job
from twist_fl.training.worker import Worker

RIVAL = "bfloat16, weights"
WIRES = ("float32", "bfloat16", "float16", RIVAL)
TICKET, TICKETS = 6, 5


def round_by_wire(job: Job, state: RunState, worker: Worker, rival: bool = False) -> RunState:
    """`rounds.twist_round`, every tensor through the records that the app sends; the rival's weights as they are."""
    tasks = plan(job, state)
    mean = RoundMean(job, state, tasks)
    for task in tasks:
        parcel = wire.task_from_records(job, wire.task_to_records(job, "", task, state.params, state.moments))
        reply = worker.train(parcel.task, parcel.params, parcel.moments)
        if rival:
            rounded = {name: tensor.bfloat16().float() for name, tensor in reply.params.items()}
            mean.add(task, replace(reply, params=rounded))
            continue
        content = wire.reply_to_records(job, task.blueprint, reply, sent=parcel.params)
        mean.add(task, wire.reply_from_records(job, task.blueprint, content, kept=state.params))
    assert not mean.report.dropped, mean.report.dropped
    return mean.finish()


def perplexities(job: Job, state: RunState) -> dict[str, float]:
    windows, size = job.corpus.test[: job.config.eval.watch_windows], job.config.eval.batch_size
    models = job.models()
    full = evaluate.perplexity(models.load_sliced(full_blueprint(job.layout), state.params), windows, size)
    num_sub = ticket_size(job.layout, job.division, TICKET).num_sub
    tickets = evaluate.ticket_distribution(
        models, state.params, job.division, num_sub, windows, tickets=TICKETS, seed=job.config.seed, batch_size=size
    ).summary()
    return {"full": full, "ticket": float(str(tickets["mean"]))}


def one(args: argparse.Namespace, scratch: Path) -> None:
    """One way, in a process of its own: from the state in `--base` if there is one."""
    torch.set_num_threads(1)
    preset = (
        *(f"data.path={args.data.resolve()}", "train.threads=1", "train.device=cpu", f"train.lr={args.lr}"),
        *(*ALIKE, "blueprint.num_sub=1/2", "train.beta2=0.95"),
    )
    # Twice the rounds, so that the second half trains on other batches than the first.
    budget = (
        f"flower.wire_dtype={args.only.split(',')[0]}",
        f"train.rounds={2 * args.rounds}",
        "eval.sizes=[6]",
        *args.settings,
    )
    job = make_job(load_config("wikitext2", [*preset, *budget]))
    worker = Worker(job, MomentShelf(scratch))
    state = RunFolder(args.base).load() if args.base else start(job)
    assert state is not None
    for _ in range(args.rounds):
        state = round_by_wire(job, state, worker, args.only == RIVAL)
    RunFolder(args.to).save(state, job.model_config)
    save(perplexities(job, state), args.out)


def side_by_side(args: argparse.Namespace, scratch: Path, stage: str, lr: float, base: Path | None) -> dict[str, Any]:
    print(f"{stage}: {args.rounds} rounds at lr {lr:g} in {len(WIRES)} ways, side by side …", flush=True)
    processes = {}
    for dtype in WIRES:
        words = ["--data", str(args.data), "--rounds", str(args.rounds), "--lr", str(lr), "--only", dtype]
        words += ["--to", str(scratch / f"{stage}-{dtype}"), "--out", str(scratch / f"{stage}-{dtype}.json")]
        words += ["--base", str(base)] if base else []
        processes[dtype] = subprocess.Popen([sys.executable, __file__, *words, *args.settings])
    for dtype, process in processes.items():
        if process.wait():
            raise SystemExit(f"{stage} with {dtype} failed")
    return {dtype: json.loads((scratch / f"{stage}-{dtype}.json").read_text()) for dtype in WIRES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with wiki.train.tokens and wiki.test.tokens")
    parser.add_argument("--rounds", type=int, default=20, help="of each half")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the first half; a tenth of it in the second")
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    parser.add_argument("settings", nargs="*", help="key=value settings over the preset's")
    parser.add_argument("--only", choices=WIRES, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if args.only:
            one(args, scratch)
            return
        make_job(load_config("wikitext2", [f"data.path={args.data.resolve()}", *args.settings]))  # tokenise once
        scratch_stage = side_by_side(args, scratch, "scratch", args.lr, None)
        fine = side_by_side(args, scratch, "fine-tuning", args.lr / 10, scratch / "scratch-float32")
    show(
        ("wire", "scratch: full", "6/12", "fine-tuning: full", "6/12"),
        [
            (dtype, *(f"{found[dtype][key]:.3f}" for found in (scratch_stage, fine) for key in ("full", "ticket")))
            for dtype in WIRES
        ],
    )
    settings = {"rounds": args.rounds, "lr": args.lr, "ticket": TICKET, "tickets": TICKETS, "settings": args.settings}
    save({"settings": settings, "scratch": scratch_stage, "fine_tuning": fine}, args.out)


if __name__ == "__main__":
    main()
