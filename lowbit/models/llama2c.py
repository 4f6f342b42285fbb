"""Reads the checkpoint files of llama2.c: v0 and v1 floats, v2 Q8_0, and the 2-bit ternary files of bit-llama2.

llama2.c rotates neighbouring pairs of each head (interleaved RoPE); ours rotates halves as Hugging Face does, so the
rows of wq and wk are permuted on load and permuted back on save.

bit-llama2 stores BitNet b1.58 models (Ma et al. 2024, arXiv:2402.17764) under the v1 header: the final norm, the tied
float embedding, then per matrix one float32 scale and the codes, four a byte, most significant bits first
(00 = 0, 01 = +1, 11 = -1). There are no norms per layer; each linear normalises its input without parameters,
quantizes it to 8 bits per token, and the stored scale is `in` times that of a weight behind an RMS norm (with it, and
with no other power of `in`, the models reach the loss that they were trained to; for widths that are powers of two, as
theirs, dividing it is exact).
"""

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from lowbit import files
from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats import base as formats
from lowbit.formats.activation import get_act
from lowbit.formats.adapter import Adapter
from lowbit.formats.base import QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models.config import ModelConfig
from lowbit.models.model import Model

MAGIC = 0x616B3432  # "ak42"
HEADER_BYTES = 256  # of versions 1 and 2
EPS = 1e-5
MATRICES = (  # the file's order; each lies there for all layers in turn
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
)
ATTENTION_NORM, FFN_NORM = "input_layernorm", "post_attention_layernorm"


@dataclasses.dataclass(frozen=True)
class _Header:
    config: ModelConfig
    kind: str  # "v0", "v1", "q8" or "bit"
    start: int
    group: int = 0


class _Cursor:
    """Takes arrays off the front of a file, one after the other."""

    def __init__(self, path: Path, offset: int):
        self.data, self.at, self.path = np.memmap(path, np.uint8, "r"), offset, path

    def take(self, dtype: str, *shape: int) -> np.ndarray:
        n = math.prod(shape) * np.dtype(dtype).itemsize
        out = np.frombuffer(self.data[self.at : self.at + n].tobytes(), dtype).reshape(shape)
        self.at += n
        return out


def load_llama2c(path: str | Path, tokenizer: Any = None) -> Model:
    """The model of a llama2.c `.bin` file, with the `tokenizer.bin` or `tok*.bin` that lies beside it.

    Float files give float32 arrays; Q8_0 gives `int8:gN:f32` `QTensor`s, bit-llama2 `ternary:tensor:f32` ones behind
    an 8-bit activation. Raises `InputError` for anything that is not such a file, whole and finite.
    """
    path = Path(path)
    h = _header(path)
    cur = _Cursor(path, h.start)
    c = h.config
    flat = {"v0": _read_v0, "v1": _read_v1, "q8": _read_q8, "bit": _read_bit}[h.kind](cur, h)
    for name, leaf in flat.items():
        if isinstance(leaf, np.ndarray):
            if not np.isfinite(leaf).all():
                raise InputError(f"{path}: {name} holds NaN or infinite weights (allowed: finite numbers)")
            flat[name] = jnp.asarray(leaf)
    order = {name: flat[name] for name in c.shapes()}
    return Model(
        config=c,
        params=trees.build(order),
        tokenizer=tokenizer if tokenizer is not None else _tokenizer_beside(path, c.vocab_size),
        source=str(path),
        meta={"format": f"llama2c-{h.kind}"},
    )


def save_llama2c(model: Model, path: str | Path) -> None:
    """Writes a float32 v0 file, which every llama2.c reader takes. Packed weights are decoded.

    Raises `InputError` when the model has something that the format cannot say.
    """
    c = model.config
    plain = _config(c.hidden_size, c.intermediate_size, c.num_layers, c.num_heads, c.num_kv_heads, c.vocab_size,
                    c.max_position, c.tied)  # fmt: skip
    differs = [
        f.name
        for f in dataclasses.fields(ModelConfig)
        if f.name not in ("bos_token_id", "eos_token_ids") and getattr(c, f.name) != getattr(plain, f.name)
    ]
    if differs:
        raise InputError(f"a llama2.c file cannot hold this model's {', '.join(differs)} (allowed: a plain Llama)")
    layers = range(c.num_layers)

    def get(name: str) -> np.ndarray:
        leaf = trees.get(model.params, name)
        if isinstance(leaf, PreparedInput):
            raise InputError(f"a llama2.c file cannot hold the activation format of {name} (allowed: weights only)")
        if isinstance(leaf, Adapter):
            raise InputError(f"a llama2.c file cannot hold the adapter of {name} (allowed: a merged model)")
        leaf = leaf.decode() if isinstance(leaf, QTensor) else getattr(leaf, "value", lambda: leaf)()
        return _interleave(np.asarray(leaf, "<f4"), name, c)

    vocab = c.vocab_size if c.tied else -c.vocab_size
    dims = (c.hidden_size, c.intermediate_size, c.num_layers, c.num_heads, c.num_kv_heads, vocab, c.max_position)
    names = ["model.embed_tokens", *(_layer(i, ATTENTION_NORM) for i in layers)]
    names += [_layer(i, m) for m in MATRICES[:4] for i in layers]
    names += [_layer(i, FFN_NORM) for i in layers]
    names += [_layer(i, m) for m in MATRICES[4:] for i in layers]
    with files.atomic_path(path) as tmp, open(tmp, "wb") as f:
        f.write(struct.pack("<7i", *dims))
        for name in [*names, "model.norm"]:
            f.write(get(name).tobytes())
        angle = np.arange(c.max_position)[:, None] * 10000.0 ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
        f.write(np.cos(angle).astype("<f4").tobytes() + np.sin(angle).astype("<f4").tobytes())
        if not c.tied:
            f.write(get("lm_head").tobytes())


# -- headers ----------------------------------------------------------------------------------------------------------


def _config(dim: int, hidden: int, layers: int, heads: int, kv: int, vocab: int, seq: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=dim // heads,
        max_position=seq,
        norm_eps=EPS,
        tied=tied,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def _header(path: Path) -> _Header:
    if not path.is_file():
        raise InputError(f"no llama2.c file {path} (allowed: an existing .bin file)")
    size = path.stat().st_size
    with open(path, "rb") as f:
        head = f.read(HEADER_BYTES)
    if len(head) < 28:
        raise InputError(f"{path} is no llama2.c file: {size} bytes (a header alone has 28)")
    group = 0
    if struct.unpack_from("<I", head)[0] == MAGIC:
        if len(head) < HEADER_BYTES:
            raise InputError(f"{path} is truncated: {size} bytes (its header alone has {HEADER_BYTES})")
        version, *dims, shared, group = struct.unpack_from("<i7iBi", head, 4)
        if version not in (1, 2):
            raise InputError(f"{path}: llama2.c version {version} (allowed: 0, 1, 2)")
        kinds, tied, start = (("v1", "bit") if version == 1 else ("q8",)), bool(shared), HEADER_BYTES
    else:
        dims = list(struct.unpack_from("<7i", head))
        kinds, tied, start = ("v0",), dims[5] > 0, 28
        dims[5] = abs(dims[5])
    dim, _, _, heads, kv, _, _ = dims
    if min(dims) <= 0 or max(dims) > 2**24 or dim % heads or (dim // heads) % 2 or heads % kv:
        raise InputError(
            f"{path} is no llama2.c file: its header reads {dims} (dim, ffn, layers, heads, kv, vocab, seq)"
        )
    if "q8" in kinds and (group <= 0 or any(i * o % group for o, i in _shapes(_config(*dims, tied)))):
        raise InputError(f"{path}: Q8_0 group size {group} (allowed: a divisor of every matrix's size)")
    config = _config(*dims, tied)
    expected = {k: start + _payload(config, k, group) for k in kinds}
    for kind, n in expected.items():
        if n == size:
            if kind == "bit":
                # Activations get as small as 1e-5, which a usual epsilon would swallow.
                config = dataclasses.replace(config, input_norm=False, linear_norm=True, norm_eps=1e-20)
            return _Header(config, kind, start, group)
    wanted = " or ".join(f"{n} as {k}" for k, n in expected.items())
    raise InputError(f"{path} is truncated or damaged: {size} bytes (its header needs {wanted})")


def _shapes(c: ModelConfig) -> list[tuple[int, int]]:
    """Every matrix of the model: the embedding, the blocks' linears and an untied head."""
    return [s for s in c.shapes().values() if len(s) == 2]


def _payload(c: ModelConfig, kind: str, group: int) -> int:
    """Bytes after the header."""
    weights = c.num_params
    if kind == "v0":
        return 4 * (weights + c.max_position * c.head_dim)  # cos and sin tables
    if kind == "v1":
        return 4 * weights
    matrices = sum(o * i for o, i in _shapes(c))
    if kind == "q8":
        return 4 * (weights - matrices) + matrices + 4 * (matrices // group)
    linears = list(c.linear_shapes().values()) * c.num_layers
    return 4 * (c.hidden_size + c.vocab_size * c.hidden_size) + sum(4 + o * i // 4 for o, i in linears)


# -- bodies -----------------------------------------------------------------------------------------------------------


def _layer(i: int, name: str) -> str:
    return f"model.layers.{i}.{name}"


def _heads(name: str, c: ModelConfig) -> int:
    """Heads whose rows the RoPE convention permutes; 0 for a matrix that RoPE does not see."""
    return c.num_heads if name.endswith("q_proj") else c.num_kv_heads if name.endswith("k_proj") else 0


def _halves(x: np.ndarray, name: str, c: ModelConfig) -> np.ndarray:
    """Interleaved rows to half-split rows."""
    heads = _heads(name, c)
    return rearrange(x, "(h d two) ... -> (h two d) ...", h=heads, two=2) if heads else x


def _interleave(x: np.ndarray, name: str, c: ModelConfig) -> np.ndarray:
    """The inverse of `_halves`."""
    heads = _heads(name, c)
    return rearrange(x, "(h two d) ... -> (h d two) ...", h=heads, two=2) if heads else x


def _norms(cur: _Cursor, c: ModelConfig, name: str) -> dict[str, Any]:
    return {_layer(i, name): cur.take("<f4", c.hidden_size) for i in range(c.num_layers)}


def _floats(cur: _Cursor, c: ModelConfig, names: tuple[str, ...]) -> dict[str, Any]:
    shapes = c.linear_shapes()
    return {_layer(i, m): _halves(cur.take("<f4", *shapes[m]), m, c) for m in names for i in range(c.num_layers)}


def _read_v0(cur: _Cursor, h: _Header) -> dict[str, Any]:
    c = h.config
    flat: dict[str, Any] = {"model.embed_tokens": cur.take("<f4", c.vocab_size, c.hidden_size)}
    flat |= _norms(cur, c, ATTENTION_NORM) | _floats(cur, c, MATRICES[:4])
    flat |= _norms(cur, c, FFN_NORM) | _floats(cur, c, MATRICES[4:])
    flat["model.norm"] = cur.take("<f4", c.hidden_size)
    cur.take("<f4", c.max_position, c.head_dim)  # cos and sin tables: computed anew
    if not c.tied:
        flat["lm_head"] = cur.take("<f4", c.vocab_size, c.hidden_size)
    return flat


def _read_v1(cur: _Cursor, h: _Header) -> dict[str, Any]:
    c = h.config
    flat = _norms(cur, c, ATTENTION_NORM) | _norms(cur, c, FFN_NORM)
    flat["model.norm"] = cur.take("<f4", c.hidden_size)
    flat["model.embed_tokens"] = cur.take("<f4", c.vocab_size, c.hidden_size)
    flat |= _floats(cur, c, MATRICES)
    if not c.tied:
        flat["lm_head"] = cur.take("<f4", c.vocab_size, c.hidden_size)
    return flat


def _read_q8(cur: _Cursor, h: _Header) -> dict[str, Any]:
    c = h.config
    flat = _norms(cur, c, ATTENTION_NORM) | _norms(cur, c, FFN_NORM)
    flat["model.norm"] = cur.take("<f4", c.hidden_size)

    def take(name: str, shape: tuple[int, int]) -> QTensor:
        out, inner = shape
        codes = cur.take("i1", out, inner).astype(np.int32)
        scales = cur.take("<f4", out * inner // h.group)
        if not np.isfinite(scales).all():
            raise InputError(f"{cur.path}: {name} holds NaN or infinite scales (allowed: finite numbers)")
        # The file groups the flattened matrix, so a group may straddle two rows; their common divisor never does.
        group = math.gcd(h.group, inner)
        scales = repeat(scales, "n -> (n r)", r=h.group // group).reshape(out, inner // group)
        fmt = formats.get(f"int8:g{group}:f32")
        return _pack(fmt, _halves(codes, name, c), _halves(scales, name, c))

    flat["model.embed_tokens"] = take("embed_tokens", (c.vocab_size, c.hidden_size))
    for m in MATRICES:
        flat |= {_layer(i, m): take(m, c.linear_shapes()[m]) for i in range(c.num_layers)}
    if not c.tied:
        flat["lm_head"] = take("lm_head", (c.vocab_size, c.hidden_size))
    return flat


def _read_bit(cur: _Cursor, h: _Header) -> dict[str, Any]:
    c = h.config
    flat: dict[str, Any] = {"model.norm": cur.take("<f4", c.hidden_size)}
    flat["model.embed_tokens"] = cur.take("<f4", c.vocab_size, c.hidden_size)
    fmt, act = formats.get("ternary:tensor:f32"), get_act("int8:token:bitnet")
    values = np.array([0, 1, 9, -1], np.int32)
    for m in MATRICES:
        out, inner = c.linear_shapes()[m]
        for i in range(c.num_layers):
            scale = cur.take("<f4", 1, 1) / np.float32(inner)
            packed = cur.take("u1", out * inner // 4)
            fields = np.stack([packed >> 6, packed >> 4, packed >> 2, packed], axis=-1) & 3
            codes = values[fields].reshape(out, inner)
            if codes.max() > 1 or not np.isfinite(scale).all():
                raise InputError(f"{cur.path}: {_layer(i, m)} is no ternary matrix (allowed: codes 00, 01, 11)")
            flat[_layer(i, m)] = PreparedInput(_pack(fmt, _halves(codes, m, c), scale), act)
    return flat


def _pack(fmt: Any, codes_OI: np.ndarray, scale_OG: np.ndarray) -> QTensor:
    """A `QTensor` of given codes and scales: nothing is quantized again."""
    arrays = fmt.pack(jnp.asarray(codes_OI), {"scale": jnp.asarray(scale_OG)})
    return QTensor(arrays, fmt, (codes_OI.shape[0], codes_OI.shape[1]), "float32")


def _tokenizer_beside(path: Path, vocab_size: int) -> Any:
    """The first `tokenizer.bin` or `tok*.bin` in the same folder with at least the model's vocabulary, or None."""
    from lowbit.data.tokenizer import Tokenizer

    for candidate in [path.parent / "tokenizer.bin", *sorted(path.parent.glob("tok*.bin"))]:
        if candidate.is_file() and candidate != path:
            tokenizer = Tokenizer.from_llama2c(candidate)
            if tokenizer.vocab_size == vocab_size:
                return tokenizer
    return None
