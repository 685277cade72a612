"""crossray: tells what fine-tuning changed inside a language model, and proves it.

Reading order: config/run_file.py (what a run is), run/flow.py (the list of steps), stages/crosscoder.py (how one stage
is wired), numerics/crosscoder.py (the model), numerics/scaling.py (why a verdict can be trusted), report/page.py (what
you see).
Importing this package imports nothing else.
"""
