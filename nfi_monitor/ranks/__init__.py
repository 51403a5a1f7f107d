"""Several processes, one monitor: who trains together, what they exchange, how one of them leaves."""
