"""Fine-tuning around fixed codes: block by block against the float model, then end to end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CONFIG, params, rows

from lowbit import qat
from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.base import Coded, QTensor
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
