"""Show two runs side by side in TensorBoard's NFI tab: the loss in float32 and in float64.

A small MLP learns division modulo 13.  After some 570 steps the float32 run has a slingshot; its float64
control has none.  Both write into one log directory.  In the tab, choose ``float32`` *against* ``float64``.

    python examples/06_tensorboard.py                     # train, then print how to open the tab
    python examples/06_tensorboard.py --serve             # start TensorBoard first, and watch it happen

Only ``run_dir=`` is for TensorBoard.  The tab comes with ``pip install "nfi-monitor[tensorboard]"``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import AlertKind, Monitor

P, WIDTH, LR = 13, 64, 4e-3
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def division(seed: int) -> tuple[Tensor, Tensor]:
    """Return ``(one-hot pairs [rows, 2 P], a/b mod P [rows])`` of half of all pairs with b ≠ 0."""
    pairs = torch.tensor([(a, b) for a in range(P) for b in range(1, P)])
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    pairs = pairs[order[: len(pairs) // 2]]
    targets = pairs[:, 0] * torch.tensor([pow(int(b), P - 2, P) for b in pairs[:, 1]]) % P
    return F.one_hot(pairs, P).flatten(1).float(), targets


def train(run_dir: Path, dtype: torch.dtype, steps: int, seed: int) -> Monitor:
    torch.manual_seed(seed)
    inputs, targets = division(seed)
    sizes = [2 * P, WIDTH, WIDTH, WIDTH]
    layers = [part for i, o in pairwise(sizes) for part in (nn.Linear(i, o), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, P))
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, betas=(0.9, 0.95))
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    with Monitor(model, optimizer, run_dir=run_dir) as monitor:
        for _ in range(steps):
            loss = F.cross_entropy(model(inputs).to(dtype), targets)
            monitor.observe_loss(loss)
            loss.backward()
            optimizer.step()
            warmup.step()
            optimizer.zero_grad()
    return monitor


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write two runs for TensorBoard's NFI tab, side by side.")
    parser.add_argument("--out", type=Path, default=Path("runs/tensorboard"), help="default: %(default)s")
    parser.add_argument(
        "--steps", type=int, default=640, help="optimizer steps of each (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", action="store_true", help="start TensorBoard first; Ctrl-C ends it")
    parser.add_argument("--port", type=int, default=6006, help="TensorBoard's (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(1)  # at this size a second thread costs more time than it saves
    if args.out.exists() and any(args.out.iterdir()):
        # A run directory is appended to, as a resumed run would: two trainings in one make no curve.
        raise SystemExit(f"{args.out} holds runs already: pass another --out, or delete it.")
    command = ["tensorboard", "--logdir", str(args.out), "--port", str(args.port)]
    server = None
    if args.serve:
        args.out.mkdir(parents=True, exist_ok=True)
        server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *command[1:]])
    try:
        for name, dtype in DTYPES.items():
            monitor = train(args.out / name, dtype, args.steps, args.seed)
            spikes = [alert.first_step for alert in monitor.alerts if alert.kind is AlertKind.SLINGSHOT]
            print(f"loss in {name}: " + (f"slingshot at step {spikes[0]}" if spikes else "no slingshot"))
        if server is None:
            print(f"Now: {' '.join(command)}")
        print(f"Open http://localhost:{args.port}/#nfi and choose float32 against float64.")
        if server is not None:
            server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        if server is not None:
            server.terminate()
            server.wait()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
