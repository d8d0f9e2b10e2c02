"""`from_torch`, `params_from_torch` and the way back: weights and optimizer states of PyTorch.

Nothing here reads files or needs PyTorch: state dicts come as `torch.load(…, weights_only=True)` or safetensors give them, with
tensors or NumPy arrays, and go back with NumPy arrays.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from adam_jax._bias import LookAheadState
from adam_jax._describe import Leaf, describe
from adam_jax._memories import Run, decays, fill, memories, read, same_kinds, same_leaves, trained, whole
from adam_jax._paths import path_of, some
from adam_jax._transformation import Transformation, first_state
from adam_jax._tree import PyTree, dtype_of
from adam_jax.groups import by_path, labels, only

Convert: TypeAlias = Callable[[np.ndarray], np.ndarray]
Layout: TypeAlias = tuple[int, ...] | tuple[Convert, Convert]
Names: TypeAlias = Mapping[str, str | None] | Callable[[str], str | None]
Layouts: TypeAlias = Mapping[str, Layout] | Callable[[str, str], Layout | None]

ALIASES = {"weight": ("kernel", "scale", "embedding"), "running_mean": ("mean",), "running_var": ("var",)}
"""What the last part of a PyTorch name can be in a tree of parameters."""

ADAM = {"exp_avg": "mu", "exp_avg_sq": "nu", "exp_inf": "infinity", "max_exp_avg_sq": "raw nu_max"}
RMSPROP = {"square_avg": "nu", "grad_avg": "mu", "momentum_buffer": "trace"}
SGD = {"momentum_buffer": "trace"}
"""The kinds of moments by PyTorch's names for them."""

SETTINGS = ("eps", "weight_decay", "momentum_decay", "maximize", "amsgrad", "centered", "nesterov", "dampening")
"""What a parameter group says besides the learning rate and the decays of moments."""


def from_torch(
    state_dict: Mapping[str, Any],
    tx: Any,
    params: PyTree,
    *,
    mapping: Names | None = None,
    transpose: Layouts | None = None,
    names: Sequence[str] | None = None,
    count: int | None = None,
) -> PyTree:
    """The state of `tx` in a run that PyTorch began.

        tx = adam_jax.adamw(3e-4, weight_decay=0.01)
        rules = dict(mapping={"conv1": "Conv_0", "fc": "Dense_0"})
        params = adam_jax.params_from_torch(model.state_dict(), params, **rules)
        state = adam_jax.from_torch(optimizer.state_dict(), tx, params, names=[n for n, _ in model.named_parameters()], **rules)

    `tx` has to be the same optimizer with the same decays: a state dict says neither NAdam nor RAdam, and our weights follow from
    the decays. Its storage is free: moments are rounded to nearest.

    Args:
      state_dict: what `optimizer.state_dict()` returns, of Adam, AdamW, NAdam, RAdam, Adamax, RMSprop or SGD; tensors or arrays.
      tx: the transformation of this package that goes on. PyTorch's parameter groups may be groups of `by_path`, or a mask of
        weight decay.
      params: the parameters, which have the moments' shapes.
      mapping: from PyTorch's names to paths in `params`: a function, or a table of names or of their beginnings
        ("layers.0": "Dense_0"). What is not in the table keeps its name. "." counts as "/", and a last part "weight" that is not
        in the tree is looked for as "kernel", "scale" and "embedding". `None` stands for what has no place in `params`.
      transpose: how arrays come to lie as in `params`, where that is not by rule: a table by PyTorch's name, or a function
        (name, path) -> entry or `None`. An entry has the axes, as `np.transpose` takes them, or a pair of functions, there and
        back, such as `after_flatten`. The rule: in a leaf called "kernel" PyTorch's first two axes come last, (out, in, …) to
        (…, in, out); all other leaves are as in PyTorch. It fits transposed convolutions of Flax with `transpose_kernel=True`.
      names: those of the parameters in the order of the optimizer's groups, where its state dict has no "param_names". With one
        group it is that of `model.named_parameters()`.
      count: the steps taken, for a state that keeps none: of SGD.

    Returns:
      A state of `tx`.

    Raises:
      TypeError: for what is no state dict (we load no files) and no tensor, or if `tx` is no transformation.
      ValueError: for names that are missing, left over, or meet in one leaf; shapes that differ once transposed; steps that
        differ from parameter to parameter; decays that are not those of `tx`; moments that only one side has.
    """
    who = "from_torch"
    groups, entries = _optimizer(state_dict, who)
    first = first_state(tx, params, who)
    parts, ours = memories(tx, first, who)
    called = _called(groups, names, who)
    leaves = trained(params)
    held = {path for its in ours.values() for memory in its for path in memory.leaves}
    pairs = _pairs(called.values(), leaves, mapping, transpose, who, still=leaves.keys() - held)
    if extra := [str(i) for i in entries if i not in called]:
        raise ValueError(f"{who}: left over the state of {some(extra)}, parameters which no group has.")
    of = {name: entries.get(i, {}) for i, name in called.items() if name in pairs}
    if blank := [name for name, entry in of.items() if not entry and pairs[name].path in held]:
        raise ValueError(
            f"{who}: found no state of {some(blank)}; expected one for each parameter. One that never had a gradient has none: "
            f'map it to None and leave it out of params, or freeze it, with by_path({{pattern: "frozen"}}, …).'
        )
    of = {name: entry for name, entry in of.items() if entry}
    if over := [name for name in of if pairs[name].path not in held]:
        raise ValueError(
            f"{who}: left over the state of {some(over)}, of which tx keeps none. Move with a tx that trains what PyTorch has "
            f"trained, and freeze it with convert_state."
        )
    kinds = _kinds(groups)
    kept = {field: True for entry in of.values() for field, its in entry.items() if its is not None}
    fields = [field for field in kept if field not in ("step", "mu_product")]
    if unknown := [field for field in fields if field not in kinds]:
        raise ValueError(f"{who}: left over {some(unknown)} in the state; expected {some(list(kinds))}.")
    same_kinds(ours, {kinds[field]: field for field in fields}, who, "the state dict")
    if ("mu_product" in kept) != any(isinstance(part.state, LookAheadState) for part in parts):
        has = "has the mu_product of NAdam, and tx does not look" if "mu_product" in kept else "is not NAdam's, and tx looks"
        raise ValueError(f"{who}: the state {has} ahead; expected the same optimizer on both sides, see presets.torch.")
    by_group = [(group, [pairs[called[i]] for i in group["params"] if called[i] in of]) for group in groups]
    _expect_decays(by_group, decays(tx, first, who), who)
    _expect_settings(by_group, tx, params, who)
    moments: dict[str, dict[str, Any]] = {}
    for field in fields:
        its = moments[kinds[field]] = {}
        keep = {path for memory in ours[kinds[field]] for path in memory.leaves}
        if lacks := [name for name, entry in of.items() if entry.get(field) is None and pairs[name].path in keep]:
            raise ValueError(f"{who}: found no {field} of {some(lacks)}; expected one for each parameter.")
        for name, entry in of.items():
            if entry.get(field) is not None:
                pair = pairs[name]
                moment = pair.into(entry[field], leaves[pair.path], who)
                if kinds[field] not in ("mu", "trace") and (moment < 0).any():
                    raise ValueError(f"{who}: {name}: found {field} below 0, which no mean of squares is.")
                its[pair.path] = jnp.array(moment.astype(np.float32) if moment.dtype.kind in "biu" else moment)
    steps = _steps({pairs[name].path: entry.get("step") for name, entry in of.items()}, count, who)
    return fill(tx, params, Run(steps, max(steps.values(), default=0), moments), who)


def to_torch(
    state: PyTree,
    tx: Any,
    like: Mapping[str, Any],
    *,
    mapping: Names | None = None,
    transpose: Layouts | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The state dict of a PyTorch optimizer in a run of ours.

        found = adam_jax.to_torch(state, tx, optimizer.state_dict(), names=names, **rules)
        found["state"] = {i: {k: torch.tensor(v) for k, v in its.items()} for i, its in found["state"].items()}
        optimizer.load_state_dict(found)

    Args:
      state: that of `tx`.
      tx: the transformation of this package that the run had.
      like: the state dict of the optimizer that goes on, fresh or not. Its "param_groups" stay.
      mapping: as in `from_torch`, from PyTorch's names to ours.
      transpose: as in `from_torch`, from PyTorch's arrays to ours.
      names: as in `from_torch`.

    Returns:
      A state dict whose "state" holds NumPy arrays, float32 or float64.

    Raises:
      TypeError: as `from_torch`.
      ValueError: as `from_torch`, and where the state has weights that no count says, as after `reset`.
    """
    who = "to_torch"
    groups, _ = _optimizer(like, who)
    run = read(tx, state, who)
    fields = {kind: field for field, kind in _kinds(groups).items()}
    same_kinds(run.moments, {kind: fields[kind] for kind in _kept(groups, run.moments)}, who, "the optimizer")
    leaves, *others = run.moments.values()
    for its in others:
        same_leaves(its, leaves, who)
    frozen = list(_frozen(tx))

    def is_trained(name: str) -> bool:
        options = _options(_target(name, mapping, who) or "")
        return not any(is_frozen(path) for is_frozen in frozen for path in options)

    called = {i: name for i, name in _called(groups, names, who).items() if is_trained(name)}
    pairs = _pairs(called.values(), leaves, mapping, transpose, who)
    by_group = [(group, [pairs[called[i]] for i in group["params"] if called.get(i) in pairs]) for group in groups]
    _expect_decays(by_group, decays(tx, state, who), who)
    also = {} if "dampening" in groups[0] else {"step": np.float32(run.count)}
    also |= {"mu_product": np.float32(1 - run.ahead)} if run.ahead is not None else {}

    def entry(pair: _Pair) -> dict[str, Any]:
        return also | {fields[kind]: pair.back(np.asarray(its[pair.path])) for kind, its in run.moments.items()}

    found = {i: entry(pairs[name]) for i, name in called.items() if name in pairs}
    return {"state": found, "param_groups": groups}


def params_from_torch(
    state_dict: Mapping[str, Any], params: PyTree, *, mapping: Names | None = None, transpose: Layouts | None = None
) -> PyTree:
    """Parameters, or the statistics of normalisation, from those of a PyTorch model.

    Args:
      state_dict: `model.state_dict()`, or a part of it such as `dict(model.named_parameters())`; tensors or arrays. PyTorch's
        "num_batches_tracked" has no place in JAX and is left out. Of weights that are tied several names may lead to one leaf.
      params: a tree of the parameters' shapes and dtypes, whatever their values: of dicts, of NNX, an Equinox module's arrays.
      mapping: as in `from_torch`.
      transpose: as in `from_torch`.

    Returns:
      A tree like `params`, of new arrays.

    Raises:
      TypeError: for what is no state dict (we load no files), or no tensor.
      ValueError: for names that are missing, left over, or meet in one leaf, and shapes that differ once transposed.
    """
    who = "params_from_torch"
    _expect_table(state_dict, who)
    leaves = _by_path(params)
    found: dict[str, np.ndarray] = {}
    for name, pair in _pairs(state_dict, leaves, mapping, transpose, who, tied=True).items():
        array = pair.into(state_dict[name], leaves[pair.path], who)
        if not np.array_equal(found.setdefault(pair.path, array), array, equal_nan=True):
            raise ValueError(
                f"{who}: found that {name!r} and another name are both mapped to {pair.path}, and differ; expected one for each "
                f"leaf, or weights that are tied."
            )
    return jax.tree_util.tree_map_with_path(lambda path, leaf: jnp.array(found[path_of(path)], leaf.dtype), params)


def params_to_torch(
    params: PyTree, like: Mapping[str, Any], *, mapping: Names | None = None, transpose: Layouts | None = None
) -> dict[str, Any]:
    """The way back of `params_from_torch`.

        found = adam_jax.params_to_torch(params, model.state_dict(), **rules)
        model.load_state_dict({name: torch.tensor(x) for name, x in found.items()})

    Args:
      params: parameters.
      like: `model.state_dict()`, or a part of it: the names and shapes.
      mapping: as in `from_torch`, from PyTorch's names to ours.
      transpose: as in `from_torch`, from PyTorch's arrays to ours.

    Returns:
      NumPy arrays by PyTorch's names, and what has no place in `params` as it is in `like`.

    Raises:
      TypeError: if `like` is no state dict.
      ValueError: as `params_from_torch`.
    """
    who = "params_to_torch"
    _expect_table(like, who)
    leaves = _by_path(params)
    found = dict(like)
    for name, pair in _pairs(like, leaves, mapping, transpose, who, tied=True).items():
        pair.into(like[name], leaves[pair.path], who)  # the same shapes, or an error that says which
        leaf = leaves[pair.path]
        # PyTorch takes no array in a dtype of ml_dtypes.
        found[name] = pair.back(np.asarray(leaf, np.float32) if leaf.dtype == jnp.bfloat16 else np.asarray(leaf))
    return found


def after_flatten(shape: Sequence[int]) -> tuple[Convert, Convert]:
    """The entry for `transpose` of a dense layer behind a flattened image.

        transpose={"fc.weight": adam_jax.after_flatten((16, 4, 4))}

    PyTorch flattens (channels, height, width) and Flax (height, width, channels): the same numbers in another order, which the
    layer's rows have to follow. Without it the shapes agree, and the outputs do not.

    Args:
      shape: what PyTorch flattens: the channels first, then one size for each axis of the image.

    Returns:
      A pair of functions: (out, channels·height·width) to (height·width·channels, out), and back.
    """
    if not isinstance(shape, (tuple, list)) or not shape or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"after_flatten: found {shape!r}; expected the sizes that PyTorch flattens, such as (16, 4, 4).")
    channels, *sizes = shape
    n = len(sizes)

    def there(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), channels, *sizes).transpose(*range(2, n + 2), 1, 0).reshape(-1, len(x))

    def back(x: np.ndarray) -> np.ndarray:
        return x.reshape(*sizes, channels, x.shape[-1]).transpose(n + 1, n, *range(n)).reshape(x.shape[-1], -1)

    return there, back


Groups: TypeAlias = "list[tuple[Mapping[str, Any], list[_Pair]]]"


class _Pair(NamedTuple):
    """A parameter of PyTorch and a leaf of ours.

    Attributes:
      name: PyTorch's.
      path: ours.
      there: makes of PyTorch's array ours.
      back: the inverse.
    """

    name: str
    path: str
    there: Convert
    back: Convert

    def into(self, tensor: Any, leaf: Any, who: str) -> np.ndarray:
        """PyTorch's array as ours lies."""
        x = _array(tensor, self.name, who)
        if x.dtype.kind == "c" and not jnp.issubdtype(dtype_of(leaf), jnp.complexfloating):
            raise ValueError(f"{who}: {self.name}: found {x.dtype}; expected real numbers, as {self.path} has.")
        try:
            y = self.there(x)
        except ValueError:
            y = None
        if y is None or y.shape != jnp.shape(leaf):
            made = "which cannot be transposed so" if y is None else f"transposed {y.shape}"
            raise ValueError(
                f"{who}: {self.name}: found the shape {x.shape}, {made}; expected {jnp.shape(leaf)}, of {self.path}. If the two "
                f"are the same parameter, say how it has to be transposed: transpose={{{self.name!r}: axes}}."
            )
        return y


def _array(x: Any, name: str, who: str) -> np.ndarray:
    """A tensor or an array as one of NumPy."""
    if "sparse" in str(getattr(x, "layout", "")):
        raise ValueError(f"{who}: {name}: found a sparse tensor; expected a dense one: x.to_dense().")
    if hasattr(x, "detach"):
        try:
            x = x.detach().cpu().resolve_neg().resolve_conj()
            return np.asarray((x.float() if "bfloat16" in str(x.dtype) else x).numpy())  # NumPy does not have bfloat16
        except (TypeError, RuntimeError, NotImplementedError) as error:
            raise TypeError(
                f"{who}: {name}: found a tensor that is no array, {error}; expected a dense one in memory."
            ) from error
    found = np.asarray(x) if hasattr(x, "__array__") or isinstance(x, (int, float)) else None
    if found is None or not (found.dtype.kind in "biufc" or jnp.issubdtype(found.dtype, jnp.floating)):
        said = x if found is None else f"an array of {found.dtype}"
        raise TypeError(f"{who}: {name}: found {said!r} of type {type(x).__name__}; expected a tensor or an array of numbers.")
    return found


def _expect_table(state_dict: Any, who: str) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"{who}: found a {type(state_dict).__name__}; expected a state dict. Load a file yourself, with "
            f"torch.load(path, weights_only=True) or safetensors, and give what it holds."
        )


def _optimizer(state_dict: Any, who: str) -> tuple[list[Any], Mapping[int, Any]]:
    """The groups and the entries of an optimizer's state dict."""
    _expect_table(state_dict, who)
    if not {"state", "param_groups"} <= state_dict.keys():
        inside = next((key for key, its in state_dict.items() if isinstance(its, Mapping) and "param_groups" in its), None)
        hint = "Weights are for params_from_torch." if inside is None else f"Pass what is in [{inside!r}]."
        raise ValueError(
            f"{who}: found a dict of {some(list(map(str, state_dict))) or 'nothing'}; expected 'state' and 'param_groups', as "
            f"optimizer.state_dict() has them. {hint}"
        )
    groups, entries = state_dict["param_groups"], state_dict["state"]
    whole = isinstance(groups, (list, tuple)) and all(isinstance(its, Mapping) and "params" in its for its in groups)
    if not whole or not groups or not isinstance(entries, Mapping) or not all(isinstance(e, Mapping) for e in entries.values()):
        raise ValueError(
            f"{who}: found param_groups or a state that are not PyTorch's; expected a list of dicts with 'params', and a dict of "
            f"dicts by parameter number, as optimizer.state_dict() has them."
        )
    if strings := [key for key in entries if isinstance(key, str)]:
        raise ValueError(
            f"{who}: found the parameter numbers {some(list(map(repr, strings)))}; expected integers. JSON makes strings of "
            f"them: {{int(i): its for i, its in state.items()}}."
        )
    return list(groups), entries


def _called(groups: list[Any], names: Sequence[str] | None, who: str) -> dict[int, str]:
    """The names by the numbers that PyTorch gives to parameters."""
    numbers = [i for group in groups for i in group["params"]]
    strings = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    if names is not None and not strings:
        raise TypeError(f"{who}: names: found {names!r}; expected a list of strings.")
    if names is None:
        if any("param_names" not in group for group in groups):
            raise ValueError(
                f"{who}: the state dict numbers its {len(numbers)} parameters and does not name them. Give their names in the "
                f"optimizer's order: names=[name for name, _ in model.named_parameters()]."
            )
        names = [name for group in groups for name in group["param_names"]]
    if len(names) != len(numbers):
        raise ValueError(
            f"{who}: found {len(names)} names for {len(numbers)} parameters; expected one each, in the groups' order."
        )
    return dict(zip(numbers, names, strict=True))


def _kinds(groups: list[Any]) -> dict[str, str]:
    """The kinds of moments by PyTorch's names, of the optimizer that has such groups."""
    return SGD if "dampening" in groups[0] else RMSPROP if "alpha" in groups[0] else ADAM


def _kept(groups: list[Any], ours: Iterable[str]) -> list[str]:
    """The kinds of moments that an optimizer with such groups keeps."""
    group = groups[0]
    if "betas" in group:
        # RAdam's and Adamax's groups look alike.
        return ["mu", "infinity" if "infinity" in ours else "nu", *(["raw nu_max"] if group.get("amsgrad") else [])]
    kept = [] if "dampening" in group else ["nu", *(["mu"] if group.get("centered") else [])]
    return kept + (["trace"] if group.get("momentum") else [])


def _expect_decays(groups: Groups, ours: Mapping[str, Mapping[str, Any]], who: str) -> None:
    """Refuses decays that are not those of `tx`: bias would be corrected wrongly for moments that others have weighed."""
    for group, pairs in groups:
        betas = group.get("betas", (group.get("alpha"),) * 2)
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"{who}: found betas={betas!r} in param_groups; expected a pair.")
        first, second = betas
        theirs = {"mu": first, "nu": second, "infinity": second, "trace": group.get("momentum")}
        for kind, pair in itertools.product(ours, pairs):
            value = ours[kind].get(pair.path)
            if _differ(theirs.get(kind), value):
                raise ValueError(
                    f"{who}: found the decay {theirs[kind]} of {kind} in the param_group of {pair.name}, and {value} in tx; "
                    f"expected the same. Move with PyTorch's, and change it with convert_state."
                )


def _expect_settings(groups: Groups, tx: Any, params: PyTree, who: str) -> None:
    """Refuses what else makes steps others than those of `tx`; a learning rate may change."""
    settings = dict(_settings(tx, params))
    leaves = {leaf.path: leaf for leaf in describe(tx, params).leaves}
    _expect_rates(groups, leaves, who)
    for group, pairs in groups:
        # What others than AdamW do with a decay that is 0 does not matter.
        decoupled = group.get("decoupled_weight_decay") if group.get("weight_decay") else None
        theirs = {key: group.get(key) for key in SETTINGS} | {"decoupled_weight_decay": decoupled}
        for pair in pairs:
            said = settings.get(pair.path, {})
            # Where a member has no such argument it does as with 0.
            ours = {key: said.get(key, 0 if key in ("maximize", "dampening") else None) for key in theirs}
            ours |= {"weight_decay": leaves[pair.path].decay, "decoupled_weight_decay": _decoupled(leaves[pair.path].stages)}
            rectifies, its = "rectify" in leaves[pair.path].stages, _rectifies(group)
            if its not in (None, rectifies):
                theirs_is, ours_is = ("RAdam's", "does not rectify") if its else ("Adam's", "rectifies")
                raise ValueError(
                    f"{who}: the param_group of {pair.name} is {theirs_is}, and tx {ours_is}; expected the same optimizer, see "
                    f"presets.torch."
                )
            for key, value in ours.items():
                if _differ(theirs[key], value):
                    raise ValueError(
                        f"{who}: found {key}={theirs[key]} in the param_group of {pair.name}, and {value} in tx; expected the "
                        f"same. See presets.torch, and by_path for groups."
                    )


def _expect_rates(groups: Groups, leaves: Mapping[str, Leaf], who: str) -> None:
    """Refuses learning rates of groups in other proportions; what they are in all may change."""
    rates = [
        (float(group["lr"]), leaves[pair.path].rate, pair.name) for group, pairs in groups if "lr" in group for pair in pairs
    ]
    known = [(theirs, ours, name) for theirs, ours, name in rates if isinstance(ours, float) and theirs > 0 and ours > 0]
    for theirs, ours, name in known[1:]:
        first_of_theirs, first_of_ours, first = known[0]
        if _differ(theirs / first_of_theirs, ours / first_of_ours):
            raise ValueError(
                f"{who}: found that lr is {first_of_theirs:g} for {first} and {theirs:g} for {name}, and in tx {first_of_ours:g} "
                f"and {ours:g}; expected the same proportion. Give the groups of by_path a learning_rate_multiplier."
            )


def _decoupled(stages: Sequence[str]) -> bool | None:
    """Whether weight decay comes behind the moments; `None` where there is none, or none to know."""
    if "add_decayed_weights" not in stages or "track_moments" not in stages:
        return None
    return stages.index("add_decayed_weights") > stages.index("track_moments")


def _rectifies(group: Mapping[str, Any]) -> bool | None:
    """Whether a group is RAdam's, as far as its settings say so."""
    if "amsgrad" in group or "momentum_decay" in group:
        return False
    return True if {"betas", "decoupled_weight_decay", "foreach"} <= group.keys() else None


def _differ(theirs: Any, ours: Any) -> bool:
    """Whether two settings are numbers, and not the same."""
    both = all(isinstance(value, (bool, int, float)) for value in (theirs, ours))
    return both and not math.isclose(theirs, ours, rel_tol=1e-6)


def _frozen(tx: Any) -> Iterator[Callable[[str], bool]]:
    """Whether the groups of a transformation freeze a path."""
    spec = tx.init.spec if isinstance(tx, Transformation) else None
    if spec is not None and spec.build is by_path:
        said = spec.arguments.arguments

        def is_frozen(path: str) -> bool:
            matching = (group for pattern, group in said["groups"].items() if re.fullmatch(pattern, path))
            return isinstance(next(matching, said["default"]), str)

        yield is_frozen
    for part in () if spec is None else (*spec.stages, *spec.inner.values()):
        yield from _frozen(part)


def _settings(tx: Any, params: PyTree) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the members in a transformation have been told, for each leaf's path."""
    if not isinstance(tx, Transformation):
        return
    spec = tx.init.spec
    said = dict(spec.arguments.arguments)
    found: dict[str, dict[str, Any]] = {path: {} for path in trained(params)}
    if spec.build is by_path:
        its = labels(said["groups"], params, said["ordered"])
        inside = [(part, only(name, its, params)) for name, part in spec.inner.items()]
    else:
        inside = [(part, params) for part in (spec.inner.values() or (spec.stages if "stages" in said else ()))]
    for part, theirs in inside:
        for path, its_own in _settings(part, theirs):
            found[path] = its_own | found[path]
    yield from found.items() if inside else ((path, said) for path in found)


def _steps(found: Mapping[str, Any], count: int | None, who: str) -> dict[str, int]:
    """The number of steps that each parameter has taken, by path."""
    numbers = {path: whole(_array(step, f"the step of {path}", who), who) for path, step in found.items() if step is not None}
    if len(numbers) not in (0, len(found)):
        raise ValueError(
            f"{who}: found no step of {some([path for path in found if path not in numbers])}; expected one for all."
        )
    if not numbers and count is None:
        raise ValueError(f"{who}: the state keeps no step. Give the number of steps taken: from_torch(…, count=1000).")
    if numbers and count not in (None, *numbers.values()):
        step = next(iter(numbers.values()))
        raise ValueError(f"{who}: found count={count}, and step {step} in the state; expected none where the state has one.")
    return numbers or dict.fromkeys(found, whole(count, who))


def _pairs(
    names: Iterable[str],
    leaves: Mapping[str, Any],
    mapping: Names | None,
    transpose: Layouts | None,
    who: str,
    still: Set[str] = frozenset(),
    tied: bool = False,
) -> dict[str, _Pair]:
    """Parameters of PyTorch with their leaves, by name, but for those that are left out.

    The leaves in `still` may have no name, and where they may be `tied` several.
    """
    found: dict[str, _Pair] = {}
    taken: dict[str, str] = {}
    _expect_rules(mapping, transpose, who)
    lost, unused = [], set(transpose) if isinstance(transpose, Mapping) else set()
    for name in names:
        unused -= {name}
        target = _target(name, mapping, who)
        path = target and next((path for path in _options(target) if path in leaves), None)
        if path is None:
            lost += [name] if target and not name.endswith("num_batches_tracked") else []
            continue
        if path in taken and not tied:
            raise ValueError(
                f"{who}: found that {taken[path]!r} and {name!r} are both mapped to {path}; expected one for each leaf."
            )
        taken[path] = name
        found[name] = _Pair(name, path, *_layout(name, path, jnp.ndim(leaves[path]), transpose, who))
    missing = [path for path in leaves if path not in taken and path not in still]
    if lost or missing:
        says = [f"left over {some(lost)} of PyTorch"] if lost else []
        says += [f"missing {some(missing)} of the parameters"] if missing else []
        raise ValueError(
            f"{who}: {'; '.join(says)}. Give mapping=, a table or a function from PyTorch's names to paths in the parameters, "
            f"and to None for what has no place there."
        )
    # A table may serve other calls too: what leads to a leaf that has no name here is known elsewhere.
    unknown = [name for name in sorted(unused) if not {*_options(_target(name, mapping, who) or "")} & still]
    if unknown:
        raise ValueError(
            f"{who}: found {some(unknown)} in transpose, which is no name of PyTorch's here; expected names such as "
            f"{some(list(names))}."
        )
    return found


def _expect_rules(mapping: Any, transpose: Any, who: str) -> None:
    """Refuses what is neither a table of names nor a function."""
    for what, rule in [("mapping", mapping), ("transpose", transpose)]:
        table = isinstance(rule, Mapping) and all(isinstance(name, str) for name in rule)
        if rule is not None and not table and not callable(rule):
            raise TypeError(f"{who}: {what}: found {rule!r}; expected a table by PyTorch's names, or a function.")


def _target(name: str, mapping: Names | None, who: str) -> str | None:
    """Where a name leads: the longest beginning that is in a table is replaced."""
    if callable(mapping):
        start, new = name, mapping(name)
    else:
        starts = [name[:i] for i in range(len(name), 0, -1) if name[i : i + 1] in (".", "")]
        start = next((start for start in starts if start in (mapping or {})), "")
        new = mapping[start] if mapping and start else ""
    if not isinstance(new, (str, type(None))):
        raise TypeError(f"{who}: mapping: found {new!r} for {start!r}; expected a path in the parameters, or None.")
    return None if new is None else new + name[len(start) :]


def _options(target: str) -> list[str]:
    """The paths that a name can mean."""
    head, slash, last = target.replace(".", "/").rpartition("/")
    return [head + slash + its for its in (last, *ALIASES.get(last, ()))]


def _layout(name: str, path: str, ndim: int, transpose: Layouts | None, who: str) -> tuple[Convert, Convert]:
    """The functions between PyTorch's array and ours."""
    given = transpose(name, path) if callable(transpose) else (transpose or {}).get(name)
    if isinstance(given, (tuple, list)) and len(given) == 2 and all(map(callable, given)):
        there, back = given
        return there, back  # type: ignore[return-value]
    kernel = ndim >= 2 and path.rpartition("/")[2] == "kernel"
    axes: Any = given if given is not None else (*range(2, ndim), 1, 0) if kernel else tuple(range(ndim))
    if not isinstance(axes, (tuple, list)) or any(map(callable, axes)) or sorted(axes) != list(range(ndim)):
        raise ValueError(
            f"{who}: transpose: found {given!r} for {name}; expected a permutation of the {ndim} axes, or a pair of functions, "
            f"there and back, such as after_flatten(shape)."
        )
    inverse = np.argsort(axes).tolist()
    return lambda x: x.transpose(axes), lambda x: x.transpose(inverse)


def _by_path(params: PyTree) -> dict[str, Any]:
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
