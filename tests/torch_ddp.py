"""One process of torch's own DistributedDataParallel: the oracle of `test_ddp.py`, which starts it.

It imports nothing of twist_fl. `python torch_ddp.py RANK FOLDER` reads FOLDER/task.pt and, as rank 0, writes
FOLDER/trained.pt.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    task: dict[str, Any] = torch.load(folder / "task.pt", weights_only=True)
    num_workers = len(task["batches"])
    dist.init_process_group(
        "gloo", f"file://{folder / 'store'}", timedelta(seconds=120), rank=rank, world_size=num_workers
    )
    model = GPT2LMHeadModel(GPT2Config(**task["config"]))
    model.load_state_dict(task["params"], strict=False)  # all but the tied head
    model.train()
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(replica.parameters(), lr=task["lr"], fused=True)
    for seed, windows in zip(task["seeds"][rank], task["batches"][rank], strict=True):
        torch.manual_seed(seed)
        logits = replica(windows, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    if rank == 0:
        torch.save({name: parameter.detach() for name, parameter in model.named_parameters()}, folder / "trained.pt")
    dist.barrier()
    os._exit(0)  # a process has hung once, perhaps in taking its connections down: that is left out


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
