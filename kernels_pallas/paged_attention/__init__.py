"""Paged attention: write this step's keys and values, then attend over pages.

`reference.py` defines the answer; every other implementation takes the same arguments. Which
one runs is chosen once, by name, by whoever builds the step.
"""
