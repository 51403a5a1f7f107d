"""Report numbers and alerts to people: console, run directory, TensorBoard, after-run report and figure.

Import from the submodules: each needs a library of its own (rich, tensorboard, matplotlib), and a run should
not load those that it does not use.  This file imports one part of rich, ``rich.style``: its first import
draws a random number from Python's global generator.  The state of the generator is restored here, because
the training may draw from it, too (to augment data).
"""

import random

_state = random.getstate()
import rich.style  # noqa: E402

random.setstate(_state)
del _state, random, rich
