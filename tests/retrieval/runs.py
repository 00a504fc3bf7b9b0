"""Small runs that were never trained (their weights are as good as any to check that they arrive),
and their bundles."""

import dataclasses
import json

import jax
import numpy as np

from tests import lowering
from twotower.config import from_dict
from twotower.core.files import content_digest, digest, new_version, publish_version
from twotower.pipeline.prepare import prepare
from twotower.retrieval.bundle import write_bundle
from twotower.retrieval.export import make_bundle
from twotower.towers.two_tower import TwoTower
from twotower.training.run import Run

FEATURES = {
    "user": {
        "user_id": {"type": "string", "embedding_size": 16},
        "city": {"type": "string", "embedding_size": 4},
        "event": {"type": "string", "embedding_size": 4},  # of the interaction: context
    },
    "item": {"item_id": {"type": "string", "embedding_size": 16}, "price": {"type": "float"}},
}
# Nearly all that exporting a bundle takes are the programs of its towers.
lowering.keep_exports()


def make_run(workdir, *, seed=0, **sections):
    """A run of the generated shop with fresh weights."""
    values = {
        "data": {"source": "shop", "num_interactions": 3000},
        "features": FEATURES,
        "model": {"user": {"layers": (16,)}, "item": {"layers": (16,)}},
        "retrieval": {"index": "exact"},
    }
    config = from_dict(
        {name: values.get(name, {}) | sections.get(name, {}) for name in values | sections}
    )
    prepared = prepare(config)
    model = TwoTower.build(config.model, prepared.encoder)
    workdir.mkdir(exist_ok=True)
    return Run(workdir, config, prepared, model, model.init(jax.random.key(seed)), 7)


def with_other_weights(run, workdir):
    """The same run as if it had been trained from another seed; `init` is not compiled again."""
    rng = np.random.default_rng(1)
    weights = jax.tree.map(
        lambda x: x + 0.3 * rng.normal(size=np.shape(x)).astype(np.float32), run.weights
    )
    workdir.mkdir(exist_ok=True)
    return dataclasses.replace(run, workdir=workdir, weights=weights)


def write(run, **options):
    """Writes the bundle of a run as `export` does, but for the proof that it scores as the trainer
    does, and returns its folder."""
    version = new_version(run.workdir / "bundle")
    write_bundle(make_bundle(run, **options), version, step=run.step)
    publish_version(version)
    return run.workdir / "bundle"


def storing(run, **retrieval):
    """The run with another section of retrieval."""
    config = dataclasses.replace(
        run.config, retrieval=dataclasses.replace(run.config.retrieval, **retrieval)
    )
    return dataclasses.replace(
        run, config=config, prepared=dataclasses.replace(run.prepared, config=config)
    )


def rewrite_manifest(folder, **changes):
    """Makes a spoilt bundle look whole, as somebody would who mixes two by hand."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    manifest |= changes
    manifest["files"] = {name: digest(folder / name) for name in manifest["files"]}
    (folder / "manifest.json").write_text(
        json.dumps(manifest | {"sha256": content_digest(manifest)})
    )
