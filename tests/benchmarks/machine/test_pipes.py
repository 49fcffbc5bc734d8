"""What single instructions ask for, and what a loop's turn does; answers from the instructions' sizes."""

import pytest

from benchmarks.machine.code import parse_amdgcn, parse_sass
from benchmarks.machine.pipes import amd, nvidia
from tests.benchmarks.machine.test_code import AMD, sass


def asked(instruction: str, warps: int = 1, before: str = "") -> dict[str, int]:
    """What one instruction asks for beside issue."""
    _, (counts,) = nvidia(parse_sass(sass(f"{before}\n{instruction}\nEXIT")), warps)
    return {name: number for name, number in counts.items() if name != "issue"}


@pytest.mark.parametrize(
    ("instruction", "wanted"),
    [
        ("FFMA R1, R2, R3, R4", {}),
        ("MUFU.EX2 R1, R2", {"special": 32}),
        ("@P0 MUFU.RCP R1, R2", {"special": 32}),
        ("@!PT MUFU.RCP R1, R2", {}),
        ("I2F.RP R0, R5", {"special": 32}),
        ("I2FP.F32.S32 R0, R5", {}),
        ("F2FP.BF16.F32.PACK_AB R1, R2, R3", {}),
        ("LDG.E.128 R28, desc[UR14][R14.64]", {"global": 512}),
        ("@!P6 LDG.E R28, desc[UR14][R26.64]", {"global": 128}),
        ("LDG.E.U16 R28, desc[UR14][R26.64]", {"global": 64}),
        ("STG.E.EF.64 desc[UR14][R26.64], R4", {"global": 256}),
        ("LDS.128 R4, [R2]", {"shared": 512}),
        ("LDS.U16 R4, [R2]", {"shared": 128}),
        ("@!PT LDS RZ, [RZ]", {}),
        ("STS.64 [R2], R4", {"shared": 256}),
        ("LDSM.16.M88.4 R8, [R119+UR7]", {"shared": 512}),
        ("LDSM.16.MT88.2 R8, [R119+UR7]", {"shared": 256}),
        ("STSM.16.M88 [R2], R8", {"shared": 128}),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R41], desc[UR14][R68.64], !P2", {"shared": 512, "global": 512}),
        ("LDGSTS.E [R41], desc[UR14][R68.64]", {"shared": 128, "global": 128}),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", {"HMMA": 2048}),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", {"HMMA": 2048}),
    ],
)
def test_an_instruction_of_a_warp(instruction, wanted):
    assert asked(instruction) == wanted
    assert asked(instruction, warps=4) == {name: 4 * number for name, number in wanted.items()}


def test_a_warp_group_s_product_reads_shared_memory_once_for_the_group():
    """64 x 64 x 16: both operands of 2 KiB from shared memory, or the right alone; two groups read twice."""
    both = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
    right = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8].tnspB, R24, !UPT"
    assert asked(both, warps=4) == {"HGMMA": 64 * 64 * 16, "shared": 4096}
    assert asked(right, warps=4) == {"HGMMA": 64 * 64 * 16, "shared": 2048}
    assert asked(both, warps=8) == {"HGMMA": 2 * 64 * 64 * 16, "shared": 2 * 4096}
    assert asked("HGMMA.64x128x8.F32.TF32 R24, gdesc[UR8], R24", warps=4) == {
        "HGMMA": 2 * 64 * 128 * 8, "shared": (64 + 128) * 32
    }  # fmt: skip


def test_a_product_in_tensor_memory_has_its_sizes_in_a_descriptor():
    """0x8100490: 128 rows (bits 24 up, in 16s), 64 columns (bits 17 up, in 8s); one thread issues it for all."""
    product = "UTCHMMA gdesc[UR10], gdesc[UR12], tmem[UR8], tmem[UR32], idesc[UR33], UPT"
    wanted = {"UTCHMMA": 128 * 64 * 16, "shared": (128 + 64) * 32}
    assert asked(product, warps=4, before="UMOV UR33, 0x8100490") == wanted
    left = product.replace("UTCHMMA gdesc[UR10]", "UTCHMMA tmem[UR10]")
    assert asked(left, before="UMOV UR33, 0x8100490")["shared"] == 64 * 32
    with pytest.raises(ValueError, match="no constant"):
        asked(product, before="UMOV UR33, 0x8100490\nUIADD3 UR33, UR33, 0x1, URZ")


@pytest.mark.parametrize("opcode", ["UTMALDG.2D [UR8], [UR4]", "HMMA.8888.F32 R0, R1, R2, R3", "IMMA.16832 R0, R1, R2"])
def test_what_cannot_be_read_is_refused(opcode):
    with pytest.raises(ValueError, match=opcode.split()[0]):
        asked(opcode)


PIPELINED = """
LDGSTS.E.BYPASS.128 [R41], desc[UR14][R68.64], !P2
.L_x_0:
LDGSTS.E.BYPASS.128 [R41], desc[UR14][R68.64], P6
MUFU.EX2 R1, R2
@P6 BRA `(.L_x_0)
STG.E.128 desc[UR14][R26.64], R4
EXIT
"""


def test_a_pipelined_loop_s_first_copies_are_counted_once():
    """Those before the loop: its last turn copies nothing."""
    inside, (outside, turn) = nvidia(parse_sass(sass(PIPELINED)), 2)
    assert inside == [None, 0]
    assert outside == {"issue": 2 * 3, "global": 2 * 512}
    assert turn == {"issue": 2 * 3, "special": 2 * 32, "global": 2 * 512, "shared": 2 * 512}


def test_a_peeled_loop_s_copies_are_those_of_all_turns():
    """The last turn of a loop of tcgen05 products stands behind it, so that one turn's copies are outside."""
    loop = PIPELINED.replace("MUFU.EX2 R1, R2", "UTCHMMA gdesc[UR1], gdesc[UR2], tmem[UR8], tmem[UR4], idesc[UR5], UPT")
    inside, (outside, turn) = nvidia(parse_sass(sass(loop.replace(".L_x_0:", ".L_x_0:\nUMOV UR5, 0x4100490"))), 2)
    assert inside == [None, 0]
    assert outside["global"] == 2 * 512 + 2 * 512
    assert (turn["global"], turn["UTCHMMA"]) == (2 * 512, 64 * 64 * 16)


def test_copies_without_a_loop_behind_them_are_counted():
    _, (counts,) = nvidia(parse_sass(sass("LDGSTS.E.BYPASS.128 [R41], desc[UR14][R68.64]\nEXIT")), 1)
    assert counts["shared"] == 512


def test_a_loop_that_waits_is_no_work_of_its_own():
    waiting = """
    .L_x_0:
    MUFU.EX2 R1, R2
    .L_x_1:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR9], R4
    @!P5 BRA `(.L_x_1)
    @P6 BRA `(.L_x_0)
    EXIT
    """
    inside, (outside, turn) = nvidia(parse_sass(sass(waiting)), 1)
    assert inside == [None, 0]
    assert outside == {"issue": 1}
    assert turn == {"issue": 4, "special": 32}


def test_amd_s_instructions_are_counted_by_kind():
    inside, (outside, turn) = amd(parse_amdgcn(AMD), 4)
    assert inside == [None, 0]
    assert outside == {"issue": 16}
    assert turn == {"issue": 16, "global": 4, "special": 4}
