"""Paged attention: write this step's keys and values, then attend over pages.

`reference.py` defines the answer; every other implementation takes the same arguments. The
builder of the step chooses one by name, once.
"""
