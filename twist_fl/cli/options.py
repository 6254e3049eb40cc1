"""Arguments and options that several commands of `cli/app.py` take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Start = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_MODEL",
        help="A run's folder, for example runs/demo/twist; or a model as it is: a Hugging Face folder, a name on the "
        "hub, a GGUF file.",
    ),
]
Runs = Annotated[
    list[Path] | None, typer.Argument(help="Folders of runs, or a folder with runs in it.", show_default="runs")
]
Sizes = Annotated[
    str | None,
    typer.Option(
        help="Ticket sizes, written as --size, as 8,6,4 or 1/2,1/4; default: as the run; of a model 1/1,1/2,1/4."
    ),
]
Draws = Annotated[int, typer.Option(min=1, max=100_000, help="Random tickets per size; prune: for se and se-unscaled.")]
Windows = Annotated[int | None, typer.Option(min=1, help="Test windows to use; default: as the run; of a model 64.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the ticket and of the sampling.")]
Writer = Annotated[
    str, typer.Argument(metavar="MODEL", help="A deployed ticket's folder, a run's, or a model: folder, name, GGUF.")
]
OwnModel = Annotated[
    str | None,
    typer.Option(
        help="A model of yours instead of ours: a Hugging Face folder, a name on the hub, a GGUF file. Text by "
        "data.path=FOLDER; train.rounds=10 and train.lr=3e-4 unless you give others."
    ),
]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Of a model: settings, for example data.path=FOLDER data.window=128 blueprint.ffn_blocks=12. Of a run, "
        "whose settings are fixed: data.path=NEW (or data.tokenizer=NEW) if its text has moved; its hash is checked.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(file_okay=False, help="Where results go; default: the run's folder, of a model runs/NAME."),
]
Resume = Annotated[
    Path | None,
    typer.Option(
        help="Go on with the run in this folder; train.rounds=200 trains it longer, data.path=NEW "
        "says where its text is now."
    ),
]
Local = Annotated[
    bool,
    typer.Option(
        "--local",
        help="Without Flower, in this process, one worker after another: starts in seconds, "
        "for quick trials. The same weights.",
    ),
]
Devices = Annotated[
    list[str] | None,
    typer.Option(
        help="An edge device as NAME=LIMIT or NAME=LIMIT,LIMIT; repeat for more. Limits: 3.5MB of memory (kB, GB, "
        "MiB too), 20ms or 0.5s a token, 1/4 or 25% of the blocks. Default: three devices."
    ),
]
RootCertificates = Annotated[
    Path | None, typer.Option(help="CA certificate (PEM) of the SuperLink; default: the system's.")
]
PrivateKey = Annotated[Path | None, typer.Option(help="This node's key, registered with `flwr supernode register`.")]
TrustedEntities = Annotated[
    Path | None, typer.Option(help="YAML file of public keys: run only apps that one of them has signed.")
]
OwnText = Annotated[
    str | None,
    typer.Option(
        metavar="PATH", help="This node's own text (data.private=nodes): a file, a folder or a glob. It stays here."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="key=value settings, for example train.lr=1e-3 blueprint.num_sub=4; `twist-fl keys` lists them."
    ),
]


def new_folder(text: str, *names: str) -> Any:
    """An option for a folder that is made: no file may stand there."""
    return typer.Option(*names, file_okay=False, help=text)


def new_file(text: str) -> Any:
    """An option for a file that is written: no folder may stand there."""
    return typer.Option(dir_okay=False, help=text)


Parts = Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to make.")]
Alpha = Annotated[
    float | None,
    typer.Option(
        help="How evenly each source (a folder of the corpus, or a file) is spread, by a Dirichlet distribution: 0.1 "
        "to a worker or two, 100 to all. Default: whatever its source, a document goes to any worker."
    ),
]
CorpusWords = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="The corpus: data.path=FOLDER, or another of `twist-fl keys data`."),
]
DemoFolder = Annotated[
    Path | None,
    new_folder(
        "Where the two runs and the report go. Default: runs/demo, of a model of yours runs/demo-NAME.", "--dir"
    ),
]
Method = Annotated[
    str, typer.Option(help="sparsegpt, wanda, zpruner, block, se, se-unscaled, magnitude; several as a,b; or all.")
]
PrunedFile = Annotated[
    Path | None, new_file("The JSON to write; default: pruned.json in the run, of a model in runs/NAME.")
]
Save = Annotated[
    Path | None,
    new_folder("Also put each pruned model in a folder METHOD-SIZE below this one."),
]
TicketSize = Annotated[
    str | None,
    typer.Option(
        help="Blocks of a divided layer, or a share: 4, 1/3, 25%; of attention+FFN: 2+6; default: the whole model."
    ),
]
Format = Annotated[
    str, typer.Option(help="compact, hf, gguf, onnx (docs/exports.md), or module:name of your own (docs/extending.md).")
]
Dtype = Annotated[
    str, typer.Option(help="Numbers of the weights: float32, bfloat16, float16; gguf: also q8_0; onnx: also int8.")
]
ExportFolder = Annotated[
    Path | None,
    new_folder("The folder to write; default: exports/SIZE-FORMAT-DTYPE in the run, of a model in runs/NAME."),
]
Draw = Annotated[int, typer.Option(min=0, max=100_000, help="Which of the seed's tickets of that size.")]
RunSeed = Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Default: the run's.")]
CardWindows = Annotated[
    int | None, typer.Option(min=1, help="Test windows for a perplexity on the model card; default: none.")
]
Page = Annotated[
    Path | None,
    new_file("A Markdown page whose <!-- table: NAME --> places are filled, too."),
]
