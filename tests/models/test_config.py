import dataclasses

import numpy as np
import pytest

from lowbit.errors import InputError
from lowbit.models.config import ModelConfig, RopeScaling, from_hf, to_hf
from lowbit.models.decoder import rope_frequencies
from tests.models.tiny import CONFIGS, LLAMA


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "bit"])
def test_round_trip(name):
    assert from_hf(to_hf(CONFIGS[name])) == CONFIGS[name]


def test_native_keeps_what_transformers_has_not():
    for sub_norm in ("sub", "per_linear"):
        config = dataclasses.replace(LLAMA, sub_norm=sub_norm)
        assert from_hf(to_hf(config, native=True)) == config
    assert from_hf(to_hf(CONFIGS["bit"], native=True)) == CONFIGS["bit"]
    config = CONFIGS["bit"]
    with pytest.raises(InputError, match="LlamaForCausalLM cannot have this decoder's input_norm, linear_norm"):
        to_hf(config)


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"qk_norm": True}, "qk_norm"),
        ({"qkv_bias": True}, "qkv_bias"),
        ({"sliding_window": 8, "sliding_layers": (True,) * 3}, "sliding_window"),
        ({"sub_norm": "sub"}, "sub_norm"),
        ({"family": "bitnet"}, "sub_norm"),
        ({"embed_scale": 2.0}, "embed_scale"),
        ({"family": "mistral", "sliding_window": 8, "sliding_layers": (True, False, True)}, "sliding_layers"),
    ],
)
def test_nothing_is_lost_silently(changes, field):
    with pytest.raises(InputError, match=f"cannot have this decoder's .*{field}"):
        to_hf(dataclasses.replace(LLAMA, **changes))


def hub(**changes):
    base = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4, vocab_size=100)
    return from_hf(base | changes)


def test_what_config_files_of_the_hub_leave_out():
    assert hub(model_type="mistral", num_attention_heads=8).sliding_window == 4096
    assert hub(model_type="mistral", num_attention_heads=8, sliding_window=None).sliding_window is None
    assert hub(model_type="mistral", num_attention_heads=8).num_kv_heads == 8
    assert hub(model_type="qwen3").head_dim == 128
    qwen2 = hub(model_type="qwen2", sliding_window=4096, max_window_layers=3)
    assert qwen2.qkv_bias and not qwen2.o_bias and qwen2.sliding_window is None
    gemma2 = hub(model_type="gemma2")
    assert gemma2.tied and (gemma2.attn_softcap, gemma2.final_softcap) == (50.0, 30.0)
    assert gemma2.activation == "gelu_tanh" and gemma2.sliding == (True, False) * 3
    text = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=7, sliding_window=16)
    text["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    wrapped = from_hf({"model_type": "gemma3", "text_config": text})
    assert wrapped.sliding == (True,) * 5 + (False, True) and wrapped.vocab_size == 262208
    assert (wrapped.rope_theta, wrapped.rope_local_theta) == (1e6, 1e4)
    assert wrapped.rope_scaling == RopeScaling("linear", 8.0)


def test_both_rope_spellings():
    scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    scaling["original_max_position_embeddings"] = 8192
    old = hub(model_type="llama", rope_theta=5e5, rope_scaling=scaling)
    new = hub(model_type="llama", rope_parameters=scaling | {"rope_theta": 5e5})
    oldest = hub(model_type="llama", rope_scaling={"type": "linear", "factor": 2.0})
    assert old == new and old.rope_scaling == RopeScaling("llama3", 8.0)
    assert oldest.rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"model_type": "gemma2", "layer_types": ["chunked"] * 6}, "unknown layer type 'chunked'"),
        ({"model_type": "llama", "num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"model_type": "llama", "head_dim": 7}, "head_dim 7"),
        ({"model_type": "llama", "rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(InputError, match=message):
        hub(**changes)


def test_llama3_frequencies_at_the_three_regimes():
    plain = rope_frequencies(128, 5e5)
    scaled = rope_frequencies(128, 5e5, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192))
    wavelength = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelength < 2048], plain[wavelength < 2048])
    np.testing.assert_array_equal(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)
    middle = (wavelength > 2048) & (wavelength < 8192)
    assert middle.any() and (scaled[middle] < plain[middle]).all() and (scaled[middle] > plain[middle] / 8).all()


def test_sizes():
    smollm = ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, 2048, tied=True)
    assert smollm.num_params == 134_515_008  # SmolLM-135M's published count
