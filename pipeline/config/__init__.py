"""The run file (run_file.py) and its sections, one class per owner.

Two halves. What is asked for (data.py, crosscoder.py, analyses.py) bears identity: a change makes artifacts stale. How
it is done (resources.py) never does. Each stage receives its own section and nothing else. Numbers are checked here as
far as that is possible without a model or data; the rest is checked by the stage, before it writes.
"""
