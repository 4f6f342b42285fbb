"""Formats whose codes are vectors, and what goes around them; importing this registers them."""

from lowbit.vq import e8  # noqa: F401
