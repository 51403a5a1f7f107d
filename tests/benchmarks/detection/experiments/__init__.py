"""Train a recorded run again, without a monitor, and continue it in another way.

A score (``score.py``) says that an alarm came before a slingshot.  It cannot say whether the alarm came early
enough for the cure, nor whether the named cause was the cause.  ``proofs`` builds on this.

plan.py    a recorded run → which snapshots, and what is tried from each (numbers only)
trials.py  the plan → what happened
"""
