"""lowbit: quantization-aware training and extreme low-bit language models in JAX."""

__version__ = "0.1.0"
