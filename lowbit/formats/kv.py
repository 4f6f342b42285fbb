"""Cache formats: how keys and values of past tokens are kept (`...self_attn.k_cache` and `v_cache` in a plan).

Names are `NAME[:SPAN][:key...]`, keys in any order:

| part | choices |
|---|---|
| NAME | `int2` .. `int8`; `fp8` (e4m3fn) |
| SPAN, what shares a scale | `token` (default): a head of one token; `channel`: one channel of a block of tokens |
| `gG` | of `token`: G channels (default: the head's); of `channel`: G tokens (default 32) |
| `asym` | a whole-number zero point, stored as a code |
| `rR` | the range is cut to R of itself (0.1 to 1), as QuaRot's `k_clip_ratio` |
| `wN` | the last N tokens are seen exactly (default 0) |

Scales are stored in fp16, and rounded to it before codes are chosen (beyond its range they saturate, as those of
weights do in a traced program). Of one block (one token, or G of them): `codes` uint8 (a dense bit stream), `scale`
float16, and with `asym` `zero` uint8 (a dense bit stream).

**The rule**, the same in one shot, prefill and decoding: the query at position t sees token s quantized iff the block
of s had ended at least N tokens ago, `(s // G + 1) * G <= t + 1 - N` (G = 1 for `token`); else exactly.
"""

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from lowbit.errors import unknown
from lowbit.formats import packing
from lowbit.formats.activation import Grid, make_grid, parse_keys, shown
from lowbit.formats.base import FormatError
from lowbit.formats.floats import SMALLEST_SCALE, round_to

CHANNEL_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class KVFormat:
    """One cache format; see the module. `tokens` is the length of a block, `group` the channels that share a scale
    (None: those of a head; without meaning where a block has several tokens)."""

    grid: Grid
    channel: bool = False
    tokens: int = 1
    group: int | None = None
    window: int = 0

    @property
    def name(self) -> str:
        size = self.tokens if self.channel else self.group
        keys = ["fp8" if self.grid.fp8 else f"int{self.grid.width}", "channel" if self.channel else "token"]
        keys += [f"g{size}"] * (size is not None) + ["asym"] * self.grid.asym
        keys += [f"r{shown(self.grid.ratio)}"] * (self.grid.ratio != 1.0) + [f"w{self.window}"] * (self.window > 0)
        return ":".join(keys)

    def bits(self, head_dim: int) -> float:
        """Stored bits of one quantized value, scale and zero point included; the exact tokens come on top."""
        shared = self.tokens if self.channel else self.group or head_dim
        return self.grid.width + (16 + self.grid.width * self.grid.asym) / shared

    @property
    def ring(self) -> int:
        """How many of the last tokens have to be kept exactly: 0, or the window and a block."""
        return 0 if self.tokens == 1 and self.window == 0 else self.window + self.tokens

    def check(self, head_dim: int) -> None:
        """Raises `FormatError` unless heads of this size have whole groups."""
        if self.group is not None and head_dim % self.group:
            raise FormatError(
                f"cache format {self.name}: heads of {head_dim} values (allowed: multiples of {self.group})"
            )

    def seen(self, position_BT: Int[Array, "#B T"], size: int) -> Bool[Array, "#B T {size}"]:
        """The rule: which of the tokens 0 .. size - 1 the queries at these positions see quantized."""
        end_S = (jnp.arange(size) // self.tokens + 1) * self.tokens
        return end_S <= position_BT[:, :, None] + 1 - self.window

    def encode(self, x: Float[Array, "*N t K D"]) -> dict[str, Array]:
        """The stored arrays of blocks of `tokens` tokens, K heads, D values: leading axes as `x`, then one of bytes or
        groups."""
        self.check(x.shape[-1])
        codes, scale, zero = self._quantize(x)
        flat = lambda a: a.reshape(*a.shape[:-2], -1)  # noqa: E731
        if self.grid.fp8:
            stored = jax.lax.bitcast_convert_type(codes.astype(jnp.float8_e4m3fn), jnp.uint8)
            return {"codes": flat(stored), "scale": flat(scale).astype(jnp.float16)}
        low, width = int(self.grid.levels[0]), self.grid.width
        out = {"codes": packing.pack(flat(codes - low), width), "scale": flat(scale).astype(jnp.float16)}
        return out | ({"zero": packing.pack(flat(zero).astype(jnp.int32), width)} if self.grid.asym else {})

    def decode(self, arrays: Mapping[str, Array], heads: int, head_dim: int) -> Float[Array, "*N t K D"]:
        """The values of stored blocks, float32."""
        n = self.tokens * heads * head_dim
        per = self.tokens if self.channel else self.group or head_dim
        rows = lambda a, size: a.reshape(*a.shape[:-1], -1, size)  # noqa: E731
        scale, zero = rows(arrays["scale"].astype(jnp.float32), 1), 0.0
        if self.grid.fp8:
            codes = jax.lax.bitcast_convert_type(arrays["codes"], jnp.float8_e4m3fn)
        else:
            codes = packing.unpack(arrays["codes"], self.grid.width, n) + int(self.grid.levels[0])
        if self.grid.asym:
            zero = rows(packing.unpack(arrays["zero"], self.grid.width, n // per), 1).astype(jnp.float32)
        return self._dequantize(rows(codes, per), scale, zero, heads, head_dim)

    def fake_quant(self, x_BTKD: Float[Array, "B T K D"]) -> Float[Array, "B T K D"]:
        """Tokens 0 .. T - 1 as their codes say, in float32 and back in `x`'s dtype: bit for bit what `decode` gives of
        `encode`. A last block that is not whole is not meant to be seen. The gradient is straight-through."""
        self.check(x_BTKD.shape[-1])
        return _fake_quant(self, x_BTKD)

    def _quantize(self, x: Array) -> tuple[Array, Array, Any]:
        """Codes `[..., rows, values]` (int32, or float32 values of e4m3fn), scales and zero points `[..., rows, 1]`."""
        x = x.astype(jnp.float32)
        if self.channel:
            x = rearrange(x, "... t K D -> ... (K D) t")
        else:
            x = rearrange(x, "... t K (G g) -> ... (t K G) g", g=self.group or x.shape[-1])
        low, high = self.grid.range(x)
        scale = jnp.maximum(round_to(self.grid.scale(low, high), "fp16"), SMALLEST_SCALE["fp16"])
        zero = self.grid.zero(low, scale)
        codes = self.grid.round(x / scale, zero)
        return (codes if self.grid.fp8 else codes.astype(jnp.int32)), scale, zero

    def _dequantize(self, codes: Array, scale: Array, zero: Any, heads: int, head_dim: int) -> Array:
        x = self.grid.dequantize(codes.astype(jnp.float32), scale, zero)
        if self.channel:
            return rearrange(x, "... (K D) t -> ... t K D", K=heads)
        g = self.group or head_dim
        return rearrange(x, "... (t K G) g -> ... t K (G g)", t=self.tokens, K=heads, G=head_dim // g)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fake_quant(fmt: KVFormat, x_BTKD: Array) -> Array:
    B, T, K, D = x_BTKD.shape
    blocks = -(-T // fmt.tokens)
    x = jnp.pad(x_BTKD, ((0, 0), (0, blocks * fmt.tokens - T), (0, 0), (0, 0)))
    y = fmt._dequantize(*fmt._quantize(x.reshape(B, blocks, fmt.tokens, K, D)), K, D)
    return y.reshape(B, -1, K, D)[:, :T].astype(x_BTKD.dtype)


_fake_quant.defvjp(lambda fmt, x: (_fake_quant(fmt, x), None), lambda fmt, _, g: (g,))


# The names that `lowbit formats` lists.
KV_FORMATS = (
    "int8:token",
    "int4:token:g64:asym",
    "int4:token:asym:r0.95",
    "int3:token:asym",
    "int2:token:asym:w128",
    "int2:channel:g32:asym:w128",
    "fp8:token",
)
_KEYS = r"(?P<group>g[1-9]\d*)|(?P<asym>asym)|(?P<ratio>r\d+(?:\.\d+)?)|(?P<window>w\d+)"


def get_kv(name: str) -> KVFormat:
    """The cache format of a name (see the module). Raises `FormatError`."""
    kind, text = "cache format", str(name).strip().lower()
    m = re.fullmatch(r"(int[2-8]|fp8)(?::(token|channel))?((?::[^:]+)*)", text)
    if m is None:
        raise FormatError(str(unknown(kind, name, KV_FORMATS)))
    keys = parse_keys(kind, str(name), m[3].split(":")[1:], _KEYS, KV_FORMATS)
    grid, channel, window = make_grid(kind, text, m[1], keys), m[2] == "channel", int(keys.get("window", "w0")[1:])
    size = int(keys["group"][1:]) if "group" in keys else None
    tokens = (size or CHANNEL_TOKENS) if channel else 1
    if window % tokens:
        raise FormatError(f"{kind} {text!r}: window of {window} tokens (allowed: multiples of the group, {tokens})")
    return KVFormat(grid, channel, tokens, None if channel else size, window)
