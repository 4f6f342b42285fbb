"""Slow readers of other runtimes' folders, written from the layouts' descriptions alone: numpy, and nothing of lowbit.

Each takes a folder's tensors and `config.json` and gives `(rotated, dense)` of the weight at `path` `[out, in]`: the
values that the codes stand for, exact, before any scale or transform (None where there is none), and the weight in
float64.
"""

import itertools

import numpy as np


def sylvester(n: int) -> np.ndarray:
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    assert len(h) == n
    return h / np.sqrt(n)


# -- codebooks --------------------------------------------------------------------------------------------------------


def aqlm(tensors, config, path, shape):
    c = config["quantization_config"]
    assert c["quant_method"] == "aqlm" and c["out_group_size"] == 1
    M, B, G = c["num_codebooks"], c["nbits_per_codebook"], c["in_group_size"]
    codes, books, scales = (tensors[f"{path}.{k}"] for k in ("codes", "codebooks", "scales"))
    assert codes.dtype == (np.int8 if B <= 8 else np.int16) and codes.shape == (shape[0], shape[1] // G, M)
    assert codes.min() >= -(2 ** (B - 1)) and codes.max() < 2 ** (B - 1)
    assert books.dtype == scales.dtype == np.float16
    assert books.shape == (M, 2**B, 1, G) and scales.shape == (shape[0], 1, 1, 1)
    w = np.zeros((shape[0], shape[1] // G, G))
    for m in range(M):
        w += books[m, codes[..., m].astype(int) % 2**B, 0].astype(np.float64)
    return None, (w * scales[:, :, 0].astype(np.float64)).reshape(shape)


def vptq(tensors, config, path, shape):
    quant = config["quantization_config"]
    assert quant["quant_method"] == "vptq"
    c = quant["config_for_layers"][path]
    assert [c["out_features"], c["in_features"]] == list(shape) and c["group_num"] == 1 and c["is_indice_packed"]
    V, K, R = c["vector_lens"][1], c["num_centroids"][1], max(c["num_res_centroids"][1], 1)
    bits, rest = K.bit_length() - 1, R.bit_length() - 1
    words = tensors[f"{path}.indices"]
    assert words.dtype == np.int32 and words.shape == (1, shape[0] // V, -(-shape[1] * (bits + rest) // 32))
    book = tensors[f"{path}.centroids.weight"].reshape(K, V).astype(np.float64)
    w = np.zeros(shape)
    for n, row in enumerate(words[0].view(np.uint32)):
        stream = sum(int(word) << (32 * i) for i, word in enumerate(row))
        for i in range(shape[1]):
            code = stream >> (i * (bits + rest)) & (K * R - 1)
            w[n * V : (n + 1) * V, i] = book[code & (K - 1)]
            if R > 1:
                w[n * V : (n + 1) * V, i] += tensors[f"{path}.res_centroids.weight"].reshape(R, V)[code >> bits]
    if c["enable_norm"]:
        assert not tensors[f"{path}.weight_bias"].any()
        w = w * tensors[f"{path}.weight_scale"].astype(np.float64)
    return None, w


# -- trellises --------------------------------------------------------------------------------------------------------


def half(bits: int) -> np.float16:
    return np.array(bits, np.uint16).view(np.float16)[()]


def computed(code: str, state: int) -> float:
    """The value of a state of a computed code."""
    multiply, add = {
        "1mad": (34038481, 76625530),
        "3inst": (89226354, 64248484),
        "mcg": (0xCBAC1FED, 0),
        "mul1": (0x83DCD12D, 0),
    }[code]
    y = (state * multiply + add) % 2**32
    total = sum(y >> shift & 255 for shift in (0, 8, 16, 24))
    if code == "1mad":
        return (total - 510) / 147.800537109375
    if code == "mul1":  # a fused product and sum: rounded once
        return float(np.float16(float(half(0x6400 + total)) * float(half(0x1EEE)) + float(half(0xC931))))
    y = (y & 0x8FFF8FFF) ^ 0x3B603B60
    return float(half(y >> 16) + half(y & 0xFFFF))


def windows(stream: str, first: int, step: int, L: int) -> list[int]:
    """L bits each, from `first`, `first + step`, ... on, of a circle of bits."""
    n = len(stream)
    return [int("".join(stream[(at + i) % n] for i in range(L)), 2) for at in range(first, first + n, step)]


def exl3(tensors, config, path, shape):
    assert config["quantization_config"]["quant_method"] == "exl3"
    trellis, suh, svh = (tensors[f"{path}.{k}"] for k in ("trellis", "suh", "svh"))
    O, I = shape
    K = trellis.shape[2] // 16
    assert trellis.dtype == np.int16 and trellis.shape == (I // 16, O // 16, 16 * K)
    assert suh.dtype == svh.dtype == np.float16 and suh.shape == (I,) and svh.shape == (O,)
    marked = [c for c in ("mcg", "mul1") if f"{path}.{c}" in tensors]
    code = marked[0] if marked else "3inst"
    if marked:
        marker = tensors[f"{path}.{code}"]
        assert marker.dtype == np.int32 and marker.shape == ()
        assert int(marker) % 2**32 == {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}[code]
    order = []  # (row, column) of a tile [in, out] in the order of the path
    for t in range(32):
        rows, columns = [t % 4 * 2 + r for r in (0, 1, 8, 9)], (t // 4, t // 4 + 8)
        order += [(r, c) for c in columns for r in rows]
    value, q = {}, np.zeros((I, O))
    for i, o in itertools.product(range(I // 16), range(O // 16)):
        words = trellis[i, o].view(np.uint16)
        stream = "".join(f"{int(words[n ^ 1]):016b}" for n in range(len(words)))  # 32-bit words, halves swapped
        for state, (r, c) in zip(windows(stream, K - 16, K, 16), order, strict=True):  # windows end with a step's bits
            if state not in value:
                value[state] = computed(code, state)
            q[16 * i + r, 16 * o + c] = value[state]
    H = sylvester(128)
    w = np.einsum("ab,nbm->nam", H, q.reshape(-1, 128, O)).reshape(I, O) * suh.astype(np.float64)[:, None]
    w = np.einsum("ab,mnb->mna", H, w.reshape(I, -1, 128)).reshape(I, O) * svh.astype(np.float64)
    return q.T, w.T


def qtip(tensors, config, path, shape):
    p = config["quip_params"]
    O, I = shape
    L, K, V = p["L"], p["K"], p["V"]
    K = p.get("K_v_proj", K) if path.endswith("v_proj") else K
    assert p["td_x"] == p["td_y"] == 16
    trellis, su, sv = (tensors[f"{path}.{k}"] for k in ("trellis", "SU", "SV"))
    assert trellis.dtype == np.int16 and trellis.shape == (O * I // 256, 16 * K)
    assert su.dtype == np.float16 and sv.dtype == np.float32 and su.shape == (I,) and sv.shape == (O,)
    assert int(tensors[f"{path}.rcp"]) == 0 and int(tensors[f"{path}.tp_rank"]) == 8
    kernel = p["decode_mode"] == "quantlut_sym" and (L, V) == (16, 2) and K in (2, 3, 4)
    order = np.arange(256)
    data = trellis.reshape(-1).view(np.uint8)
    if kernel:
        # A group is 2 x 2 tiles; for each of 32 parts, the two rows of tiles within the two columns, K bytes of each.
        n, tiles = 0, np.zeros((O // 16, I // 16, 32, K), np.uint8)
        for m, k, part, column, row in np.ndindex(O // 32, I // 32, 32, 2, 2):
            tiles[2 * m + row, 2 * k + column, part] = data[n : n + K][::-1]
            n += K
        data = tiles.reshape(len(trellis), -1)
        order = np.arange(256).reshape(2, 8, 2, 4, 2).transpose(1, 3, 2, 0, 4).reshape(-1)
    else:
        data = data.reshape(len(trellis), -1, 2)[..., ::-1].reshape(len(trellis), -1)  # the high byte comes first
    table = tensors[f"{path}.tlut"].astype(np.float64) if f"{path}.tlut" in tensors else None

    def values(state: int) -> list[float]:
        if p["decode_mode"] == "lut":
            return list(table[state])
        if p["decode_mode"] == "quantlut_sym":
            h = state * (state + 1)
            first, second = table[h >> (16 - p["tlut_bits"] - 1) & (2 ** p["tlut_bits"] - 1)]
            return [-first if h >> 15 & 1 else first, second]
        return [computed(p["decode_mode"], state)]

    q = np.zeros(shape)
    for tile, own in enumerate(data):
        stream = "".join(f"{int(byte):08b}" for byte in own)
        found = np.array([values(s) for s in windows(stream, 0, K * V, L)]).reshape(-1)
        block = np.zeros(256)
        block[order] = found
        r, c = divmod(tile, I // 16)
        q[16 * r : 16 * r + 16, 16 * c : 16 * c + 16] = block.reshape(16, 16)
    return q, sv.astype(np.float64)[:, None] * (sylvester(O) @ q @ sylvester(I)) * su.astype(np.float64)


# -- lattices ---------------------------------------------------------------------------------------------------------

NORM_12 = """31113333 13113333 11313333 11133333 33313311 33313131 33311331 33313113 33311313 33311133
33133311 33133131 33131331 33133113 33131313 33131133 31333311 31333131 31331331 31333113
31331313 13331133 13333311 13333131 13331331 13333113 13331313 11331333 33113331"""


def e8p_points() -> np.ndarray:
    """The 65 536 points of E8P by code, from the table of magnitudes."""
    half = np.array(list(itertools.product((0.5, 1.5, 2.5), repeat=8)))
    rows = half[(half**2).sum(axis=1) <= 10]
    rows = np.concatenate([rows, [[int(c) / 2 for c in word] for word in NORM_12.split()]])
    assert rows.shape == (256, 8)
    rows = rows[:, [0, 2, 4, 6, 1, 3, 5, 7]]
    rows[:, 7] *= 1 - 2 * (rows.sum(axis=1) % 2)
    shuffle = [0, 4, 1, 5, 2, 6, 3, 7]
    out = np.zeros((65536, 8))
    for code in range(65536):
        sign, odd = code & 255, bin(code & 255).count("1") % 2
        sign ^= odd
        flips = [-1 if sign >> i & 1 else 1 for i in shuffle]
        out[code] = rows[code >> 8, shuffle] * flips + (-0.25 if odd else 0.25)
    return out


def e8_points() -> np.ndarray:
    """The 256 points of the second stage of 3 bits."""
    whole = [v for v in itertools.product(range(-1, 2), repeat=8) if sum(v) % 2 == 0 and sum(x * x for x in v) <= 2]
    halves = [v for v in itertools.product((-0.5, 0.5), repeat=8) if sum(v) % 2 == 0]
    return np.concatenate([whole, halves, 2 * np.eye(8), -2 * np.eye(8)[:7]])


def quip(tensors, config, path, shape, points=[]):  # noqa: B006
    if not points:
        points += [e8p_points(), e8_points()]
    p = config["quip_params"]
    O, I = shape
    words, su, sv, scale = (tensors[f"{path}.{k}"] for k in ("Qidxs", "SU", "SV", "Wscale"))
    ids = {"E8P12": 7, "E8P12RVQ4B": 17, "E8P12RVQ3B": 18}
    assert int(tensors[f"{path}.codebook_id"]) == ids[p["codebook"]] and p["codesz"] == 8
    assert words.dtype == np.int64 and words.shape == (O, int(I / (8 * p["packsz"])))
    assert su.dtype == sv.dtype == np.float16 and scale.dtype == np.float32 and scale.shape == ()

    def first(words: np.ndarray) -> np.ndarray:
        """A word: bytes of the table of 2 rows x 2 vectors below, their sign bits above; 8 x 4 words for 16 rows."""
        out = np.zeros((O, I))
        flat = iter(words.reshape(-1))
        for block, eight, pair, quarter in np.ndindex(O // 16, I // 64, 8, 4):
            word = int(next(flat)) % 2**64
            for k in range(4):
                sign = sum((word >> (32 + 4 * j + k) & 1) << j for j in range(8))
                row, vector = 16 * block + 2 * pair + k % 2, 8 * eight + 2 * quarter + k // 2
                out[row, 8 * vector : 8 * vector + 8] = points[0][(word >> (8 * k) & 255) << 8 | sign]
        return out

    n = I // 32
    q = first(words[:, :n])
    if p["codebook"] == "E8P12RVQ4B":
        q = q + first(words[:, n:]) / p["resid_scale_override"]
    elif p["codebook"] == "E8P12RVQ3B":
        codes = np.ascontiguousarray(words[:, n:]).view(np.uint8)
        q = q + points[1][codes].reshape(O, I) / p["resid_scale_override"]
    w = sv.astype(np.float64)[:, None] * (sylvester(O) @ (float(scale) * q) @ sylvester(I)) * su.astype(np.float64)
    return q, w
