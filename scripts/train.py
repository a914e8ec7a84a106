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
from torch.utils.data import default_collate

import synthbroker as sb

UNSEEN_SEEDS, EVALUATIONS = range(100, 108), 10  # the generator yields none of these seeds
PEAK_RATE, WARM_UP = 2e-2, 0.1
CROP = 52  # voxels of 64; on a CPU, PyTorch takes six times as long per voxel for layers of fewer than 2**20 values


def crop(sample: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cut a cube out at random: half the work, and a sample that is given again looks new."""
    cube = [slice(start, start + CROP) for start in (random.randint(0, n - CROP) for n in sample["label"].shape)]
    return {"image": sample["image"][:, *cube], "label": sample["label"][*cube]}


@torch.no_grad()
def evaluate(model: MeshNet, unseen: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the predicted classes, and the mean foreground Dice of each sample."""
    predicted = torch.cat([model(image[None]).argmax(dim=1) for image in unseen["image"]])
    return predicted, foreground_dice(predicted, unseen["label"], len(CLASSES))


def train(model: MeshNet, unseen: dict[str, torch.Tensor], args: argparse.Namespace) -> History:
    """Train for `args.seconds`, evaluating on the unseen samples as time goes on."""
    dataset = sb.RingDataset(ring=args.ring, group="train", batch_size=1, reuse=2, transform=crop, wait_s=60)
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    history = History()
    with Progress() as progress:
        bar = progress.add_task("training", total=args.seconds)
        progress.print(history.evaluated(*evaluate(model, unseen)))
        began = asked = time.monotonic()
        for batch in dataset.loader():
            history.waited_s += time.monotonic() - asked
            done = min(1.0, history.seconds / args.seconds)
            optimiser.param_groups[0]["lr"] = PEAK_RATE * min(done / WARM_UP, (1 - done) / (1 - WARM_UP))
            loss = soft_dice_loss(model(batch["image"].to(args.device)), batch["label"].to(args.device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            history.trained(time.monotonic() - began, loss.item(), batch.info.uses)
            progress.update(bar, completed=history.seconds, description=history.now)
            if history.seconds >= args.seconds * len(history.dice) / EVALUATIONS:
                progress.print(history.evaluated(*evaluate(model, unseen)))
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
    unseen = default_collate([*map(BrainMaker(args.device), UNSEEN_SEEDS)])
    torch.manual_seed(0)
    history = train(MeshNet(len(CLASSES)).to(args.device), unseen, args)
    print(summary(history, sb.status(args.ring)), f"drawn in {draw(args.png, history, unseen)}", sep="\n")


if __name__ == "__main__":
    main()
