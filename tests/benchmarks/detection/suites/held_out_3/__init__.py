"""The third held-out half: families of kinds that no other half has, after rules had changed."""
