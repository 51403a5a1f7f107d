"""The second held-out half: other families, trained after the rules had changed once more."""
