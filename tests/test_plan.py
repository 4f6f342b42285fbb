"""Rules, refusals and the byte table."""

import pytest

from lowbit.errors import InputError
from lowbit.formats import base
from lowbit.formats.kv import get_kv
from lowbit.models.config import ModelConfig
from lowbit.plan import Plan, Rule, encoded_bytes, render, total

CONFIG = ModelConfig("llama", 64, 32, 48, 3, 4, 2, 8, 64)
SHAPES = CONFIG.shapes()
Q0 = "model.layers.0.self_attn.q_proj"


def test_uniform_covers_the_block_linears_and_nothing_else():
    sites = Plan.uniform("int4:g16").resolve(SHAPES)
    assert set(sites) == {f"model.layers.{i}.{n}" for i in range(3) for n in CONFIG.linear_shapes()}
    assert {f.name for f in sites.values()} == {"int4:g16"}


def test_first_match_wins_and_default_takes_the_rest():
    rules = (
        Rule(r".*\.0\.self_attn\.q_proj", "bf16"),
        Rule(r".*\.self_attn\..*", "int8:channel"),
        Rule(r"model\.embed_tokens", "int8:channel"),
        Rule(r".*\.down_proj:in", "int8:token"),
    )
    sites = Plan(rules, "int4:g16").resolve(SHAPES)
    assert Q0 not in sites
    assert sites["model.layers.1.self_attn.q_proj"].name == "int8:channel"
    assert sites["model.embed_tokens"].name == "int8:channel"
    assert sites["model.layers.2.mlp.up_proj"].name == "int4:g16"
    assert [s for s in sites if s.endswith(":in")] == [f"model.layers.{i}.mlp.down_proj:in" for i in range(3)]
    assert "lm_head" not in sites and "model.norm" not in sites


def test_a_weight_rule_addresses_neither_inputs_nor_caches():
    assert not [s for s in Plan((Rule(".*", "int8:channel"),)).resolve(SHAPES) if s.endswith((":in", "_cache"))]


def test_caches():
    sites = Plan((Rule(r".*\.0\..*_cache", "bf16"), Rule(r".*\.(k|v)_cache", "int4:w64"))).resolve(SHAPES)
    assert sites == {f"model.layers.{i}.self_attn.{s}_cache": get_kv("int4:w64") for i in (1, 2) for s in "kv"}


@pytest.mark.parametrize(
    "rules, default, words",
    [
        ((Rule("model.layers.9.*", "int4:g16"),), None, ["rule 1", "model.layers.9.*", "matches nothing"]),
        ((Rule("q_proj", "int4:g16"),), None, ["rule 1", "matches nothing", "whole path"]),
        ((Rule(".*norm", "int4:g16"),), None, ["matches nothing"]),
        ((Rule(r".*\.mlp\..*", "int4:g16"), Rule(r".*up_proj", "int8:channel")), None, ["rule 2", "earlier rules"]),
        ((Rule("(", "int4:g16"),), None, ["rule 1", "regular expression"]),
        ((Rule(".*", "itn4"),), None, ["rule 1", "itn4", "did you mean"]),
        ((Rule(".*q_proj:in", "int4:g16"),), None, ["rule 1", "activation format", "int8:token"]),
        ((Rule("attn.k_cache", "int8"),), None, ["attn.k_cache", "matches nothing", "6 caches", "0.self_attn.k_cache"]),
        ((Rule(".*_cache", "int8:tensor"),), None, ["rule 1", "unknown cache format 'int8:tensor'"]),
        ((Rule(r"model\.embed_tokens:in", "int8:token"),), None, ["matches nothing"]),
        ((Rule(r".*q_proj:in", "int4:token:g64"),), None, ["int4:token:g64", Q0 + ":in [32]", "multiples of 64"]),
        ((), "int4:g64", ["int4:g64", Q0, "[32, 32]", "and 18 more"]),
        ((), "int9", ["int9"]),
    ],
)
def test_refusals_name_the_thing(rules, default, words):
    with pytest.raises(InputError) as e:
        Plan(rules, default).resolve(SHAPES)
    assert all(w in str(e.value) for w in words), str(e.value)
    assert "\n" not in str(e.value)


def test_default_without_block_linears_is_refused():
    with pytest.raises(InputError, match="no linears inside blocks"):
        Plan.uniform("int4:g16").resolve({"lm_head": (8, 8)})


def test_rules_file(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text("[[rule]]\nmatch = '.*q_proj'\nformat = 'int8:channel'\n")
    assert Plan.load(path, "int4:g16") == Plan((Rule(".*q_proj", "int8:channel"),), "int4:g16")


@pytest.mark.parametrize(
    "text, words",
    [
        ("[[rule]\n", ["not TOML"]),
        ("", ["no rules"]),
        ("rule = 3\n", ["no rules"]),
        ("[[rules]]\nmatch='a'\n", ["'rules'", "did you mean 'rule'"]),
        ("[[rule]]\nmatch='a'\nfromat='int4'\n", ["'fromat'", "did you mean 'format'"]),
        ("[[rule]]\nmatch='a'\n", ["format is None"]),
        ("[[rule]]\nmatch='a'\nformat=4\n", ["format is 4"]),
    ],
)
def test_bad_rules_files(tmp_path, text, words):
    path = tmp_path / "rules.toml"
    path.write_text(text)
    with pytest.raises(InputError) as e:
        Plan.load(path)
    assert all(w in str(e.value) for w in [str(path), *words]), str(e.value)


def test_missing_rules_file(tmp_path):
    with pytest.raises(InputError, match="cannot read rules file"):
        Plan.load(tmp_path / "none.toml")


def test_bytes_are_those_of_real_encoding():
    import jax.numpy as jnp

    for name in ("int4:g16", "int3:g16:asym", "int8:channel"):
        fmt = base.get(name)
        assert encoded_bytes(fmt, (48, 32)) == fmt.encode(jnp.ones((48, 32))).nbytes
    assert encoded_bytes(base.get("int4:g16"), (48, 32)) == 48 * 32 // 2 + 48 * 2 * 2


def test_table_counts_every_tensor():
    rows = Plan((Rule(r".*\.down_proj:in", "int8:token"),), "int4:g16").table(SHAPES)
    weights = [r for r in rows if not r.site.endswith(":in")]
    assert [r.site for r in weights] == list(SHAPES)
    nbytes, bits, quantized = total(rows)
    linears = sum(o * i for o, i in CONFIG.linear_shapes().values()) * 3
    kept = CONFIG.num_params - linears
    assert nbytes == kept * 2 + linears * 5 // 8
    assert bits == 8 * nbytes / CONFIG.num_params
    assert quantized == 5.0
    assert {r.format for r in rows if r.kept} == {"bf16"}
    wide = Plan((Rule(r"model\.embed_tokens", "bf16"),), "int4:g16").table(SHAPES, dict.fromkeys(SHAPES, "float32"))
    assert {r.format for r in wide if r.kept} == {"f32"} and total(wide) == (
        nbytes + kept * 2, 8 * (nbytes + kept * 2) / CONFIG.num_params, 5.0
    )  # fmt: skip
    text = render(rows)
    assert "layers.{0-2}.self_attn.q_proj" in text and f"total {nbytes} bytes" in text
