"""What the process of `dllm.structure.compiled` runs."""

from __future__ import annotations

import json

from dllm.checks import first_line
from dllm.structure.compiled import Compiled
from dllm.structure.formats import ResponseFormat
from dllm.structure.language import compile_regex


def attempt(form: str) -> Compiled | ValueError | TypeError:
    """Translate and compile a format in this process; errors that it causes are returned.

    Args:
        form: the arguments of `ResponseFormat`, in JSON.
    """
    given = ResponseFormat(*json.loads(form))
    try:
        return Compiled(compile_regex(given.regex, given.name), given.parts if given.scaffold else [])
    except (ValueError, TypeError) as error:
        return error
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # noqa: BLE001  # the libraries raise several kinds for what they cannot read
        return ValueError(f"{given.name} cannot be used: {first_line(error)}; correct it")
