"""Turn tensors into numbers: pure functions without hooks, one small file per quantity.

No function here reads a value on the host, unless its docstring says so.  Each returns tensors on the device
of its input, so that all numbers of an optimizer step reach the host in one copy.
"""
