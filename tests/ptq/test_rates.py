"""`lowbit plan`: the budget is kept to the byte, and the model is better than a uniform one of the same size."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from lowbit import tree as trees
from lowbit.cli import main
from lowbit.data.corpus import python_corpus
from lowbit.errors import InputError
from lowbit.evaluate.perplexity import evaluate
from lowbit.export.open import find_folder, open_model
from lowbit.formats import base as formats
from lowbit.models.hf import load_hf, save_hf
from lowbit.plan import Plan, encoded_bytes, total
from lowbit.ptq import rtn
from lowbit.ptq.rates import choose, predicted, sensitivities
from tests.shared import shared_path

FORMATS = ["int2:channel", "int3:channel", "int4:channel"]
VECTORS = ["e8p2", "e8p3", "e8p4"]  # which hold no rows of 172, as those of stories260K's down_proj


@pytest.fixture(scope="module")
def stories():
    return open_model(shared_path("data/models/stories260K/stories260K.bin"))


@pytest.fixture(scope="module")
def texts() -> tuple[str, str]:
    """To measure on, and to judge by."""
    text = shared_path("data/corpora/tinystories/ts_val_decoded.txt").read_text()
    return text[:30000], text[40000:70000]


@pytest.fixture(scope="module")
def home(stories, texts, tmp_path_factory):
    root = tmp_path_factory.mktemp("rates")
    save_hf(stories, root / "m", dtype=None)
    (root / "text.txt").write_text(texts[0])
    return root


def linears(model) -> list[str]:
    return [p for p, s in model.config.shapes().items() if ".layers." in p and len(s) == 2]


def uniform_bytes(model, name: str) -> int:
    return sum(encoded_bytes(formats.get(name), model.config.shapes()[p]) for p in linears(model))


def kl(model, assignment, text: str, convention: str | None = None) -> float:
    other = model.replace(params=rtn.quantize(model.params, assignment))
    return evaluate(other, text, model, convention)["kl_mean"]


@pytest.mark.slow
def test_command(stories, texts, home, monkeypatch, capsys):
    """From the command to a packed folder: never over the budget, all of it used, better than uniform 3 bits."""
    monkeypatch.chdir(home)
    shapes = stories.config.shapes()
    dtypes = {p: str(a.dtype) for p, a in trees.items(stories.params)}
    uniform = Plan.uniform("int3:channel")
    budget = total(uniform.table(shapes, dtypes))[0]
    argv = ["plan", "m", "--text", "text.txt", "--formats", *FORMATS, "e8p2", "--rows", "4", "--length", "128"]
    argv += ["--bytes", str(budget), "--out", "rules.toml", "--json"]
    assert main(argv) == 0, capsys.readouterr().err
    data = json.loads(capsys.readouterr().out)
    assert data["exact"] and data["bound_kl"] == data["predicted_kl"] and set(data["formats"]) <= {*FORMATS, "e8p2"}
    plan = Plan.load("rules.toml")
    table = plan.table(shapes, dtypes)
    smallest = min(int(np.prod(shapes[p])) for p in linears(stories)) // 8 + 2  # a bit a weight
    assert budget - smallest < total(table)[0] <= budget
    assert data["bytes_quantized"] == sum(r.bytes for r in table if not r.kept)
    ours, theirs = (kl(stories, p.resolve(shapes), texts[1]) for p in (plan, uniform))
    assert ours < 0.9 * theirs
    assert main(["quantize", "m", "--rules", "rules.toml", "--out", "q", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stored_bytes"] == total(table)[0]
    assert kl_of(load_hf(home / "q"), stories, texts[1]) == pytest.approx(ours, rel=1e-3)
    assert main(argv) == 2 and "rules.toml exists" in capsys.readouterr().err


def kl_of(model, reference, text: str) -> float:
    return evaluate(model, text, reference)["kl_mean"]


@pytest.fixture(scope="module")
def two_bits(stories, texts):
    bits = (
        8
        * uniform_bytes(stories, "int2:channel")
        / sum(int(np.prod(stories.config.shapes()[p])) for p in linears(stories))
    )
    return bits, choose(stories, FORMATS, [texts[0]], bits=bits, rows=2, length=64)


def test_the_smallest_budget_and_a_large_one(stories, texts, two_bits):
    bits, least = two_bits
    assert set(least.formats.values()) == {"int2:channel"} and least.bits == pytest.approx(bits)
    text = f"budget of {bits - 1e-3:g} bits (allowed: at least {bits:.6g} bits, with the smallest format everywhere)"
    with pytest.raises(InputError, match=re.escape(text)):
        choose(stories, FORMATS, [texts[0]], bits=bits - 1e-3)
    assignment = {p: formats.get(f) for p, f in least.formats.items()}
    assert predicted(least.sensitivity, stories, assignment) == pytest.approx(least.kl)


def test_sensitivities_predict_the_divergence(stories, texts, two_bits):
    """A tensor that the model does not use costs nothing; the same seed gives the same numbers; noise as large as that
    of 4 bits in all tensors costs about what the sum says."""
    _, least = two_bits
    path = linears(stories)[3]
    again = sensitivities(stories, [path], [texts[0]], rows=2, length=64)
    assert again[path] == least.sensitivity[path] > 0
    dead = stories.replace(
        params=trees.map_leaves(lambda p, a: jnp.zeros_like(a) if p.endswith("0.mlp.down_proj") else a, stories.params)
    )
    up = "model.layers.0.mlp.up_proj"
    assert sensitivities(dead, [up], [texts[0]], rows=2, length=64)[up] == pytest.approx(0, abs=1e-4)
    four = {p: formats.get("int4:channel") for p in linears(stories)}
    measured = kl(stories, four, texts[0][:8000], "gptq-64")
    assert 0.4 < measured / predicted(least.sensitivity, stories, four) < 2.5


@pytest.mark.parametrize(
    "names, budget, message",
    [
        (FORMATS, {}, "without --bits or --bytes"),
        (FORMATS, {"bits": 3.0, "nbytes": 1}, "with --bits and --bytes"),
        ([], {"bits": 3.0}, r"rates over 0 formats"),
        (["e8p5"], {"bits": 3.0}, r"unknown format 'e8p5'"),
        (VECTORS, {"bits": 3.0}, r"no format of e8p2, e8p3, e8p4 holds model.layers.0.mlp.down_proj \[64, 172\]"),
        (["q4_k"], {"bits": 3.0}, r"no format of q4_k holds model.layers.0.self_attn.q_proj \[64, 64\]"),
        (FORMATS, {"nbytes": 1000}, r"budget of 1000 bytes \(allowed: at least \d+ bytes, with the smallest"),
    ],
)
def test_bad_requests_are_refused(stories, texts, names, budget, message):
    with pytest.raises(InputError, match=message):
        choose(stories, names, [texts[0]], **budget)


def test_a_quantized_model_is_refused(stories, texts):
    path = linears(stories)[0]
    packed = stories.replace(params=rtn.quantize(stories.params, {path: formats.get("e8p2")}))
    with pytest.raises(InputError, match=rf"{path} is not a float weight"):
        choose(packed, FORMATS, [texts[0]], bits=3.0)


def test_options_are_refused(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    argv = ["plan", "m", "--text", "text.txt", "--formats", "e8p2", "--out", "other.toml"]
    for more, message in (
        ([], "plan with neither --bits nor --bytes (allowed: one of them)"),
        (["--bits", "3", "--bytes", "9"], "plan with both --bits and --bytes"),
        (["--bits", "3", "--rows", "0"], "--rows is 0 (allowed: at least 1)"),
    ):
        assert main([*argv, *more]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_lowbit_base():
    """The bundled model: below the KL of uniform e8p3 at its size, on text that nothing was chosen by."""
    model = load_hf(find_folder("lowbit-base"))
    documents = python_corpus(["prose"])
    half = len(documents) // 2
    shapes = model.config.shapes()
    weights = sum(int(np.prod(shapes[p])) for p in linears(model))
    test = "\n".join(documents[half:])[:20000]
    bits = 8 * uniform_bytes(model, "e8p3") / weights
    rates = choose(model, VECTORS, documents[:half], bits=bits, rows=2, length=128)
    assert rates.exact and rates.bits <= bits
    ours = kl(model, {p: formats.get(f) for p, f in rates.formats.items()}, test, "gptq-128")
    theirs = kl(model, dict.fromkeys(linears(model), formats.get("e8p3")), test, "gptq-128")
    print(f"KL {theirs:.4f} uniform, {ours:.4f} by rate")
    assert ours < theirs
