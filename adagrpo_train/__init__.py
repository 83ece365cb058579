"""AdaGRPO-Train: RL alignment of flow-matching text-to-image models. Every name has one import path."""

__version__ = "0.1.0"
