"""Formats whose codes are vectors, and what goes around them; importing this registers them."""

from lowbit.vq import additive, e8, incoherent, trellis, vector  # noqa: F401
