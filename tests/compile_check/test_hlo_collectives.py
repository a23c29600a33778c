"""Collectives are counted in compiled text: one that can be counted by hand, and a program of four devices."""

import subprocess
import sys
from pathlib import Path

from running import ROOT, environment

from udm_grpo.compile_check.hlo_collectives import Collective, collectives, type_bytes

TEXT = """
HloModule page

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%condition (state: (s32[], f32[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(28)
  %state = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%inner (p: bf16[16,128]) -> bf16[2,128] {
  %p = bf16[16,128]{1,0} parameter(0)
  ROOT %part = bf16[2,128]{1,0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

%body (state.1: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %state.1 = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %value = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%state.1), index=1
  %whole = (f32[8,128], f32[64,128]) all-gather-start(%value), channel_id=3, dimensions={0}
  %gathered = f32[64,128]{1,0} all-gather-done(%whole)
  %twice = ((bf16[16,128]), bf16[2,128]) async-start(%value), calls=%inner
  %again = (s32[]) while(%state.1), condition=%known, body=%deep, backend_config={"known_trip_count":{"n":"3"}}
  %piece = f32[64,128]{1,0} fusion(%gathered), calls=%spread
  %two = s32[] constant(2)
  %count = s32[] get-tuple-element(%state.1), index=0
  %more = s32[] add(%count, %two)
  ROOT %next = (s32[], f32[8,128]) tuple(%more, %value)
}

%spread (q: f32[8,128]) -> f32[64,128] {
  %q = f32[8,128] parameter(0)
  ROOT %also = f32[64,128] all-gather(%q), channel_id=3, dimensions={0}
}

%known (s: (s32[], f32[8,128])) -> pred[] {
  ROOT %yes = pred[] constant(true)
}

%offloaded (r: f32[2,8]) -> f32[16,8] {
  %r = f32[2,8] parameter(0)
  ROOT %far = f32[16,8] all-to-all(%r), dimensions={0}
}

%deep (s.1: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %s.1 = (s32[], f32[8,128]) parameter(0)
  %four = f32[4] constant({0, 0, 0, 0})
  %moved = (f32[4], f32[4]) collective-permute-start(%four), source_target_pairs={{0,1},{1,0}}
  ROOT %same = (s32[], f32[8,128]) tuple(%s.1)
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %off = ((f32[2,8], token[]), f32[16,8]) call-start(%a), async_execution_thread="sparsecore", to_apply=%offloaded
  %all = f32[8,128]{1,0} all-reduce(%a), to_apply=%add
  %loop = (s32[], /*index=1*/f32[8,128]{1,0}) while(%all), condition=%condition, body=%body
  ROOT %out = f32[8,128]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_page_that_can_be_counted_by_hand():
    totals = collectives(TEXT)
    assert totals["all-reduce"] == Collective(1, 8 * 128 * 4)
    # The loop counts to 28 in steps of two, so it runs 14 times; the second piece of the gather is the same gather.
    assert totals["all-gather"] == Collective(14, 14 * 64 * 128 * 4)
    assert totals["reduce-scatter"] == Collective(14, 14 * 16 * 128 * 2)
    assert totals["collective-permute"] == Collective(14 * 3, 14 * 3 * 4 * 4)
    assert totals["all-to-all"] == Collective(1, 16 * 8 * 4)  # handed to the SparseCores
    assert len(totals) == 5


SHARD_MAP = """
%spread (q: f32[3]) -> f32[6] {
  %q = f32[3] parameter(0)
  ROOT %also = f32[6] all-gather(%q), channel_id=1, dimensions={0}
}

ENTRY %main (a: f32[8], b: f32[8], c: f32[3]) -> f32[8] {
  %a = f32[8] parameter(0)
  %b = f32[8] parameter(1)
  %c = f32[3] parameter(2)
  %one = f32[8] all-reduce(%a), channel_id=1, to_apply=%add
  %two = f32[8] all-reduce(%b), channel_id=1, to_apply=%add
  %three = f32[6] all-gather(%c), channel_id=1, dimensions={0}
  %piece = f32[6] fusion(%c), calls=%spread
  ROOT %four = f32[2] reduce-scatter(%two), channel_id=1, to_apply=%add
}
"""


def test_collectives_of_a_shard_map_share_a_channel_and_are_counted_apart():
    totals = collectives(SHARD_MAP)
    assert totals == {
        "all-reduce": Collective(2, 2 * 8 * 4),
        "all-gather": Collective(1, 6 * 4),
        "reduce-scatter": Collective(1, 8 * 4),
    }


def test_bytes_of_types():
    assert type_bytes("bf16[32,1345]{1,0:T(8,128)(2,1)}") == 32 * 1345 * 2
    assert type_bytes("(s32[]{:T(128)}, f8e4m3fn[7], pred[5])") == 4 + 7 + 5
    assert type_bytes("s4[3]") == 2
    assert collectives("HloModule nothing") == {}


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from udm_grpo.compile_check.hlo_collectives import collectives
mesh = Mesh(np.array(jax.devices()), ("x",))
rows, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("x"), PartitionSpec()))

def gathers(turns):
    def body(c, w):
        c = jax.lax.with_sharding_constraint(c @ w, rows)
        return jax.lax.with_sharding_constraint(c, whole) * 2, None
    loop = lambda w: jax.lax.scan(lambda c, _: body(c, w), jnp.ones((8, 16)), None, length=turns)[0]
    text = jax.jit(loop, in_shardings=whole, out_shardings=whole).lower(jnp.ones((16, 16))).compile().as_text()
    totals = collectives(text)
    assert set(totals) == {"all-gather"}, totals
    return totals["all-gather"]

few, many = gathers(7), gathers(17)
print(many.count - few.count, many.bytes - few.bytes)
"""


def test_a_gather_in_a_loop_counts_each_turn(tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment(4), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["10", str(10 * 8 * 16 * 4)]
