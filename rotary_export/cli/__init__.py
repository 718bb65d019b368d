"""The command line, `rotary-export`: one file per group of commands.

main.py: the group `cli`, its errors and exit codes.
options.py: options and arguments that several commands share.
export.py: `export`, `export-model`.
fuse.py: `fuse`.
verify_run.py: `verify`, `run`, `generate`, `bench`.
deploy_serve.py: `deploy`, `serve`.
inspect.py: `inspect`, `doctor`; inspection.py: the facts that they print.
examples.py: two examples of each command, for its `--help`.
report.py: the proof as a table.
terminal.py: tables and progress on a terminal, plain lines in a pipe, or JSON.
arrays.py: arrays from and to `.npy` and `.npz` files.
"""
