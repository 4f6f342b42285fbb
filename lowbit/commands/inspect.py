"""`lowbit inspect`, `lowbit estimate` and `lowbit formats`."""

import dataclasses
import math
from typing import Any

from lowbit.commands.common import Flag, Model, Result, Word, WordPath, folder_of, lines, load, result
from lowbit.errors import InputError


def _yes(value: bool) -> str:
    return "yes" if value else "no"


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Configuration, tensors, sizes and weight statistics of a model."""

    model: Model
    """Folder, file, run directory or hub id."""
    stats: Flag = False
    """Also minimum, maximum, mean and standard deviation of every tensor (decodes packed ones)."""
    json: Flag = False
    """Print one JSON object, and nothing else, on standard output."""

    def main(self) -> Result:
        from lowbit import tree as trees
        from lowbit.evaluate.size import file_bytes, layer_table, sizes

        model = load(self.model)
        tensors = layer_table(model.params)
        if self.stats:
            leaves = dict(trees.items(model.params))
            tensors = [row | statistics(leaves[row["path"]]) for row in tensors]
        data = {
            "model": self.model,
            **model.meta,
            **sizes(model.params),
            "file_bytes": file_bytes(model.source),
            "tokenizer": None if model.tokenizer is None else type(model.tokenizer).__name__,
            "config": dataclasses.asdict(model.config),
            "tensors": tensors,
        }
        head = {k: v for k, v in data.items() if k not in ("config", "tensors")}
        config = {k: v for k, v in data["config"].items() if v not in (None, (), False)}
        return result(data, "\n\n".join([lines(head), lines(config), tensor_table(tensors)]))


def statistics(leaf: Any) -> dict[str, float | None]:
    """Minimum, maximum, mean and standard deviation of a weight's values, in float32 or better; None for a cache."""
    import numpy as np

    from lowbit.kernels.qdot.api import dense
    from lowbit.models.cache import CacheSite

    if isinstance(leaf, CacheSite):
        return dict.fromkeys(("min", "max", "mean", "std"))
    x = np.asarray(leaf if hasattr(leaf, "ndim") else dense(leaf)).astype(np.float64)
    return {"min": float(x.min()), "max": float(x.max()), "mean": float(x.mean()), "std": float(x.std())}


def tensor_table(rows: list[dict[str, Any]]) -> str:
    """Tensors as aligned text."""
    keys = list(rows[0])
    cells = [[_cell(k, row[k]) for k in keys] for row in rows]
    widths = [max(len(line[i]) for line in [keys, *cells]) for i in range(len(keys))]
    return "\n".join(
        "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in [keys, *cells]
    )


def _cell(key: str, value: Any) -> str:
    if key == "shape" or value is None:
        return "x".join(map(str, value or ("-",)))
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Size of a quantization, the layer table and memory, before doing it. Nothing is quantized.

    Packed tensors are counted exactly, and so are those that stay as they are, in the dtype that they came in.
    """

    model: Model
    """Folder, file, run directory or hub id."""
    format: Word = None
    """Format of the linears inside blocks (see lowbit formats)."""
    rules: WordPath = None
    """TOML file of [[rule]] match, format; the first match wins."""
    json: Flag = False
    """Print one JSON object, and nothing else, on standard output."""

    def main(self) -> Result:
        from lowbit import plan as plans

        plan = make_plan(self.format, self.rules)
        config, params = read_abstract(self.model)
        shapes = config.shapes()
        table = plan.table(shapes, kept_dtypes(params))
        nbytes, bits, quantized = plans.total(table)
        weights = [math.prod(s) for s in shapes.values()]
        memory = {
            "bf16_bytes": 2 * sum(weights),
            "largest_tensor_bytes": 4 * max(weights),  # in float32, what quantize holds at a time
            "train_state_bytes": 16 * sum(weights),  # float32 weights, gradients and two moments
        }
        data = {
            "model": self.model,
            "params": config.num_params,
            "bytes": nbytes,
            "bits_per_weight": bits,
            "bits_per_weight_quantized": quantized or None,
            **memory,
            "tensors": table,
        }
        text = f"{plans.render(table)}\n\n" + lines({k: v for k, v in data.items() if k != "tensors"})
        return result(data, text)


def make_plan(format: str | None, rules: Any) -> Any:
    """The plan of `--format` and `--rules`, at least one of them. Raises `InputError`."""
    from lowbit.formats import base
    from lowbit.plan import Plan

    if format is None and rules is None:
        raise InputError(f"no --format and no --rules (allowed formats: {', '.join(base.names())})")
    if format is not None:
        base.get(format)
    return Plan.load(rules, format) if rules is not None else Plan.uniform(str(format))


def read_abstract(source: str) -> tuple[Any, Any]:
    """A model's configuration and its parameters as `ShapeDtypeStruct`s, in the dtypes that are stored.

    The weights of a plain folder are not read, only their headers; a folder that has none yet gets the dtype that its
    config.json names, else bfloat16. Anything else is read whole.
    """
    import jax
    import jax.numpy as jnp

    from lowbit import tree as trees
    from lowbit.models.hf import FLOATS, load_config, stored_kinds
    from lowbit.models.shards import read_json

    folder = folder_of(source)
    if folder is not None:
        config = load_config(folder)
        if any(folder.glob("*.safetensors")):
            kinds = stored_kinds(folder)
        else:
            raw = read_json(folder / "config.json")
            dtype = raw.get("dtype") or raw.get("torch_dtype")
            kinds = dict.fromkeys(config.shapes(), dtype if dtype in FLOATS else "bfloat16")
        if all(isinstance(kind, str) and kind in FLOATS for kind in kinds.values()):
            leaves = {p: jax.ShapeDtypeStruct(s, jnp.dtype(kinds[p])) for p, s in config.shapes().items()}
            return config, trees.build(leaves)
    model = load(source)
    return model.config, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), model.params)


def kept_dtypes(params: Any) -> dict[str, str]:
    """`{path: dtype}` of the parameters that are not packed."""
    from lowbit import tree as trees
    from lowbit.formats.adapter import bare

    plain = {p: bare(a) for p, a in trees.items(params)}
    return {p: str(a.dtype) for p, a in plain.items() if hasattr(a, "ndim")}


@dataclasses.dataclass(frozen=True)
class Formats:
    """List the formats: of weights, with bits per weight on a 4096 x 4096 matrix and whether they can be trained; of
    activations, with bits of a code; and of the key-value cache, with bits per value for heads of 128."""

    json: Flag = False
    """Print one JSON object, and nothing else, on standard output."""

    def main(self) -> Result:
        from lowbit.formats import base
        from lowbit.formats.activation import ACTS, get_act
        from lowbit.formats.kv import KV_FORMATS, get_kv
        from lowbit.formats.learned import LEARNED
        from lowbit.plan import encoded_bytes

        rows = []
        for name in base.names():
            fmt = base.get(name)
            bits = 8 * encoded_bytes(fmt, (4096, 4096)) / 4096**2
            rows.append({"name": name, "bits_per_weight": bits, "trainable": fmt.trainable, "tile": fmt.tile})
        acts = [{"name": name, "bits": get_act(name).bits} for name in (*ACTS, *LEARNED)]
        caches = [{"name": name, "bits": get_kv(name).bits(128)} for name in KV_FORMATS]
        width = max(len(r["name"]) for r in rows + acts + caches)
        text = "\n".join(
            [f"{'name'.ljust(width)}  bits/weight  trained"]
            + [f"{r['name'].ljust(width)}  {r['bits_per_weight']:11.4f}  {_yes(r['trainable'])}" for r in rows]
            + ["", f"{'activations (path:in)'.ljust(width)}  bits"]
            + [f"{r['name'].ljust(width)}  {r['bits']}" for r in acts]
            + ["", f"{'caches (k_cache, v_cache)'.ljust(width)}  bits/value"]
            + [f"{r['name'].ljust(width)}  {r['bits']:.4g}" for r in caches]
        )
        return result({"formats": rows, "activations": acts, "caches": caches}, text)
