"""Train a small MeshNet on the brains of a ring for some minutes: a trainer, to be copied and changed."""

import argparse
import os
import random
import time

import torch
from brains import CLASSES, BrainMaker
from meshnet import MeshNet, foreground_dice, soft_dice_loss
from picture import History, draw, summary
from rich.progress import Progress

import synthbroker as sb

UNSEEN_SEEDS = range(8)  # the generator yields none of these
EVALUATIONS = 10
PEAK_RATE, WARM_UP = 2e-2, 0.1
CROP = 52  # voxels of 64; on a CPU, PyTorch takes six times as long per voxel for layers of fewer than 2**20 values


def crop(sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cut a cube out at random: half the work, and a sample that is given again looks new."""
    cube = [slice(start, start + CROP) for start in (random.randint(0, n - CROP) for n in sample["label"].shape)]
    return {"image": sample["image"][:, *cube], "label": sample["label"][*cube]}


@torch.no_grad()
def evaluate(model: MeshNet, image: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the predicted classes, and the mean foreground Dice of each sample."""
    predicted = torch.cat([model(one[None]).argmax(dim=1) for one in image])
    return predicted, foreground_dice(predicted, label, len(CLASSES))


def train(model: MeshNet, unseen: tuple[torch.Tensor, torch.Tensor], args: argparse.Namespace) -> History:
    """Train for `args.seconds`, evaluating on unseen images and labels as time goes on."""
    dataset = sb.RingDataset(ring=args.ring, group="train", batch_size=1, reuse=2, transform=crop, wait_s=60)
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    history = History()
    with Progress() as progress:
        bar = progress.add_task("training", total=args.seconds)
        progress.print(history.evaluated(*evaluate(model, *unseen)))
        began = asked = time.monotonic()
        for batch in dataset.loader():
            history.waited_s += time.monotonic() - asked
            done = min(1.0, history.seconds / args.seconds)
            optimiser.param_groups[0]["lr"] = PEAK_RATE * min(done / WARM_UP, (1 - done) / (1 - WARM_UP))
            loss = soft_dice_loss(model(batch["image"].to(args.device)), batch["label"].to(args.device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            now = history.trained(time.monotonic() - began, loss.item(), batch.info.uses)
            progress.update(bar, completed=history.seconds, description=now)
            if history.seconds >= args.seconds * len(history.dice) / EVALUATIONS:
                progress.print(history.evaluated(*evaluate(model, *unseen)))
            if len(history.dice) > EVALUATIONS:
                break
            asked = time.monotonic()
    dataset.close()
    return history


def main() -> None:
    """Train, then say and draw how it went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ring", default="brains")
    parser.add_argument("--seconds", type=float, default=230.0, help="how long to train (default: %(default)g)")
    parser.add_argument("--png", default="brains.png", help="where to draw the result (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(max(1, min(8, (os.cpu_count() or 2) - 1)))  # a core is the generator's
    make = BrainMaker(args.device)
    samples = [make(seed) for seed in UNSEEN_SEEDS]
    image, label = (torch.stack([sample[name] for sample in samples]) for name in ("image", "label"))
    torch.manual_seed(0)
    history = train(MeshNet(len(CLASSES)).to(args.device), (image, label), args)
    status = sb.status(args.ring)
    print(summary(history, generated=status.committed, dropped=status.groups["train"].lost))
    print("drawn in", draw(args.png, history, image.cpu(), label.cpu()))


if __name__ == "__main__":
    main()
