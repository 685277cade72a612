"""Published layouts of crosscoders: files of others read into tensors and settings, ours written so that others can.

Nothing here knows the Crosscoder class, which imports this room to load and save itself.
"""
