"""lowbit: quantization-aware training and extreme low-bit language models in JAX."""

from lowbit import xla

__version__ = "0.1.0"

xla.configure()  # before jax starts: without it XLA:CPU miscompiles int8 reductions
