"""AQLM's and VPTQ's folders, read back by readers written from the layouts alone."""

import json

import numpy as np
import pytest
from lowbit.export.aqlm import export_aqlm
from lowbit.export.vptq import export_vptq
from safetensors.numpy import load_file

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.base import QTensor
from lowbit.plan import Plan, Rule
from lowbit.ptq import rtn
from tests.export.small_models import byte_model


def packed(*formats: str):
    model = byte_model(num_layers=1)
    rules = tuple(Rule(r".*\.(q|o)_proj", f) for f in formats[1:])
    return model.replace(params=rtn.quantize(model.params, Plan(rules, formats[0]).resolve(model.config.shapes())))


def folder_of(path):
    return load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())


def check(model, tensors, read):
    """Every packed weight decodes to the same values, everything else is there in fp16."""
    known = 0
    for path, leaf in trees.items(model.params):
        if isinstance(leaf, QTensor):
            np.testing.assert_array_equal(read(path, leaf.shape), np.asarray(leaf.decode()), err_msg=path)
            known += 1
        else:
            name = path if path.endswith(".bias") else f"{path}.weight"
            np.testing.assert_array_equal(tensors[name], np.asarray(leaf, np.float32).astype(np.float16))
    assert known == 7


@pytest.mark.parametrize("name", ["aqlm:2x4:g4", pytest.param("aqlm:1x9:g4", marks=pytest.mark.slow)])
def test_aqlm(name, tmp_path):
    model = packed(name)
    export_aqlm(model, tmp_path / "out")
    tensors, config = folder_of(tmp_path / "out")
    c = config["quantization_config"]
    M, B, G = c["num_codebooks"], c["nbits_per_codebook"], c["in_group_size"]
    assert c["quant_method"] == "aqlm" and f"aqlm:{M}x{B}:g{G}" == name and c["out_group_size"] == 1
    assert c["linear_weights_not_to_quantize"] == ["lm_head.weight"]

    def read(path, shape):
        codes, books, scales = (tensors[f"{path}.{k}"] for k in ("codes", "codebooks", "scales"))
        assert codes.dtype == (np.int8 if B <= 8 else np.int16) and codes.shape == (shape[0], shape[1] // G, M)
        assert books.shape == (M, 2**B, 1, G) and scales.shape == (shape[0], 1, 1, 1)
        codes = codes.astype(np.int64) % (256 if B <= 8 else 65536)
        w = sum(books[m, codes[..., m], 0].astype(np.float32) for m in range(M))
        return (w * scales[:, :, 0].astype(np.float32)).reshape(shape)

    check(model, tensors, read)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vptq:v4:k32:r8:s", "vptq:v8:k64"])
def test_vptq(name, tmp_path):
    model = packed(name)
    export_vptq(model, tmp_path / "out")
    tensors, config = folder_of(tmp_path / "out")
    layers = config["quantization_config"]["config_for_layers"]

    def read(path, shape):
        c = layers[path]
        V, K, R = c["vector_lens"][1], c["num_centroids"][1], max(c["num_res_centroids"][1], 1)
        bits, rest = K.bit_length() - 1, R.bit_length() - 1
        words = tensors[f"{path}.indices"]
        assert words.dtype == np.int32 and words.shape == (1, shape[0] // V, -(-shape[1] * (bits + rest) // 32))
        w = np.zeros(shape, np.float32)
        for n, row in enumerate(words[0].view(np.uint32)):
            stream = sum(int(word) << (32 * i) for i, word in enumerate(row))
            for i in range(shape[1]):
                code = stream >> (i * (bits + rest)) & (K * R - 1)
                v = tensors[f"{path}.centroids.weight"].reshape(K, V)[code & (K - 1)].astype(np.float32)
                if R > 1:
                    v = v + tensors[f"{path}.res_centroids.weight"].reshape(R, V)[code >> bits]
                w[n * V : (n + 1) * V, i] = v
        if c["enable_norm"]:
            assert not tensors[f"{path}.weight_bias"].any()
            w = w * tensors[f"{path}.weight_scale"].astype(np.float32)
        return w

    check(model, tensors, read)


@pytest.mark.slow
def test_refusals(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"weights in \['aqlm:1x4:g4', 'aqlm:2x4:g4'\]"):
        export_aqlm(packed("aqlm:2x4:g4", "aqlm:1x4:g4"), out)
    with pytest.raises(InputError, match="no aqlm format"):
        export_aqlm(packed("nuq2"), out)
    with pytest.raises(InputError, match="weight in format 'nuq2'"):
        export_aqlm(packed("aqlm:2x4:g4", "nuq2"), out)
    with pytest.raises(InputError, match="weight in format 'vptq:v4:k4:o2'"):
        export_vptq(packed("vptq:v4:k4:o2"), out)
    with pytest.raises(InputError, match="'vptq:v4:k4:r8': VPTQ's reader loses bits"):
        export_vptq(packed("vptq:v4:k4:r8"), out)
    with pytest.raises(InputError, match="without packed weights"):
        export_vptq(byte_model(num_layers=1), out)
    assert not out.exists()
