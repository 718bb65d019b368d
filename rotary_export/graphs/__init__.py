"""What is exported of a plain embedding: the graphs `tables` and `rotate`, dynamic and static."""
