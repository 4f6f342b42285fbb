"""Hugging Face folders: `config.json`, safetensors, tokenizer files; plain weights or our packed ones.

A packed folder stores every `QTensor` as it is: the tensors `PATH.NAME` are its arrays, and `config.json` says which
format each path has,

    "quantization_config": {"quant_method": "lowbit", "version": 1, "formats": {PATH: FORMAT, ...},
                            "dtypes": {PATH: dtype of the decoded weight, ...},
                            "inputs": {PATH: activation format, ...},
                            "online": {PATH: transform of the input, see `lowbit.linalg.online`, ...},
                            "adapters": {PATH: {"rank": R, "scaling": S, "pool": G}, ...},
                            "caches": {PATH: {"format": cache format, "online": transform of the heads}, ...}}

(the arrays of an activation format or a transform are the tensors `PATH.input.NAME` and `PATH.online.NAME`, those of an
adapter `PATH.lora_a` and `PATH.lora_b`), so loading gives the same codes and scales back bit for bit.

Folders in a layout of another runtime (`lowbit.vq.layouts`) are read too: their weights become `QTensor`s of the
formats that hold the same codes.
"""

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowbit import tree as trees
from lowbit.errors import InputError, unknown
from lowbit.formats import adapter
from lowbit.formats import base as formats
from lowbit.formats.adapter import Adapter
from lowbit.formats.base import Coded, Latent, QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.linalg.online import describe, described_shapes, restore
from lowbit.models import cache as caches
from lowbit.models.cache import CacheSite
from lowbit.models.config import ModelConfig, from_hf, to_hf
from lowbit.models.model import Model
from lowbit.models.shards import INDEX, Shards, ShardWriter, atomic_folder, read_json, require_finite, some
from lowbit.vq.layouts import LAYOUTS, Entry, method_of

SHARD_BYTES = 5_000_000_000
FLOATS = {"float32": np.dtype("float32"), "float16": np.dtype("float16"), "bfloat16": np.dtype(jnp.bfloat16)}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
VERSION = 1
# Tensors that some checkpoints carry and that the decoder computes, ties or has no use for.
_HARMLESS = re.compile(r".*rotary_emb\.inv_freq|.*\.(attn|attention)\.(masked_)?bias")
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector|vision_model)\..*")


def load_hf(folder: str | Path) -> Model:
    """The model of a folder, weights in the dtype they are stored in (computation casts), packed ones as `QTensor`s.

    Peak memory is the model plus one tensor. Raises `InputError` for a missing or unreadable file, missing, misshaped
    or unknown tensors, NaN or infinite weights, and architectures or settings that the decoder does not have.
    """
    folder = Path(folder)
    raw, config, quant = _read_config(folder)
    flat = {path: _to_device(read()) for path, read in _readers(folder, raw, config, quant).items()}
    dtypes = sorted({str(v.dtype) for v in flat.values() if isinstance(v, jax.Array)})
    method = method_of(raw)
    kind = "hf-packed" if quant else "hf" if method is None else f"hf-{method}"
    meta = {"format": kind, "dtype": raw.get("dtype") or raw.get("torch_dtype") or dtypes[0]}
    return Model(config, trees.build(flat), load_tokenizer(folder), str(folder), meta)


def load_config(folder: str | Path) -> ModelConfig:
    """The configuration alone: reads no weights."""
    return _read_config(Path(folder))[1]


def iter_tensors(folder: str | Path, only: Callable[[str], bool] | None = None) -> Iterator[tuple[str, Any]]:
    """`(path, array)` of every parameter in the model's order (embedding, layer by layer, norm, head), one in memory,
    then every `CacheSite`.

    Arrays are numpy in their stored dtype; packed weights come as `QTensor`s. The same checks as `load_hf`. Paths that
    `only` does not take are checked but not read.
    """
    yield from ((path, read()) for path, read in readers(folder).items() if only is None or only(path))


def readers(folder: str | Path) -> dict[str, Callable[[], Any]]:
    """What `iter_tensors` reads, in any order: `{path: function that reads it}`, of which nothing is kept in memory.

    All the checks of `load_hf` but those of values are made here, from the headers.
    """
    folder = Path(folder)
    return _readers(folder, *_read_config(folder))


def stored_kinds(folder: str | Path) -> dict[str, Any]:
    """`{path: dtype name, or the Format of a packed weight}` in the model's order; reads headers only."""
    folder = Path(folder)
    raw, config, quant = _read_config(folder)
    shards = Shards(folder)
    packed = {path: formats.get(name) for path, name in (quant or {}).get("formats", {}).items()}
    packed |= {path: entry.format for path, entry in _foreign(raw, config, shards).items()}
    rename = _renamer(shards)
    return {path: packed.get(path) or str(shards.dtype(rename(tensor_name(path)))) for path in config.shapes()}


def stored_adapters(folder: str | Path) -> dict[str, dict[str, Any]]:
    """`{path: {"rank", "scaling", "pool"}}` of the weights of a folder that have an adapter."""
    return (_read_config(Path(folder))[2] or {}).get("adapters", {})


def save_hf(
    model: Model,
    folder: str | Path,
    dtype: str | None = "bfloat16",
    packed: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `config.json`, `generation_config.json`, safetensors and the tokenizer; nothing half-written is left.

    Float weights are cast to `dtype` (None: kept as they are). With `packed=False` quantized weights are decoded, so
    that `transformers` reads the folder; with `packed=True` they are stored as they are, for `load_hf`. Raises
    `InputError` when `transformers` cannot have the decoder, on values that `dtype` cannot hold, and on a full disk.
    """
    if dtype is not None and dtype not in FLOATS:
        raise unknown("dtype", dtype, FLOATS)
    with atomic_folder(folder) as tmp:
        writer = HfWriter(tmp, model.config, dtype, packed, max_shard_bytes)
        for path, leaf in trees.items(model.params):
            writer.add(path, leaf)
        writer.close()
        write_tokenizer(model.source, model.tokenizer, tmp)


class HfWriter:
    """Writes a folder leaf by leaf, for a quantizer that never holds the whole model (see `save_hf` for the options).

    Use inside `atomic_folder`; `close` checks that every parameter of the configuration came once.
    """

    def __init__(
        self, folder: Path, config: ModelConfig, dtype: str | None, packed: bool, max_shard_bytes: int = SHARD_BYTES
    ):
        self.folder, self.config, self.dtype, self.packed = folder, config, dtype, packed
        self.shards = ShardWriter(folder, max_shard_bytes)
        self.formats: dict[str, str] = {}
        self.dtypes: dict[str, str] = {}
        self.names: dict[str, dict[str, str]] = {"input": {}, "online": {}}
        self.caches: dict[str, dict[str, str]] = {}
        self.adapters: dict[str, dict[str, Any]] = {}
        self.seen: dict[str, str] = {}
        to_hf(config, dtype or "float32", native=packed)  # fails before anything is written

    def add(self, path: str, leaf: Any) -> None:
        """Appends a parameter: an array, `QTensor`, `Latent`, `Coded`, `Adapter` or `PreparedInput`; or a `CacheSite`,
        which only a packed folder keeps: to any other it is the runtime's choice."""
        if path in self.seen or path in self.caches:
            raise InputError(f"parameter {path} twice (allowed: once)")
        if isinstance(leaf, CacheSite):
            if self.packed:
                self.caches[path], arrays = caches.describe(leaf)
                for name, a in arrays.items():
                    self.shards.add(f"{path}.{name}", np.asarray(a))
            return
        if isinstance(leaf, PreparedInput):
            names, arrays = describe(leaf)
            if self.packed:
                for kind, name in names.items():
                    self.names[kind][path] = name
                for name, a in arrays.items():
                    self.shards.add(f"{path}.{name}", np.asarray(a))
            elif leaf.op is not None:
                raise InputError(
                    f"cannot save {path}: its input is transformed online ({leaf.op.name}), which only a packed folder "
                    "holds (allowed: packed)"
                )
            leaf = leaf.w
        if isinstance(leaf, Adapter):
            if not self.packed:
                raise InputError(
                    f"cannot save {path}: it has an adapter, which only a packed folder holds "
                    "(allowed: packed, or merge it first)"
                )
            self.adapters[path], arrays = adapter.describe(leaf)
            for name, a in arrays.items():
                require_finite(np.asarray(a), f"{path}.{name}", "cannot save")
                self.shards.add(f"{path}.{name}", np.asarray(a))
            leaf = leaf.w
        if isinstance(leaf, Latent | Coded):
            leaf = leaf.encode() if self.packed else leaf.value()
        if isinstance(leaf, QTensor) and self.packed:
            self.formats[path], self.dtypes[path] = leaf.format.name, leaf.dtype
            self.seen[path] = leaf.dtype
            for name, a in leaf.arrays.items():
                self.shards.add(f"{path}.{name}", np.asarray(a))
            return
        a = np.asarray(leaf.decode() if isinstance(leaf, QTensor) else leaf)
        require_finite(a, path, "cannot save")
        if self.dtype is not None:
            with np.errstate(over="ignore"):
                a = a.astype(FLOATS[self.dtype])
            require_finite(a, path, f"cannot save as {self.dtype}")
        self.seen[path] = str(a.dtype)
        self.shards.add(tensor_name(path), a)

    def add_arrays(self, path: str, dtype: str, arrays: dict[str, np.ndarray]) -> None:
        """Appends a packed weight of another runtime's layout as the tensors `PATH.NAME`."""
        self.seen[path] = dtype
        for name, a in arrays.items():
            self.shards.add(f"{path}.{name}", a)

    def close(self, more: dict[str, Any] | None = None) -> None:
        """Finishes the weights and writes the two configuration files, `config.json` with `more` keys."""
        wanted = self.config.shapes()
        _require_same(set(wanted), set(self.seen), "the model to save")
        self.shards.close()
        dtype = self.dtype or self.seen["model.embed_tokens"]
        out = to_hf(self.config, dtype, native=self.packed) | (more or {})
        if self.packed:
            out["quantization_config"] = {
                "quant_method": "lowbit",
                "version": VERSION,
                "formats": self.formats,
                "dtypes": self.dtypes,
                "inputs": self.names["input"],
            }
            if self.names["online"]:
                out["quantization_config"]["online"] = self.names["online"]
            if self.caches:
                out["quantization_config"]["caches"] = self.caches
            if self.adapters:
                out["quantization_config"]["adapters"] = self.adapters
        generation = {k: out[k] for k in ("bos_token_id", "eos_token_id")} | {"_from_model_config": True}
        write_json(self.folder / "config.json", out)
        write_json(self.folder / "generation_config.json", generation)


def resolve(source: str | Path) -> Path:
    """The local folder of a model: `source` itself, or the hub snapshot of `owner/name` or `owner/name@revision`.

    Downloads only configuration, safetensors and tokenizer files; with `HF_HUB_OFFLINE=1` only looks in the cache.
    Raises `InputError`.
    """
    path = Path(source)
    if path.is_dir():
        return path
    m = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", str(source))
    if m is None or path.exists():
        raise InputError(f"no model {str(source)!r} (allowed: a local folder, or a hub id such as owner/name)")
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = ["*.safetensors", INDEX, "*.json", "tokenizer.model", "merges.txt", "*.jinja"]
    try:
        return Path(snapshot_download(m[1], revision=m[2], allow_patterns=patterns))
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        httpx.HTTPError,
        OSError,
    ) as e:
        why = " ".join(str(e).split())[:200] or type(e).__name__
        raise InputError(f"no folder {str(source)!r}, and the hub gave no model of that name: {why}") from e


def tensor_name(path: str) -> str:
    """The HF tensor name of a parameter path."""
    return path if path.endswith(".bias") else path + ".weight"


# -- reading ----------------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig, dict[str, Any] | None]:
    if not folder.is_dir():
        raise InputError(f"no folder {folder} (allowed: a folder with config.json and safetensors)")
    raw = read_json(folder / "config.json")
    method = method_of(raw)
    if method not in (None, "lowbit", *LAYOUTS):
        raise unknown("quant_method in config.json", method, ("lowbit", "aqlm", "vptq", "exl3"))
    quant = raw["quantization_config"] if method == "lowbit" else None
    if quant is not None and quant.get("version") != VERSION:
        raise InputError(f"config.json: packed version {quant.get('version')!r} (allowed: {VERSION})")
    return raw, from_hf(raw), quant


def _foreign(raw: dict[str, Any], config: ModelConfig, shards: Shards) -> dict[str, Entry]:
    """The weights that are packed in another runtime's layout."""
    method = method_of(raw)
    if method not in LAYOUTS:
        return {}
    return LAYOUTS[method].entries(raw, {path: s for path, s in config.shapes().items() if len(s) == 2}, shards)


def _load_foreign(folder: Path, path: str, entry: Entry, shards: Shards) -> QTensor:
    arrays = {name: shards.read(f"{path}.{name}") for name in entry.tensors}
    try:
        return entry.load(arrays)
    except formats.FormatError as e:
        raise InputError(f"{folder}: {path}: {e}") from e


def _readers(
    folder: Path, raw: dict[str, Any], config: ModelConfig, quant: dict[str, Any] | None
) -> dict[str, Callable[[], Any]]:
    """Checks names and shapes against the configuration; a function for each leaf reads it."""
    shards = Shards(folder)
    foreign = _foreign(raw, config, shards)
    fmts = {path: formats.get(name) for path, name in (quant or {}).get("formats", {}).items()}
    names: dict[str, dict[str, str]] = {}
    for kind, key in (("input", "inputs"), ("online", "online")):
        for path, name in (quant or {}).get(key, {}).items():
            names.setdefault(path, {})[kind] = name
    dtypes = (quant or {}).get("dtypes", {})
    for path, dtype in dtypes.items():
        if dtype not in FLOATS:
            raise unknown(f"dtype of {path} in config.json", dtype, FLOATS)
    shapes = config.shapes()
    adapters = (quant or {}).get("adapters", {})
    if stray := sorted(p for p in {**fmts, **names, **adapters} if len(shapes.get(p, ())) != 2):
        raise InputError(f"config.json gives formats to what is no matrix of the model: {some(stray)}")
    sites = (quant or {}).get("caches", {})
    if stray := sorted(sites.keys() - set(caches.paths(config))):
        raise InputError(f"config.json gives cache formats to what is no cache of the model: {some(stray)}")

    rename = _renamer(shards)
    where: dict[str, dict[str, str]] = {}  # path -> {array name, "" for a plain weight: tensor name}
    expected: dict[str, tuple[tuple[int, ...], str | None]] = {}  # tensor name -> shape, dtype
    for path, shape in shapes.items():
        if path in fmts:
            arrays = _stored_arrays(fmts[path], shape)
            where[path] = {name: f"{path}.{name}" for name in arrays}
            expected |= {f"{path}.{name}": (a.shape, str(a.dtype)) for name, a in arrays.items()}
        elif path in foreign:
            expected |= {f"{path}.{name}": spec for name, spec in foreign[path].tensors.items()}
        else:
            where[path] = {"": rename(tensor_name(path))}
            expected[where[path][""]] = (shape, None)
    prepared: dict[str, dict[str, str]] = {}  # path -> {array of its activation format or transform: tensor name}
    for path, kinds in names.items():
        own = described_shapes(kinds, shapes[path][1])
        prepared[path] = {name: f"{path}.{name}" for name in own}
        expected |= {f"{path}.{name}": (shape, None) for name, shape in own.items()}
    factors: dict[str, dict[str, str]] = {}  # path -> {array of its adapter: tensor name}
    for path, kinds in adapters.items():
        own = adapter.described_shapes(path, kinds, shapes[path])
        factors[path] = {name: f"{path}.{name}" for name in own}
        expected |= {f"{path}.{name}": (shape, None) for name, shape in own.items()}
    for path, kinds in sites.items():
        own = caches.described_shapes(kinds)
        prepared[path] = {name: f"{path}.{name}" for name in own}
        expected |= {f"{path}.{name}": (shape, None) for name, shape in own.items()}
    _check(folder, config, shards, expected)

    def read(path: str) -> Any:
        own = {name: jnp.asarray(shards.read(n)) for name, n in prepared.get(path, {}).items()}
        if path in sites:
            site = caches.restore(sites[path], own)
            site.check(config.head_dim)
            return site
        if path in foreign:
            return _load_foreign(folder, path, foreign[path], shards)
        shape = shapes[path]
        if path in fmts:
            arrays = {name: jnp.asarray(shards.read(n)) for name, n in where[path].items()}
            leaf: Any = QTensor(arrays, fmts[path], (shape[0], shape[1]), dtypes.get(path, "float32"))
        else:
            leaf = shards.read(where[path][""])
        arrays = {name: jnp.asarray(shards.read(n)) for name, n in factors.get(path, {}).items()}
        leaf = adapter.restore(leaf, adapters.get(path), arrays)
        return restore(leaf, names.get(path, {}), own)

    return {path: functools.partial(read, path) for path in (*shapes, *sites)}


@functools.cache
def _stored_arrays(fmt: formats.Format, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """What a packed weight of this shape consists of. Raises `FormatError` if the format cannot hold it."""
    return jax.eval_shape(lambda w: fmt.encode(w).arrays, jax.ShapeDtypeStruct(shape, jnp.float32))


def _check(
    folder: Path, config: ModelConfig, shards: Shards, expected: dict[str, tuple[tuple[int, ...], str | None]]
) -> None:
    """Raises `InputError` unless the folder has exactly the expected tensors, give or take the harmless ones."""
    if missing := [n for n in expected if n not in shards]:
        raise InputError(f"{folder} lacks {len(missing)} tensors that its config.json needs: {some(missing)}")
    wrapped = any("language_model." in n for n in expected)

    def harmless(name: str) -> bool:
        tied = config.tied and name.endswith("lm_head.weight")
        return tied or bool(_HARMLESS.fullmatch(name)) or (wrapped and bool(_VISION.fullmatch(name)))

    if extra := sorted(n for n in shards if n not in expected and not harmless(n)):
        raise InputError(f"{folder} has {len(extra)} tensors that its config.json does not explain: {some(extra)}")
    for name, (shape, dtype) in expected.items():
        if shards.shape(name) != shape:
            found, wanted = list(shards.shape(name)), list(shape)
            raise InputError(f"{folder}: tensor {name} has shape {found} (config.json needs {wanted})")
        allowed = [dtype] if dtype else list(FLOATS)
        if str(shards.dtype(name)) not in allowed:
            raise InputError(f"{folder}: tensor {name} has dtype {shards.dtype(name)} (allowed: {', '.join(allowed)})")


def _renamer(shards: Shards) -> Callable[[str], str]:
    """How the text part's tensors are called: multimodal wrappers put `language_model` somewhere in front."""
    if "language_model.model.embed_tokens.weight" in shards:
        return lambda name: f"language_model.{name}"
    if "model.language_model.embed_tokens.weight" in shards:
        return lambda name: re.sub(r"^model\.", "model.language_model.", name)
    return lambda name: name


def _to_device(leaf: Any) -> Any:
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, None if it has none. Raises `InputError` for one that cannot be read."""
    from lowbit.data.tokenizer import Tokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    return Tokenizer.from_dir(folder)


# -- writing ----------------------------------------------------------------------------------------------------------


def _require_same(wanted: set[str], found: set[str], where: str) -> None:
    if missing := sorted(wanted - found):
        raise InputError(f"{where} lacks {len(missing)} parameters: {some(missing)}")
    if extra := sorted(found - wanted):
        raise InputError(f"{where} has {len(extra)} parameters that its config does not explain: {some(extra)}")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """An indented JSON object."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(source: str | Path, tokenizer: Any, folder: Path) -> None:
    """The files of the folder that a model came from if they are still there, else the tokenizer's own."""
    path = Path(source)
    kept = [path / n for n in TOKENIZER_FILES if (path / n).is_file()] if source and path.is_dir() else []
    if kept:
        for p in kept:
            shutil.copyfile(p, folder / p.name)
    elif tokenizer is not None:
        tokenizer.save(folder)
