"""Charts of the report, one file per topic: each function takes a table and returns an Altair chart, nothing else."""
