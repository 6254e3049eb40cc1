"""Tables of docs/performance.md, from what `benchmarks/bench.py` has put into results/performance."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from math import log, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from twist_fl.report.cells import markdown
from twist_fl.report.document_tables import origin

Found = Mapping[str, Mapping[str, Any]]
"""What each benchmark found, by its name."""


def read(folder: Path) -> dict[str, dict[str, Any]]:
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def tables(found: Found) -> dict[str, str]:
    """Markdown tables by name, of those benchmarks that have run; below each, where its numbers are from."""
    made = {}
    for bench, makers in TABLES.items():
        for name, make in makers.items():
            if bench in found:
                made[name] = make(found[bench]) + "\n" + origin(found[bench]) + "\n"
    return made


def number(value: float) -> str:
    """Three significant digits, never as a power of ten."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return text if "e" not in text else f"{value:.6f}".rstrip("0")


Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]


def table(rows: Iterable[Row], *columns: Column) -> str:
    """Markdown: a header and its text per column, a line per row."""
    return markdown([[name for name, _ in columns], *([text(row) for _, text in columns] for row in rows)])


def _speed_up(*more: Column) -> tuple[Column, ...]:
    return (
        ("faster", lambda r: f"{r['speed_up']:.2f}"),
        ("FLOPs", lambda r: f"{r['flop_ratio']:.2f}"),
        ("share", lambda r: f"{r['speed_up'] / r['flop_ratio']:.2f}"),
        *more,
    )


def _round(found: Row) -> str:
    rates, places = found["rates"], {"server": "server, all workers", "worker": "each worker", "both": "both"}
    parts = [
        f"One thread: a plain copy reads and writes {number(rates['copy'] / 1e9)} GB/s, a large float32 product does "
        f"{number(rates['flops'] / 1e9)} GFLOP/s.\n"
    ]
    for case in found["cases"]:
        size = f"`both` {case['keep']}/{case['of']}, S = {found['settings']['workers']}"
        rows = [{"phase": name} | phase for name, phase in case["phases"].items()]
        phases = table(
            rows,
            ("phase", lambda r: str(r["phase"])),
            ("where", lambda r: places[r["at"]]),
            ("copies", lambda r: str(r["copies"])),
            ("MB", lambda r: number(r["bytes"] / 1e6)),
            ("TFLOP", lambda r: number(r["flops"] / 1e12)),
        )
        times = table(
            rows,
            ("phase", lambda r: str(r["phase"])),
            ("floor s", lambda r: number(r["floor_seconds"])),
            ("measured s", lambda r: number(r["seconds"])),
            ("measured / floor", lambda r: number(r["seconds"] / r["floor_seconds"]) if r["floor_seconds"] else "-"),
        )
        parts.append(f"{size}: {case['subnet_params']:,} parameters a worker\n\n{phases}\n{times}")
    return "\n".join(parts)


def _ddp(found: Row) -> str:
    settings, one = found["settings"], {"speed_up": 1, "flop_ratio": 1, "memory": 1, "paper_memory": 1}
    about = (
        f"GPT-2's 12 layers and 12 heads, d {settings['d_model']}, vocabulary {settings['vocab']:,}: "
        f"{found['num_params'] / 1e6:.1f} M parameters, batches of {settings['batch']} x {settings['window']} tokens, "
        f"{settings['workers']} processes of one thread.\n\n"
    )
    papers = ("paper_speed_up", "paper_step_speed_up")
    rows = [found["ddp"] | one | dict.fromkeys(papers, 1), *found["rows"]]
    names: Column = ("", lambda r: f"`{r['setting']}` {r['keep']}/{r['of']}" if "keep" in r else "DDP")
    speeds = table(
        rows,
        names,
        ("ms/batch", lambda r: number(1e3 * r["seconds"])),
        *_speed_up(("paper", lambda r: " / ".join(f"{r[key]:.2f}" for key in papers if key in r))),
    )
    memory = table(
        rows,
        names,
        ("peak MB", lambda r: number(r["peak_mb"])),
        ("of DDP", lambda r: f"{r['memory']:.2f}"),
        ("paper", lambda r: f"{r['paper_memory']:.2f}"),
        ("MB a round", lambda r: number(r["mb_per_interval"])),
    )
    return f"{about}{speeds}\n{memory}"


def _ddp_flower(found: Row) -> str:
    return table(
        found["flower"],
        ("", lambda r: f"`both` {r['keep']}/12"),
        ("s a round", lambda r: number(r["seconds"])),
        ("of it training", lambda r: number(r["training_seconds"])),
        ("DDP, as many batches, s", lambda r: number(r["ddp_seconds"])),
        *_speed_up(("MB a worker", lambda r: number(r["mb_per_worker"]))),
    )


def _growth_flower(found: Row) -> str:
    return table(
        found["flower"],
        ("workers", lambda r: str(r["workers"])),
        ("s a round", lambda r: number(r["seconds"])),
        ("slowest worker's part", lambda r: number(r["training_seconds"])),
        ("rest, a worker, ms", lambda r: number(1e3 * (r["seconds"] - r["training_seconds"]) / r["workers"])),
        ("whole command, s", lambda r: number(r["command_seconds"])),
    )


def _growth_server(found: Row) -> str:
    return f"A state of {number(found['server'][0]['state_mb'])} MB.\n\n" + table(
        found["server"],
        ("workers", lambda r: str(r["workers"])),
        ("server s a round", lambda r: number(r["seconds"])),
        ("a worker, ms", lambda r: number(1e3 * r["seconds"] / r["workers"])),
        ("server memory, copies of the state", lambda r: f"{r['copies']:.2f}"),
        ("shared segments MB", lambda r: number(r["segment_mb"])),
    )


def _growth_sizes(found: Row) -> str:
    name: Column = ("GPT-2", lambda r: str(r["size"]))
    models = table(
        found["sizes"],
        name,
        ("M parameters", lambda r: number(r["num_params"] / 1e6)),
        ("blocks kept", lambda r: f"{r['keep']}/{r['of']}"),
        ("M of the subnet", lambda r: number(r["subnet_params"] / 1e6)),
        ("MB each way", lambda r: number(r["mb_each_way"])),
        ("TFLOP/step", lambda r: number(r["tflop_step"])),
    )
    costs = table(
        found["sizes"],
        name,
        ("training GiB", lambda r: number(r["training_gib"])),
        ("server s a round", lambda r: number(r["server_seconds"])),
        ("server GB", lambda r: number(r["server_gb"])),
        ("layers measured", lambda r: f"{r['layers_measured']} of {r['layers']}"),
    )
    return f"{models}\n{costs}"


def _wire(found: Row) -> str:
    settings = found["settings"]
    about = f"{settings['rounds']} rounds at lr {settings['lr']:g}, then {settings['rounds']} at a tenth of it.\n\n"
    return about + table(
        ({"wire": wire, "scratch": row, "fine": found["fine_tuning"][wire]} for wire, row in found["scratch"].items()),
        ("on the wire", lambda r: str(r["wire"])),
        ("from scratch: full", lambda r: f"{r['scratch']['full']:.2f}"),
        ("6/12", lambda r: f"{r['scratch']['ticket']:.2f}"),
        ("fine-tuning: full", lambda r: f"{r['fine']['full']:.2f}"),
        ("6/12", lambda r: f"{r['fine']['ticket']:.2f}"),
    )


def _step(found: Row) -> str:
    plain, *_ = found["rows"]
    return table(
        found["rows"],
        ("loss", lambda r: str(r["loss"])),
        ("s/step", lambda r: number(r["seconds"])),
        ("of plain", lambda r: f"{r['seconds'] / plain['seconds']:.2f}"),
        ("peak MB", lambda r: number(r["peak_mb"])),
        ("of plain", lambda r: f"{r['peak_mb'] / plain['peak_mb']:.2f}"),
    )


def _server(found: Row) -> str:
    return table(
        found["rows"],
        ("work (threads)", lambda r: f"{r['work']} ({r['threads']})"),
        ("MB", lambda r: number(r["mb"])),
        ("before, s", lambda r: number(r["rival"]) if r["rival"] else "-"),
        ("limit s", lambda r: number(r["limit"])),
        ("s", lambda r: number(r["ours"])),
        ("limit / s", lambda r: f"{r['of_limit']:.2f}"),
    )


def _transport(found: Row) -> str:
    return table(
        found["rows"],
        ("transport", lambda r: str(r["transport"])),
        ("MB a worker", lambda r: number(r["mb_per_worker"])),
        ("s a round", lambda r: number(r["seconds"])),
        ("one copy, s", lambda r: number(r["copy"])),
        ("s / one copy", lambda r: number(r["seconds"] / r["copy"])),
    )


def _warm_nodes(found: Row) -> str:
    return table(
        found["rows"],
        ("nodes", lambda r: str(r["nodes"])),
        ("MB a worker", lambda r: number(r["mb_per_worker"])),
        ("first round, s", lambda r: number(r["first"])),
        ("later, s", lambda r: number(r["seconds"])),
        ("faster", lambda r: f"{r['faster']:.1f}"),
        ("start-up, s", lambda r: number(max(r["start_up"])) if r["start_up"] else "-"),
    )


def _flight(found: Row) -> str:
    return f"{found['num_nodes']} nodes.\n\n" + table(
        found["rows"],
        ("transport", lambda r: str(r["transport"])),
        ("MB a worker, each way", lambda r: number(r["mb_per_worker"])),
        ("later, s", lambda r: number(r["seconds"])),
        ("faster", lambda r: f"{r['faster']:.1f}"),
        ("two copies, s", lambda r: number(r["two_copies"])),
        ("s / two copies", lambda r: number(r["seconds"] / r["two_copies"])),
    )


def _flight_line(found: Row) -> str:
    rate, delay = found["line"]
    return f"{found['num_nodes']} nodes, {rate:,.0f} Mbit/s, {delay:g} ms.\n\n" + table(
        found["rows"],
        ("transport", lambda r: str(r["transport"])),
        ("MB a worker, each way", lambda r: number(r["mb_per_worker"])),
        ("later, s", lambda r: number(r["seconds"])),
        ("the line itself, s", lambda r: number(r["line_seconds"])),
        ("share of the line", lambda r: f"{r['line_seconds'] / r['seconds']:.2f}"),
    )


def _chaos(found: Row) -> str:
    blows, drifts = found["blows"], found["drift"]
    lost = f"{found['lost_replies']} of {found['lost_replies'] + found['intervals']}"
    again = ", ".join(f"{why}: {number}" for why, number in found["ends"].items())
    grew = ", ".join(f"{name} {value:.2f}" for name, value in drifts.items() if value is not None)
    when, error = "of the last round", ""
    if "perplexity" in found:
        pairs = [(found["perplexity"], found["undisturbed"])]
    else:
        when, pairs = "of every tenth round of the second half, mean", found["perplexities"]
        error = f" ± {stdev(log(ours / theirs) for ours, theirs in pairs) / sqrt(len(pairs)):.3f}"
    ours, theirs = map(mean, zip(*pairs, strict=True))
    rows = {
        "rounds done, of those that were wanted": f"{found['rounds_done']:,} of {found['settings']['rounds']:,}",
        "minutes": f"{found['seconds'] / 60:.0f}",
        "a round, median, s": number(found["median_round"]),
        "blows": ", ".join(f"{blow}: {number}" for blow, number in blows.items()),
        "the server was begun again, because": again or "never",
        "each round once in the log": "yes" if found["each_round_once"] else "no",
        "replies that did not count": lost,
        "processes left at the end": str(found["processes_left"]),
        "last third / second third": grew or "too short",
        f"perplexity {when}, and undisturbed with as many intervals": f"{ours:.2f}, {theirs:.2f} "
        f"({found['ratio']:.3f}{error})",
    }
    return table([{"what": what, "found": value} for what, value in rows.items()], ("", lambda r: str(r["what"])),
                 ("", lambda r: str(r["found"])))  # fmt: skip


def _text(found: Row) -> str:
    settings = found["settings"]
    about = f"A byte-level BPE of {settings['vocab']:,} tokens, {settings['cores']} cores.\n\n"
    return about + table(
        found["rows"],
        ("", lambda r: str(r["how"])),
        ("MB of text", lambda r: number(r["mb"])),
        ("s", lambda r: number(r["seconds"])),
        ("MB/s", lambda r: number(r["mb_per_second"])),
        ("peak MB", lambda r: number(r["peak_mb"])),
    )


def _scale(found: Row) -> str:
    return f"{found['round']} nodes train a round.\n\n" + table(
        found["rows"],
        ("", lambda r: str(r["what"])),
        ("nodes", lambda r: f"{r['nodes']:,}"),
        ("a round, s", lambda r: number(r["seconds"])),
        ("longest training, s", lambda r: number(r["training"]) if "training" in r else "-"),
        ("peak GB", lambda r: number(r["peak_bytes"] / 1e9)),
        ("whole run, s", lambda r: number(r["whole_seconds"])),
    )


def _start_up(found: Row) -> str:
    return table(
        found["rows"],
        ("`twist-fl train demo`", lambda r: str(r["way"])),
        ("to the first round, s", lambda r: number(r["seconds"])),
        ("of before", lambda r: f"{r['of_before']:.2f}"),
        ("of a core, s", lambda r: number(r["cpu_seconds"])),
        ("memory, MB", lambda r: number(r["mb"])),
    )


def _run_memory(found: Row) -> str:
    return table(
        found["rows"],
        ("", lambda r: str(r["way"])),
        ("server, GB", lambda r: f"{r['server']['bytes'] / 1e9:.2f}"),
        ("of the counted", lambda r: f"{r['server']['ratio']:.2f}"),
        ("a worker, GB", lambda r: f"{r['worker']['bytes'] / 1e9:.2f}"),
        ("of the counted ", lambda r: f"{r['worker']['ratio']:.2f}"),
    )


def _ticket_speed(what: str) -> Callable[[Row], str]:
    def made(found: Row) -> str:
        rows = [row | row[what] for row in found["rows"]]
        return table(
            rows,
            ("engine", lambda r: str(r["engine"])),
            ("threads, batch", lambda r: f"{r['threads']}, {r['batch']}"),
            ("ticket", lambda r: str(r["ticket"])),
            ("ms", lambda r: number(1000 * r["seconds"])),
            ("faster", lambda r: f"{r['speed_up']:.2f}"),
            ("of the bound", lambda r: f"{r['speed_up'] / r['bound']:.2f}"),
        )

    return made


TABLES: dict[str, dict[str, Callable[[Row], str]]] = {
    "round": {"round": _round},
    "ddp": {"ddp": _ddp, "ddp through Flower": _ddp_flower},
    "growth": {
        "growth through Flower": _growth_flower,
        "growth of the server": _growth_server,
        "growth of the model": _growth_sizes,
    },
    "server": {"server": _server},
    "transport": {"transport": _transport},
    "warm_nodes": {"nodes": _warm_nodes},
    "flight": {"flight": _flight},
    "flight_line": {"flight over a line": _flight_line},
    "chaos": {"chaos": _chaos},
    "chaos_mean": {"chaos, perplexity over rounds": _chaos},
    "scale": {"scale": _scale},
    "start_up": {"start-up": _start_up},
    "run_memory": {"memory of a run": _run_memory},
    "ticket_speed": {"a new token": _ticket_speed("token"), "a prompt": _ticket_speed("prompt")},
    "wire": {"wire": _wire},
    "step": {"step": _step},
    "text": {"text": _text},
}
