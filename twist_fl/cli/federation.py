"""`twist-fl node` and `twist-fl federation`: several machines, with TLS and a key for each node; docs/nodes.md."""

from __future__ import annotations

import time
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from twist_fl.cli import options
from twist_fl.federation.joining import DEFAULT_PORT, node_arguments

federation = typer.Typer(
    help="Several machines: keys and certificates, the server and nodes on this machine, who is there.",
    no_args_is_help=True,
)
console = Console(markup=False)
_LOOK_SECONDS = 2.0
Folder = Annotated[Path, typer.Argument(help="The federation's folder.")]


def node(
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="The SuperLink's Fleet API.")],
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS: for loopback and trusted networks.")] = False,
    root_certificates: options.RootCertificates = None,
    auth_supernode_private_key: options.PrivateKey = None,
    node_config: Annotated[
        str, typer.Option(help='For example "partition-id=0 num-partitions=2".', show_default=False)
    ] = "",
    trusted_entities: options.TrustedEntities = None,
    data: options.OwnText = None,
) -> None:
    """Join a Flower network as a SuperNode whose worker stays warm between rounds; see docs/nodes.md."""
    arguments = node_arguments(
        superlink, insecure, root_certificates, auth_supernode_private_key, node_config, trusted_entities, data
    )
    from twist_fl.federation.node import run_node

    run_node(arguments)


def _say(text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False)


@federation.command()
def init(
    folder: Folder,
    host: Annotated[
        list[str], typer.Option(help="A name or IP address under which nodes reach the server; nodes use the first.")
    ],
    node: Annotated[list[str], typer.Option(metavar="NAME", help="A node; repeat for each.")],
    port: Annotated[int, typer.Option(min=1, max=2**16 - 1, help="The server's.")] = DEFAULT_PORT,
    force: Annotated[bool, typer.Option("--force", help="Make all keys in the folder anew; its runs stay.")] = False,
) -> None:
    """Make a certificate authority, the server's certificate, a key for each node; files for systemd and Compose."""
    from twist_fl.federation.federation_folder import create

    made = create(folder, host, node, port, force)
    where = quote(str(folder))
    _say(
        f"{made.folder}: keys for {', '.join(made.nodes)}; the certificate is for "
        f"{', '.join(dict.fromkeys([*made.hosts, 'localhost']))}"
        f"\nTo try it on this machine alone:\n  twist-fl federation up {where} --nodes {len(made.nodes)}\n"
        f"For several machines: bring {made.folder / 'nodes'}/NAME to each node's machine, and here start\n"
        f"  twist-fl federation up {where} --nodes 0 --listen 0.0.0.0"
    )


@federation.command()
def up(
    folder: Folder,
    nodes: Annotated[int | None, typer.Option(min=0, help="How many of the nodes run here. Default: all.")] = None,
    listen: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where the server listens: this machine only; 0.0.0.0 is all.")
    ] = "127.0.0.1",
) -> None:
    """Run the server, and nodes on this machine, until Ctrl-C."""
    from twist_fl.federation.federation_folder import opened
    from twist_fl.federation.network import up as run

    there = opened(folder)
    run(there, listen, len(there.nodes) if nodes is None else nodes, _say)


@federation.command()
def status(
    where: Annotated[str, typer.Argument(metavar="FOLDER|HOST:PORT", help="The federation's folder, or its server.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    root_certificates: Annotated[Path | None, typer.Option(help="Of HOST:PORT: its CA certificate (PEM).")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="HOST:PORT has no TLS.")] = False,
) -> None:
    """Show which nodes are online, and of each run its round and bytes."""
    from twist_fl.federation.network_status import described, target

    there = target(where, root_certificates, insecure)
    text = "\n".join(described(there))
    if not follow or not console.is_terminal:
        _say(text)
    if follow and console.is_terminal:
        with Live(Text(text), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(_LOOK_SECONDS)
                live.update(Text("\n".join(described(there))), refresh=True)
    while follow:
        time.sleep(_LOOK_SECONDS)
        if (newer := "\n".join(described(there))) != text:
            _say(text := newer)
