"""The forms that compilers print collectives in."""

import pytest
from collectives import collectives_in


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%psum.2 = bf16[64,32]{1,0} all-reduce(%dot.1), channel_id=1", [("bf16", 2048)]),
        ("%s = bf16[64,32]{1,0} all-reduce-start(%dot.1), channel_id=1", [("bf16", 2048)]),
        (
            "%s = ((bf16[64,32]{1,0:T(8,128)(2,1)}), bf16[64,32]{1,0:T(8,128)(2,1)}) "
            "all-reduce-start(%dot.1), channel_id=1",
            [("bf16", 2048)],
        ),
        (
            "%s = (s32[2]{0}, f32[], f32[3]{0}, f32[4]{0}, f32[5]{0}, /*index=5*/f32[6]{0}) "
            "all-reduce(%a, %b, %c, %d, %e, %f), channel_id=1",
            [("s32", 2), ("f32", 1), ("f32", 3), ("f32", 4), ("f32", 5), ("f32", 6)],
        ),
        ("%d = bf16[64,32]{1,0} all-reduce-done(%all-reduce-start.1)", []),
        ("%a = f32[64]{0} add(%all-reduce.1, %all-reduce.2)", []),
    ],
)
def test_finds_what_a_chip_is_given(line: str, expected: list[tuple[str, int]]) -> None:
    found = collectives_in(line)
    assert [one[1:] for one in found] == expected
    assert all(kind == "all-reduce" for kind, _, _ in found)
