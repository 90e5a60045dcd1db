"""Parsing a scheduled program: loop counts, sizes of types, and collectives in each form that XLA emits."""

import pathlib

import pytest

from lcm_jax.planning.compiled import HloProgram, size_of

TEXT = (pathlib.Path(__file__).parent / "program.hlo").read_text()


@pytest.fixture(scope="module")
def program():
    return HloProgram(TEXT)


def test_operations_run_as_often_as_their_loops(program):
    found = [(op.name, op.times, op.cycles) for op in program.operations() if op.cycles]
    assert found == [("work", 5, 7000), ("work", 3, 7000), ("dear", 1, 500)]  # of branches, the dearer


def test_nothing_is_listed_that_does_not_run(program):
    kinds = {op.kind for op in program.operations()}
    assert not kinds & {"parameter", "constant", "tuple", "get-tuple-element", "while", "convolution"}
    kernel = next(op for op in program.operations() if op.kind == "custom-call")
    assert (kernel.source, kernel.bytes) == ("jit(f)/attn/pallas_call", 16 * 4096 * 128 * 2)


def hidden(collective):
    """Cycles of what runs between its start and its end, each time."""
    return (collective.end - collective.start) / collective.times


def test_exchanges_in_each_form(program):
    found = [(c.kind, c.times, c.bytes, hidden(c)) for c in program.collectives()]
    assert found == [
        ("all-gather", 5, 2**21, 7000),  # started and done, with work between
        ("all-gather", 3, 2**21, 7000),
        ("reduce-scatter", 1, 2**20, 0),  # an all-reduce of which a fusion keeps a part
        ("collective-permute", 1, 64, 0),
        ("all-reduce", 1, 4, 0),
    ]


def test_a_loop_hides_with_all_its_rounds():
    before, after = (f"  %{name}" for name in ("while.11 =", "all-reduce-scatter ="))
    start = "  %early-start = (f32[8]{0}, f32[64]{0}) all-gather-start(%g), replica_groups=[1,8]<=[8]\n"
    done = "  %early-done = f32[64]{0} all-gather-done(%early-start)\n"
    text = TEXT.replace(before, start + before).replace(after, done + after)
    early = next(c for c in HloProgram(text).collectives() if c.bytes == 256)
    assert (early.times, hidden(early)) == (1, 3 * 7000)


def test_a_kernel_hides_what_it_is_said_to_cost():
    before, after = (f"  %{name}" for name in ("kernel =", "collective-permute.1 ="))
    start = "  %early-start = (f32[8]{0}, f32[64]{0}) all-gather-start(%g), replica_groups=[1,8]<=[8]\n"
    done = "  %early-done = f32[64]{0} all-gather-done(%early-start)\n"
    text = TEXT.replace(before, start + before).replace(after, done + after)
    found = HloProgram(text).collectives(lambda kind, text: 30.0 if kind == "custom-call" else 0.0)
    assert next(hidden(c) for c in found if c.bytes == 256) == 30


def test_a_chain_of_fusions_is_one_exchange():
    """As it is written for one core a chip: pieces of a gather in what computes meanwhile."""
    piece = (
        '%all-gather.{} = f32[64]{{0}} all-gather(%p), replica_groups=[1,8]<=[8], frontend_attributes={{chain_id="4"}}'
    )
    pieces = "".join(f"%piece.{i} (p: f32[8]) -> f32[64] {{\n  ROOT {piece.format(i)}\n}}\n\n" for i in range(3))
    chain = (
        "  %async-collective-start.7 = (f32[8]{0}, f32[64]{0}) fusion(%g), kind=kCustom, calls=%piece.0\n"
        '  %busy = (f32[8]{0}, f32[64]{0}) fusion(%x), calls=%piece.1, backend_config={"estimated_cycles":"900"}\n'
        "  %part = f32[64]{0} get-tuple-element(%busy), index=1\n"
        "  %async-collective-done.7 = f32[64]{0} fusion(%part), kind=kCustom, calls=%piece.2\n"
    )
    text = TEXT.replace("ENTRY", pieces + "ENTRY").replace("  %kernel =", chain + "  %kernel =")
    found = [c for c in HloProgram(text).collectives() if c.kind == "all-gather" and c.bytes == 256]
    assert [(c.times, hidden(c), c.groups) for c in found] == [(1, 900, (tuple(range(8)),))]


def test_groups_are_read_in_both_notations(program):
    groups = [c.groups for c in program.collectives()]
    assert groups[0] == ((0, 1, 2, 3), (4, 5, 6, 7))  # [2,4]<=[8]
    assert groups[2] == groups[0]
    assert groups[3] == ((0, 1), (1, 0))
    assert groups[4] == (tuple(range(8)),)
    transposed = TEXT.replace("[2,4]<=[8]", "[4,2]<=[2,4]T(1,0)")
    assert HloProgram(transposed).collectives()[0].groups == ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
    ("type", "size"),
    [
        ("bf16[8,128]{1,0:T(8,128)(2,1)}", 2048),
        ("f32[]{:T(128)}", 4),
        ("(s32[]{:T(128)}, bf16[2,3]{1,0}, pred[7])", 4 + 12 + 7),
        ("u32[]{:S(2)}", 4),
        ("f8e4m3fn[16]", 16),
        ("token[]", 0),
    ],
)
def test_sizes_of_types(type, size):
    assert size_of(type) == size


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        HloProgram("nothing")
