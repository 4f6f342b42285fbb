"""What fake quantization costs a training step, and what google qwix's costs on the same model.

One process, programs timed in turn, minimum of each (a shared machine only ever adds time); `cpu` has the same ratios
of processor seconds, which a busy machine disturbs less. The model has the shapes
of lowbit-base (llama, 8M parameters); a step is the cross entropy, its gradient and AdamW on 2048 tokens, without
a teacher. Weights only: int4, groups of 64 along the input. Ratios are to the same step without fake quantization.

Ours unrolls these three layers, as the decoder does by itself below six; `scan` gives ours under a scan, to the plain
step under a scan. qwix runs the same forward pass behind an nnx module (it recognises weights by object identity, which
a scan loses), and its ratio is to that module without qwix. Judge by `step_ms` too: the plain steps differ by what XLA
makes of them.

    python benchmarks/qat_step.py [--quick] [--json]

`--json` prints one object last: `ours`, `scan` and `qwix` (ratios), `step_ms`, `compile_s`, `loss`, versions.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import time
from functools import partial

from lowbit import xla

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = xla.flags(os.environ.get("XLA_FLAGS", ""), importlib.metadata.version("jaxlib"))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lowbit import tree as trees
from lowbit.export.open import find_folder
from lowbit.formats import base
from lowbit.formats.base import Latent
from lowbit.models import decoder
from lowbit.models.hf import load_config
from lowbit.train.objective import cross_entropy

CONFIG = load_config(find_folder("lowbit-base"))
BATCH, LENGTH = 8, 256
FORMAT = "int4:g64"
OPTIMIZER = optax.adamw(1e-3)


def mean_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.mean(cross_entropy(logits[:, :-1], tokens[:, 1:]))


def make_step(loss):
    """A donated, jitted `(params, state, tokens) -> (params, state, loss)`."""

    def step(params, state, tokens):
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, state = OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def decoder_loss(params, tokens, scan=None):
    x, _ = decoder.hidden_states(params, tokens, CONFIG, scan=scan)
    return mean_loss(decoder.head(params, x, CONFIG), tokens)


def latents(params):
    """Every block linear as a latent weight in training."""
    fmt, linears = base.get(FORMAT), set(CONFIG.linear_shapes())

    def wrap(path: str, leaf):
        return Latent(leaf, {}, fmt) if ".layers." in path and path.split(".", 3)[3] in linears else leaf

    return trees.map_leaves(wrap, params)


# -- qwix: the same forward pass behind nnx modules that hold the weights as nnx.Param ---------------------------------


class Blocks(nnx.Module):
    """All layers; attributes are named by path, where qwix looks a weight up."""

    def __init__(self, flat: dict[str, jax.Array]):
        for path, leaf in flat.items():
            setattr(self, path.replace(".", "/"), nnx.Param(leaf))

    def __call__(self, embedding: jax.Array, tokens: jax.Array) -> jax.Array:
        flat = {n.replace("/", "."): p[...] for n, p in vars(self).items() if isinstance(p, nnx.Param)}
        params = trees.build({"model.embed_tokens": embedding, **flat})
        return decoder.hidden_states(params, tokens, CONFIG)[0]


class Head(nnx.Module):
    """Outside of the quantization rule, as the embedding is in ours."""

    def __call__(self, embedding: jax.Array, x: jax.Array) -> jax.Array:
        return decoder.head({"model": {"embed_tokens": embedding}}, x, CONFIG)


class Model(nnx.Module):
    def __init__(self, params: trees.Tree):
        flat = dict(trees.items(params))
        self.embedding = nnx.Param(flat.pop("model.embed_tokens"))
        self.blocks, self.head = Blocks(flat), Head()

    def __call__(self, tokens: jax.Array) -> jax.Array:
        embedding = self.embedding[...]
        return self.head(embedding, self.blocks(embedding, tokens))


def nnx_program(model: Model):
    """`(loss, params)` of an nnx model."""
    graph, weights, rest = nnx.split(model, nnx.Param, ...)

    def loss(weights, tokens):
        return mean_loss(nnx.merge(graph, weights, rest)(tokens), tokens)

    return loss, weights


def quantized_by_qwix(model: Model, tokens: jax.Array) -> Model:
    """The model under `QtProvider`, block linears only."""
    import qwix

    rule = qwix.QtRule(module_path="blocks", op_names=("dot_general",), weight_qtype="int4", tile_size=64)
    return qwix.quantize_model(model, qwix.QtProvider([rule]), tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 12")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    args = parser.parse_args()

    tokens = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (BATCH, LENGTH)), jnp.int32)
    params = decoder.init_params(CONFIG, jax.random.key(0))

    scanned = partial(decoder_loss, scan=True)
    programs = {
        "plain": (decoder_loss, params),
        "ours": (decoder_loss, latents(params)),
        "plain_scan": (scanned, params),
        "ours_scan": (scanned, latents(params)),
        "plain_nnx": nnx_program(Model(params)),
        "qwix": nnx_program(quantized_by_qwix(Model(params), tokens)),
    }
    steps, states, compile_s, first_loss = {}, {}, {}, {}
    for name, (loss, start) in programs.items():
        start = jax.tree.map(jnp.copy, start)  # donated below
        args_ = (start, OPTIMIZER.init(start), tokens)
        t = time.perf_counter()
        steps[name] = make_step(loss).lower(*args_).compile()
        compile_s[name] = round(time.perf_counter() - t, 2)
        *states[name], value = steps[name](*args_)
        first_loss[name] = float(value)
    # The programs must be what they claim: one model, and really quantized.
    for name in ("plain_scan", "plain_nnx"):
        assert abs(first_loss["plain"] - first_loss[name]) < 1e-4, first_loss
    assert abs(first_loss["ours"] - first_loss["ours_scan"]) < 1e-4, first_loss
    for name in ("ours", "qwix"):
        assert 1e-6 < abs(first_loss[name] - first_loss["plain"]) < 0.1, first_loss

    best, cpu = dict.fromkeys(steps, float("inf")), dict.fromkeys(steps, float("inf"))
    for _ in range(3 if args.quick else 12):
        for name, step in steps.items():
            t, c = time.perf_counter(), time.process_time()
            *states[name], value = step(*states[name], tokens)
            jax.block_until_ready((states[name], value))
            best[name] = min(best[name], time.perf_counter() - t)
            cpu[name] = min(cpu[name], time.process_time() - c)

    def ratios(seconds: dict[str, float]) -> dict[str, float]:
        pairs = {"ours": "plain", "scan": "plain_scan", "qwix": "plain_nnx"}
        of = {"scan": "ours_scan"}
        return {k: round(seconds[of.get(k, k)] / seconds[plain], 3) for k, plain in pairs.items()}

    result = {
        **ratios(best),
        "cpu": ratios(cpu),
        "plain_ms": round(1e3 * best["plain"], 1),
        "step_ms": {k: round(1e3 * v, 1) for k, v in best.items()},
        "compile_s": compile_s,
        "loss": {k: round(v, 5) for k, v in first_loss.items()},
        "tokens": int(tokens.size),
        "format": FORMAT,
        "device": jax.devices()[0].device_kind,
        "versions": {
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "flax", "qwix")},
        },
    }
    for name, ms in result["step_ms"].items():
        print(f"{name:15s} {ms:9.1f} ms a step   compile {compile_s[name]:6.1f} s   loss {first_loss[name]:.5f}")
    for kind, r in (("wall", result), ("cpu", result["cpu"])):
        print(f"{kind:4s} ours {r['ours']:.3f}   scan {r['scan']:.3f}   qwix {r['qwix']:.3f}   (to plain)")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
