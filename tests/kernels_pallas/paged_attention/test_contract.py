"""All implementations take the reference's arguments, in its order."""

import inspect

import pytest

from kernels_pallas.paged_attention.gpu import paged_attention_gpu
from kernels_pallas.paged_attention.reference import paged_attention_reference
from kernels_pallas.paged_attention.tpu import paged_attention_tpu
from kernels_pallas.paged_attention.xla import paged_attention_xla


@pytest.mark.parametrize(
    "implementation", [paged_attention_xla, paged_attention_tpu, paged_attention_gpu]
)
def test_signatures_agree(implementation):
    contract = inspect.signature(paged_attention_reference).parameters
    parameters = inspect.signature(implementation).parameters
    assert list(parameters)[: len(contract)] == list(contract)
    for name, parameter in contract.items():
        mine = parameters[name]
        assert (mine.kind, mine.default, str(mine.annotation)) == (
            parameter.kind,
            parameter.default,
            str(parameter.annotation),
        )
    for name in list(parameters)[len(contract) :]:
        extra = parameters[name]
        assert extra.kind is inspect.Parameter.KEYWORD_ONLY, name
        assert extra.default is not inspect.Parameter.empty, name
