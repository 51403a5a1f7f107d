"""What measures rather than asserts: commands, run by hand, whose numbers the documentation quotes."""
