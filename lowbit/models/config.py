"""One description for every supported decoder: Llama, Mistral, Qwen2, Qwen3, Gemma 2 and 3, BitNet are settings of it.

`from_hf` reads a Hugging Face `config.json` (either rope spelling: `rope_theta` + `rope_scaling`, or
`rope_parameters`), `to_hf` writes one that `transformers` loads.
"""

import dataclasses
from typing import Any, Literal

from lowbit.errors import InputError, unknown

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "bitnet"]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "bitnet")
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "bitnet": "BitNetForCausalLM",
}


# Hugging Face's names of BitNet's norms, by the linear that they precede.
SUB_NORMS = {"self_attn.o_proj": "self_attn.attn_sub_norm", "mlp.down_proj": "mlp.ffn_sub_norm"}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling: `linear` (divide by factor) or `llama3` (divide low frequencies, blend the middle)."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of a decoder. Sizes are counts; `head_dim` may differ from hidden / heads."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float = 1e-5
    activation: Literal["silu", "gelu_tanh", "gelu", "relu2"] = "silu"
    tied: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float | None = None  # Gemma 3: sliding layers use their own base, unscaled
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norm: bool = False  # Gemma: norms after attention and MLP too
    norm_plus_one: bool = False  # Gemma: the scale is 1 + weight
    embed_scale: float = 1.0
    query_scale: float | None = None  # default head_dim ** -0.5
    attn_softcap: float | None = None
    final_softcap: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()  # per layer; () means none
    input_norm: bool = True  # False: no norm before attention and MLP (bit-llama2 has it inside each linear)
    linear_norm: bool = False  # parameter-free RMS norm on the input of every block linear
    # BitNet's SubLN, RMS norms with a weight: "sub" before o_proj and down_proj, "per_linear" before each block linear
    sub_norm: Literal["none", "sub", "per_linear"] = "none"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def sliding(self) -> tuple[bool, ...]:
        return self.sliding_layers or (False,) * self.num_layers

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """`{site: (out, in)}` of the linears of one block, by their name inside the layer."""
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """`{path: shape}` of every parameter, paths as in `lowbit.tree` (HF names without `.weight`)."""
        d, hd = self.hidden_size, self.head_dim
        out: dict[str, tuple[int, ...]] = {"model.embed_tokens": (self.vocab_size, d)}
        biased = {
            "self_attn.q_proj": self.qkv_bias,
            "self_attn.k_proj": self.qkv_bias,
            "self_attn.v_proj": self.qkv_bias,
            "self_attn.o_proj": self.o_bias,
        } | {f"mlp.{n}_proj": self.mlp_bias for n in ("gate", "up", "down")}
        for i in range(self.num_layers):
            p = f"model.layers.{i}."
            for name, shape in self.linear_shapes().items():
                out[p + name] = shape
                if biased[name]:
                    out[p + name + ".bias"] = (shape[0],)
                if self.sub_norm == "per_linear":
                    out[p + name + "_norm"] = (shape[1],)
                if self.sub_norm == "sub" and name in SUB_NORMS:
                    out[p + SUB_NORMS[name]] = (shape[1],)
                if name == "self_attn.o_proj" and self.qk_norm:
                    out[p + "self_attn.q_norm"] = out[p + "self_attn.k_norm"] = (hd,)
            if self.input_norm:
                out[p + "input_layernorm"] = out[p + "post_attention_layernorm"] = (d,)
            if self.sandwich_norm:
                out[p + "pre_feedforward_layernorm"] = out[p + "post_feedforward_layernorm"] = (d,)
        out["model.norm"] = (d,)
        if not self.tied:
            out["lm_head"] = (self.vocab_size, d)
        return out

    @property
    def num_params(self) -> int:
        """Parameters, a tied embedding counted once."""
        total = 0
        for shape in self.shapes().values():
            n = 1
            for s in shape:
                n *= s
            total += n
        return total


# What `transformers` assumes when config.json is silent, where that is not "absent": hub files leave these out.
_GEMMA_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "gemma2": _GEMMA_DEFAULTS
    | {"max_position_embeddings": 8192, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "gemma3_text": _GEMMA_DEFAULTS
    | {
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "sliding_window_pattern": 6,
        "rope_local_base_freq": 10000.0,
    },
    "bitnet": {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "relu2",
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu2": "relu2"}


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Reads a `config.json`. Raises `InputError` on an architecture or a setting that the decoder does not have."""
    family = hf.get("model_type")
    if family == "gemma3" and "text_config" in hf:  # a multimodal wrapper: its text part is a gemma3_text
        hf = {**hf["text_config"], "model_type": "gemma3_text"}
        family = "gemma3_text"
    if family not in FAMILIES:
        raise unknown("model_type", family, FAMILIES)
    hf = _DEFAULTS[family] | hf

    def number(key: str, kind: type = int, default: Any = None) -> Any:
        value = hf.get(key)
        value = default if value is None else value
        if value is None:
            raise InputError(f"config.json has no {key!r} (needed for model_type {family!r})")
        if isinstance(value, bool) or not isinstance(value, int | float) or value != kind(value) or value <= 0:
            raise InputError(f"config.json: {key} is {value!r} (allowed: a positive {kind.__name__})")
        return kind(value)

    if hf.get("use_bidirectional_attention"):
        raise InputError("config.json: use_bidirectional_attention is true (allowed: false, this decoder is causal)")
    gemma = family in ("gemma2", "gemma3_text")
    hidden, layers, heads = number("hidden_size"), number("num_hidden_layers"), number("num_attention_heads")
    kv, head_dim = number("num_key_value_heads", default=heads), number("head_dim", default=hidden // heads or None)
    if heads % kv or head_dim % 2:
        raise InputError(
            f"config.json: {heads} heads, {kv} key-value heads, head_dim {head_dim} (allowed: a multiple, an even dim)"
        )
    theta, scaling, local_theta = _rope(hf, family)
    window, sliding = _sliding(hf, family, layers)
    act = hf.get("hidden_activation") if gemma else hf.get("hidden_act", "silu")
    if act not in _ACTIVATIONS:
        raise unknown("hidden_act", act, _ACTIVATIONS)
    eos = hf.get("eos_token_id")
    bias = bool(hf.get("attention_bias", False)) and family in ("llama", "qwen3", "gemma2", "gemma3_text", "bitnet")
    ours = hf.get("lowbit", {})
    sub_norm = ours.get("sub_norm", "sub" if family == "bitnet" else "none")
    if sub_norm not in ("none", "sub", "per_linear"):
        raise unknown("sub_norm", sub_norm, ("none", "sub", "per_linear"))
    return ModelConfig(
        family=family,
        vocab_size=number("vocab_size"),
        hidden_size=hidden,
        intermediate_size=number("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head_dim,
        max_position=number("max_position_embeddings"),
        norm_eps=number("rms_norm_eps", float, 1e-6),
        activation=_ACTIVATIONS[act],
        tied=bool(hf.get("tie_word_embeddings", False)),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_local_theta=local_theta,
        qkv_bias=family == "qwen2" or bias,
        o_bias=bias,
        mlp_bias=bool(hf.get("mlp_bias", False)) and family == "llama",
        qk_norm=family in ("qwen3", "gemma3_text"),
        sandwich_norm=gemma,
        norm_plus_one=gemma,
        embed_scale=float(hidden) ** 0.5 if gemma else 1.0,
        query_scale=number("query_pre_attn_scalar", float) ** -0.5 if gemma else None,
        attn_softcap=hf.get("attn_logit_softcapping") if family == "gemma2" else None,
        final_softcap=hf.get("final_logit_softcapping") if gemma else None,
        sliding_window=window,
        sliding_layers=sliding,
        input_norm=bool(ours.get("input_norm", True)),
        linear_norm=bool(ours.get("linear_norm", False)),
        sub_norm=sub_norm,
        bos_token_id=hf.get("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )


def _rope(hf: dict[str, Any], family: str) -> tuple[float, RopeScaling | None, float | None]:
    """`(theta, scaling, theta of sliding layers)`; reads `rope_parameters` and the older flat keys."""
    rope = hf.get("rope_parameters") or {}
    local: float | None = float(hf["rope_local_base_freq"]) if family == "gemma3_text" else None
    if "full_attention" in rope or "sliding_attention" in rope:  # one entry per layer type
        sliding = rope.get("sliding_attention") or {}
        if family != "gemma3_text" or (sliding.get("rope_type") or "default") != "default":
            raise InputError(
                f"config.json: rope_parameters of sliding layers {sliding} (allowed: Gemma 3's default type)"
            )
        local = float(sliding.get("rope_theta") or local)
        rope = rope.get("full_attention") or {}
    default = 1_000_000.0 if family == "gemma3_text" else 10000.0
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or default)
    raw = {**(hf.get("rope_scaling") or {}), **rope}
    kind = raw.get("rope_type") or raw.get("type") or "default"
    partial = raw.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise InputError(f"config.json: partial_rotary_factor is {partial} (allowed: 1.0)")
    if kind == "default":
        return theta, None, local
    if kind not in ("linear", "llama3"):
        raise unknown("rope type", kind, ("default", "linear", "llama3"))
    keys = ("factor",) if kind == "linear" else ("factor", "low_freq_factor", "high_freq_factor")
    for key in keys:
        if not isinstance(raw.get(key), int | float) or raw[key] <= 0:
            raise InputError(
                f"config.json: {key} of rope type {kind!r} is {raw.get(key)!r} (allowed: a positive number)"
            )
    if kind == "linear":
        return theta, RopeScaling("linear", float(raw["factor"])), local
    original = raw.get("original_max_position_embeddings") or hf.get("original_max_position_embeddings") or 8192
    low, high = float(raw["low_freq_factor"]), float(raw["high_freq_factor"])
    return theta, RopeScaling("llama3", float(raw["factor"]), low, high, int(original)), local


def _sliding(hf: dict[str, Any], family: str, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    window = hf.get("sliding_window")
    if window is None or (family in ("qwen2", "qwen3") and not hf.get("use_sliding_window", False)):
        return None, ()
    types = hf.get("layer_types")
    if family in ("llama", "bitnet"):
        flags = ()
    elif family == "mistral":
        flags = (True,) * layers
    elif types is not None:
        if len(types) != layers:
            raise InputError(f"config.json layer_types has {len(types)} entries (num_hidden_layers is {layers})")
        for t in types:
            if t not in ("sliding_attention", "full_attention"):
                raise unknown("layer type", t, ("sliding_attention", "full_attention"))
        flags = tuple(t == "sliding_attention" for t in types)
    elif family == "gemma2":
        flags = tuple(i % 2 == 0 for i in range(layers))
    elif family == "gemma3_text":
        flags = tuple((i + 1) % hf["sliding_window_pattern"] != 0 for i in range(layers))
    else:
        flags = tuple(i >= hf["max_window_layers"] for i in range(layers))
    return (int(window), flags) if any(flags) else (None, ())


def to_hf(c: ModelConfig, dtype: str = "bfloat16", native: bool = False) -> dict[str, Any]:
    """A `config.json` for `transformers`.

    With `native`, one that only lowbit needs to read: it may hold what no transformers class has. Raises `InputError`
    when the file would not describe this decoder, naming the fields.
    """
    gemma = c.family in ("gemma2", "gemma3_text")
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    out: dict[str, Any] = {
        "architectures": [ARCHITECTURES[c.family]],
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_position,
        "rms_norm_eps": c.norm_eps,
        "hidden_activation" if gemma else "hidden_act": names[c.activation],
        "tie_word_embeddings": c.tied,
        "rope_theta": c.rope_theta,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": list(c.eos_token_ids) if len(c.eos_token_ids) > 1 else next(iter(c.eos_token_ids), None),
        "dtype": dtype,
        "torch_dtype": dtype,  # readers older than transformers 5
    }
    if c.rope_scaling is not None:
        s = c.rope_scaling
        out["rope_scaling"] = {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            out["rope_scaling"] |= {
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_max_position,
            }
    if c.family in ("llama", "qwen3", "gemma2", "gemma3_text", "bitnet"):
        out["attention_bias"] = c.o_bias
    if c.family == "llama":
        out["mlp_bias"] = c.mlp_bias
    if c.family not in ("llama", "bitnet"):
        out["sliding_window"] = c.sliding_window
    if c.sliding_window is not None and c.family != "mistral":  # Mistral slides everywhere
        out["layer_types"] = ["sliding_attention" if s else "full_attention" for s in c.sliding]
    if c.family in ("qwen2", "qwen3"):
        out["use_sliding_window"] = c.sliding_window is not None
    if gemma:
        out["query_pre_attn_scalar"] = round((c.query_scale or c.head_dim**-0.5) ** -2)
        out["final_logit_softcapping"] = c.final_softcap
        out["attn_logit_softcapping"] = c.attn_softcap
    if c.family == "gemma3_text":
        out["rope_local_base_freq"] = c.rope_local_theta
    own_norms = c.sub_norm != ("sub" if c.family == "bitnet" else "none")
    if native and (c.linear_norm or not c.input_norm or own_norms):
        out["lowbit"] = {"input_norm": c.input_norm, "linear_norm": c.linear_norm, "sub_norm": c.sub_norm}
    back = from_hf(out)
    same = dataclasses.replace(c, sliding_layers=c.sliding if c.sliding_window else ())
    if gemma and c.query_scale is None:
        same = dataclasses.replace(same, query_scale=c.head_dim**-0.5)
    lost = [f.name for f in dataclasses.fields(c) if getattr(back, f.name) != getattr(same, f.name)]
    if lost:
        raise InputError(f"{ARCHITECTURES[c.family]} cannot have this decoder's {', '.join(lost)} (they would be lost)")
    return out
