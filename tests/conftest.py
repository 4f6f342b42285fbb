"""Settings that must be made before jax is imported."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # results are compared bit for bit; a GPU run asks for itself
