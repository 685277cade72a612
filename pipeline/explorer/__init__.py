"""A local web application over a finished run: `crossray explore FILE`, and `crossray.explore(run)`.

Nothing here computes anything of its own: tables come from the run, codes and answers from the library's pair.
"""
