"""On which devices the state lives.

Each moment where its parameter is, and split further where every device would hold a copy.

Placement changes no number. What a stage computes it computes for each element alone, or sums
exactly; its random bits belong to positions in the whole array. So XLA may cut the arrays as it is
told, and a run is the same on one device and on a pod. Gradients have to arrive as their parameters
are cut, or be put so: XLA may otherwise compute in their layout, and contract products and sums
otherwise.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from adam_jax._core.configuration import scalar_fields
from adam_jax._core.errors import brief
from adam_jax._core.leaves import PyTree, arrays_of, dtype_of
from adam_jax._core.paths import Parameters, Shape, is_scale, owner
from adam_jax._core.spec import show, swapped

Axes: TypeAlias = tuple[str, ...]

_spec: Any = PartitionSpec  # some versions of JAX leave it without types


def state_shardings(
    tx: optax.GradientTransformation,
    params_or_shapes: PyTree,
    shardings: PyTree,
    *,
    mesh: Any = None,
    zero: str | Axes | None = None,
) -> PyTree:
    """The shardings of a transformation's whole state, from those of the parameters.

        shardings = state_shardings(tx, params, param_shardings, zero="data")
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        step = jax.jit(step, out_shardings=(param_shardings, shardings), donate_argnums=(0, 1))

    An array of the state belongs to a parameter if its path ends in the parameter's and its shape
    is the parameter's, or has 1 along some axes (the ν that a block shares). It is sharded as the
    parameter is. Everything else, counts and scalars, is on every device.

    `zero` is what ZeRO calls stage 1: devices that hold the same parameters share their state out
    among them. XLA then sums the gradients as before, lets each device step its part, and gathers
    the new parameters. A part is cut along the first axis that is not cut yet and divides by the
    number of devices, else along the first that divides further (but not in meshes with explicit
    axes, where JAX does not add an array that is cut in one way to one that is cut in another). A
    parameter that is cut over `zero` already, fully sharded, leaves nothing to share out.

    Args:
      tx: any gradient transformation; states of others are treated alike.
      params_or_shapes: the parameters, or their shapes and dtypes (`jax.ShapeDtypeStruct`). Nothing
        is allocated.
      shardings: `NamedSharding`s or, with a mesh, `PartitionSpec`s: one for all, a tree like the
        parameters, or a prefix of it. `None`: those that the parameters have.
      mesh: where the `PartitionSpec`s are meant. `None`: that of the shardings, or the one of
        `jax.set_mesh`.
      zero: the mesh axis, or axes, over which data is parallel.

    Returns:
      A tree of `NamedSharding`s with the structure of `tx.init(params)`, for `out_shardings`; their
      `.spec` are the specs for `jax.shard_map`.

    Raises:
      TypeError: for what is no transformation and no sharding.
      ValueError: for shardings that do not fit the parameters, several meshes, none, or an axis
        that the mesh has not.

    Warns:
      UserWarning: naming the arrays that `zero` cannot cut: no axis of theirs divides by the number
      of devices.

    Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter
    Models" (2020), §5.1.
    """
    if not callable(getattr(tx, "init", None)):
        hint = swapped(tx, "state_shardings")
        raise TypeError(
            f"state_shardings: found {brief(tx)}; expected a gradient transformation, and the "
            f"parameters after it.{hint}"
        )
    shardings = _of_arrays(shardings, params_or_shapes)
    params_or_shapes = arrays_of(params_or_shapes)
    parameters = _parameters(params_or_shapes, shardings, mesh)
    given = [its.mesh for its in jax.tree.leaves(shardings) if isinstance(its, NamedSharding)]
    mesh = _one_mesh(mesh, given + [its.sharding.mesh for its in parameters.values()])
    axes = _axes(zero)
    if missing := [axis for axis in axes if axis not in mesh.shape]:
        raise ValueError(
            f"state_shardings: zero: found {_listed(missing)}; expected axes of the mesh, "
            f"{_listed(mesh.shape)}."
        )

    state = jax.eval_shape(tx.init, jax.tree.map(_abstract, params_or_shapes))
    leaves, structure = _flat(state)
    own_shapes = {path: its.shape for path, its in parameters.items()}
    shapes = Parameters(own_shapes, scalar_fields(tx, state))
    owners = [owner(path, leaf.shape, shapes) for path, leaf in leaves]
    owned: dict[Any, list[Shape]] = {path: [its.shape] for path, its in parameters.items()}
    for belongs, (path, leaf) in zip(owners, leaves, strict=True):
        # Scales follow their moments: they have no axis to cut of their own.
        if belongs is not None and not is_scale(path):
            owned[belongs].append(leaf.shape)
    entries = {path: _split(its, owned[path], mesh.shape, axes) for path, its in parameters.items()}

    made, uncut = [], []
    for belongs, (path, leaf) in zip(owners, leaves, strict=True):
        if belongs is None:
            made.append(NamedSharding(mesh, _spec()))
            continue
        its = parameters[belongs]
        kept = [
            entry if n == of else None
            for n, of, entry in zip(leaf.shape, its.shape, entries[belongs], strict=True)
        ]
        made.append(NamedSharding(mesh, _spec(*kept), memory_kind=its.sharding.memory_kind))
        if leaf.size and not is_scale(path) and _size(mesh.shape, set(axes) - set(_used(kept))) > 1:
            uncut.append(f"{jax.tree_util.keystr(path)} {leaf.shape}")
    if uncut:
        more = f" and {len(uncut) - 8} more" if len(uncut) > 8 else ""
        warnings.warn(
            f"state_shardings: no axis of {', '.join(uncut[:8])}{more} divides by the "
            f"{_size(mesh.shape, axes)} devices of zero={zero!r}: each of them keeps these whole.",
            stacklevel=2,
        )
    return jax.tree.unflatten(structure, made)


def _axes(zero: Any) -> Axes:
    """The mesh axes that `zero` names."""
    axes = () if zero is None else (zero,) if isinstance(zero, str) else zero
    if not isinstance(axes, (tuple, list)) or len(set(axes)) != len(axes):
        raise ValueError(
            f"state_shardings: zero: found {brief(zero)}; expected the name of a mesh axis, or "
            "several different ones."
        )
    return tuple(axes)


class _Parameter(NamedTuple):
    shape: Shape
    sharding: NamedSharding


def _of_arrays(shardings: PyTree, params: PyTree) -> PyTree:
    """Shardings without those of leaves that are no arrays, such as the functions of a module."""
    structure: Any = jax.tree.structure(shardings, is_leaf=_is_sharding)
    if structure != jax.tree.structure(params):
        return shardings
    is_array = jax.tree.leaves(
        jax.tree.map(lambda leaf: leaf is not None, arrays_of(params), is_leaf=lambda x: x is None)
    )
    found = jax.tree.leaves(shardings, is_leaf=_is_sharding)
    return jax.tree.unflatten(
        structure, [its if array else None for its, array in zip(found, is_array, strict=True)]
    )


def _is_sharding(node: Any) -> bool:
    return isinstance(node, (Sharding, PartitionSpec))


def _parameters(params: PyTree, shardings: PyTree, mesh: Any) -> dict[Any, _Parameter]:
    """Shape and sharding of each parameter by its path, checked against each other."""
    located, structure = _flat(params)
    if shardings is None:
        found = [getattr(leaf, "sharding", None) for _, leaf in located]
    else:
        try:
            spread = jax.tree.map(
                lambda its, part: jax.tree.map(lambda _: its, part),
                shardings,
                params,
                is_leaf=_is_sharding,
            )
            found = structure.flatten_up_to(spread)
        except (ValueError, TypeError) as error:
            raise ValueError(
                "state_shardings: shardings: found the structure "
                f"{show(jax.tree.structure(shardings))}; expected one sharding, or the structure "
                f"of the parameters, {show(structure)}, or a prefix of it."
            ) from error
    parameters = {}
    for (path, leaf), its in zip(located, found, strict=True):
        where = f"at leaf {jax.tree_util.keystr(path)}"
        if not isinstance(its, (NamedSharding, PartitionSpec)):
            raise TypeError(
                f"state_shardings: {where} found {brief(its)}; expected a "
                "jax.sharding.NamedSharding, or a PartitionSpec and mesh=."
            )
        try:
            sharding = (
                NamedSharding(_one_mesh(mesh), its) if isinstance(its, PartitionSpec) else its
            )
            if PartitionSpec.UNCONSTRAINED in tuple(sharding.spec):
                raise ValueError("P.UNCONSTRAINED says nothing of where the state belongs.")
            sharding.shard_shape(np.shape(leaf))
        except ValueError as error:
            raise ValueError(
                f"state_shardings: {where} found {its} for a parameter of shape {np.shape(leaf)}; "
                f"expected a sharding whose mesh is known and divides it. {error}"
            ) from error
        parameters[path] = _Parameter(np.shape(leaf), sharding)
    return parameters


def _one_mesh(given: Any, found: Sequence[Any] = ()) -> Any:
    """The one mesh of those found and given, or that of `jax.set_mesh`."""
    if given is not None and not isinstance(given, (Mesh, AbstractMesh)):
        raise TypeError(
            f"state_shardings: mesh: found {brief(given)}; expected a jax.sharding.Mesh."
        )
    meshes = list(dict.fromkeys([*found, *([] if given is None else [given])]))
    if not meshes and hasattr(jax.sharding, "get_mesh"):
        meshes = [mesh for mesh in [jax.sharding.get_mesh()] if not mesh.empty]
    if len(meshes) != 1:
        raise ValueError(
            f"state_shardings: found {len(meshes)} "
            f"meshes{': ' if meshes else ''}{_listed(meshes)}; expected one, in the shardings, as "
            "mesh=, or by jax.set_mesh."
        )
    return meshes[0]


def _abstract(leaf: Any) -> Any:
    shape: Any = jax.ShapeDtypeStruct  # some versions of JAX leave it without types
    return shape(np.shape(leaf), dtype_of(leaf))


def _split(its: _Parameter, shapes: list[Shape], mesh: Any, axes: Axes) -> list[Any]:
    """Returns how a parameter's state is sharded.

    It is sharded as the parameter, and over `axes` along an axis where all its arrays can be. If
    there is no such axis, it is sharded as the parameter alone.
    """
    entries = [*its.sharding.spec, *[None] * (len(its.shape) - len(its.sharding.spec))]
    further = tuple(axis for axis in axes if axis not in _used(entries))
    uncut_first = sorted(range(len(entries)), key=lambda i: bool(_names(entries[i])))
    if any(kind == AxisType.Explicit for kind in its.sharding.mesh.axis_types or ()):
        # There JAX adds an array that is cut along an axis to one that is not, but not to one that
        # is cut otherwise.
        uncut_first = [i for i in uncut_first if not _names(entries[i])]
    for wanted in (shapes, shapes[:1]):
        for i in uncut_first:
            cut = (*_names(entries[i]), *further)
            if further and all(shape[i] % _size(mesh, cut) == 0 for shape in wanted):
                return [*entries[:i], cut if len(cut) > 1 else cut[0], *entries[i + 1 :]]
    return entries


def _flat(tree: PyTree) -> tuple[list[Any], Any]:
    return jax.tree_util.tree_flatten_with_path(tree)


def _names(entry: Any) -> Axes:
    """The mesh axes in one entry of a spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _used(entries: Iterable[Any]) -> Axes:
    return tuple(name for entry in entries for name in _names(entry))


def _size(mesh: Any, axes: Iterable[str]) -> int:
    return math.prod(mesh[axis] for axis in axes)


def _listed(found: Iterable[Any]) -> str:
    return ", ".join(map(repr, found))
