"""A training for the cluster's tests: learns to add four numbers, on as many ranks as there are."""

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
losses = []
for batch in dataset.loader():
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(batch["x"]), batch["y"])
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
if rank == 0:
    torch.save(model.module.state_dict(), "model.pt")
    print(f"{ranks} ranks, {len(losses)} steps, loss {losses[0]:.3g} -> {losses[-1]:.3g}", flush=True)
dataset.close()
dist.destroy_process_group()
