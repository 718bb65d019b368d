"""A model before and after, compared by running both."""
