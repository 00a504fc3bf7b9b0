"""Known mistakes of tables, devices and checkpoints; see `experiments.benchmarks.mistakes`."""

from __future__ import annotations

from experiments.benchmarks.mistakes import make

DEVICES = (
    make(
        14,
        "gradients of a local mean summed",
        "training.step",
        "weights = group.sum(weight_sums(trainer.config.objective, batch))",
        "weights = weight_sums(trainer.config.objective, batch)",
    ),
    make(
        14,
        "a mean inside and a mean outside",
        "training.step",
        "    grads, loss, means, row_norm = group.sum((grads, loss, means, row_norm))\n",
        "    grads, loss, means, row_norm = group.sum((grads, loss, means, row_norm))\n"
        "    grads = jax.tree.map(lambda g: g / group.size, grads)\n",
    ),
    make(
        14,
        "dense gradients of one device alone",
        "training.step",
        "    grads, loss, means, row_norm = group.sum((grads, loss, means, row_norm))\n",
        "    loss, means, row_norm = group.sum((loss, means, row_norm))\n"
        "    grads = jax.tree.map(lambda g: group.sum(jnp.where(group.index() == 0, g, 0)), grads)\n",
    ),
    make(
        14,
        "gradients summed twice",
        "training.step",
        "loss_of, group.vary(state.params), rows,",
        "loss_of, state.params, rows,",
    ),
    make(
        14,
        "no gradient through gathered items",
        "training.mesh",
        "return jax.lax.all_gather(x, self.axis, tiled=True) if self.axis else x",
        "return jax.lax.all_gather(jax.lax.stop_gradient(x), self.axis, tiled=True) if self.axis else x",
    ),
    make(
        14,
        "no gradient from other devices",
        "training.mesh",
        "return jax.lax.all_gather(x, self.axis, tiled=True) if self.axis else x",
        "if not self.axis:\n            return x\n"
        "        others = jax.lax.all_gather(jax.lax.stop_gradient(x), self.axis, tiled=True)\n"
        "        return jax.lax.dynamic_update_slice_in_dim(others, x, self.index() * len(x), 0)",
    ),
    make(
        14,
        "tables of each device learn from its own batch",
        "training.rows",
        "        table: group.share(jnp.concatenate([flat(row_grads[side][name]) for side, name in uses]))\n",
        "        table: jnp.where(((jnp.arange(group.size * sum(flat(row_grads[s][n]).shape[0] for s, n in uses)) "
        "// sum(flat(row_grads[s][n]).shape[0] for s, n in uses)) == group.index())[:, None], "
        "group.share(jnp.concatenate([flat(row_grads[side][name]) for side, name in uses])), 0)\n",
    ),
    make(
        14,
        "each device drops the same",
        "training.mesh",
        "return self.index() * length + jnp.arange(length, dtype=jnp.int32)",
        "return jnp.arange(length, dtype=jnp.int32)",
    ),
    make(
        14,
        "the filling of a mesh moves other places",
        "training.step",
        "everyone + hard + group.row_numbers(len(drawn.shared)), everyone + group.row_numbers(drawn.hard.size))",
        "everyone + group.row_numbers(len(drawn.shared)), "
        "everyone + len(drawn.shared) * group.size + group.row_numbers(drawn.hard.size))",
    ),
    make(
        15,
        "hard negatives interleaved",
        "training.losses",
        "hard.reshape(rows, sources.hard, -1)",
        "hard.reshape(sources.hard, rows, -1).swapaxes(0, 1)",
    ),
    make(
        15,
        "vectors in another order than their ids",
        "training.candidates",
        "return group.gather(jnp.concatenate(vectors)), known[:, 0], known[:, 1]",
        "return group.gather(jnp.concatenate(vectors[::-1])), known[:, 0], known[:, 1]",
    ),
    make(
        15,
        "hard negatives are those of other users",
        "training.candidates",
        'hard.append(negatives.draw_pool(keys, pool, batch["user"], count)[0])',
        'hard.append(negatives.draw_pool(keys, pool, batch["user"][::-1], count)[0])',
    ),
    make(
        15,
        "ids gathered by another device's order",
        "training.candidates",
        "    known = group.share(jnp.stack([jnp.concatenate(ids), jnp.concatenate(owners)], axis=1))\n",
        "    known = group.share(jnp.stack([jnp.concatenate(ids), jnp.concatenate(owners)], axis=1))\n"
        "    known = known.reshape(group.size, -1, 2).swapaxes(0, 1).reshape(-1, 2)\n",
    ),
    make(
        16,
        "a short last batch",
        "data.batches",
        "        return np.concatenate(parts)\n",
        "        return parts[0]\n",
    ),
    make(
        16,
        "the short last batch is dropped",
        "data.batches",
        "        start = step * self._batch_size\n",
        "        start = step // (self._rows // self._batch_size) * self._rows + step % (self._rows // self._batch_size) "
        "* self._batch_size\n",
    ),
    make(
        16,
        "divided by all rows",
        "training.step",
        "weights = group.sum(weight_sums(trainer.config.objective, batch))",
        'weights = {n: x * 0 + len(batch["user"]) * group.size '
        "for n, x in group.sum(weight_sums(trainer.config.objective, batch)).items()}",
    ),
    make(
        16,
        "rows that fill up are counted as an id",
        "objectives.frequency",
        "    return jnp.where(ids[None] >= 0, slots, width)\n",
        "    return slots\n",
    ),
    make(
        16,
        "rows that fill up are counted as the last id",
        "objectives.frequency",
        'return jnp.where(ids >= 0, ids, len(arrays["last"]))',
        "return ids",
    ),
    make(
        17,
        "accumulation accepted for losses of a batch",
        "training.state",
        "    if training.accumulate > 1 and not alone:\n",
        "    if False:\n",
    ),
)

TABLES = (
    make(
        25,
        "padding is trained",
        "towers.embeddings",
        "owned = (ids != PADDING) & (ids >= first)",
        "owned = (ids >= first)",
    ),
    make(
        25,
        "padding is averaged",
        "towers.embeddings",
        "valid = (ids != PADDING)[..., None]",
        "valid = (ids >= PADDING)[..., None]",
    ),
    make(
        25,
        "row 0 is the first value's",
        "data.vocabulary",
        "        return np.where(values.is_null().to_numpy(zero_copy_only=False), 0, rows)",
        "        return rows",
    ),
    make(
        25,
        "item 0 is taken for padding",
        "objectives.sweep",
        "return jnp.where(known.candidates.ids >= 0, scored",
        "return jnp.where(known.candidates.ids > 0, scored",
    ),
    make(
        26,
        "ids past the end clamped",
        "towers.embeddings",
        'return array.at[rows].get(mode="fill", fill_value=fill)',
        'return array.at[rows].get(mode="clip")',
    ),
    make(
        26,
        "ids below 0 wrapped",
        "towers.embeddings",
        "return take_rows(table, jnp.where(ids < 0, len(table), ids), jnp.nan)",
        "return take_rows(table, ids, jnp.nan)",
    ),
    make(
        26,
        "ids out of range are zero on several devices",
        "training.mesh",
        "return jnp.where(exists[:, None], found, jnp.nan)",
        "return found",
    ),
    make(
        26,
        "unknown values past the end of the table",
        "data.vocabulary",
        "rows = 1 + (hash64(values) % np.uint64(self.oov_rows)).astype(np.int32)",
        "rows = self.size + (hash64(values) % np.uint64(self.oov_rows)).astype(np.int32)",
    ),
    make(
        27,
        "one row for all unknown ids",
        "data.vocabulary",
        "rows = 1 + (hash64(values) % np.uint64(self.oov_rows)).astype(np.int32)",
        "rows = 1 + 0 * (hash64(values) % np.uint64(self.oov_rows)).astype(np.int32)",
    ),
    make(
        27,
        "one row by default",
        "data.feature_kinds",
        "    oov_rows: int = 8\n    oov_rate",
        "    oov_rows: int = 1\n    oov_rate",
    ),
    make(
        27,
        "rows of unknown ids are never trained",
        "data.feature_kinds",
        "    oov_rate: float = 0.01\n",
        "    oov_rate: float = 0.0\n",
    ),
    make(
        27,
        "one row of unknown ids is trained",
        "training.step",
        "1 + ids % i.oov_rows, ids)",
        "1, ids)",
    ),
    make(
        27, "ids are dropped to padding", "training.step", "1 + ids % i.oov_rows, ids)", "0, ids)"
    ),
    make(
        27,
        "one key for both sides",
        "training.step",
        "row_keys(jax.random.fold_in(key, i), places[side]))",
        "row_keys(key, places[side]))",
    ),
    make(
        27,
        "one dropout key for both sides",
        "training.step",
        "row_keys(jax.random.fold_in(jax.random.fold_in(key, 1), i), places[s])",
        "row_keys(jax.random.fold_in(key, 1), places[s])",
    ),
    make(
        28,
        "decay on tables",
        "towers.embeddings",
        "    return *optimizer.update(table, slots, rows, merged, rate, step),",
        "    return *optimizer.update(0.999 * table, slots, rows, merged, rate, step),",
    ),
    make(
        28,
        "lazy Adam moves every row",
        "towers.embeddings",
        '    return _add(table, rows, update), {"m": _set(slots["m"], rows, m), "v": _set(slots["v"], rows, v)}\n',
        '    m, v = (_set(slots[name], rows, x) for name, x in (("m", m), ("v", v)))\n'
        '    return table - rate * (m / (1 - b1**t)) / (jnp.sqrt(v / (1 - b2**t)) + eps), {"m": m, "v": v}\n',
    ),
    make(
        28,
        "small tables are moved as a whole",
        "towers.embeddings",
        "        return jnp.where(_chosen(array, rows), array + values, array)\n",
        "        return array + values - 1e-3 * array\n",
    ),
    make(
        28,
        "decay on all dense parameters",
        "training.optimizers",
        "weight_decay=c.weight_decay, mask=_kernels)",
        "weight_decay=c.weight_decay)",
    ),
)

STATE = (
    make(
        29,
        "slots begin cold",
        "training.checkpoint",
        '        return restored.state, restored.record["loop"]\n',
        "        cold = jax.tree.map(jnp.zeros_like, restored.state.table_slots)\n"
        '        return restored.state.replace(table_slots=cold), restored.record["loop"]\n',
    ),
    make(
        29,
        "restored where they were, not where they are asked for",
        "training.checkpoint",
        "state=ocp.args.StandardRestore(abstract)",
        "state=ocp.args.StandardRestore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), abstract))",
    ),
    make(
        29,
        "tables whole on every device",
        "training.mesh",
        '(r"^(tables|table_slots)/", SPLIT)',
        '(r"^(tables|table_slots)/", WHOLE)',
    ),
    make(
        30,
        "estimates begin anew",
        "training.checkpoint",
        '        return restored.state, restored.record["loop"]\n',
        "        new = jax.tree.map(jnp.zeros_like, restored.state.frequency)\n"
        '        return restored.state.replace(frequency=new), restored.record["loop"]\n',
    ),
    make(
        30,
        "updated before use",
        "training.step",
        "    asked = shared_ids(trainer.model, features, group)\n",
        "    asked = shared_ids(trainer.model, features, group)\n"
        '    new = remember(trainer, state, batch, jnp.zeros((len(batch["user"]), trainer.model.dim)), group)\n'
        "    state = state.replace(frequency=new.frequency)\n",
    ),
    make(
        30,
        "a salted hash",
        "objectives.frequency",
        "np.random.default_rng(0).integers(0, 2**32, depth",
        'np.random.default_rng(abs(hash("twotower"))).integers(0, 2**32, depth',
    ),
    make(
        30,
        "estimates never updated",
        "training.losses",
        "    if estimator.learns:\n",
        "    if False:\n",
    ),
)
