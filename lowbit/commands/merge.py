"""`lowbit merge`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from lowbit.commands.common import Flag, Model, Result, check_output, lines, load, result


@dataclasses.dataclass(frozen=True)
class Merge:
    """Add a model's adapters into its weights, which makes them float weights that every runtime reads.

    Nothing is quantized again. In float32 the model stays the same function up to rounding; other dtypes round more.
    """

    model: Model
    """Folder or run directory of a model with adapters (recipes qlora, loftq)."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder to write: a plain one, or a packed one if other weights are packed or inputs are quantized."""
    dtype: str = "float32"
    """Of the merged weights: float32, bfloat16, float16."""
    force: Flag = False
    """Replace what is in --out."""
    json: Flag = False
    """Print one JSON object, and nothing else, on standard output."""

    def main(self) -> Result:
        from lowbit import tree as trees
        from lowbit.evaluate.size import sizes
        from lowbit.formats.adapter import bare
        from lowbit.formats.base import QTensor
        from lowbit.formats.fake_quant import PreparedInput
        from lowbit.models.cache import CacheSite
        from lowbit.models.hf import save_hf
        from lowbit.qat.adapters import merged

        check_output(self.out, self.force)
        model = load(self.model)
        done = model.replace(params=merged(model.params, self.dtype))
        rest = [leaf for _, leaf in trees.items(done.params)]
        packed = any(isinstance(leaf, PreparedInput | CacheSite) or isinstance(bare(leaf), QTensor) for leaf in rest)
        save_hf(done, self.out, dtype=None, packed=packed)
        data: dict[str, Any] = {
            "model": self.model,
            "out": str(self.out),
            "dtype": self.dtype,
            "folder": "packed" if packed else "plain",
            **sizes(done.params),
        }
        return result(data, lines(data))
