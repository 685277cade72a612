"""The report: one self-contained HTML file, its figures as files, and the terminal's verdict table.

Last stage of the flow: `data.ReportData` (plain tables) goes in, text comes out. Nothing here computes a verdict, reads
an artifact or knows of Ray and MLflow. Figures are Altair charts made from the tables: interactive in the page, PNG as
files.
"""
