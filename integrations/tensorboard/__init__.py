"""Provide TensorBoard's NFI tab, a dynamic plugin that ``tensorboard --logdir RUNS`` finds by itself."""
