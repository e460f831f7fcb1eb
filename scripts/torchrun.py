"""Commands that torchrun started in several processes: the first one runs the command, the others follow it.

Imports are light, so that signals are handled while torch is being imported.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from dllm.scripts.ending import line

_PATIENCE = 10  # seconds until an error of a process that is not the first is its own: the first one's end them all


def processes() -> int:
    """How many processes torchrun started for this command; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


@contextmanager
def together(command: str) -> Iterator[None]:
    """Run the command in the first process; the others follow it here, and exit with it."""
    if processes() == 1:
        yield
    elif int(os.environ["RANK"]):
        _follow(command)
    else:
        from dllm.models.leading import leading

        with leading():
            yield


def _follow(command: str) -> NoReturn:
    """Repeat what the first process does, in silence; torchrun ends this process where that one fails."""
    shown, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    try:
        from dllm.decoding.following import follow

        follow()
    except Exception as error:  # noqa: BLE001  # printed, if it is not that of the first process
        time.sleep(_PATIENCE)
        said = line(command, f"process {os.environ['RANK']}: {error}")
        os.write(shown, f"{said if isinstance(error, (ValueError, OSError)) else traceback.format_exc()}\n".encode())
        os._exit(1)
    os._exit(0)
