"""Everything the monitor says of a fixed set of trainings, written down so that two versions can be
compared.
"""
