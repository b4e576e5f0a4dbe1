"""What must hold of the rendered objects, whatever the values.

Each policy gives a line for each thing that is wrong. That they can fail is tested too, with
templates that were changed for the worse (`test_mutations`).
"""
