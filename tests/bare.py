"""Run by `make test-bare` where only torch and numpy are installed: imports all of numerics and trains five steps.

Not a test module: pytest is not there. An environment says more than a blocked import, for it also lacks what torch
would import where it finds it.
"""

import importlib
import pkgutil
import sys
from importlib.metadata import distributions
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
FOREIGN = {"ray", "mlflow", "pydantic", "pandas", "safetensors", "transformers", "pyyaml", "pyarrow", "rich"}


def main() -> None:
    found = sorted(FOREIGN & {distribution.name.lower() for distribution in distributions()})
    if found:
        sys.exit(f"expected an environment of torch and numpy, found {', '.join(found)}: remove .venv-bare")
    import pipeline.numerics

    names = [module.name for module in pkgutil.walk_packages(pipeline.numerics.__path__, "pipeline.numerics.")]
    imported = [name for name in names if not name.endswith(".triton_programs")]  # triton's own language
    for name in imported:
        importlib.import_module(name)

    import torch

    from pipeline.numerics.trainer import CrosscoderTrainer
    from tests.golden.specs import CASES, make_rows, make_spec

    for case in CASES:
        trainer = CrosscoderTrainer(make_spec(case))
        trainer.initialise(make_rows(0))
        for step in range(5):
            trainer.step(make_rows(step))
        crosscoder = trainer.crosscoder()
        x_BMD = make_rows(5).float()
        assert crosscoder.decode(crosscoder.encode(x_BMD)).shape == x_BMD.shape, case
    sys.stdout.write(
        f"{len(imported)} modules of numerics, {len(CASES)} crosscoders, torch {torch.__version__} alone\n"
    )


if __name__ == "__main__":
    main()
