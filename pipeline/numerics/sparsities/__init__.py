"""How training keeps codes sparse: one file per sparsity, and the registry that finds them.

base.py says what a sparsity answers, registry.py lists the ones that exist.
"""
