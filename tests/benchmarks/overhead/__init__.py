"""What the monitor costs beside the training it watches, and beside what others cost.

    python -m tests.benchmarks.overhead                       # the table: OVERHEAD.md beside this file
    python -m tests.benchmarks.overhead --cases mlp-26k --rounds 5 --no-write

Timing two runs one after the other measures the machine's mood: clocks, caches and neighbours drift by more
than the few per cent in question.  So a bare and a watched copy live side by side, from the same seed and fed
the same batches, and short blocks of their steps alternate: bare, watched, bare, watched, …, bare.  A ratio
divides a watched block by the mean of the bare blocks right before and right after it, which cancels a steady
drift; the table shows the median over rounds and the quartiles, of wall time and of CPU time.  The garbage
collector is off while the clock runs.

The arm ``bare, again`` is a second copy without a monitor.  Its ratio should be 1; how far its quartiles
stand from 1 is what the machine can resolve, and no row of the table is known better than that.  Where a
target is finer than that, the monitor's own clock decides: its seconds over the training's, which leaves out
what Python takes to call the hooks.  ``every step`` reads within the monitor's budget of rows, ``every step,
all rows`` without it.
"""
