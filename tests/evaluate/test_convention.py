"""Which tokens each convention scores, and refusals."""

import numpy as np
import pytest

from lowbit.data.tokenizer import ByteTokenizer
from lowbit.errors import InputError
from lowbit.evaluate.convention import default_convention, parse, windows

TOK = ByteTokenizer()
BOS = TOK.bos_id


def test_gptq_scores_all_but_the_first_of_each_disjoint_window():
    w = windows("abcdefghij", TOK, "gptq-4")
    ids = [BOS, *b"abcdefghij"]
    assert w.tokens.tolist() == [ids[0:4], ids[4:8]]  # the rest, three tokens, is not scored
    assert w.scored.tolist() == [[False, True, True, True]] * 2
    assert w.tokens.dtype == np.int32 and w.convention == "gptq-4"


def test_documents_are_joined_by_a_blank_line():
    assert np.array_equal(windows(["ab", "cd"], TOK, "gptq-7").tokens, windows("ab\n\ncd", TOK, "gptq-7").tokens)


def test_llamacpp_replaces_the_first_token_and_scores_the_second_half():
    w = windows("abcdefghijklmnop", TOK, "llamacpp-8")
    ids = [BOS, *b"abcdefghijklmnop"]
    assert w.tokens.tolist() == [ids[0:8], [BOS, *ids[9:16]]]
    assert w.scored.tolist() == [[False] * 5 + [True] * 3] * 2
    big = windows("x" * 1200, TOK, "llamacpp-512", 512)
    assert big.scored.sum(axis=1).tolist() == [255, 255]  # as llama-perplexity says


def test_no_bos_is_put_where_the_tokenizer_adds_none():
    tok = ByteTokenizer()
    tok.adds_bos = False
    assert windows("abcdefgh", tok, "llamacpp-4").tokens.tolist() == [list(b"abcd"), list(b"efgh")]


def test_stories_are_the_long_ones_cut_after_256_tokens():
    short, long, longer = "s" * 200, "m" * 201, "l" * 400
    text = f"{short}<|endoftext|> {long} \n<|endoftext|>{longer}"
    w = windows(text, TOK, "stories-256")
    assert w.tokens.shape == (2, 257)
    assert w.scored.sum(axis=1).tolist() == [201, 256]
    assert w.tokens[0, :203].tolist() == [BOS, *b"m" * 201, 0]
    many = windows([f"{i:03d}" * 70 for i in range(70)], TOK, "stories-256")
    assert len(many.tokens) == 60 and many.tokens[59, 1:4].tolist() == list(b"059")


def test_default_is_the_largest_window_that_the_context_allows():
    assert default_convention(512) == "gptq-512" and default_convention(100) == "gptq-100"
    assert default_convention(1 << 17) == "gptq-4096"
    assert windows("x" * 600, TOK, None, 512).convention == "gptq-512"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gptq", "allowed: stories-256, gptq-N, llamacpp-N"),
        ("gptq-0", "unknown"),
        ("gptq-1", "scores no token"),
        ("llamacpp-3", "scores no token"),
        ("stories-128", "unknown"),
        ("gptq-2048", "at most the model's context, 512"),
        ("gptq--4", "unknown"),
    ],
)
def test_bad_names(name, says):
    with pytest.raises(InputError, match=says):
        parse(name, 512)


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ("", "gptq-4", "empty"),
        ("  \n", "stories-256", "empty"),
        ([], "gptq-4", "empty"),
        ("ab", "gptq-4", r"3 tokens \(needed: at least 4, one window of gptq-4"),
        ("ab", "stories-256", "1 stories, none over 200"),
    ],
)
def test_bad_texts(text, name, says):
    with pytest.raises(InputError, match=says):
        windows(text, TOK, name)
