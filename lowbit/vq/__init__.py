"""Formats whose codes are vectors, and what goes around them; importing this registers them."""

<<<<<<< HEAD
from lowbit.vq import additive, e8, incoherent, trellis, vector  # noqa: F401
=======
from lowbit.vq import additive, incoherent, vector  # noqa: F401
>>>>>>> vq-codebooks
