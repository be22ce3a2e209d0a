"""Tables of steps on chips: :mod:`cells` answers many, :mod:`score` is the number that dure exists
for, :mod:`matrix` all models on all chips, :mod:`rows` the published whole-model results.
"""
