"""The declaration of mesh axes, and that the configuration and the rules agree with it."""

from dataclasses import fields

from gptjax.config import MeshConfig
from gptjax.parallel import mesh, sharding


def test_mesh_axes_are_the_fields_of_the_configuration_in_the_order_of_its_shape():
    names = [axis.name for axis in mesh.MESH_AXES]
    assert list(MeshConfig(data=1).shape(1)) == names
    assert {field.name for field in fields(MeshConfig)} == {*names, "machine"}


def test_every_axis_splits_a_logical_axis_and_rules_name_no_other_axis():
    used = {axis for logical in sharding.RULES for axis in sharding.mesh_axes(logical)}
    assert used == set(mesh.AXES)


def test_logical_axes_lie_on_the_mesh_axes_that_split_them():
    sequences, positions = mesh.axes_splitting("sequences"), mesh.axes_splitting("positions")
    layers, features = mesh.axes_splitting("layers"), mesh.axes_splitting("features")
    assert sequences == ("data", "fsdp", "fsdp_2", "fsdp_3", "expert")
    assert sharding.mesh_axes("batch") == (*layers, *sequences)
    assert sharding.mesh_axes("tokens") == (*positions, *layers, *sequences)
    assert sharding.mesh_axes("residual") == (*positions, *layers, *sequences, *features)
    assert sharding.mesh_axes("w_embed") == mesh.FSDP == mesh.axes_splitting("parameters")
    assert sharding.mesh_axes("experts") == mesh.axes_splitting("experts")


def test_only_the_data_axis_crosses_slices():
    assert [axis.name for axis in mesh.MESH_AXES if axis.crosses_slices] == ["data"]
