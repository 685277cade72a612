"""All reading and writing: one file system, the records that mark an artifact complete, and the activation store.

filesystem.py is the only door to disk and object store; faults.py says which of its failures are worth a retry;
artifacts.py holds fingerprints and records; the other files hold rows.
"""
