"""TensorBoard's NFI tab, installed as a dynamic plugin: ``tensorboard --logdir RUNS`` finds it by itself."""
