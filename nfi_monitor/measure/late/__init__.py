"""Measure on an accelerator in few kernels: it adds up there, and the host does the rest when the sums come.

A kernel takes longer to launch than to run on tensors of this size.  So the device makes only what needs
whole rows or all coordinates, and one copy brings it to the host.
"""
