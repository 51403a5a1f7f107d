"""The rules: each owns its switch, its levels, its evidence, the mechanism it speaks for, advice and words."""
