"""Read tensors on the host in C: one pass over memory in place of many torch operations."""
