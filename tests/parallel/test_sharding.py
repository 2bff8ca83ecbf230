"""The table of axes, and what the names of arrays say through it."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec, SingleDeviceSharding

from jinfer.parallel.mesh import make_mesh, split_devices
from jinfer.parallel.sharding import Placement, axes_of, spec_of
from jinfer.step.slots import empty_slots


@pytest.mark.parametrize(
    ("name", "axes", "spec"),
    [
        ("w_qkv_UD", "UD", ("tensor",)),
        ("w_gate_up_YD", "YD", ("tensor",)),
        ("w_o_DQ", "DQ", (None, "tensor")),
        ("b_k_KH", "KH", ("tensor",)),
        ("embed_VD", "VD", ("tensor",)),
        ("attn_norm_D", "D", ()),
        ("cells_LPKZ2H", "LPKZ2H", (None, None, "tensor")),
        ("scales_LPK2Z", "LPK2Z", (None, None, "tensor")),
        ("output_count_AV", "AV", (None, "tensor")),
        ("bad_words_AJ8", "AJ8", ()),
        ("seed_A2", "A2", ()),
        ("logprobs", "", ()),
    ],
)
def test_a_name_says_where_its_array_goes(name: str, axes: str, spec: tuple[Any, ...]) -> None:
    assert axes_of(name) == axes
    assert spec_of(axes) == PartitionSpec(*spec)


def test_numbers_in_front_of_a_cut_axis_are_refused() -> None:
    with pytest.raises(ValueError, match="after the sharded axes; got axes='2K'"):
        spec_of("2K")


def placement_of(size: int) -> Placement:
    return Placement(make_mesh(jax.devices(), size))


def test_slots_are_cut_along_the_vocabulary_only() -> None:
    slots = jax.eval_shape(lambda: empty_slots(max_slots=3, pages_per_slot=5, vocab_size=512))
    placed = placement_of(4).placed(slots)
    cut = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(placed)
        if leaf.sharding.spec != PartitionSpec()
    }
    assert cut == {
        ".sampling.output_count_AV",
        ".sampling.allowed_bits_AW",
        ".sampling.prompt_bits_AW",
    }


def test_on_one_device_nothing_is_cut_and_nothing_is_mapped() -> None:
    placement = placement_of(1)
    assert placement.sharding("VD") == SingleDeviceSharding(jax.devices()[0])
    assert placement.spread(jnp.sin, None, None) is jnp.sin
    shards = placement.shards
    text = str(jax.make_jaxpr(lambda x: shards.sum(shards.join(x)))(jnp.ones(3)))
    assert "psum" not in text and "all_gather" not in text


def test_replicas_share_no_device() -> None:
    groups = split_devices(jax.devices(), data_parallel_size=2, tensor_parallel_size=4)
    assert [make_mesh(group, 4).shape for group in groups] == [{"data": 1, "tensor": 4}] * 2
    assert len(set(groups[0]) | set(groups[1])) == 8


def test_more_devices_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must not exceed the devices; got .*=2, .*=8 with 8"):
        split_devices(jax.devices(), data_parallel_size=2, tensor_parallel_size=8)
    with pytest.raises(ValueError, match=r"exceed the devices; got .*=16 with 8 devices. Lower"):
        make_mesh(jax.devices(), 16)
