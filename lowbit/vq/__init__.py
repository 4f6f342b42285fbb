"""Formats whose codes are vectors; importing it registers them."""

from lowbit.vq import additive, vector  # noqa: F401
