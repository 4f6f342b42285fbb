"""Logits of every family equal transformers' on random weights, in both directions (needs torch and transformers)."""

import json

import jax
import numpy as np
import pytest

from lowbit.models.decoder import init_params
from lowbit.models.hf import load_hf, save_hf

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

TOLERANCE = 1e-4  # float32, largest absolute difference of logits
LENGTH = 40  # several sliding windows
BASE = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
LAYERS7 = dict(num_hidden_layers=7, head_dim=32, sliding_window=8)
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
CASES = {  # name: (transformers class prefix, settings)
    "llama2": ("Llama", dict(num_key_value_heads=4)),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3)),
    "llama-linear-rope": ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4))),
    "llama-biases": ("Llama", dict(attention_bias=True, mlp_bias=True, head_dim=32)),
    "smollm": ("Llama", dict(tie_word_embeddings=True, num_key_value_heads=1)),
    "mistral": ("Mistral", dict(sliding_window=8, head_dim=32)),
    "mistral-full": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2-sliding": ("Qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=32)),
    "qwen3-biases": ("Qwen3", dict(head_dim=16, attention_bias=True, tie_word_embeddings=True)),
    "gemma2": (
        "Gemma2",
        dict(head_dim=32, sliding_window=8, query_pre_attn_scalar=24)
        | dict(attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    ),
    "gemma3": ("Gemma3Text", dict(**LAYERS7, query_pre_attn_scalar=24, rope_parameters=GEMMA3_ROPE)),
    "bitnet": ("BitNet", dict(hidden_act="relu2", rope_theta=500000.0, pad_token_id=0)),
    "gemma3-softcap": ("Gemma3Text", dict(**LAYERS7, query_pre_attn_scalar=24, final_logit_softcapping=3.0)),
}
CLASSES = {"Gemma3Text": "Gemma3ForCausalLM"}


def build(name: str):
    """A transformers model of the case with weights large enough that every part of it matters."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    prefix, settings = CASES[name]
    config = getattr(transformers, f"{prefix}Config")(**BASE | settings)
    config._attn_implementation = "eager"  # the only one with soft caps
    torch.manual_seed(0)
    model = getattr(transformers, CLASSES.get(prefix, f"{prefix}ForCausalLM"))(config).float().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * (1.0 if "embed" in key or "lm_head" in key else 2.0) * p.shape[1] ** -0.5)
    return model


def theirs(model, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, BASE["vocab_size"], (2, LENGTH))


@pytest.mark.parametrize("name", CASES)
def test_we_load_theirs(name, tmp_path, record_property):
    model = build(name)
    model.save_pretrained(tmp_path)
    ours = load_hf(tmp_path)
    x = tokens()
    want, got = theirs(model, x), np.asarray(ours.logits(x))
    diff = float(np.abs(got - want).max())
    record_property("max_abs_diff", diff)
    print(f"{name}: max abs diff {diff:.2e}, logits std {want.std():.2f}")
    assert want.std() > 0.3  # else a small difference says little
    assert diff <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_they_load_ours(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = build(name)
    model.save_pretrained(tmp_path / "theirs")
    config = load_hf(tmp_path / "theirs").config
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda a: a + 0.2 * jax.random.normal(jax.random.key(a.size), a.shape), params)
    ours = load_hf(tmp_path / "theirs").replace(params=params, source="")
    save_hf(ours, tmp_path / "ours", dtype="float32", max_shard_bytes=60_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1

    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    x = tokens()
    assert np.abs(theirs(back.eval(), x) - np.asarray(ours.logits(x))).max() <= TOLERANCE


def test_the_tolerance_would_notice_a_window_off_by_one(tmp_path):
    model = build("mistral")
    model.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"sliding_window": 9}))
    x = tokens()
    assert np.abs(np.asarray(load_hf(tmp_path).logits(x)) - theirs(model, x)).max() > 100 * TOLERANCE


def test_the_text_part_of_a_multimodal_gemma3(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    text = build("gemma3")
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    config = transformers.Gemma3Config(
        text_config=text.config.to_dict(), vision_config=vision | {"patch_size": 14}, mm_tokens_per_image=4
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.save_pretrained(tmp_path)
    x = tokens()
    assert np.abs(np.asarray(load_hf(tmp_path).logits(x)) - theirs(text, x)).max() <= TOLERANCE
