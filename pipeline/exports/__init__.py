"""A finished run for others: `crossray export` and `crossray push`. One file per form.

Forms are folders on this machine that other tools read. Nothing is computed that the run does not hold; what a form
cannot express is refused, or said in the README.md that lies in the folder.
"""
