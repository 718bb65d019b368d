"""The command line, `rotary-export`: one file per group of commands."""
