"""Straight-through quantization-aware training.

The forward pass sees `w_hat = decode(encode(w))`, the gradient goes to the float32 latent `w` (Bengio et al. 2013,
arXiv 1308.3432; the clip policy is the format's). Recipe `ste` recomputes scales from the latent at every step, as
BitNet and most fake-quant trainers do; recipe `ste-learned` starts from the same scales and learns them.
"""

from lowbit.qat.base import register_start
from lowbit.qat.latents import dynamic, learned

register_start("ste", dynamic)
register_start("ste-learned", learned, {"scale_lr": 0.1})
