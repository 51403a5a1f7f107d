"""What a warning is worth and whether the cause was named right, found out by training again.

A score (``score.py``) says that an alarm came before a slingshot.  It cannot say whether the alarm came early
enough for the cure, nor whether the named cause was the cause.  Here each recorded run is trained once more,
without a monitor, snapshots are taken where the alarms were, and the run goes on from them in another way.

plan.py    recorded run → which snapshots, and what is tried from each (numbers only)
trials.py  the plan → what happened
cadence.py the same training under ``Monitor(every="auto")``, scored beside every-step reading
results.py a cache of one file a job, and ``CACHE/experiments.json``, which the report shows
"""
