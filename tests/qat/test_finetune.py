"""Fine-tuning around fixed codes: block by block against the float model, then end to end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CONFIG, params, rows
from shared import shared_path

from lowbit import qat
from lowbit import tree as trees
from lowbit.cli import main
from lowbit.data.tokenizer import ByteTokenizer
from lowbit.errors import InputError
from lowbit.formats.base import Coded, QTensor
from lowbit.models.decoder import init_params
from lowbit.models.hf import save_hf
from lowbit.models.model import Model
from lowbit.plan import Plan
from lowbit.ptq import rtn
from lowbit.train.block_options import BlockOptions
from lowbit.train.config import TrainConfig
from lowbit.train.loop import train
from lowbit.train.objective import language

TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (72, 16))
OPTIONS = BlockOptions(rows=64, valid_rows=8, epochs=3, quant_lr=2e-3)
ASSIGNMENT = Plan.uniform("int2:g16:min").resolve(CONFIG.shapes())


@pytest.fixture(scope="module")
def fp() -> Model:
    return Model(CONFIG, jax.tree.map(jnp.asarray, params()))


def test_a_packed_model_nears_its_teacher_and_keeps_its_codes(fp):
    """Scales, minima and norms learn in the blocks and after them; every code is that of the start."""
    packed = fp.replace(params=rtn.quantize(fp.params, ASSIGNMENT))
    recipe, reports = qat.get("ft"), []
    tuned = recipe.before.run(packed, ASSIGNMENT, TOKENS, OPTIONS, None, lambda r, n: reports.append(r), None, None, fp)
    assert all(r["valid_mse"] < 0.97 * r["start_mse"] for r in reports), reports
    assert reports[0]["weights"] > 0
    settings = TrainConfig(**recipe.defaults | {"steps": 2, "batch_size": 4, "loss": "kl", "lr": 1e-3})
    start = recipe.prepare(tuned, ASSIGNMENT)
    done = train(start, rows(), language(CONFIG, settings, CONFIG), settings, teacher=fp.params)
    old, mid, new = (dict(trees.items(p)) for p in (packed.params, tuned, recipe.convert(done.params)))
    for path in ASSIGNMENT:
        assert isinstance(new[path], QTensor)
        for a, b in ((old, mid), (mid, new)):
            assert np.array_equal(a[path].arrays["codes"], b[path].arrays["codes"])
            assert any(not np.array_equal(a[path].arrays[k], b[path].arrays[k]) for k in ("scale", "min"))
    norm = "model.layers.0.input_layernorm"
    assert not np.array_equal(old[norm], mid[norm]) and not np.array_equal(mid[norm], new[norm])


def test_blocks_alone_pack_and_end_to_end_starts_from_rounding(fp):
    recipe = qat.get("block-ft")
    out = recipe.before.run(fp, ASSIGNMENT, TOKENS, OPTIONS)
    assert recipe.before.alone and all(isinstance(dict(trees.items(out))[p], QTensor) for p in ASSIGNMENT)
    start = dict(trees.items(qat.get("e2e-ft").prepare(fp.params, ASSIGNMENT)))
    assert all(isinstance(start[p], Coded) and set(start[p].params) == {"scale", "min"} for p in ASSIGNMENT)


def test_a_teacher_of_another_shape_is_refused(fp):
    import dataclasses

    other = fp.replace(config=dataclasses.replace(CONFIG, rope_theta=5e5), source="other")
    with pytest.raises(InputError, match="teacher other of another shape"):
        qat.get("ft").before.run(fp, ASSIGNMENT, TOKENS, OPTIONS, teacher=other)


def test_a_teacher_in_another_file_format_has_the_same_tokenizer(tmp_path, capsys):
    """The folder's tokenizer.json says what the teacher's tokenizer.bin says; that of another model does not."""
    file = str(shared_path("data/models/stories260K/stories260K.bin"))
    other = dataclasses.replace(CONFIG, vocab_size=512, max_position=64)
    save_hf(Model(other, init_params(other, jax.random.key(0)), ByteTokenizer()), tmp_path / "other")
    (tmp_path / "text.txt").write_text("Once upon a time, there was a little girl. " * 60)
    packed, out = str(tmp_path / "packed"), str(tmp_path / "out")
    assert main(["quantize", file, "--format", "int2:g4", "--out", packed]) == 0
    args = ["train", packed, "--recipe", "e2e-ft", "--format", "int2:g4", "--text", str(tmp_path / "text.txt")]
    args += ["--steps", "1", "--batch-size", "1", "--seq", "32", "--out", out]
    assert main([*args, "--teacher", str(tmp_path / "other")]) == 2
    assert "other has another tokenizer than" in capsys.readouterr().err
    assert main([*args, "--teacher", file]) == 0
