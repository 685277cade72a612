"""The Ray cluster of a run: started or joined (connect.py), and runs as jobs of a distant one (jobs.py)."""
