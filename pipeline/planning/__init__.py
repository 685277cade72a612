"""What a run will cost, before it starts: texts (texts.py), models (shapes.py), rows, bytes and memory (sizes.py), time
(times.py, calibration.py).

estimate.py puts them together for `crossray plan`.
"""
