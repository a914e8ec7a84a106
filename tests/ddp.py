"""Ranks that train together, each in a process of its own: a model whose gradients all ranks add up in every step.

Were one rank to get another number of batches, all would wait for ever: the tests have a deadline.
"""

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import synthbroker as sb
from tools import values


def train(
    rank: int, told: Any, *, world_size: int, folder: str, epochs: int = 1, leave_after: int | None = None, **how: Any
) -> None:
    """Train as one rank, and tell rank, and numbers and uses of each step; logs into `folder`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    logging.basicConfig(filename=f"{folder}/log-{rank}")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world_size)
    try:
        told.put((rank, _steps(rank, epochs, leave_after, **how)))
        dist.barrier()
    except BaseException as error:
        told.put((rank, f"{type(error).__name__}: {error}"))
        raise
    finally:
        dist.destroy_process_group()


def _steps(
    rank: int, epochs: int, leave_after: int | None, *, url: str, ring: str, loader: dict[str, Any], **options: Any
) -> list[Any]:
    model = DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    per_rank = {name: value[rank] for name, value in options.pop("per_rank", {}).items()}
    batches = sb.RingDataset(url, ring=ring, group="g", **options | per_rank).loader(**loader)
    steps = []
    for _ in range(epochs):
        for i, batch in enumerate(batches):
            optimizer.zero_grad()
            model(batch["x"][:, :4]).sum().backward()  # waits for all other ranks
            optimizer.step()
            steps.append((values(batch), list(batch.info.uses)))
            if i + 1 == leave_after:
                break
    return steps
