"""`from_torch`, `to_torch`: a run of a PyTorch optimizer goes on in ours, and back.

Nothing here reads files or needs PyTorch: state dicts come as `torch.load(…, weights_only=True)` or
safetensors give them, with tensors or NumPy arrays, and go back with NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from adam_jax._core.errors import some
from adam_jax._core.leaves import PyTree, arrays_of
from adam_jax._core.spec import all_specs
from adam_jax._core.transformation import abstract_state
from adam_jax.migrate.foreign_state import (
    ForeignState,
    ahead_field,
    all_leaves,
    decays,
    fill,
    memories,
    read,
    same_kinds,
    same_leaves,
    trained,
)
from adam_jax.migrate.torch_forms import form_of
from adam_jax.migrate.torch_layout import Layouts, warn_of_open
from adam_jax.migrate.torch_names import Names, options_of, target_of
from adam_jax.migrate.torch_order import ParamNames, named_parts
from adam_jax.migrate.torch_pairs import (
    expect_all_parts,
    expect_real,
    open_ways,
    pairs_of,
)
from adam_jax.migrate.torch_parts import Heads, Splits, Stacks
from adam_jax.migrate.torch_rules import Rules, expect_rules
from adam_jax.migrate.torch_settings import expect_decays, expect_settings
from adam_jax.migrate.torch_state import (
    cut_entry,
    expect_known,
    fields_by_name,
    kinds_kept,
    moment_by_path,
    same_steps,
    step_of,
    steps_by_path,
)


def from_torch(
    state_dict: Mapping[str, Any],
    tx: Any,
    params: PyTree,
    *,
    mapping: Names | None = None,
    transpose: Layouts | None = None,
    split: Splits | None = None,
    stack: Stacks | None = None,
    heads: Heads | None = None,
    names: ParamNames | None = None,
    count: int | None = None,
) -> PyTree:
    r"""The state of `tx` in a run that PyTorch began.

        tx = adam_jax.adamw(3e-4, weight_decay=0.01)
        rules = dict(mapping={"conv1": "Conv_0", "fc": "Dense_0"})
        params = adam_jax.migrate.params_from_torch(model.state_dict(), params, **rules)
        names = [name for name, _ in model.named_parameters()]
        saved = optimizer.state_dict()
        state = adam_jax.migrate.from_torch(saved, tx, params, names=names, **rules)

    `tx` has to be the same optimizer with the same decays, of which our weights follow; a state
    dict does not name it. Its storage is free: moments are rounded to nearest. Leaves that have
    taken other steps than the rest go on each from its own.

    Args:
      state_dict: what `optimizer.state_dict()` returns, of Adam, AdamW, NAdam, RAdam, Adamax,
        RMSprop or SGD; tensors or arrays. Also of distributed checkpoints, whose keys are names,
        nested or flattened, and with the steps in the groups, as apex keeps them.
      tx: the transformation of this package that goes on. PyTorch's parameter groups may be groups
        of `by_path`, or a mask of weight decay.
      params: the parameters, which have the moments' shapes.
      mapping: from PyTorch's names to paths in `params`: a function, or a table of names or of
        their beginnings ("layers.0": "Dense_0"). What is not in the table keeps its name. "."
        counts as "/", a beginning that is mapped to "" is cut off before the rest is looked up, and
        a last part "weight" that is not in the tree is looked for as "kernel",
        "scale" and "embedding". `None` stands for what has no place in `params`.
      transpose: how arrays come to lie as in `params`, where that is not by rule: a table by
        PyTorch's name, or by a regular expression of whole names, or a function (name, path) ->
        entry or `None`. An entry has the axes, as `np.transpose` takes them; a pair of functions,
        there and back, such as `after_flatten`; or a word. The rule: in a leaf called "kernel"
        PyTorch's first two axes come last, (out, in, …) to (…, in, out); all other leaves are as in
        PyTorch. It fits transposed convolutions of Flax with `transpose_kernel=True`. "kernel" and
        "same" are the two halves of the rule, whatever the leaf is called, and "rule" itself says
        that it is right. Where shapes would allow another layout and there is no entry, a
        `LayoutWarning` lists the leaves.
      split: how one parameter becomes several, as a fused q, k, v: a table, by name or pattern, to
        the names of the parts, {r"(.*)\.in_proj_(.*)": (r"\1.q.\2", r"\1.k.\2", r"\1.v.\2")}.
        It is cut along the first axis into equal parts; another axis, or sizes, by
        `Split(names, axis, sizes)`. The other tables know the parts by their names.
      stack: which layers become one leaf: a table of beginnings to the axis of layers in our leaf.
        {"layers": 0} puts "layers.0.fc.weight", "layers.1.fc.weight" … into the leaf of
        "layers.fc.weight", a name that the other tables know as well.
      heads: how many heads a leaf has that has an axis of them where PyTorch has one axis for all,
        by name or pattern: (h·d, in) becomes (in, h, d), (out, h·d) becomes (h, d, out), and a bias
        (h·d,) becomes (h, d). Leaves of one axis stay.
      names: those of the parameters, where the state dict has no "param_names". With one group it
        is a list in the order of `model.named_parameters()`. With several groups it is a list for
        each group, in the optimizer's order. A table by PyTorch's numbers says it most plainly.
      count: the steps taken, for a state that keeps none: of SGD.

    Returns:
      A state of `tx`.

    Raises:
      TypeError: for what is no state dict (we load no files) and no tensor, or if `tx` is no
        transformation.
      ValueError: for names that are missing, left over, or meet in one leaf; an order of names that
        equal shapes do not check (one list for several groups, an alphabetical one); shapes that
        differ once transposed; steps that are no whole number; decays and settings that are not
        those of `tx`; moments that only one side has.
    """
    caller = "from_torch"
    form = form_of(state_dict, caller)
    groups, entries = form.groups, form.entries
    params = arrays_of(params)
    first = abstract_state(tx, params, caller)
    parts, ours = memories(tx, first, caller)
    leaves, rules = trained(params), Rules(mapping, transpose, split, stack, heads)
    expect_rules(rules, caller)
    called, cutter = named_parts(form, names, leaves, rules, caller)
    held = {path for its in ours.values() for path in all_leaves(its)}
    every = [part for name in called.values() for part in cutter(name)]
    pairs = pairs_of(every, leaves, rules, caller, still=leaves.keys() - held)
    if extra := [str(i) for i in entries if i not in called]:
        raise ValueError(
            f"{caller}: left over the state of {some(extra)}, parameters which no group has."
        )
    kinds = fields_by_name(groups)
    cut = {
        part: (entry, group)
        for group in groups
        for i in group["params"]
        for part, entry in cut_entry(cutter, called[i], entries.get(i, {}), kinds).items()
    }
    of = {name: entry for name, (entry, _) in cut.items() if name in pairs}
    if blank := [name for name, entry in of.items() if not entry and pairs[name].path in held]:
        raise ValueError(
            f"{caller}: found no state of {some(blank)}; expected one for each "
            f"parameter. One that never had a gradient has none: "
            f"map it to None and leave it out of params, or freeze it, with "
            f'by_path({{pattern: "frozen"}}, …).'
        )
    of = {name: entry for name, entry in of.items() if entry}
    if over := [name for name in of if pairs[name].path not in held]:
        raise ValueError(
            f"{caller}: left over the state of {some(over)}, of which tx keeps none. Move with a "
            "tx that trains what PyTorch has trained, and freeze it with convert_state."
        )
    kept = {field: True for entry in of.values() for field, its in entry.items() if its is not None}
    fields = [field for field in kept if field not in ("step", "mu_product")]
    expect_known(fields, kinds, caller)
    same_kinds(ours, {kinds[field]: field for field in fields}, caller, "the state dict")
    expect_real(leaves, [kinds[field] for field in fields], caller)
    if ("mu_product" in kept) != any(map(ahead_field, parts)):
        has = (
            "has the mu_product of NAdam, and tx does not look"
            if "mu_product" in kept
            else "is not NAdam's, and tx looks"
        )
        raise ValueError(
            f"{caller}: the state {has} ahead; expected the same optimizer on both sides, see "
            "presets.torch."
        )
    by_group = [(group, [pairs[name] for name in of if cut[name][1] is group]) for group in groups]
    expect_decays(by_group, decays(tx, first, caller), caller)
    expect_settings(by_group, tx, params, caller)
    moments = {}
    for field in fields:
        keep = all_leaves(ours[kinds[field]])
        moments[kinds[field]] = moment_by_path(field, kinds[field], of, pairs, leaves, keep, caller)
    warn_of_open(open_ways([pairs[name] for name in of], leaves), caller)
    steps_found = {name: step_of(name, entry, cut[name][1], caller) for name, entry in of.items()}
    steps = steps_by_path(same_steps(steps_found, pairs, caller), count, caller)
    return fill(tx, params, ForeignState(steps, max(steps.values(), default=0), moments), caller)


def to_torch(
    state: PyTree,
    tx: Any,
    like: Mapping[str, Any],
    *,
    mapping: Names | None = None,
    transpose: Layouts | None = None,
    split: Splits | None = None,
    stack: Stacks | None = None,
    heads: Heads | None = None,
    names: ParamNames | None = None,
) -> dict[str, Any]:
    """The state dict of a PyTorch optimizer in a run of ours.

        found = adam_jax.migrate.to_torch(state, tx, optimizer.state_dict(), names=names, **rules)
        entries = found["state"].items()
        found["state"] = {i: {k: torch.tensor(v) for k, v in entry.items()} for i, entry in entries}
        optimizer.load_state_dict(found)

    Args:
      state: that of `tx`.
      tx: the transformation of this package that the run had.
      like: the state dict of the optimizer that goes on, fresh or not. Its "param_groups" stay.
      mapping: as in `from_torch`, from PyTorch's names to ours.
      transpose: as in `from_torch`, from PyTorch's arrays to ours.
      split: as in `from_torch`.
      stack: as in `from_torch`.
      heads: as in `from_torch`.
      names: as in `from_torch`.

    Returns:
      A state dict in the form of `like`, whose moments are NumPy arrays, float32 or float64.

    Raises:
      TypeError: as `from_torch`.
      ValueError: as `from_torch`, and where the state has weights that no count says, as after
        `reset`.
    """
    caller = "to_torch"
    form = form_of(like, caller)
    groups = form.groups
    run = read(tx, state, caller)
    fields = {kind: field for field, kind in fields_by_name(groups).items()}
    same_kinds(
        run.moments,
        {kind: fields[kind] for kind in kinds_kept(groups, run.moments)},
        caller,
        "the optimizer",
    )
    leaves, *others = run.moments.values()
    expect_real(leaves, run.moments, caller)
    for its in others:
        same_leaves(its, leaves, caller)
    frozen = [spec.freezes for spec in all_specs(tx) if spec.freezes is not None]

    def is_trained(name: str) -> bool:
        options = options_of(target_of(name, mapping, caller) or "")
        return not any(is_frozen(path) for is_frozen in frozen for path in options)

    rules = Rules(mapping, transpose, split, stack, heads)
    expect_rules(rules, caller)
    called, parts = named_parts(form, names, leaves, rules, caller)
    every = [part for name in called.values() for part in parts(name) if is_trained(part)]
    pairs = pairs_of(every, leaves, rules, caller)
    by_group = [
        (group, [pairs[p] for i in group["params"] for p in parts(called[i]) if p in pairs])
        for group in groups
    ]
    expect_decays(by_group, decays(tx, state, caller), caller)
    shared = any("step" in group for group in groups)  # apex and TransformerEngine keep it there
    also = {} if shared or "dampening" in groups[0] else {"step": np.float32(run.count)}
    groups = [group | ({"step": run.count} if "step" in group else {}) for group in groups]
    also |= {"mu_product": np.float32(1 - run.ahead)} if run.ahead is not None else {}

    def moment(name: str, kind: str) -> np.ndarray:
        def part_of(part: str) -> np.ndarray:
            return pairs[part].out_of(np.asarray(run.moments[kind][pairs[part].path]), caller)

        return parts.join(name, part_of)

    warn_of_open(open_ways(pairs.values(), leaves), caller)
    found = {
        i: also | {fields[kind]: moment(name, kind) for kind in run.moments}
        for i, name in called.items()
        if expect_all_parts(parts(name), pairs, name, caller)
    }
    return form.rebuild(groups, found)
