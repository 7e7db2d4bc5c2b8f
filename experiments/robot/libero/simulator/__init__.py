"""The simulator: environments, cameras and rendering."""
