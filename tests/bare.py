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
FOREIGN = ("ray", "mlflow", "pydantic", "pandas", "safetensors", "transformers", "yaml", "pyarrow")


def main() -> None:
    present = {distribution.name.lower() for distribution in distributions()}
    found = sorted(present & {*FOREIGN, "pyyaml"})
    if found:
        sys.exit(f"expected an environment of torch and numpy, found {', '.join(found)}: remove .venv-bare")
    import pipeline.numerics

    names = [module.name for module in pkgutil.walk_packages(pipeline.numerics.__path__, "pipeline.numerics.")]
    imported = [name for name in names if not name.endswith(".triton_programs")]  # triton's own language
    for name in imported:
        importlib.import_module(name)

    import torch

    from pipeline.numerics.crosscoder import Crosscoder
    from pipeline.numerics.trainer import CrosscoderSpec, CrosscoderTrainer

    x_BMD = torch.randn(64, 2, 16, generator=torch.Generator().manual_seed(0))
    for sparsity in ({"kind": "batch_topk", "k": 4}, {"kind": "topk", "k": 4}, {"kind": "l1"}, {"kind": "jumprelu"}):
        trainer = CrosscoderTrainer(
            CrosscoderSpec(num_models=2, activation_dim=16, num_latents=64, num_steps=5, lr_warmup_steps=0, **sparsity)
        )
        trainer.initialise(x_BMD)
        losses = []
        for _ in range(5):
            trainer.step(x_BMD)
            losses.append(trainer.metrics()["loss"])
        assert losses[-1] < losses[0], (sparsity, losses)
        crosscoder = trainer.crosscoder()
        assert isinstance(crosscoder, Crosscoder)
        assert crosscoder.decode(crosscoder.encode(x_BMD)).shape == x_BMD.shape
    sys.stdout.write(f"{len(imported)} modules of numerics and {5 * 4} steps with torch {torch.__version__} alone\n")


if __name__ == "__main__":
    main()
