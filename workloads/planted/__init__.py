"""A benchmark with planted truth: activations whose concepts are known, recipes that fit them, and how right they are.

world.py makes the rows, trial.py fits and judges one recipe, score.py compares with the truth, table.py puts seeds
together. `crossray benchmark workloads/planted.yaml` runs it; README.md says how foreign checkpoints enter.
"""
