"""How other runtimes store the weights of formats of vectors: one file for each, `LAYOUTS` by name.

They know arrays and `config.json`, not models: `lowbit.models.hf` reads folders through them, `lowbit.export.layouts`
writes them.
"""

from typing import Any

from lowbit.errors import InputError
from lowbit.vq.layouts.aqlm import Aqlm
from lowbit.vq.layouts.base import Entry, Layout, Written
from lowbit.vq.layouts.exl3 import Exl3
from lowbit.vq.layouts.qtip import Qtip
from lowbit.vq.layouts.quip import Quip
from lowbit.vq.layouts.vptq import Vptq

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Aqlm(), Vptq(), Exl3(), Quip(), Qtip())}


def method_of(raw: dict[str, Any]) -> str | None:
    """Which layout a `config.json` says the folder has: a name of `LAYOUTS`, what else `quant_method` says, or None
    without any. QuIP# and QTIP have `quip_params` instead, told apart by what only QTIP's have. Raises `InputError` for
    what is no object."""
    for key in ("quip_params", "quantization_config"):
        if raw.get(key) is not None and not isinstance(raw[key], dict):
            raise InputError(f"config.json: {key} is {raw[key]!r} (allowed: an object)")
    if (params := raw.get("quip_params")) is not None:
        return "qtip" if "decode_mode" in params else "quip"
    quant = raw.get("quantization_config")
    method = None if quant is None else str(quant.get("quant_method"))
    if method in ("quip", "qtip"):
        raise InputError(f"config.json: quant_method is {method!r} without quip_params (allowed: both)")
    return method


__all__ = ["LAYOUTS", "Entry", "Layout", "Written", "method_of"]
