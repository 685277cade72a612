"""Ray wiring, one file per artifact: organism, corpus, tokens, activations, crosscoders, measurements, report.

A stage takes its own config section and the folders of its inputs, and publishes one artifact per step. The maths is in
numerics/; what happens to one batch is in models/, text/, extraction/ and analyses/. What is here decides where it
runs, how it resumes and in what order its results are put together.
"""
