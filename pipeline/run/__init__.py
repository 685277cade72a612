"""A run from its file to its result: the list of steps, what is missing of them, and the check of what is there.

flow.py lists the steps and what each one's identity is, runner.py makes the missing ones, verify.py checks artifacts.
"""
