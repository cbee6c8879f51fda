"""The image's health check: exit code 0 if the server in this container can answer requests now.

Knows the variable that chooses the port, and nothing else of the server. Needs only Python's own library, and
takes no proxy from the environment.
"""

import http.client
import os
import sys

TIMEOUT_SECONDS = 4


def main() -> int:
    """0: ready; 1: it says that it is not, or does not answer."""
    port = int(os.environ.get("NEURONTUNE_PORT", "8000"))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/ready")
        response = connection.getresponse()
        said = response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        said = f"No answer: {error}"
    else:
        if response.status == 200:
            return 0
    sys.stderr.write(f"{said}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
