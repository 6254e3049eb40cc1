"""data.private=nodes, the server's side: whose text is where, and what is known of it."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from twist_fl.data.node_text import ToldText, tokenizer_files
from twist_fl.data.own_text import check_batch
from twist_fl.runs.checkpoint import RunFolder
from twist_fl.training.job import Job


class Owners:
    """Which node has which worker's text: a node's partition-id is its worker's place among the clients."""

    def __init__(self, job: Job, folder: RunFolder) -> None:
        self._job, self._folder = job, folder
        self.nodes: dict[int, int] = {}
        """By worker."""

    def keep(self, nodes: Container[int]) -> None:
        """Forget all other nodes."""
        self.nodes = {worker: node for worker, node in self.nodes.items() if node in nodes}

    def tokenizer(self) -> dict[str, str]:
        return tokenizer_files(self._job.corpus.tokenizer_folder)

    def add(self, place: int, node: int, told: tuple[str, int, int]) -> None:
        """Raises ValueError if there is no such worker, or another node is it."""
        clients = self._job.clients
        if place >= len(clients):
            raise ValueError(
                f"a node's partition-id says which worker's text it has: it must be 0 to {len(clients) - 1}, and each "
                "node's another"
            )
        worker = clients[place]
        if worker in self.nodes:
            raise ValueError(f"two nodes have partition-id={place}: give each worker's node its own")
        text = ToldText(self._job.config.data, worker, *told)
        check_batch(text, self._job.config.train.batch_size, f"worker {worker}")
        assert self._job.own is not None
        self._job.own[worker] = text
        self.nodes[worker] = node

    def report(self) -> dict[str, Any]:
        """For the log: whose text there is, and whose is not what it was."""
        known: dict[str, str] = {}
        for event in self._folder.events("nodes"):
            known |= event.get("texts", {})
        texts = {str(worker): self._job.text_of(worker) for worker in sorted(self.nodes)}
        changed = [worker for worker, text in texts.items() if known.get(worker, text.digest) != text.digest]
        return {
            "windows": {worker: text.num_windows for worker, text in texts.items()},
            "texts": {worker: text.digest for worker, text in texts.items()},
            "notes": dict.fromkeys(changed, "its text is not what it was: the run goes on with what it has now"),
        }
