"""Attention over the parts of a causal pattern, forward and backward, one online-softmax loop nest for all of them.

Forward::

    for each batch and head, each tile of BLOCK_M queries, the last ones first as they see most:      (one program)
        for each of the parts (mst_compile.rules.patterns.Parts):
            a run: tiles of BLOCK_N keys that every query sees; tiles that only some see, masked
            summaries: tiles of summary keys, gathered from the ends of the chunks before
            distances: one key a query at each distance, a row-wise dot of two [BLOCK_M, size] tiles
            update maxima, denominators and the weighted sum of values

The backward pass recomputes the probabilities: one kernel walks the keys of a query tile for grad-query, another the
queries of a key tile, and the heads of its group, for grad-key and grad-value. Nothing is added by atomics. The latter
takes one part a launch, as a key may be a summary and in a run, and the lowering adds their shares; the former takes
distances in a launch of their own, as row-wise dots want small tiles.

Arithmetic intensity: a key tile costs ``4 BLOCK_M BLOCK_N size`` operations for ``2 BLOCK_N size`` elements, so it is
bound by the tensor core; a row-wise dot costs 4 operations for the same elements as 2, and is bound by L2. A tile of
keys at distances would cost BLOCK_N times the operations of its row-wise dot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

from mst_compile.rules.patterns import Parts

_FAR = 2**30  # further than any two positions, which are int32 here


@dataclass(frozen=True)
class AttentionTile:
    """``queries`` by ``keys``."""

    queries: int
    keys: int
    warps: int
    stages: int


def constants(parts: Parts) -> dict[str, int]:
    """The parts as constants of the templates: their numbers, and whether the window holds all keys."""
    numbers = {name.upper(): min(number, _FAR) for name, number in vars(parts).items()}
    return numbers | {"UNBOUNDED": parts.window >= _FAR}


def tiles(size: int, kind: str, which: str, parts: Parts) -> list[AttentionTile]:
    """Tiles to choose from for a head size, ``kind`` ("half", "tf32" or "ieee", see tiles.py), kernel ("forward",
    "grad_query" or "grad_key_value") and its parts."""
    column = 0 if size <= 64 else 1 if size <= 128 else 2
    rows_alone = which != "forward" and parts.step and len(parts.alone()) == 1
    return [AttentionTile(*tile) for tile in _TILES["rows" if rows_alone else which, kind][column]]


# Columns: head sizes up to 64, 128 and 256. Every one is cross-compiled for sm_90 by the test suite and must not spill
# more than one register.
_TILES: dict[tuple[str, str], list[list[tuple[int, int, int, int]]]] = {
    ("forward", "half"): [[(64, 64, 4, 3), (128, 64, 8, 3)], [(64, 64, 8, 2), (64, 32, 4, 2)], [(32, 32, 8, 2)]],
    ("grad_query", "half"): [[(64, 64, 4, 3), (128, 64, 8, 3)], [(64, 64, 8, 2), (128, 64, 8, 2)], [(64, 32, 8, 2)]],
    ("grad_key_value", "half"): [[(32, 128, 8, 2), (32, 64, 4, 2)], [(32, 64, 8, 2), (16, 64, 8, 2)], [(32, 32, 8, 1)]],
    ("rows", "half"): [[(64, 64, 4, 2)], [(32, 32, 4, 2)], [(16, 16, 4, 2)]],
    ("forward", "tf32"): [[(64, 32, 4, 2)], [(64, 32, 8, 2)]],
    ("grad_query", "tf32"): [[(64, 32, 4, 2)], [(64, 32, 8, 2)]],
    ("grad_key_value", "tf32"): [[(32, 64, 4, 2)], [(32, 32, 8, 1)]],
    ("rows", "tf32"): [[(64, 64, 4, 2)], [(32, 32, 4, 2)]],
    ("forward", "ieee"): [[(32, 32, 4, 2)], [(16, 16, 4, 1)]],
    ("grad_query", "ieee"): [[(32, 16, 4, 1)], [(16, 16, 4, 1)]],
    ("grad_key_value", "ieee"): [[(16, 16, 4, 1)], [(16, 16, 8, 1)]],
    ("rows", "ieee"): [[(64, 64, 4, 2)], [(32, 32, 4, 2)]],
}  # fmt: skip

# Constants that the lowering gives: those of the parts; SCALE, HEADS, GROUP (heads a key head), SIZE and BLOCK_D (head
# size, and the power of two from it), NAMES (of the operands), *_STRIDE (elements between positions), KEY_MASK (whether
# there is one); and the tile: BLOCK_M, BLOCK_N, PRECISION. Strings are in quotes, as they also become Triton constants.
_COMMON = r"""
{% macro base(name, which) %}{{name}} + batch * {{stride(name, 0)}} + {{which}} * {{stride(name, 1)}}{% endmacro %}
{% set d_inside = "(d < SIZE)" if SIZE != BLOCK_D else "" %}
{% macro rows_of(pointer, row_stride, position, guard) -%}
tl.load({{pointer}} + {{position}}[:, None] * {{row_stride}} + d[None, :]
{%- set conditions = ([guard ~ "[:, None]"] if guard else []) + ([d_inside ~ "[None, :]"] if d_inside else []) -%}
{{ ", mask=" ~ conditions | join(" & ") ~ ", other=0.0" if conditions else "" }})
{%- endmacro %}
{% macro columns_of(pointer, row_stride, position, guard) -%}
tl.load({{pointer}} + {{position}}[None, :] * {{row_stride}} + d[:, None]
{%- set conditions = ([guard ~ "[None, :]"] if guard else []) + ([d_inside ~ "[:, None]"] if d_inside else []) -%}
{{ ", mask=" ~ conditions | join(" & ") ~ ", other=0.0" if conditions else "" }})
{%- endmacro %}
{# Whether query q sees key n of a part, for tensors q and n that broadcast. #}
{% macro sees(q, n, part) -%}
{%- if part == "summary" -%} ({{n}} < {{q}} // SUMMARY * SUMMARY)
{%- elif UNBOUNDED -%} ({{n}} <= {{q}})
{%- elif WINDOW -%} ({{n}} <= {{q}}) & ({{q}} - {{n}} < WINDOW)
{%- else -%} ({{n}} <= {{q}}) & ({{n}} // CHUNK == {{q}} // CHUNK)
{%- endif -%}
{%- endmacro %}
{% macro key_visible(n) -%}
tl.load(VISIBLE + batch * LENGTH + {{n}}, mask=({{n}} >= 0) & ({{n}} < LENGTH), other=0) != 0
{%- endmacro %}
"""

# The keys of a query tile: `tile` is a macro of the part that does a key tile at positions n ("" where every query sees
# all of it), `row` one of nothing that does one key a query at positions n.
_OVER_KEYS = r"""
{% macro over_keys(tile, row) %}
    first = pid * BLOCK_M
    last = min(first + BLOCK_M, LENGTH)
{% if CHUNK %}
    # All masked, as few tiles are not: further loops would cost registers.
    for start in range(first // CHUNK * CHUNK // BLOCK_N * BLOCK_N, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
{{tile("run")}}
{% elif WINDOW %}
{% if UNBOUNDED %}
    whole = 0
{% else %}
    low = max(first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    # From here to the first query every query sees every key.
    whole = max(min(tl.cdiv(max(last - WINDOW, 0), BLOCK_N) * BLOCK_N, first), low)
    for start in range(low, whole, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
{{tile("run")}}
{% endif %}
    for start in range(whole, first, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
{{tile("")}}
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
{{tile("run")}}
{% endif %}
{% if SUMMARY %}
    for start in range(0, (last - 1) // SUMMARY, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)) * SUMMARY + (SUMMARY - 1)
{{tile("summary")}}
{% endif %}
{% if STEP %}
    for back in range(FIRST, last, STEP):
        n = rows - back
{{row()}}
{% endif %}
{% endmacro %}
"""

_QUERY_TILE = r"""
    LENGTH = {{size("Q", 2)}}
    pid = tl.cdiv(LENGTH, BLOCK_M) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // HEADS).to(INDEX_DTYPE)
    head = tl.program_id(1) % HEADS
    k_base = {{base("K", "(head // GROUP)")}}
    v_base = {{base("V", "(head // GROUP)")}}
    d = tl.arange(0, BLOCK_D)
    rows = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows < LENGTH
    q_base = {{base("Q", "head")}}
    q = {{rows_of("q_base", "Q_STRIDE", "rows", "row_inside")}}
    SCALE_2: tl.constexpr = SCALE * 1.4426950408889634  # exponentials are powers of 2
"""

_MASKED = r"""
{% macro visible_scores(part) %}
{% set conditions = ([sees("rows[:, None]", "n[None, :]", part)] if part else [])
   + (["visible[None, :]"] if KEY_MASK else []) %}
{% if KEY_MASK %}
        visible = {{key_visible("n")}}
{% endif %}
{% if conditions %}
        s = tl.where({{conditions | join(" & ")}}, s, float("-inf"))
{% endif %}
{% endmacro %}
{% macro one_key_a_query() %}
        seen = (n >= 0) & row_inside{{" & (" ~ key_visible("n") ~ ")" if KEY_MASK else ""}}
        k = {{rows_of("k_base", "K_STRIDE", "n", "seen")}}
        v = {{rows_of("v_base", "V_STRIDE", "n", "seen")}}
        s = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * SCALE_2
        s = tl.where(seen, s, float("-inf"))
{% endmacro %}
"""

_STORE_ROWS = r"""
    idx_b = batch
    idx_h = head
    idx_t = rows[:, None]
    idx_d = d[None, :]
    mask = row_inside[:, None] & (idx_d < SIZE)
    {{store_output(("idx_b", "idx_h", "idx_t", "idx_d"), "acc", "mask", val_shape=("BLOCK_M", "BLOCK_D"))}}
"""

FORWARD = (
    _COMMON
    + _OVER_KEYS
    + _MASKED
    + r"""
{{def_kernel(*NAMES[1:-1].split(","))}}
"""
    + _QUERY_TILE
    + r"""
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
{% macro rescale(s, axis) %}
        new = tl.maximum(top, {{"tl.max(s, 1)" if axis else "s"}})
        held = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet
        p = tl.exp2(s - held{{"[:, None]" if axis else ""}})
        shrink = tl.exp2(top - held)
        total = total * shrink + {{"tl.sum(p, 1)" if axis else "p"}}
        acc = acc * shrink[:, None]
        top = new
{% endmacro %}
{% macro tile(part) %}
        n_inside = n < LENGTH
        k = {{columns_of("k_base", "K_STRIDE", "n", "n_inside" if part else "")}}
        s = tl.dot(q, k, input_precision=PRECISION) * SCALE_2
{{visible_scores(part)}}
{{rescale("s", True)}}
        v = {{rows_of("v_base", "V_STRIDE", "n", "n_inside" if part else "")}}
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
{% endmacro %}
{% macro row() %}
{{one_key_a_query()}}
{{rescale("s", False)}}
        acc += p[:, None] * v.to(tl.float32)
{% endmacro %}
{{over_keys(tile, row)}}
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    lse = tl.where(total == 0.0, float("-inf"), (top + tl.log2(total)) * 0.6931471805599453)
    tl.store(LSE + tl.program_id(1) * LENGTH + rows, lse, mask=row_inside)
"""
    + _STORE_ROWS
)

GRAD_QUERY = (
    _COMMON
    + _OVER_KEYS
    + _MASKED
    + r"""
{{def_kernel(*NAMES[1:-1].split(","))}}
"""
    + _QUERY_TILE
    + r"""
    do_base = {{base("DO", "head")}}
    do = {{rows_of("do_base", "DO_STRIDE", "rows", "row_inside")}}
    lse = tl.load(LSE + tl.program_id(1) * LENGTH + rows, mask=row_inside, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse) * 1.4426950408889634
    delta = tl.load(DELTA + tl.program_id(1) * LENGTH + rows, mask=row_inside, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
{% macro tile(part) %}
        n_inside = n < LENGTH
        k = {{columns_of("k_base", "K_STRIDE", "n", "n_inside" if part else "")}}
        v = {{columns_of("v_base", "V_STRIDE", "n", "n_inside" if part else "")}}
        s = tl.dot(q, k, input_precision=PRECISION) * SCALE_2
{{visible_scores(part)}}
        p = tl.exp2(s - lse[:, None])
        ds = p * (tl.dot(do, v, input_precision=PRECISION) - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), tl.trans(k), acc, input_precision=PRECISION)
{% endmacro %}
{% macro row() %}
{{one_key_a_query()}}
        p = tl.exp2(s - lse)
        ds = p * (tl.sum(do.to(tl.float32) * v.to(tl.float32), 1) - delta)
        acc += ds[:, None] * k.to(tl.float32)
{% endmacro %}
{{over_keys(tile, row)}}
    acc = acc * SCALE
"""
    + _STORE_ROWS
)

GRAD_KEY_VALUE = (
    _COMMON
    + r"""
{{def_kernel(*NAMES[1:-1].split(","))}}
    LENGTH = {{size("Q", 2)}}
    batch = (tl.program_id(1) // (HEADS // GROUP)).to(INDEX_DTYPE)
    kv_head = tl.program_id(1) % (HEADS // GROUP)
    pid = tl.program_id(0)  # the first keys, which most queries see, come first
    d = tl.arange(0, BLOCK_D)
    number = pid * BLOCK_N + tl.arange(0, BLOCK_N)
{% if SUMMARY %}
    n = number * SUMMARY + (SUMMARY - 1)
    first = pid * BLOCK_N * SUMMARY + SUMMARY
    COUNT = LENGTH // SUMMARY
{% else %}
    n = number
    first = pid * BLOCK_N
    COUNT = LENGTH
{% endif %}
    n_inside = number < COUNT
    last = min(first + BLOCK_N, LENGTH)
    k_base = {{base("K", "kv_head")}}
    v_base = {{base("V", "kv_head")}}
    k = {{rows_of("k_base", "K_STRIDE", "n", "n_inside")}}
    v = {{rows_of("v_base", "V_STRIDE", "n", "n_inside")}}
{% if KEY_MASK %}
    visible = n_inside & ({{key_visible("n")}})
{% else %}
    visible = n_inside
{% endif %}
    SCALE_2: tl.constexpr = SCALE * 1.4426950408889634
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
{% macro queries(guard) %}
            q = {{rows_of("q_base", "Q_STRIDE", "rows", guard)}}
            do = {{rows_of("do_base", "DO_STRIDE", "rows", guard)}}
            # A query past the end has probability exp(-inf) = 0.
            lse = tl.load(LSE + line + rows, mask={{guard}}, other=float("inf"))
            lse = tl.where(lse == float("-inf"), 0.0, lse) * 1.4426950408889634
            delta = tl.load(DELTA + line + rows, mask={{guard}}, other=0.0)
{% endmacro %}
{% macro tile(part) %}
            rows = start + tl.arange(0, BLOCK_M)
            row_inside = rows < LENGTH
{{queries("row_inside")}}
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * SCALE_2
            seen = visible[:, None]{{" & " ~ sees("rows[None, :]", "n[:, None]", part) if part else ""}}
            p = tl.where(seen, tl.exp2(s - lse[None, :]), 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
{% endmacro %}
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        q_base = {{base("Q", "head")}}
        do_base = {{base("DO", "head")}}
        line = (batch * HEADS + head) * LENGTH
{% if SUMMARY %}
        for start in range(first // BLOCK_M * BLOCK_M, LENGTH, BLOCK_M):
{{tile("summary")}}
{% elif STEP %}
        for ahead in range(FIRST, LENGTH - first, STEP):
            rows = n + ahead
            row_inside = visible & (rows < LENGTH)
{{queries("row_inside")}}
            s = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * SCALE_2
            p = tl.where(row_inside, tl.exp2(s - lse), 0.0)
            dv += p[:, None] * do.to(tl.float32)
            ds = p * (tl.sum(do.to(tl.float32) * v.to(tl.float32), 1) - delta)
            dk += ds[:, None] * q.to(tl.float32)
{% elif UNBOUNDED %}
        border = min(tl.cdiv(last, BLOCK_M) * BLOCK_M, LENGTH)
        for start in range(first // BLOCK_M * BLOCK_M, border, BLOCK_M):
{{tile("run")}}
        for start in range(border, LENGTH, BLOCK_M):
{{tile("")}}
{% else %}
{% set until = "last + WINDOW - 1" if WINDOW else "((last - 1) // CHUNK + 1) * CHUNK" %}
        for start in range(first // BLOCK_M * BLOCK_M, min({{until}}, LENGTH), BLOCK_M):
{{tile("run")}}
{% endif %}
    dk = dk * SCALE
    place = ((batch * COUNT + number[:, None]) * (HEADS // GROUP) + kv_head) * SIZE + d[None, :]
    mask = n_inside[:, None] & (d < SIZE)[None, :]
    tl.store(DV + place, dv.to(DV.dtype.element_ty), mask=mask)
    idx_b = batch
    idx_h = kv_head
    idx_t = number[:, None]
    idx_d = d[None, :]
    {{store_output(("idx_b", "idx_h", "idx_t", "idx_d"), "dk", "mask", val_shape=("BLOCK_N", "BLOCK_D"))}}
"""
)


@SymbolicGridFn
def _query_grid(b: Any, h: Any, t: Any, _: Any, meta: dict[str, Any], *, cdiv: Callable[..., Any]) -> tuple:
    return cdiv(t, meta["BLOCK_M"]), b * h, 1


@SymbolicGridFn
def _key_grid(b: Any, h: Any, t: Any, _: Any, meta: dict[str, Any], *, cdiv: Callable[..., Any]) -> tuple:
    return cdiv(t, meta["BLOCK_N"]), b * h, 1


forward = TritonTemplate(name="mst_attention", grid=_query_grid, source=FORWARD)
grad_query = TritonTemplate(name="mst_attention_grad_query", grid=_query_grid, source=GRAD_QUERY)
grad_key_value = TritonTemplate(name="mst_attention_grad_key_value", grid=_key_grid, source=GRAD_KEY_VALUE)
