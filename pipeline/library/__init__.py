"""What `import crossray` shows, nothing else: the parts of the pipeline put together for a notebook.

Nothing here computes anything of its own; stages and library call the same functions of the rooms below.
"""
