"""Define the declaration of a quantity: all facts that the package needs about it.

The command line and TensorBoard read the declarations without torch.  So functions are named by a path
``"module:function"`` and imported where they are called.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import Literal

LAST = 1_000
"""Default for ``Quantity.place``."""


class Undefined(Enum):
    """Reason why a reading may be NaN."""

    INPUT = "an input of the quantity is NaN, Inf, or too large to be squared"
    NO_ROWS = "no row of the step counts, or none of those that were sampled"
    NO_DIRECTION = "a vector whose direction or growth is measured is zero, or too small to be squared"
    STILL = "no parameter moved, or the movement is too small to be squared"


class Merge(Enum):
    """Way in which the numbers of micro-batches and ranks become one number."""

    ROW_SUMS = "sums over rows are added over micro-batches and ranks, then divided"
    ROW_EXTREME = "the most extreme row of all micro-batches and ranks is used"
    MEAN_FEATURES = "features are added over micro-batches and ranks; computed from their mean"
    RANK_MEAN = "measured once per step on each rank; mean over the ranks that measured it"
    FIRST_RANK = "measured once per step on each rank; the value of the first rank that has one"
    LARGEST_RANK = "measured once per step on each rank; the largest value"
    LOSS = "mean over micro-batches, then over ranks"
    DERIVED = "computed on the host from quantities that are merged already"


@dataclass(frozen=True)
class PerRow:
    """A function of each row, summed over rows and divided by their number.

    ``function``: path ``"module:function"`` of a function that takes a
    :class:`nfi_monitor.measure.views.RowView` and returns one number per row, [N].  ``over``: the mean is
    over rows with a gradient ("live") or over these and the underflowed ones ("counted").  ``from_shards``:
    the function reads only the view's numbers per row, not its ``grad`` and ``logits``.  Without it, the
    quantity is absent where the classes of a row are on several ranks.
    """

    function: str
    over: Literal["live", "counted"]
    from_shards: bool = False


@dataclass(frozen=True)
class Quantity:
    """One measured quantity.

    What it is: ``name`` in readings; ``unit``; ``label``, the name that people read; ``meaning``, formula or
    definition; ``source``; ``within``, smallest and largest value of a reading; ``nan``, when a reading may
    be NaN instead (empty: never, because rows that are not finite are counted and left out).

    How it is measured: ``merge``; ``per_row`` or ``per_step`` where a function of its own measures it.
    ``per_step`` is the path ``"module:function"`` of a function that takes a
    :class:`nfi_monitor.measure.views.StepView` and returns a scalar tensor, or None where it cannot be
    measured.  Quantities without either are computed together with others in ``measure/``.

    How it is held: ``reference`` names the test (``"file::function"``) that compares it with an independent
    computation; ``no_reference`` gives the reason where there is none.  Exactly one of the two is given.

    Where it is shown: ``chart``, title of its chart in TensorBoard's NFI tab, and ``curve``, its short name
    there; ``extreme``, "max" or "min" for its line in the after-run report (None: no line); ``live``, a
    column of the live panel, where its label is ``short``; ``tail``, a column of ``nfi-monitor tail``.
    ``place``: order wherever people read it, smallest first.  Quantities without one come last, in the order
    of the catalogue.
    """

    name: str
    unit: str
    label: str
    meaning: str
    source: str = ""
    within: tuple[float, float] = (-inf, inf)
    nan: tuple[Undefined, ...] = ()
    merge: Merge = Merge.RANK_MEAN
    per_row: PerRow | None = None
    per_step: str = ""
    reference: str = ""
    no_reference: str = ""
    chart: str = ""
    curve: str = ""
    extreme: Literal["max", "min"] | None = None
    live: bool = False
    short: str = ""
    tail: bool = False
    place: int = LAST


LIU = "Liu et al. 2026 (arXiv 2605.06152)"
ADAM = "Kingma & Ba 2015"
SHARE = (0.0, 1.0)
COSINE = (-1.0, 1.0)
POSITIVE = (0.0, inf)
INPUT = (Undefined.INPUT,)
MEAN_ROW = (Undefined.INPUT, Undefined.NO_ROWS)
