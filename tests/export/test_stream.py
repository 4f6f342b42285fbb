"""`stream_gguf`: what does not fit by its shape is refused before any weight is loaded."""

import pytest

from lowbit.errors import InputError
from lowbit.export.stream import stream_gguf
from lowbit.models import hf
from lowbit.plan import Plan
from tests.export.small_models import model


@pytest.mark.parametrize("format, type, block", [("int8", "auto", "Q8_0's block of 32"), ("q8_0", "TQ2_0", "of 256")])
@pytest.mark.parametrize("packed", [False, True], ids=["plan", "packed"])
def test_rows_of_no_whole_blocks(format, type, block, packed, tmp_path, monkeypatch):
    src = tmp_path / "m"
    m = model(num_layers=2, intermediate_size=344 if format == "int8" else 320)
    hf.save_hf(m, src)
    if packed:
        from lowbit.ptq.rtn import quantize_dir

        quantize_dir(src, Plan.uniform(format), tmp_path / "packed")
        src = tmp_path / "packed"

    def load(_):
        pytest.fail("a weight was loaded")
        yield

    monkeypatch.setattr(hf, "iter_tensors", load)
    plan = None if packed else Plan.uniform(format)
    with pytest.raises(
        InputError, match=rf"layers.0.mlp.down_proj .*layers.1.mlp.down_proj .*no multiple of .*{block}"
    ):
        stream_gguf(src, tmp_path / "m.gguf", type, plan=plan)
    assert not list(tmp_path.glob("*.gguf"))
