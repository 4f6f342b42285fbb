"""transformers loads our exports: dequantized folders, and GGUF files of the types it knows (needs torch)."""

import numpy as np
import pytest

from lowbit.export.gguf import write_gguf
from lowbit.export.hf import export_hf
from lowbit.export.layouts import export_layout
from lowbit.models.hf import load_hf
from tests.export.coded import coded_model
from tests.export.small_models import byte_model, packed

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
TOLERANCE = 1e-4  # float32, largest absolute difference of logits


def theirs(model, tokens: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.float().numpy()


def tokens() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 258, (2, 40))


FORMATS = [("llama", "q4_0"), ("llama", "int2:g64"), ("qwen2", "ternary:tensor"), ("qwen3", "int4:g64:asym"),
           ("gemma2", "tq2_0"), ("gemma3", "int3:g64"), ("llama", "rht:e8p2"), ("llama", "trellis2:latin:l10"),
           ("llama", "aqlm:2x4:g4")]  # fmt: skip


@pytest.mark.parametrize("name, format", FORMATS)
def test_dequantized_folder(name, format, tmp_path):
    transformers = pytest.importorskip("transformers")
    m = packed(byte_model(name), format)
    export_hf(m, tmp_path / "m")
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    x = tokens()
    diff = np.abs(theirs(back, x) - np.asarray(m.logits(x))).max()
    print(f"{name} {format}: max abs diff {diff:.2e}")
    assert diff <= TOLERANCE


def test_aqlm_folder(tmp_path):
    """transformers and AQLM's own library read `--to aqlm`; with codebooks of 2^8 AQLM takes a kernel on the CPU whose
    threads race for their sums, so this has 2^10."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("aqlm")
    export_layout(coded_model("aqlm:1x10:g4", {"o_proj": ""}), tmp_path / "m", "aqlm")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="float32")
    assert sum(type(part).__name__ == "QuantizedLinear" for part in back.modules()) == 6
    x = tokens()
    diff = np.abs(theirs(back, x) - np.asarray(load_hf(tmp_path / "m").logits(x))).max()
    print(f"aqlm: max abs diff {diff:.2e}")
    assert diff <= TOLERANCE


TYPES = "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 TQ1_0 TQ2_0 Q2_K Q3_K Q4_K Q5_K Q6_K MXFP4".split()
OTHERS = [(n, t) for n in ("qwen2", "qwen3", "gemma2", "gemma3") for t in ("F32", "Q4_0")]


@pytest.mark.parametrize("name, type", [*(("llama", t) for t in TYPES), *OTHERS])
def test_gguf(name, type, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # transformers reads GGUF files only with it
    from lowbit.export.gguf_read import read_gguf

    # transformers gives every Gemma in a GGUF file query_pre_attn_scalar 256; llama.cpp takes the head size.
    m = byte_model(name, **(dict(head_dim=256) if name.startswith("gemma") else {}))
    if type not in ("F32", "F16", "BF16"):
        m = packed(m, type.lower())
    write_gguf(m, tmp_path / "m.gguf", type)
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", attn_implementation="eager", dtype="float32"
    )
    x = tokens()
    diff = np.abs(theirs(back, x) - np.asarray(read_gguf(tmp_path / "m.gguf").logits(x))).max()
    print(f"{name} {type}: max abs diff {diff:.2e}")
    assert diff <= TOLERANCE
