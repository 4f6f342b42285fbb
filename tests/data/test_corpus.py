"""Corpora: reading, bad input, and the text of a Python installation."""

import json

import pytest

from lowbit.data import corpus
from lowbit.errors import InputError


def test_text_is_split_at_separators_and_kept_otherwise(tmp_path):
    one, many = tmp_path / "one.txt", tmp_path / "many.txt"
    one.write_bytes("a\r\nb é\n".encode())
    many.write_text("first<|endoftext|>\n second \n<|endoftext|>  ")
    assert list(corpus.documents(one)) == ["a\r\nb é\n"]
    assert list(corpus.documents(many)) == ["first", "second"]


def test_folder_is_read_in_sorted_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.jsonl").write_text('{"text": "a1"}\n\n{"text": "a2"}\n')
    (tmp_path / "sub" / "c.md").write_text("c")
    (tmp_path / "d.bin").write_bytes(b"\xff")
    assert list(corpus.documents(tmp_path)) == ["a1", "a2", "b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.txt", b"ab\xff", "offset 2"),
        ("x.txt", b" \n", "is empty"),
        ("x.jsonl", b'{"text": "a"}\n{"text"', "line 2 is no JSON"),
        ("x.jsonl", b'{"body": "a"}', "line 1 has no string 'text'"),
        ("x.jsonl", b'["a"]', "line 1 has no string 'text'"),
        ("x.txt", None, "cannot read text"),
    ],
)
def test_bad_text_is_one_line(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as e:
        list(corpus.documents(tmp_path / name))
    assert "\n" not in str(e.value) and name in str(e.value)


def test_folder_without_text(tmp_path):
    with pytest.raises(InputError, match="has no text"):
        list(corpus.documents(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_hub_name_is_loaded_and_failure_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(3)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert list(corpus.hub_documents(str(tmp_path))) == ["document 0", "document 1", "document 2"]
    with pytest.raises(InputError, match="string field 'body'"):
        corpus.hub_documents(str(tmp_path), field="body")
    with pytest.raises(InputError, match="cannot load data set") as e:
        corpus.hub_documents(str(tmp_path / "missing"))
    assert "\n" not in str(e.value)


@pytest.fixture(scope="module")
def python_docs():
    return list(corpus.python_documents())


@pytest.mark.slow
def test_python_corpus_is_the_same_every_time(python_docs):
    assert python_docs == list(corpus.python_documents())
    assert corpus.python_corpus(["prose"]) == [text for _, kind, text in python_docs if kind == "prose"]


def test_python_corpus_is_large_text(python_docs):
    docs = python_docs
    assert all(text and text.strip() == text for _, _, text in docs)
    names = [name for name, _, _ in docs]
    assert len(set(names)) == len(names)
    size = {kind: sum(len(t) for _, k, t in docs if k == kind) for kind in ("prose", "code")}
    assert size["code"] > 5e6 and size["prose"] > 3e5
    code = {name: text for name, kind, text in docs if kind == "code"}
    assert "class ArgumentParser" in code["code:argparse.py"]
    assert not any("test" in name.split(":")[1].split(".")[:-1] for name in code)


def test_a_docstring_is_in_one_kind_only():
    import ast

    long = "This sentence is here to be long enough. " * 12
    source = f'"""{long}"""\nimport os\n\nclass A:\n    """{long}B"""\n\n    x = 1\n\ndef f():\n    """short"""\n'
    code, prose = corpus._split_docstrings(source, ast.parse(source))
    assert "long enough" not in code and "short" in code and "x = 1" in code
    assert prose == [long.strip(), long + "B"]
