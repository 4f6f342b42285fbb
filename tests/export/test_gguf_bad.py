"""Damaged and foreign GGUF files: one line that names the file and what is wrong."""

import struct

import numpy as np
import pytest

from lowbit.errors import InputError
from lowbit.export.gguf import write_gguf
from lowbit.export.gguf_read import read_gguf
from tests.export.small_models import byte_model, model, packed


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "m.gguf"
    write_gguf(packed(byte_model(num_layers=1), "q4_0"), path, "Q4_0")
    return path.read_bytes()


def check(tmp_path, data: bytes, message: str):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as e:
        read_gguf(path)
    assert "\n" not in str(e.value) and "bad.gguf" in str(e.value)


@pytest.mark.parametrize("keep", [0, 3, 8, 30, 200, 3000, -1, -5000])
def test_truncated(good, tmp_path, keep):
    check(tmp_path, good[:keep], "truncated or corrupt")


def test_every_truncation_of_the_head_is_an_input_error(good, tmp_path):
    """No length leads to another exception."""
    path = tmp_path / "bad.gguf"
    for keep in range(0, 9000, 97):
        path.write_bytes(good[:keep])
        with pytest.raises(InputError):
            read_gguf(path)


def test_flipped_bytes_in_the_head_never_crash(good, tmp_path):
    """A flipped byte is refused or gives a model, but no other exception."""
    path, rng, refused = tmp_path / "bad.gguf", np.random.default_rng(0), 0
    for at in [*rng.integers(0, 1200, 40), *rng.integers(len(good) - 300_000, len(good) - 299_000, 4)]:
        data = bytearray(good)
        data[at] ^= 0xA5
        path.write_bytes(data)
        try:
            read_gguf(path)
        except InputError:
            refused += 1
    assert refused > 10


CASES = [
    (b"GGUF", b"GGML", "is no GGUF file: it begins with b'GGML'"),
    (b"GGUF\x03", b"GGUF\x01", "GGUF version 1"),
    (b"general.architecture", b"general.architecturx", "unknown GGUF architecture None"),
    (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lamma", "unknown GGUF architecture 'lamma'; did you mean 'llama'"),
    (b"llama.block_count", b"llama.block_cound", "has no llama.block_count"),
    (b"llama.attention.head_count\x04", b"llama.attention.head_cound\x04", "has no llama.attention.head_count"),
    (b"blk.0.ffn_up.weight", b"blk.0.ffn_op.weight", "tensors missing .'blk.0.ffn_up.weight'., unknown .'blk.0.ffn_op"),
    (b"token_embd.weight", b"token_embx.weight", "no tensor token_embd.weight"),
    (b"tokenizer.ggml.merges", b"tokenizer.ggml.merged", "has no tokenizer.ggml.merges"),
    (b"\x05\0\0\0\0\0\0\0gpt-2", b"\x05\0\0\0\0\0\0\0gpt-3", "unknown GGUF pre-tokenizer 'gpt-3'"),
    (b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0bert", "unknown GGUF tokenizer model 'bert'"),
    (b"llama.embedding_length\x04\0\0\0\0\x01", b"llama.embedding_length\x04\0\0\0\0\x02", r"has shape .* \(allowed: "),
]


@pytest.mark.parametrize("old, new, message", CASES, ids=[c[2][:30] for c in CASES])
def test_foreign(good, tmp_path, old, new, message):
    assert old in good and len(old) == len(new)
    check(tmp_path, good.replace(old, new, 1), message)


def test_unknown_tensor_type(good, tmp_path):
    name = b"blk.0.ffn_up.weight"
    at = good.index(name) + len(name) + 4 + 16
    assert struct.unpack_from("<I", good, at)[0] == 2
    check(tmp_path, good[:at] + struct.pack("<I", 20) + good[at + 4 :], "ffn_up.weight has GGML type 20")


def test_nan_weights_and_scales(tmp_path):
    path = tmp_path / "bad.gguf"
    write_gguf(packed(model(num_layers=1), "q8_0"), path, "Q8_0")
    data = bytearray(path.read_bytes())
    data[-4:] = struct.pack("<f", float("nan"))  # the last tensor is the float head
    check(tmp_path, bytes(data), "holds NaN or infinite")


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no GGUF file"):
        read_gguf(tmp_path / "none.gguf")
