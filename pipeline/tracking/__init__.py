"""Where a run's numbers, figures, inputs and models are logged.

tracker.py is the seam, mlflow_tracker.py the only file that imports MLflow, spool.py keeps what a server that is away
cannot take, run_log.py says how a run appears there.
"""
