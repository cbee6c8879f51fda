"""`python -m server` is the command `neurontune`."""

from server.cli import app

app(prog_name="neurontune")
