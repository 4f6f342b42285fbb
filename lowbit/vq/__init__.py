"""Formats whose codes are vectors; importing this registers them."""

from lowbit.vq import trellis  # noqa: F401
