"""Loops and instructions are read off hand-written listings, of which the answers are known."""

import pytest

from benchmarks.machine.code import Instruction, parse_amdgcn, parse_sass


def sass(text: str) -> str:
    """A listing as nvdisasm prints it, from lines that are a label or ``[@P0] OPCODE operands``."""
    lines = []
    for index, line in enumerate(text.split("\n")):
        code = line.strip()
        if code.startswith(".L"):
            lines.append(code)
        elif code:
            lines.append(f"        /*{16 * index:04x}*/              {code} ;")
    header = '.section .text.kernel,"ax",@progbits\n        .type           kernel,@function\n.text.kernel:\n'
    return header + "\n".join(lines) + "\n"


def opcodes(parts) -> list[tuple[int | None, list[str]]]:
    return [(part.inside, [one.opcode for one in part.instructions]) for part in parts]


def test_an_instruction_has_its_predicate_modifiers_and_operands():
    (part,) = parse_sass(sass("@!P6 LDG.E.128 R28, desc[UR14][R26.64+0x10]\nEXIT"))
    load = part.instructions[0]
    assert load == Instruction("LDG.E.128", "R28, desc[UR14][R26.64+0x10]", "!P6")
    assert (load.name, load.modifiers) == ("LDG", ["E", "128"])


def test_loops_are_nested_by_what_contains_them():
    parts = parse_sass(
        sass(
            """
            MOV R0, RZ
            .L_x_0:
            IADD3 R0, R0, 0x1, RZ
            .L_x_1:
            FADD R1, R1, 1
            @P0 BRA `(.L_x_1)
            FMUL R2, R2, R2
            @P1 BRA `(.L_x_0)
            .L_x_2:
            MUFU.EX2 R3, R3
            @P2 BRA `(.L_x_2)
            EXIT
            """
        )
    )
    assert opcodes(parts) == [
        (None, ["MOV", "EXIT"]),
        (0, ["IADD3", "FMUL", "BRA"]),
        (1, ["FADD", "BRA"]),
        (0, ["MUFU.EX2", "BRA"]),
    ]


def test_an_unrolled_loop_is_one_loop_and_its_rest_another():
    """Four turns at once, then one at a time: two branches back."""
    parts = parse_sass(
        sass(
            """
            @!P0 BRA `(.L_x_1)
            .L_x_0:
            FADD R1, R1, 1
            FADD R1, R1, 1
            FADD R1, R1, 1
            FADD R1, R1, 1
            @P1 BRA `(.L_x_0)
            .L_x_1:
            @!P2 EXIT
            .L_x_2:
            FADD R1, R1, 1
            @P3 BRA `(.L_x_2)
            EXIT
            """
        )
    )
    assert [(part.inside, len(part.instructions)) for part in parts] == [(None, 3), (0, 5), (0, 2)]


def test_a_branch_within_a_loop_and_two_branches_back_are_no_further_loops():
    parts = parse_sass(
        sass(
            """
            .L_x_0:
            @P0 BRA `(.L_x_1)
            FADD R1, R1, 1
            @P1 BRA `(.L_x_0)
            .L_x_1:
            FMUL R1, R1, 2
            @P2 BRA `(.L_x_0)
            EXIT
            """
        )
    )
    assert opcodes(parts) == [(None, ["EXIT"]), (0, ["BRA", "FADD", "BRA", "FMUL", "BRA"])]


def test_a_block_behind_the_end_belongs_to_the_loop_that_it_returns_to():
    """And its branch back to the middle of the code makes no loop of what it jumps over."""
    parts = parse_sass(
        sass(
            """
            MOV R0, RZ
            @P3 BRA `(.L_x_4)
            .L_x_5:
            .L_x_0:
            FADD R1, R1, 1
            @P0 BRA `(.L_x_2)
            .L_x_1:
            @P1 BRA `(.L_x_0)
            EXIT
            .L_x_2:
            FMUL R1, R1, 2
            BRA `(.L_x_1)
            .L_x_4:
            MUFU.RCP R2, R2
            BRA `(.L_x_5)
            """
        )
    )
    assert opcodes(parts) == [
        (None, ["MOV", "BRA", "EXIT", "MUFU.RCP", "BRA"]),
        (0, ["FADD", "BRA", "BRA", "FMUL", "BRA"]),
    ]


def test_a_loop_may_be_left_by_a_call_that_never_returns():
    """As ptxas leaves one of two loops in a row: only a call of the kernel's own label is a way on."""
    parts = parse_sass(
        sass(
            """
            .L_x_0:
            FADD R1, R1, 1
            @!P6 CALL.REL.NOINC `(.L_x_1)
            BRA `(.L_x_0)
            .L_x_1:
            FMUL R1, R1, 2
            @P0 BRA `(.L_x_1)
            EXIT
            """
        )
    )
    assert opcodes(parts) == [(None, ["EXIT"]), (0, ["FADD", "CALL.REL.NOINC", "BRA"]), (0, ["FMUL", "BRA"])]


def test_what_is_never_reached_is_not_counted():
    """The padding behind the last instruction turns for ever, and a slow path is only called."""
    parts = parse_sass(
        sass(
            """
            CALL.REL.NOINC `($__internal_0)
            EXIT
            MUFU.RCP R2, R2
            RET.REL.NODEC R2 `(kernel)
            .L_x_9:
            BRA `(.L_x_9)
            NOP
            """
        )
    )
    assert opcodes(parts) == [(None, ["CALL.REL.NOINC", "EXIT"])]


def test_a_condition_may_stand_among_a_branch_s_operands():
    parts = parse_sass(sass(".L_x_0:\nUIADD3 UR4, UR4, 0x1, URZ\nBRA.U UP0, `(.L_x_0)\nEXIT"))
    assert opcodes(parts) == [(None, ["EXIT"]), (0, ["UIADD3", "BRA.U"])]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no instruction"), ("BRA `(.L_x_7)\nEXIT", "jumps to .L_x_7"), ("BRX R2 -0x10\nEXIT", "indirect jump")],
)
def test_code_that_cannot_be_followed_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_sass(sass(text))


AMD = """
	.text
kernel:                                 ; @kernel
.Lfunc_begin0:
; %bb.0:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
	s_cbranch_scc1 .LBB0_3
; %bb.1:                                ; %.lr.ph
	v_mov_b32_e32 v1, 0
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	global_load_dwordx4 v[2:5], v[6:7], off
	v_exp_f32_e32 v1, v1
	s_add_i32 s2, s2, 1 ; a comment
	s_cbranch_scc0 .LBB0_2
.LBB0_3:
	s_endpgm
.Lfunc_end0:
	.size	kernel, .Lfunc_end0-kernel
	s_nop 0
"""


def test_amd_s_assembly_has_loops_too():
    assert opcodes(parse_amdgcn(AMD)) == [
        (None, ["s_load_dwordx2", "s_cbranch_scc1", "v_mov_b32_e32", "s_endpgm"]),
        (0, ["global_load_dwordx4", "v_exp_f32_e32", "s_add_i32", "s_cbranch_scc0"]),
    ]
