"""`dllm lm-eval`: lm-evaluation-harness's own command line, with the model class `dllm` registered."""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

import subprocess
import sys
import warnings

from dllm.scripts.ending import fail


def _commit() -> str | None:
    """What the harness notes of the folder's repository, without git's words where there is none."""
    try:
        described = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return described.stdout.strip() or None


def main() -> None:
    """Hand everything over to the harness."""
    try:
        from lm_eval import evaluator
        from lm_eval.__main__ import cli_evaluate

        import dllm.evaluation.lm_eval  # registers the class
        from dllm.tasks.harness import fault_of
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        fail("dllm lm-eval", "lm-eval is missing: pip install 'dllm-samplers[eval]'")
    told = warnings.formatwarning
    # What has no effect is told in a line; warnings of libraries keep their place.
    warnings.formatwarning = lambda message, category, filename, *more: (
        f"dllm lm-eval: {message}\n"
        if filename == dllm.evaluation.lm_eval.__file__
        else told(message, category, filename, *more)
    )
    evaluator.get_git_commit_hash = _commit
    try:
        cli_evaluate()
    except ValueError as error:
        fail("dllm lm-eval", " ".join(str(error).split()))
    except Exception as error:
        if (fault := fault_of(error, "the task", __file__)) is None:
            raise
        fail("dllm lm-eval", fault)
    finally:
        sys.stdout.flush()
