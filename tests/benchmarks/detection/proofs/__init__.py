"""Whether the monitor names the right cause and advises what helps, proved by training again.

The runs are watched as a user watches them: ``Monitor(model, optimizer)`` with its defaults.  Snapshots are
taken where an alert is heard, and the run is continued from them in other ways.

kicks.py     what comes from outside: a bad batch, a corrupt gradient, a jump of the learning rate
subjects.py  which runs are tried
hear.py      one run under the default monitor, with snapshots
actions.py   the first line of an alert's advice as something that is done to a training
trial.py     one run → its slingshots, replays, averted alarms and float64 twins
kept.py      the cache: one JSON file for each run, and one for each continuation
page.py      PROOFS.md, from the kept results
"""
