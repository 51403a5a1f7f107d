"""Numbers and alerts → people: console, JSON lines, TensorBoard, the after-run report and its figure.

Nothing is imported here: each report drags in its own library (rich, tensorboard, matplotlib), and a
run that uses one of them should not pay for the others.  Import from the submodules.
"""
