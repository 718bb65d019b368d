"""The rewrite rules, and the nodes that they write."""
