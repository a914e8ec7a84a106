"""A training for the cluster's tests that goes on where it was when its job comes back."""

import os
import signal
import sys
from pathlib import Path

import torch

import synthbroker as sb

stop = []
signal.signal(signal.SIGUSR2, lambda *_: stop.append(True))
most, path = int(sys.argv[1]), Path("last.pt")
trained = []
dataset = sb.RingDataset(ring="brains", group="train", batch_size=2, ack="checkpoint", name="resume")
loader = dataset.loader()
if path.exists():
    saved = torch.load(path, weights_only=True)
    trained = saved["trained"]
    loader.load_state_dict(saved["data"])


def save():
    """Keep what was trained on, and what is to come."""
    torch.save({"trained": trained, "data": loader.state_dict()}, "last.new")
    os.replace("last.new", path)
    loader.acknowledge()
    Path("steps").write_text("\n".join(map(str, trained)))
    print(f"saved after {len(trained)} samples", flush=True)


for batch in loader:
    trained += batch["n"].tolist()
    if stop or len(trained) % 10 == 0:
        save()
    if stop:
        sys.exit(75)
    if len(trained) >= most:
        break
save()
dataset.close()
