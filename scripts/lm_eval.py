"""`dllm lm-eval`: lm-evaluation-harness's own command line, with the model class `dllm` registered."""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

import logging
import subprocess
import sys
import warnings

from dllm.checks import out_of_memory
from dllm.scripts.ending import fail


def _commit() -> str | None:
    """The git commit of the current folder, for the harness, without error output of git."""
    try:
        described = subprocess.run(["git", "describe", "--always"], capture_output=True, check=False)
    except OSError:  # no git
        return None
    return described.stdout.decode(errors="replace").strip() or None


class _Unsaved(logging.Filter):
    """Keeps what the harness, which goes on, tells of results that it cannot write."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        self._harness = logging.getLogger("lm_eval")

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass what the harness shows."""
        if record.getMessage().startswith("Could not save"):
            self.told.append(record.getMessage())
        return self._harness.isEnabledFor(record.levelno)


def main() -> None:
    """Run the harness's command line."""
    try:
        from lm_eval import evaluator
        from lm_eval.__main__ import cli_evaluate

        import dllm.evaluation.lm_eval  # registers the class
        from dllm.tasks.harness import fault_of
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        fail("dllm lm-eval", "lm-eval is missing: pip install 'dllm-samplers[eval]'")
    default = warnings.formatwarning
    # Own warnings are printed in one line; those of libraries are unchanged.
    warnings.formatwarning = lambda message, category, filename, *more: (
        f"dllm lm-eval: {message}\n"
        if filename == dllm.evaluation.lm_eval.__file__
        else default(message, category, filename, *more)
    )
    evaluator.get_git_commit_hash = _commit
    unsaved = _Unsaved()
    tracker = logging.getLogger("lm_eval.loggers.evaluation_tracker")
    tracker.addFilter(unsaved)
    tracker.setLevel(logging.INFO)  # the filter is asked about warnings whatever the harness shows
    try:
        cli_evaluate()
        if unsaved.told:
            raise ValueError(f"{unsaved.told[0]} to --output_path; free disk space, or give another one")
    except ValueError as error:
        fail("dllm lm-eval", " ".join(str(error).split()))
    except Exception as error:
        if out_of_memory(error):
            fail("dllm lm-eval", "out of memory; use a smaller model, batch_size or length")
        if (fault := fault_of(error, "the task", __file__)) is None:
            raise
        fail("dllm lm-eval", fault)
    finally:
        sys.stdout.flush()
