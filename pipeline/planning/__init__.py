"""What a run will cost, before it starts: rows, bytes and memory (sizes.py), time (times.py, calibration.py).

estimate.py puts them together for `crossray plan`.
"""
