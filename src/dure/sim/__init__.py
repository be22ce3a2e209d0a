"""The simulator of machine programs: their time, their values, and the proof that they can't race.

All three read one expansion of the program (:mod:`dure.sim.expand`).
"""
