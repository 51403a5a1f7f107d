"""Watch a plain training loop on real images with two lines of code.

scikit-learn's digits (1,797 handwritten 8×8 images), a small MLP, minibatches, AdamW: an everyday run.
The loop is an ordinary one; the monitor adds the import and the ``with``.

    python examples/01_plain_loop.py
    python examples/01_plain_loop.py --loss-dtype bfloat16     # the same run with coarser rounding
    python examples/01_plain_loop.py --loss-dtype float64      # the same run with finer rounding

Nothing goes wrong here: no slingshot, the same test accuracy every time.  But the gradient of the correct
class is rounded to exactly 0 if a margin is large enough: about 16 nats in float32, 5.5 in bfloat16
(24 ln 2 and 8 ln 2).  Compare "absorbed rows" in the three summaries.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rich
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import Monitor

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(images, labels, test images, test labels)``; pixels in [0, 1], one fifth held out."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as missing:
        raise SystemExit("This example reads scikit-learn's digits: pip install scikit-learn") from missing
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out, kept = order[: len(order) // 5], order[len(order) // 5 :]
    return images[kept], labels[kept], images[held_out], labels[held_out]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small MLP on scikit-learn's digits under the monitor and print the summary."
    )
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="rows of a minibatch (default %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, help="write readings and alerts here (default: nowhere)")
    parser.add_argument(
        "--loss-dtype", choices=DTYPES, default="float32", help="precision from the logits to the loss"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(1)  # at this size a second thread costs more time than it saves
    torch.manual_seed(args.seed)
    images, labels, test_images, test_labels = digits(args.seed)

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    with Monitor(model, optimizer, run_dir=args.run_dir) as monitor:
        for _ in range(args.steps):
            rows = torch.randint(len(labels), (args.batch,))
            logits = model(images[rows])
            if args.loss_dtype != "float32":
                # A cast between head and loss: show the monitor the tensor whose gradient is rounded.
                logits = monitor.tap(logits.to(DTYPES[args.loss_dtype]))
            loss = F.cross_entropy(logits, labels[rows])
            monitor.observe_loss(loss)  # optional: lets the monitor see the spike itself, not only its cause
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).double().mean().item()
    rich.print(monitor.summary())
    rich.print(f"test accuracy {accuracy:.1%} after {args.steps} steps, loss in {args.loss_dtype}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
