"""The fifth held-out half: mostly minibatches."""
