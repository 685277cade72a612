"""What a run leaves for others to look up: its numbers in a tracker, its log in a file.

tracker.py says what a tracker can do, choose.py picks one, mlflow_tracker.py is the only file that imports MLflow,
spool.py keeps what a server that is away cannot take, run_log.py says how a run appears there, and log_file.py writes
the log file.
"""
