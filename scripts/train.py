"""Train a small MeshNet on the brains of a ring: a trainer, to be copied and changed.

    python scripts/train.py --ring brains --seconds 210 --png brains.png
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from brains import CLASSES, SEEDS_FOR_VALIDATION, VOXEL_MM, BrainMaker
from meshnet import MeshNet, foreground_dice, segmentation_loss
from picture import History, draw
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import synthbroker as sb

VALIDATION_SEEDS = range(8)
EVALUATIONS = 10
PEAK_LEARNING_RATE = 2e-2


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ring", default="brains")
    parser.add_argument("--seconds", type=float, default=210.0, help="how long to train (default: %(default)s)")
    parser.add_argument("--png", default="brains.png", help="where the picture goes (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=max(1, min(8, (os.cpu_count() or 2) - 1)))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    make = BrainMaker()
    unseen = [make(seed) for seed in VALIDATION_SEEDS]
    image = torch.stack([sample["image"] for sample in unseen]).to(args.device)
    label = torch.stack([sample["label"] for sample in unseen]).to(args.device)
    torch.manual_seed(int(os.environ.get("TSEED", "0")))
    model = MeshNet(len(CLASSES)).to(args.device)
    optimiser = torch.optim.AdamW(model.parameters())
    history = History()
    batches = iter(sb.RingDataset(ring=args.ring, group="train", batch_size=int(os.environ.get("B", "2")), reuse=2).loader())

    @torch.no_grad()
    def evaluate() -> torch.Tensor:
        predicted = torch.cat([model(one[None]).argmax(dim=1) for one in image])
        history.dice.append((history.seconds, foreground_dice(predicted, label, len(CLASSES))))
        progress.print(f"{history.seconds:4.0f} s  {len(history.loss):5d} steps  Dice {history.dice[-1][1]:.2f}")
        return predicted

    waited_s = 0.0
    text = TextColumn("{task.description}")
    with Progress(text, BarColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task("training", total=args.seconds)
        evaluate()
        began = time.monotonic()
        while history.seconds < args.seconds:
            asked = time.monotonic()
            batch = next(batches).copy()
            waited_s += time.monotonic() - asked
            for group in optimiser.param_groups:
                group["lr"] = PEAK_LEARNING_RATE * (1 - history.seconds / args.seconds)
            loss = segmentation_loss(model(batch["image"].to(memory_format=torch.channels_last_3d)), batch["label"].long())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            history.seconds = time.monotonic() - began
            history.loss.append((history.seconds, loss.item()))
            progress.update(bar, completed=history.seconds)
            if history.seconds > args.seconds * len(history.dice) / EVALUATIONS:
                predicted=evaluate()
    torch.save((image,label,predicted,history), '/tmp/dw/res.pt')
    s=sb.status(args.ring); print(s.__dict__, s.groups['train'].__dict__, 'waited', waited_s/history.seconds)


if __name__ == "__main__":
    main()
