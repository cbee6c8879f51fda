"""`python -m server` is the command `neurontune`."""

from server.cli import app

if __name__ == "__main__":  # engines start processes of their own, which import this file
    app(prog_name="neurontune")
