"""The two language models of a run: loading, the check that they form a pair, the cut at a layer, generation.

torch and transformers; nothing here knows of Ray, MLflow or run files.
"""
