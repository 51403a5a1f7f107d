"""Numbers and alerts → people: console, JSON lines, TensorBoard, the after-run report and its figure.

Each report drags in its own library (rich, tensorboard, matplotlib), and a run that uses one of them should
not pay for the others: import from the submodules.  Only the part of rich that draws a random number when it
is first imported is imported here, and the number put back: a training that draws from Python's global
generator, too (to augment data, say), would be another one with the monitor.
"""

import random

_state = random.getstate()
import rich.style  # noqa: E402

random.setstate(_state)
del _state, random, rich
