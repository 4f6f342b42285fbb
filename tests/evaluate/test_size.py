"""Sizes are counted on the packed arrays, by hand here."""

import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.errors import InputError
from lowbit.evaluate.size import file_bytes, layer_table, sizes
from lowbit.formats.base import Latent, QTensor, get
from tests.evaluate import tiny


def weight(rows: int, columns: int):
    return jnp.asarray(np.random.default_rng(0).standard_normal((rows, columns)), jnp.float32)


def test_bits_of_a_mixed_tree():
    fmt = get("int4:g32")
    packed = fmt.encode(weight(16, 64))
    tree = {"model": {"embed": weight(10, 64).astype(jnp.bfloat16), "q": packed, "norm": jnp.ones(64)}}
    out = sizes(tree)
    nbytes = 10 * 64 * 2 + 16 * 64 // 2 + 16 * 2 * 2 + 64 * 4  # 4-bit codes and one fp16 scale per 32
    assert out["params"] == 640 + 1024 + 64
    assert out["stored_bytes"] == nbytes
    assert out["bits_per_weight"] == pytest.approx(8 * nbytes / 1728)
    assert out["bits_per_weight_quantized"] == pytest.approx(4.5)
    rows = {r["path"]: r for r in layer_table(tree)}
    assert rows["model.q"] == {
        "path": "model.q",
        "format": fmt.name,
        "shape": (16, 64),
        "bits": 4.5,
        "bytes": 576,
    }
    assert rows["model.embed"]["format"] == "bfloat16" and rows["model.embed"]["bits"] == 16


def test_a_latent_weight_counts_as_its_codes():
    fmt, w = get("int4:g32"), weight(16, 64)
    latent = Latent(w, fmt.init(w), fmt)
    assert sizes({"q": latent}) == sizes({"q": latent.encode()})
    assert layer_table({"q": Latent(w, {}, fmt)}) == layer_table({"q": fmt.encode(w)})


def test_shared_arrays_count_once():
    w = weight(4, 64)
    assert sizes({"a": w, "b": w})["params"] == 256
    q = get("int4:g32").encode(w)
    codebook = jnp.zeros((256, 8), jnp.float32)
    one, two = (QTensor(dict(q.arrays, book=codebook), q.format, q.shape) for _ in range(2))
    fresh = get("int4:g32").encode(w + 1)
    two = QTensor(dict(fresh.arrays, book=codebook), q.format, q.shape)
    out = sizes({"a": one, "b": two})
    assert out["params"] == 512 and out["stored_bytes"] == 2 * q.nbytes + 256 * 8 * 4


def test_a_whole_model_has_the_parameters_of_its_configuration():
    model = tiny.model()
    out = sizes(model.params, tiny.CONFIG)
    assert out["bits_per_weight"] == 32 and out["bits_per_weight_quantized"] is None
    short = dict(model.params, model={k: v for k, v in model.params["model"].items() if k != "norm"})
    with pytest.raises(InputError, match="as its configuration says"):
        sizes(short, tiny.CONFIG)
    with pytest.raises(InputError, match="0 parameters"):
        sizes({})


def test_file_bytes(tmp_path):
    assert file_bytes("") is None and file_bytes("some/hub-name") is None and file_bytes(tmp_path) is None
    (tmp_path / "model-1.safetensors").write_bytes(b"x" * 10)
    (tmp_path / "model-2.safetensors").write_bytes(b"x" * 5)
    (tmp_path / "config.json").write_bytes(b"{}")
    assert file_bytes(tmp_path) == 15 and file_bytes(tmp_path / "config.json") == 2
