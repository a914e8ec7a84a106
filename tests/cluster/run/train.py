"""A training for the cluster's tests: learns to add four numbers, on as many ranks as there are.

What it has learnt is judged by all inputs that there are (sums.py): the losses of single batches differ by chance.
"""

import sys

import torch
import torch.distributed as dist

import synthbroker as sb

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
dataset = sb.RingDataset(ring="brains", group="train", batch_size=4, epoch_size=int(sys.argv[1]))
inputs = torch.arange(7.0)[:, None].expand(7, 4)


@torch.no_grad()
def loss_on_all() -> float:
    return float(torch.nn.functional.mse_loss(model.module(inputs), inputs.sum(1, keepdim=True)))


before, steps = loss_on_all(), 0
for batch in dataset.loader():
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(batch["x"]), batch["y"])
    loss.backward()
    optimizer.step()
    steps += 1
if rank == 0:
    torch.save(model.module.state_dict(), "model.pt")
    print(f"{ranks} ranks, {steps} steps, loss {before:.3g} -> {loss_on_all():.3g}", flush=True)
dataset.close()
dist.destroy_process_group()
