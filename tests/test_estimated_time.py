"""lorweb_jax.plan's estimated times: hand-written texts of compiled programs against arithmetic by hand."""

import pytest

from lorweb_jax.planning import collectives, estimated_time, gpu_time, tpu_time
from lorweb_jax.planning.chips import GPUS, TPUS
from lorweb_jax.planning.collectives import Traffic
from lorweb_jax.planning.estimated_time import COLLECTIVES, costs
from lorweb_jax.planning.hlo import operand_shapes, parse, places


def seconds(text, chip, devices, model):
    """{(kind, phase): seconds} of what takes any."""
    total = estimated_time.table(costs(text, chip, devices, model))
    return {(kind, phase): value for kind, phases in total.items() for phase, value in phases.items() if value}


GPU_HLO = """
%fused_gelu (p.1: bf16[8,64]) -> bf16[8,64] {
  %p.1 = bf16[8,64]{1,0} parameter(0)
  ROOT %tanh.1 = bf16[8,64]{1,0} tanh(%p.1)
}

%fused_copy (p.2: bf16[4,8,64]) -> bf16[8,64] {
  %p.2 = bf16[4,8,64]{2,1,0} parameter(0)
  ROOT %slice.1 = bf16[1,8,64]{2,1,0} dynamic-slice(%p.2, %i)
}

%body (p.3: (bf16[4,8,64])) -> (bf16[4,8,64]) {
  %w = bf16[8,64]{1,0} fusion(%p.3), kind=kLoop, calls=%fused_copy, backend_config={"custom":"dynamic_memcpy"}
  %y = bf16[8,64]{1,0} custom-call(%w), custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(f)/jvp(blocks)/dot"}, backend_config={"reification_cost":[\
{"exec_time_us":90.0,"name":""},{"exec_time_us":7.0,"name":"sol"}],"x":1}
  %a = (bf16[1,2,50,128]{3,2,1,0}, u8[0]{0}) custom-call(%y), custom_call_target="__cudnn$fmhaSoftmaxBackward", \
metadata={op_name="jit(f)/transpose(jvp(blocks))/dot_product_attention_bwd"}, backend_config={\
"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["1", "2", "50", "60"]}}
  %k = bf16[8,64]{1,0} custom-call(%y), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(f)/jvp(blocks)/pallas_call"}
  ROOT %g = bf16[8,64]{1,0} fusion(%k), kind=kLoop, calls=%fused_gelu, \
metadata={op_name="jit(f)/transpose(jvp(blocks))/rematted_computation/gelu"}
}

ENTRY %main (p.4: bf16[4,8,64]) -> bf16[8,64] {
  %p.4 = bf16[4,8,64]{2,1,0} parameter(0)
  ROOT %loop = (bf16[4,8,64]) while(%p.4), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"4"}}
}
"""


def test_time_of_a_gpu_program():
    """Four runs of a loop, by hand: a copy reads and writes 1 KiB; a product takes what its model says; attention's
    five products of the way back 10·2·50·60·128 FLOPs at 51 % of the peak; a Pallas kernel its bytes at nine tenths of
    the bandwidth; a fusion without an estimate, its bytes."""
    chip = GPUS["h100"]
    expected = {
        ("copies, slices", "forward"): 4 * 2048 / chip.bandwidth,
        ("products", "forward"): 4 * 7e-6,
        ("attention", "backward"): 4 * 10 * 2 * 50 * 60 * 128 / (0.51 * chip.flops),
        ("Pallas kernels", "forward"): 4 * 2048 / (0.9 * chip.bandwidth),
        ("elementwise, reductions", "recomputed"): 4 * 2048 / chip.bandwidth,
    }
    assert seconds(GPU_HLO, chip, 1, gpu_time.model) == pytest.approx(expected)


def test_time_of_streaming():
    """Half a MiB out of the host's memory in each of four turns, begun and ended by an instruction each; what carries
    the stack costs nothing."""
    text = """
%body (p: (f32[8,64], f32[4,256,512])) -> (f32[8,64], f32[4,256,512]) {
  %p = (f32[8,64]{1,0}, f32[4,256,512]{2,1,0:S(5)}) parameter(0)
  %x = f32[8,64]{1,0} get-tuple-element(%p), index=0
  %w = f32[4,256,512]{2,1,0:S(5)} get-tuple-element(%p), index=1
  %s = ((f32[4,256,512]{2,1,0:S(5)}, s32[]), f32[1,256,512]{2,1,0}, u32[]) fusion-start(%w), kind=kCustom, calls=%slice
  %d = f32[1,256,512]{2,1,0} fusion-done(%s)
  ROOT %t = (f32[8,64]{1,0}, f32[4,256,512]{2,1,0:S(5)}) tuple(%x, %w)
}

%c (p.1: f32[8,64]) -> pred[] {
  ROOT %true = pred[] constant(true)
}

ENTRY %main (p.2: f32[8,64]) -> f32[8,64] {
  %p.2 = (f32[8,64]{1,0}, f32[4,256,512]{2,1,0:S(5)}) parameter(0)
  ROOT %loop = (f32[8,64]{1,0}, f32[4,256,512]{2,1,0:S(5)}) while(%p.2), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"4"}}
}
""".replace("\\\n", "")
    [cost] = costs(text, GPUS["h100"], 1, gpu_time.model)
    assert (cost.kind, cost.times) == (estimated_time.STREAMED, 4)
    assert cost.seconds == pytest.approx(4 * 256 * 512 * 4 / GPUS["h100"].host)


# 262,144 elements in bfloat16 are sent around rings of four: 393,216 bytes, on a v6e 983.04 ns.
TPU_HLO = """HloModule jit_update, is_scheduled=true

FileNames
1 "/a/lorweb_jax/lorweb_jax/nn/layers.py"
2 "/a/site-packages/jax/splash.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=108 end_line=108 column=4 end_column=9}
2 {file_name_id=2 function_name_id=2 line=7 end_line=7 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
3 {file_location_id=2 parent_frame_id=1}


%fused_product (p.1: bf16[64,128], p.2: bf16[128,256]) -> bf16[64,256] {
  %p.1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p.2 = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %c.1 = bf16[64,256]{1,0:T(8,128)(2,1)} convolution(%p.1, %p.2), dim_labels=bf_io->bf
}

%fused_heads (p.3: bf16[8,64,128], p.4: bf16[8,128,32]) -> bf16[8,64,32] {
  %p.3 = bf16[8,64,128]{2,1,0} parameter(0)
  %p.4 = bf16[8,128,32]{2,1,0} parameter(1)
  ROOT %c.2 = bf16[8,64,32]{2,1,0} convolution(%p.3, %p.4), window={size=8 stride=7 lhs_dilate=8}, \
dim_labels=0bf_0io->0bf
}

%body (p.5: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %p.5 = (s32[], bf16[64,128]{1,0}) parameter(0)
  %w = bf16[65536]{0} get-tuple-element(%p.5), index=1
  %first = (bf16[65536]{0}, bf16[262144]{0}) all-gather-start(%w), replica_groups={{0,1,2,3}}, dimensions={0}
  %second = (bf16[65536]{0}, bf16[262144]{0}) all-gather-start(%w), replica_groups={{0,1,2,3}}, dimensions={0}
  %y = bf16[64,256]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused_product, \
metadata={op_name="jit(f)/jvp(loss)/dot_general" stack_frame_id=1}, backend_config={"estimated_cycles":"1050"}
  %first.done = bf16[262144]{0} all-gather-done(%first)
  %n = bf16[64,256]{1,0} tanh(%y), backend_config={"window_config":{"estimated_cycles":"350"}}
  %second.done = bf16[262144]{0} all-gather-done(%second)
  ROOT %t = (s32[], bf16[64,128]{1,0}) tuple(%i, %n)
}

%condition (p.6: (s32[], bf16[64,128])) -> pred[] {
  %at = s32[] get-tuple-element(%p.6), index=0
  %limit = s32[] constant(19)
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}

ENTRY %main (q: bf16[24,512,128], k: bf16[24,2560,128]) -> bf16[24,512,128] {
  %q = bf16[24,512,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[24,2560,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %mask = s8[1,5,1]{2,1,0} parameter(2)
  %splash.1 = (f32[512,128]{1,0}, bf16[24,512,128]{2,1,0}) custom-call(%mask, %q, %k, %k), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/jvp(loss)/splash_mha_fwd/pallas_call" stack_frame_id=3}, backend_config={}
  %splash_mha_dkv.2 = (bf16[24,512,128]{2,1,0}, bf16[24,2560,128]{2,1,0}) custom-call(%mask, %q, %k, %k), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
}}, metadata={op_name="jit(f)/transpose(jvp(loss))/splash_mha_dkv/pallas_call"}, backend_config={}
  %norm = bf16[24,512,128]{2,1,0} custom-call(%q), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/rematted_computation/pallas_call"}, backend_config={}
  %loop = (s32[], bf16[64,128]{1,0}) while(%start), condition=%condition, body=%body, \
metadata={op_name="jit(f)/transpose(jvp(loss))/while"}
  %joined = bf16[64,256]{1,0} fusion(%x, %w), kind=kOutput, calls=%fused_product, \
backend_config={"estimated_cycles":"0"}
  %heads = bf16[8,64,32]{2,1,0} fusion(%x, %w), kind=kOutput, calls=%fused_heads, backend_config={}
  %sum = f32[131072]{0} all-reduce(%norm), replica_groups={{0,1},{2,3}}, to_apply=%add
  %moved = bf16[24,512,128]{2,1,0} copy(%norm), backend_config={"estimated_cycles":"1750"}
  ROOT %out = bf16[24,512,128]{2,1,0} bitcast(%moved)
}
""".replace("\\\n", "")


def test_time_of_a_tpu_program():
    """By hand. The loop, 19 times: a product of 600 ns, behind which the first gather hides, but for 383.04 ns; the
    second then waits for the interconnect, and hides behind 200 ns of tanh alone. An all-reduce of two hides behind
    nothing. Heads 128 wide use half of a v6e's MXUs."""
    chip, gather = TPUS["v6e"], 2 * 262144 * 3 / 4 / 400e9
    score, move = 24 * 512 * 2560 * 128, 2 * 24 * 512 * 128 * 2
    joined, heads = 2 * 64 * 128 * 256, 2 * 8 * 64 * 128 * 32
    expected = {
        ("products", "forward"): 19 * 600e-9 + (joined + heads) / (0.65 * chip.flops),
        ("attention", "forward"): 4 * score / (0.35 * chip.flops),
        ("attention", "backward"): 10 * score / (0.35 * chip.flops),
        ("Pallas kernels", "recomputed"): move / (0.9 * chip.bandwidth),
        ("elementwise, reductions", "backward"): 19 * 200e-9,
        ("copies, slices", "forward"): 1e-6,
        (COLLECTIVES, "backward"): 19 * ((gather - 600e-9) + (gather - 200e-9)),
        (COLLECTIVES, "forward"): 2 * 131072 * 4 / 2 / 400e9,
    }
    assert seconds(TPU_HLO, chip, 4, tpu_time.model) == pytest.approx(expected)
    lines = {cost.name: cost.place for cost in costs(TPU_HLO, chip, 4, tpu_time.model)}
    assert (
        lines["y"] == "lorweb_jax/nn/layers.py:108" and lines["splash.1"] == "jax/splash.py:7" and lines["norm"] == ""
    )
    assert "heads 128 wide, 70 % of" in "\n".join(tpu_time.assumptions(chip))


def test_a_transfer_goes_on_during_a_loop():
    """It begins before 19 turns that are 800 ns of work and 1,166.08 of waiting for their own gathers."""
    around = TPU_HLO.replace(
        "  %loop =", "  %a = (bf16[65536], bf16[262144]) all-gather-start(%k), replica_groups={{0,1,2,3}}\n  %loop ="
    ).replace("  %joined =", "  %a.done = bf16[262144] all-gather-done(%a)\n  %joined =")
    gather = 2 * 262144 * 3 / 4 / 400e9

    def waited(text):
        return sum(cost.seconds for cost in costs(text, TPUS["v6e"], 4, tpu_time.model) if cost.kind == COLLECTIVES)

    # The loop leaves the interconnect nothing: it is sent afterwards.
    assert waited(around) - waited(TPU_HLO) == pytest.approx(gather)
    idle = around.replace(
        "%second = (bf16[65536]{0}, bf16[262144]{0}) all-gather-start(%w)", "%second = s32[] copy(%w)"
    )
    # With one gather of its own, 200 ns in each turn.
    assert waited(idle) == pytest.approx(19 * (gather - 600e-9) + 2 * 131072 * 4 / 2 / 400e9)


def test_a_chain_of_fusions_that_gather():
    """Begun by one fusion, sent while a second computes 700 ns, awaited by the third, which computes 100 more."""
    member = (
        'all-gather(%p), channel_id=5, replica_groups={{0,1,2,3}}, backend_config={"async_collective_fusion_config":{}}'
    )
    fusions = "".join(
        f"%fused.{number} (p: bf16[65536]) -> bf16[262144] {{\n  %g.{number} = bf16[262144]{{0}} {member}\n"
        f"  ROOT %r.{number} = bf16[262144]{{0}} {last}\n}}\n\n"
        for number, last in enumerate(
            (
                'custom-call(%g.0), custom_call_target="AsyncCollectiveStart"',
                "tanh(%p)",
                'custom-call(%g.2), custom_call_target="AsyncCollectiveDone"',
            )
        )
    )
    entry = "".join(
        f"  %f.{number} = bf16[262144]{{0}} fusion(%f), calls=%fused.{number}, backend_config={{{cycles}}}\n"
        for number, cycles in enumerate(("", '"estimated_cycles":"1225"', '"estimated_cycles":"175"'))
    )
    text = f"{fusions}ENTRY %main (f: bf16[65536]) -> bf16[262144] {{\n{entry}}}\n"
    found = seconds(text, TPUS["v6e"], 4, tpu_time.model)
    assert found[COLLECTIVES, "forward"] == pytest.approx(2 * 262144 * 3 / 4 / 400e9 - 800e-9)


def test_a_gather_by_the_sparse_core():
    """As libtpu 0.0.52 writes it: its operand comes with the update, after 1 µs of work; 600 ns hide part of it."""
    text = """
%called (p.1: bf16[65536]) -> bf16[262144] {
  ROOT %g = bf16[262144]{0} all-gather(%p.1), channel_id=5, replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

%async (p.2: bf16[65536]) -> bf16[262144] {
  ROOT %c = bf16[262144]{0} custom-call(%p.2), custom_call_target="TODO", called_computations={%called}
}, execution_thread="sparsecore"

ENTRY %main (p.3: bf16[65536]) -> bf16[262144] {
  %p.3 = bf16[65536]{0} parameter(0)
  %start = ((), (), s32[8]{0}) async-start(), async_execution_thread="sparsecore", calls=%async
  %shard = bf16[65536]{0} negate(%p.3), backend_config={"estimated_cycles":"1750"}
  %update = ((bf16[65536]{0}), bf16[262144]{0}, s32[8]{0}) async-update(%start, %shard)
  %y = bf16[64]{0} tanh(%p.3), backend_config={"estimated_cycles":"1050"}
  ROOT %done = bf16[262144]{0} async-done(%update)
}
"""
    sent = 2 * 262144 * 3 / 4
    assert collectives.traffic(text, 4) == {"all-gather": Traffic(1, sent)}
    found = seconds(text, TPUS["v6e"], 4, tpu_time.model)
    assert found[COLLECTIVES, "forward"] == pytest.approx(sent / 400e9 - 600e-9)


def test_a_pallas_call_keeps_its_attributes():
    """Those after its metadata's line ends, and instructions after it."""
    computations, entry = parse(TPU_HLO)
    call = next(instruction for instruction in computations[entry] if instruction.name == "splash.1")
    assert 'op_name="jit(f)/jvp(loss)/splash_mha_fwd/pallas_call"' in call.rest
    assert call.operands() == ["mask", "q", "k", "k"] and len(computations[entry]) == 12
    text = (
        "ENTRY %m (p: f32[]) -> f32[] {\n  %p = (f32[8,4], (s8[2], f32[2,3])) parameter(0)\n  %r = f32[] f(%p#1#1)\n}"
    )
    made = {instruction.name: instruction for instruction in parse(text)[0]["m"]}
    assert operand_shapes(made["r"], made) == ["f32[2,3]"]
    assert places("ENTRY %main (p: f32[]) -> f32[] {\n}\n") == {}
