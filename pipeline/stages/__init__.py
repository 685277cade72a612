"""Ray wiring, one file per artifact; catalogue.py lists the stages in the order of the flow with what each needs.

A stage takes typed inputs and publishes one artifact per step. The maths is in numerics/; what happens to one batch is
in models/, text/, extraction/ and analyses/. The files here decide where it runs, how it resumes and in what order its
results are put together.
"""
