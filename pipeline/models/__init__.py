"""The two language models of a run: loaded, checked to form a pair, cut at a layer, made to write.

torch and transformers; nothing here knows of Ray, MLflow or run files.
"""
