"""How GGUF names things: architectures, metadata keys, tensor names and row orders, both ways.

Metadata keys and conventions are those of llama.cpp's loader (`src/models/*.cpp`): the llama architecture rotates
neighbouring pairs, so rows of Q and K are interleaved; Gemma stores its norms as `1 + weight`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import rearrange

from lowbit.errors import InputError, unknown
from lowbit.models.config import ModelConfig, RopeScaling
from lowbit.models.decoder import rope_frequencies

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text"}
SWA_PERIOD = {"gemma2": 2, "gemma3": 6}  # every n-th layer attends fully
ROPE_FREQS = "rope_freqs.weight"

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def tensor_names(c: ModelConfig) -> dict[str, str]:
    """`{path: GGUF name}` of every parameter, in file order."""
    layer = _LAYER | _SANDWICH if c.sandwich_norm else _LAYER
    out = {}
    for path in c.shapes():
        stem, kind = (path[: -len(".bias")], ".bias") if path.endswith(".bias") else (path, ".weight")
        if stem in _TOP:
            out[path] = _TOP[stem] + kind
        else:
            _, _, i, name = stem.split(".", 3)
            out[path] = f"blk.{i}.{layer[name]}{kind}"
    return out


def _permuted_heads(path: str, c: ModelConfig) -> int:
    """Heads of a tensor whose rows the file interleaves, else 0."""
    if ARCHITECTURES[c.family] != "llama":
        return 0
    stem = path.removesuffix(".bias")
    return c.num_heads if stem.endswith("q_proj") else c.num_kv_heads if stem.endswith("k_proj") else 0


def to_file_rows(x: np.ndarray, path: str, c: ModelConfig) -> np.ndarray:
    """Rows (weights, codes, scales or packed bytes alike) in the file's order: half-split heads become interleaved."""
    heads = _permuted_heads(path, c)
    return rearrange(x, "(h p r) ... -> (h r p) ...", h=heads, p=2) if heads else x


def from_file_rows(x: np.ndarray, path: str, c: ModelConfig) -> np.ndarray:
    """Inverse of `to_file_rows`."""
    heads = _permuted_heads(path, c)
    return rearrange(x, "(h r p) ... -> (h p r) ...", h=heads, p=2) if heads else x


def check(c: ModelConfig) -> None:
    """Raises `InputError` for a model that no GGUF architecture of llama.cpp computes in the same way."""
    arch = ARCHITECTURES.get(c.family)
    if arch is None:
        raise unknown("family for GGUF", c.family, ARCHITECTURES)

    def need(ok: bool, what: str, value: object, allowed: object) -> None:
        if not ok:
            raise InputError(f"{what} {value}: GGUF architecture {arch!r} has none such (allowed: {allowed})")

    gemma = arch.startswith("gemma")
    need(not c.linear_norm, "linear_norm", c.linear_norm, False)
    need(c.sub_norm == "none", "sub_norm", c.sub_norm, "none")
    need(c.input_norm, "input_norm", c.input_norm, True)
    need(c.activation == ("gelu_tanh" if gemma else "silu"), "activation", c.activation, "silu, Gemma gelu_tanh")
    need(c.sandwich_norm == c.norm_plus_one == gemma, "norms of", c.family, "plain, Gemma sandwiched")
    need(c.qk_norm == (arch in ("qwen3", "gemma3")), "qk_norm", c.qk_norm, "qwen3 and gemma3 only")
    need(not c.o_bias or arch == "llama", "o_bias", c.o_bias, False)
    need(not c.mlp_bias or arch == "llama", "mlp_bias", c.mlp_bias, False)
    scaling = c.rope_scaling
    need(scaling is None or scaling.kind == "linear" or arch == "llama", "rope scaling", scaling, "linear or none")
    need(arch != "qwen2" or c.num_heads * c.head_dim == c.hidden_size, "head_dim", c.head_dim, "hidden / heads")
    need(arch != "gemma2" or c.tied, "tied", c.tied, True)
    need(arch != "gemma2" or None not in (c.attn_softcap, c.final_softcap), "softcaps", c.attn_softcap, "numbers")
    need(arch == "gemma2" or c.attn_softcap is None, "attn_softcap", c.attn_softcap, None)
    need(gemma or c.final_softcap is None, "final_softcap", c.final_softcap, None)
    embed, query = (c.hidden_size**0.5 if gemma else 1.0), _query_scale(arch, c)
    need(abs(c.embed_scale - embed) < 1e-6 * embed, "embed_scale", c.embed_scale, embed)
    scale = c.query_scale if c.query_scale is not None else c.head_dim**-0.5
    need(abs(scale - query) < 1e-6 * query, "query_scale", scale, query)


def _query_scale(arch: str, c: ModelConfig) -> float:
    """llama.cpp tells Gemma's 27B models, which divide by hidden / heads, by their number of layers."""
    if (arch, c.num_layers) in (("gemma2", 46), ("gemma3", 62)):
        return (c.hidden_size // c.num_heads) ** -0.5
    return c.head_dim**-0.5


def context_length(c: ModelConfig) -> int:
    """Positions over which llama.cpp computes the same function: it has sliding windows for Gemma only."""
    if c.sliding_window is not None and not c.family.startswith("gemma"):
        return min(c.max_position, c.sliding_window)
    return c.max_position


def metadata(c: ModelConfig) -> dict[str, Any]:
    """Keys of the architecture: int is written as uint32, float as float32, a list as an array."""
    arch = ARCHITECTURES[c.family]
    out: dict[str, Any] = {
        "context_length": context_length(c),
        "embedding_length": c.hidden_size,
        "block_count": c.num_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.norm_eps),
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": float(c.rope_theta),
        "vocab_size": c.vocab_size,
    }
    if c.rope_scaling is not None and c.rope_scaling.kind == "linear":
        out |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(c.rope_scaling.factor)}
    if arch in SWA_PERIOD:
        out |= _sliding(arch, c)
    if arch == "gemma2":
        out["attn_logit_softcapping"] = float(c.attn_softcap or 0.0)
    if c.final_softcap is not None:
        out["final_logit_softcapping"] = float(c.final_softcap)
    if c.rope_local_theta is not None:
        out["rope.freq_base_swa"] = float(c.rope_local_theta)
    return {f"{arch}.{k}": v for k, v in out.items()}


def _sliding(arch: str, c: ModelConfig) -> dict[str, Any]:
    if c.sliding_window is None:  # gemma2 always has one in llama.cpp: as long as the context it changes nothing
        return {"attention.sliding_window": c.max_position} if arch == "gemma2" else {}
    out: dict[str, Any] = {"attention.sliding_window": c.sliding_window}
    if c.sliding != _default_sliding(arch, c.num_layers):
        out["attention.sliding_window_pattern"] = list(c.sliding)
    return out


def _default_sliding(arch: str, layers: int, period: int | None = None) -> tuple[bool, ...]:
    n = period or SWA_PERIOD[arch]
    return tuple((i + 1) % n != 0 for i in range(layers))


def rope_factors(c: ModelConfig) -> np.ndarray | None:
    """Llama 3's divisors of the inverse frequencies, float32 `[head_dim / 2]`: the tensor `rope_freqs.weight`."""
    if c.rope_scaling is None or c.rope_scaling.kind != "llama3":
        return None
    plain = rope_frequencies(c.head_dim, c.rope_theta)
    return (plain / rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)).astype(np.float32)


# -- reading ----------------------------------------------------------------------------------------------------------


def read_config(kv: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], factors: Any = None) -> ModelConfig:
    """The configuration that metadata and `{tensor: shape}` describe. Raises `InputError` naming what is missing."""
    arch = kv.get("general.architecture")
    if arch not in FAMILIES:
        raise unknown("GGUF architecture", arch, FAMILIES)

    def get(key: str, default: Any = None) -> Any:
        value = kv.get(f"{arch}.{key}", default)
        return _shortest(value) if isinstance(value, float) else value

    def need(key: str) -> Any:
        value = get(key)
        if value is None:
            raise InputError(f"GGUF file has no {arch}.{key} (needed for architecture {arch!r})")
        return value

    hidden, heads, layers = need("embedding_length"), need("attention.head_count"), need("block_count")
    head_dim = get("attention.key_length") or hidden // heads
    gemma = arch.startswith("gemma")
    window, sliding = get("attention.sliding_window") if gemma else None, ()
    if window:
        pattern = get("attention.sliding_window_pattern")
        if isinstance(pattern, list):
            sliding = tuple(map(bool, pattern))
        else:
            sliding = _default_sliding(arch, layers, pattern)
    if "token_embd.weight" not in tensors:
        raise InputError("GGUF file has no tensor token_embd.weight (needed in every model)")
    scaling = _read_scaling(get, factors, head_dim, get("rope.freq_base", 10000.0))
    local = None
    if arch == "gemma3":
        local = get("rope.freq_base_swa", 10000.0)
    config = ModelConfig(
        family=FAMILIES[arch],  # type: ignore[arg-type]
        vocab_size=tensors["token_embd.weight"][0],
        hidden_size=hidden,
        intermediate_size=need("feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv") or heads,
        head_dim=head_dim,
        max_position=need("context_length"),
        norm_eps=need("attention.layer_norm_rms_epsilon"),
        activation="gelu_tanh" if gemma else "silu",
        tied="output.weight" not in tensors,
        rope_theta=get("rope.freq_base", 10000.0),
        rope_scaling=scaling,
        rope_local_theta=local,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        qk_norm=arch in ("qwen3", "gemma3"),
        sandwich_norm=gemma,
        norm_plus_one=gemma,
        embed_scale=float(hidden) ** 0.5 if gemma else 1.0,
        attn_softcap=get("attn_logit_softcapping", 50.0) if arch == "gemma2" else None,
        final_softcap=get("final_logit_softcapping", 30.0 if arch == "gemma2" else None) if gemma else None,
        sliding_window=window or None,
        sliding_layers=sliding,
        bos_token_id=kv.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=(kv["tokenizer.ggml.eos_token_id"],) if "tokenizer.ggml.eos_token_id" in kv else (),
    )
    if _query_scale(arch, config) != head_dim**-0.5:
        import dataclasses

        config = dataclasses.replace(config, query_scale=_query_scale(arch, config))
    return config


def _shortest(x: float) -> float:
    """The shortest decimal that is this float32: 1e-05 rather than 9.99999974e-06."""
    return float(str(np.float32(x)))


def _read_scaling(get: Any, factors: np.ndarray | None, head_dim: int, theta: float) -> RopeScaling | None:
    if get("rope.scaling.type") == "linear" and get("rope.scaling.factor", 1.0) != 1.0:
        return RopeScaling("linear", get("rope.scaling.factor"))
    if factors is None:
        return None
    return llama3_of(factors, head_dim, theta, get)


def llama3_of(factors: np.ndarray, head_dim: int, theta: float, get: Any) -> RopeScaling:
    """The Llama-3 scaling whose factors these are. The file holds only factors; released models all use the low and
    high frequency factors 1 and 4 and an original context of 8192, others are searched over powers of two."""
    factor = _shortest(float(factors.max()))
    plain = rope_frequencies(head_dim, theta)
    contexts = [8192, *(2**k for k in range(5, 21) if k != 13)]
    for original in contexts:
        for low, high in ((1.0, 4.0), (1.0, 2.0), (1.0, 8.0), (2.0, 4.0)):
            s = RopeScaling("llama3", factor, low, high, original)
            if np.allclose(plain / rope_frequencies(head_dim, theta, s), factors, rtol=1e-6):
                return s
    raise InputError(
        f"{ROPE_FREQS} with a largest factor of {factor} fits no Llama-3 scaling (allowed: low, high factors 1 and 4)"
    )
