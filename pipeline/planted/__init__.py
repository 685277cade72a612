"""A benchmark with planted truth: activations whose concepts are known, recipes that fit them, and how right they are.

world.py makes the rows, trial.py fits and judges one recipe, score.py compares with the truth and summarises the seeds,
benchmark.py runs what is missing; pair.py makes the same table for a finished run. `crossray benchmark
workloads/planted.yaml` runs it; docs/planted.md says how to add a crosscoder of your own.
"""
