"""Ray Serve, with a bundle as an application.

engine.py: `rotary-export serve --engine ray`, on this machine.
app.py: the application: the Open Inference Protocol around a bundle; `build_app` for config files.
reaper.py: ends the remaining processes of Ray after the server.
"""
