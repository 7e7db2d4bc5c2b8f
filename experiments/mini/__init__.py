"""The mini models, and their data from the simulator."""

# Kinds of scene that `moved_scene` makes; here, where flags can name them without loading the simulator.
SCENES = ("task", "moved")
