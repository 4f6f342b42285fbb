"""Formats whose codes are vectors, and what goes around them; importing this registers them."""

from lowbit.vq import additive, incoherent, vector  # noqa: F401
