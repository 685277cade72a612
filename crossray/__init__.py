"""crossray as a library: the same code as the command, from a notebook, without a run file and without services.

    pair = crossray.load_pair("google/gemma-2-2b", "google/gemma-2-2b-it", layer=13)
    rows = pair.activations(texts)
    crosscoder = crossray.fit(rows, k=32, expansion=8)
    table = crossray.latents(crosscoder, rows)

Everything public is in the list below, with where it is made. Names are loaded when they are first used, so
`import crossray` takes no time and starts nothing. docs/library.md is the tour.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.run_file import RunConfig as RunConfig
    from pipeline.errors import ArtifactError as ArtifactError
    from pipeline.errors import CrossrayError as CrossrayError
    from pipeline.errors import InputError as InputError
    from pipeline.explorer.server import explore as explore
    from pipeline.exports.forms import export as export
    from pipeline.exports.pushing import push as push
    from pipeline.library import plot as plot
    from pipeline.library.crosscoder import Crosscoder as Crosscoder
    from pipeline.library.dashboard import Dashboard as Dashboard
    from pipeline.library.demo import DemoPair as DemoPair
    from pipeline.library.demo import demo_pair as demo_pair
    from pipeline.library.difference import Difference as Difference
    from pipeline.library.fitting import fit as fit
    from pipeline.library.loading import load_pair as load_pair
    from pipeline.library.origin import Origin as Origin
    from pipeline.library.pair import Pair as Pair
    from pipeline.library.rows import Rows as Rows
    from pipeline.library.runs import Run as Run
    from pipeline.library.runs import open_run as open  # noqa: F401 (renamed on purpose)
    from pipeline.library.runs import run as run
    from pipeline.library.summary import Summary as Summary
    from pipeline.library.tables import latents as latents
    from pipeline.library.training_examples import training_examples as training_examples
    from pipeline.models.loading import ModelSpec as ModelSpec

SURFACE = {
    "load_pair": "pipeline.library.loading",
    "demo_pair": "pipeline.library.demo",
    "fit": "pipeline.library.fitting",
    "latents": "pipeline.library.tables",
    "training_examples": "pipeline.library.training_examples",
    "open": "pipeline.library.runs:open_run",
    "run": "pipeline.library.runs",
    "explore": "pipeline.explorer.server",
    "export": "pipeline.exports.forms",
    "push": "pipeline.exports.pushing",
    "plot": "pipeline.library.plot:",
    "Crosscoder": "pipeline.library.crosscoder",
    "Dashboard": "pipeline.library.dashboard",
    "DemoPair": "pipeline.library.demo",
    "Difference": "pipeline.library.difference",
    "ModelSpec": "pipeline.models.loading",
    "Origin": "pipeline.library.origin",
    "Pair": "pipeline.library.pair",
    "Rows": "pipeline.library.rows",
    "Run": "pipeline.library.runs",
    "RunConfig": "pipeline.config.run_file",
    "Summary": "pipeline.library.summary",
    "CrossrayError": "pipeline.errors",
    "InputError": "pipeline.errors",
    "ArtifactError": "pipeline.errors",
}
"""The public surface: name -> module, or module:name where it is called otherwise there, or module: for itself."""

__all__ = tuple(SURFACE)


def __getattr__(name: str) -> Any:
    if name not in SURFACE:
        raise AttributeError(f"module 'crossray' has no attribute {name!r}; it has {', '.join(SURFACE)}")
    home, colon, called = SURFACE[name].partition(":")
    module = import_module(home)
    value = module if colon and not called else getattr(module, called or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(SURFACE)
