"""What folds leaves as a plain model for any runtime; what stays online leaves packed, refused by name elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.export.api import export
from lowbit.export.gguf import write_gguf
from lowbit.export.open import open_model
from lowbit.linalg.hadamard import randomized
from lowbit.models.hf import load_hf, save_hf
from lowbit.models.model import Model
from lowbit.plan import Plan
from lowbit.ptq import rtn
from lowbit.rotations import base
from lowbit.rotations.fold import State, apply
from tests.export.small_models import byte_model
from tests.models.tiny import tiny
from tests.shared import ROOT, shared_path

MERGED = ("llama-tied-bias", "llama3-rope", "mistral", "qwen2", "qwen3")
quiet = pytest.mark.filterwarnings("ignore")


def merged(model: Model) -> Model:
    """Every part that folds: norms, R1, and R2 of each layer, as SpinQuant's `r1+r2` makes them."""
    c = model.config
    keys = jax.random.split(jax.random.key(0), c.num_layers + 1)
    heads = {i: randomized(c.head_dim, k) for i, k in enumerate(keys[1:])}
    return apply(model, State("spinquant:r1+r2", True, randomized(c.hidden_size, keys[0]), heads))


def ids(model: Model, n: int = 48) -> np.ndarray:
    return np.random.default_rng(1).integers(0, min(model.config.vocab_size, 258), n)


def kl(theirs: np.ndarray, ours: np.ndarray) -> float:
    p, q = (jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in (theirs, ours))
    return float((jnp.exp(p) * (p - q)).sum(-1).mean())


@quiet
@pytest.mark.transformers
@pytest.mark.parametrize("name", MERGED)
def test_transformers_gives_the_original_logits(name: str, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = byte_model(name)
    save_hf(merged(model), tmp_path / "m", dtype="float32")
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    x, want = ids(model)[None], np.asarray(model.logits(ids(model)[None]))
    with torch.no_grad():
        got = back.eval()(torch.from_numpy(x)).logits.float().numpy()
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("name", ["quarot", "quarot:r1"])
@pytest.mark.parametrize("source", ["lowbit-base", "stories260K"])
def test_pretrained_models_stay_the_same(source: str, name: str):
    """KL to the original at most 1e-6 nats per token."""
    path = (
        ROOT / "lowbit/assets/lowbit-base"
        if source == "lowbit-base"
        else shared_path("data/models/stories260K/stories260K.bin")
    )
    model = open_model(path)
    assert abs(kl(model.logits(ids(model)), base.transform(model, name).logits(ids(model)))) <= 1e-6


@quiet
@pytest.mark.llamacpp
@pytest.mark.parametrize("name", [*MERGED, "lowbit-base", "stories260K"])
def test_llamacpp_gives_the_original_logits(name: str, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    if name == "stories260K":
        model = open_model(shared_path("data/models/stories260K/stories260K.bin"))
    else:
        model = load_hf(ROOT / "lowbit/assets/lowbit-base") if name == "lowbit-base" else byte_model(name)
    x = ids(model)

    def run(path) -> np.ndarray:
        lm = llama_cpp.Llama(str(path), logits_all=True, n_ctx=256, n_threads=2, verbose=False)
        lm.eval(x.tolist())
        return np.array(lm.scores[: len(x)])

    rotated = merged(model)
    write_gguf(rotated, tmp_path / "m.gguf", "F32")
    assert kl(run(tmp_path / "m.gguf"), np.asarray(model.logits(x))) <= 1e-4
    if name == "lowbit-base":  # and the codes of a rotated model, as everywhere
        plan = Plan.uniform("q4_0").resolve(rotated.config.shapes())
        packed = rotated.replace(params=rtn.quantize(rotated.params, plan))
        write_gguf(packed, tmp_path / "q.gguf", "Q4_0")
        assert kl(run(tmp_path / "q.gguf"), np.asarray(packed.logits(x))) <= 2e-3


@pytest.mark.parametrize(
    "name, op", [("quarot:heads", "o_proj.*hadamard:4:across"), ("quarot:r4", "down_.*hadamard:48")]
)
def test_online_transforms_are_refused_by_name_and_kept_packed(name: str, op: str, tmp_path):
    model = base.transform(tiny(), name)
    for to in ("hf", "gguf"):
        for drop in (False, True):
            with pytest.raises(InputError, match=f"layers.0.*{op}.*allowed: packed"):
                export(model, to, tmp_path / "out", drop_activations=drop)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=f"{op}.*only a packed folder holds"):
        save_hf(model, tmp_path / "plain", dtype=None)
    export(model, "packed", tmp_path / "packed")
    again = load_hf(tmp_path / "packed")
    assert jax.tree.structure(again.params) == jax.tree.structure(model.params)
    tokens = np.arange(20) % 61
    assert (np.asarray(again.logits(tokens)) == np.asarray(model.logits(tokens))).all()


def test_rotated_and_quantized_models_survive_a_packed_folder(tmp_path):
    model = base.transform(tiny("qwen2"), "quarot")
    plan = Plan.uniform("int4:g16").resolve(model.config.shapes())
    packed = model.replace(params=rtn.quantize(model.params, plan))
    save_hf(packed, tmp_path / "m", packed=True, dtype=None)
    again = load_hf(tmp_path / "m")
    tokens = np.arange(20) % 61
    assert (np.asarray(again.logits(tokens)) == np.asarray(packed.logits(tokens))).all()
    flat = dict(trees.items(again.params))
    assert flat["model.layers.1.mlp.down_proj"].op.name == "hadamard:48"
    assert flat["model.layers.1.mlp.down_proj"].w.format.name == "int4:g16"
