"""A model as a graph with open sizes, and the model as it was afterwards."""
