"""The held-out half: families that were trained after the commit that fixed all rules and constants."""
