"""Documents, the filters they pass, chat templates, and token ids with one bit mask per token.

Plain functions on one document or file; nothing here knows of models' weights, Ray, MLflow or run files.
"""
