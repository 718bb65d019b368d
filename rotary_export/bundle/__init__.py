"""A bundle on disk: what it contains, and how it appears there whole or not at all.

- `manifest.py`: `manifest.json`, hashes; standard library only.
- `schema.py`: which entries a manifest has, and of what kind.
- `dims.py`: the names of dynamic sizes.
- `paths.py`: names of files.
- `staging.py`: folders to make things in, and what killed runs leave of them.
- `atomic.py`: folders and files that replace others only when they are complete.
- `folder.py`: where a bundle is written, and what it may replace.
- `copy_files.py`: copies of files and folders.
- `json_file.py`: JSON files, with one error for each defect.
"""
