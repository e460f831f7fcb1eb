"""`dllm generate`: one prompt with a live display of the canvas, a JSONL file of prompts, or a job (`dllm.jobs`)."""

from __future__ import annotations

if __name__ == "__main__":
    import dllm.scripts.cli

    dllm.scripts.cli.run_file(__file__)

import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text

import dllm
from dllm import identity, jobs
from dllm.checks import SEEDS, choice, renamed, seed
from dllm.decoding import compatibility
from dllm.decoding.display import CanvasView, live, plain, save_picture
from dllm.decoding.drift import Drift, Measurement, summarise
from dllm.decoding.prompts import encode
from dllm.decoding.step import Step
from dllm.escape import terminal
from dllm.evaluation.answer_manifest import AnswerManifest, describe, identify
from dllm.evaluation.jsonl import AnswerFile, PromptLine, read_questions
from dllm.files import is_folder
from dllm.progress import progress_bar, progress_reports, watched
from dllm.resolve import build
from dllm.scripts import app, own
from dllm.structure import read_format_file
from dllm.tasks import word_problems

_TEXTS = ("prompt", "input", "output", "picture", "resume", "split", "column")
_KINDS = get_type_hints(dllm.Options) | {
    name: kind | None for name, kind in {"seed": int, **dict.fromkeys(_TEXTS, str)}.items()
}
_LATER = {None: "confidence puts end-of-text off", "confidence": "logits never predicts it"}
# Options without effect on infilling.
_WITHOUT_INFILL = ("gen_length", "stop_at_eos", "stop")


def main() -> None:
    """Entry point."""
    app.run(generate, "generate", _KINDS)


def generate(cfg: DictConfig) -> None:
    """Run the command."""
    engine = build("engine", cfg.engine, jobs.JobEngine)
    if cfg.model.get("tp") and isinstance(engine, jobs.Ray):
        raise ValueError(
            "engine=ray is not supported with model.tp=true; use engine=local, or model.tp=false without torchrun"
        )
    _check(cfg)
    if _is_job(cfg):
        generate_rows(cfg, engine)
        return
    questions = read_questions(Path(cfg.input)) if cfg.input else []
    answers = AnswerFile(Path(cfg.output)) if cfg.output else None
    sampler, cache, read, fields, options = _parts(cfg)

    def load() -> Session:
        return Session(app.load_model(fields["model"]), sampler, cache, options, cfg.chat, cfg.infill)

    if answers is None:
        prompt = word_problems.problems(1, seed=options["seed"])[0].question if cfg.prompt is None else cfg.prompt
        load().answer_prompt(prompt, cfg.show, Path(cfg.picture) if cfg.picture else None)
        return
    with answers:
        manifest = AnswerManifest(answers, cfg.resume == "mixed")
        if cfg.seed is None and manifest.seed is not None:  # resume with the same seed
            options["seed"] = manifest.seed
        made = {"sampler": sampler, "cache": cache}
        session = describe(fields | options, HydraConfig.get().runtime.choices, made)
        left = _left(questions, answers)
        manifest.check(questions, session)
        if left or not manifest.fits(session):
            runner = load()
            session["model"] = identify(runner.lm)
            manifest.check_model(session)
            if left:
                answers.prepare = lambda: manifest.begin(questions, session)
                try:
                    runner.answer_file(questions, answers, cfg.show, read)
                finally:
                    manifest.end()
                manifest.verify()
        if manifest.note:
            print(manifest.note)
        print(_done(questions, answers))
        if failed := len(_left(questions, answers)):
            raise ValueError(f"{failed} of {len(left)} prompts failed, as reported above; the same command retries")


def generate_rows(cfg: DictConfig, engine: jobs.JobEngine) -> None:
    """Run the command as a job: from files or a data set to a folder of shards."""
    source, folder = jobs.Input(cfg.input, cfg.split, cfg.column), jobs.JobFolder(cfg.output)
    sampler, cache, read, fields, options = _parts(cfg)
    if source.note:
        print(source.note, file=sys.stderr)
    with folder:
        if cfg.seed is None and folder.seed is not None:  # resume with the same seed
            options["seed"] = folder.seed
        session = describe(fields | options, HydraConfig.get().runtime.choices, {"sampler": sampler, "cache": cache})
        load = partial(app.load_model, fields["model"], app.option_of("model"))
        files = identity.read_by(sampler) | identity.read_by(cache)
        identity.check_unchanged(read)
        setting = jobs.Setting(load, sampler, cache, dllm.Options(**options), cfg.chat, cfg.infill, files=files)
        with nullcontext() if cfg.show == "none" else progress_reports("decoding") as report:
            done = jobs.run(source, folder, engine, setting, session, report or (lambda done, total, note: None))
    failed = f", of which {done.failures} failed (column error)" if done.failures else ""
    print(f"{done.rows} of {done.rows} rows are in {cfg.output}{failed}")
    print(f"in the order of the input: pyarrow.parquet.read_table({cfg.output!r})")


def _parts(
    cfg: DictConfig,
) -> tuple[Any, Any, tuple[identity.Stamp, ...], dict[str, Any], dict[str, Any]]:
    """Sampler, cache, stamps of what they read, all fields and the options of decoding.

    Bad values are rejected before the model is loaded.
    """
    sampler, cache, read = app.build_both(cfg)
    fields: Any = OmegaConf.to_container(cfg, resolve=True)
    fields["response_format"] = read_format_file(fields["response_format"])
    options = {name: fields[name] for name in dllm.Options.__dataclass_fields__}
    options["seed"] = random.randrange(SEEDS) if cfg.seed is None else cfg.seed
    compatibility.check(sampler, cache, dllm.Options(**options).cfg_scale)
    return sampler, cache, read, fields, options


def _is_job(cfg: DictConfig) -> bool:
    """Whether the output is a folder of shards: a folder, or a new name that does not end in .jsonl."""
    if cfg.output is None:
        return False
    path = Path(cfg.output)
    return is_folder(path) or cfg.output.endswith("/") or (path.suffix != ".jsonl" and not os.path.lexists(path))


def _why_empty(suppression: str | None) -> str:
    more = f"; eos_suppression={_LATER[suppression]}" if suppression in _LATER else ""
    return f"what ends an answer came first{more}"


def _print_answer(console: Console, result: dllm.Generation, suppression: str | None) -> None:
    """Print an answer and its statistics."""
    console.print(Text(terminal(result.texts[0]), "green"), soft_wrap=True)
    if not (result.texts[0] or "").strip():
        console.print(f"the answer is empty: {_why_empty(suppression)}", highlight=False, soft_wrap=True)
    stats, nfe = result.stats, int(result.nfe[0])
    counts = f"NFE {nfe}  tokens {stats.tokens}  TPF {stats.tpf:.2f}  {stats.tokens_per_second:.1f} tokens/s"
    # Costs beyond NFE are shown if there are any.
    counts += f"  extra positions {stats.extra_columns}" if stats.extra_columns > 0 else ""
    if stats.cache_refreshes:
        counts += f"  computed {stats.computed_share:.0%} of the positions, refreshes {stats.cache_refreshes}"
    counts += f"  {_summary(stats.drift)}" if stats.drift is not None else ""
    guided = int(result.guide_nfe[0])
    counts += f"  guide NFE {guided} in {stats.guide_seconds:.2f} s" if guided else ""
    console.print(counts, highlight=False, soft_wrap=True)


class Session:
    """A loaded model and its decoding options.

    Args:
        lm: the model.
        sampler: the policy.
        cache: the cache.
        options: fields of `dllm.Options`; `seed` is a single number.
        chat: send plain text as a user message.
        infill: fill the masks of each prompt.
    """

    def __init__(
        self, lm: dllm.LanguageModel, sampler: Any, cache: Any, options: dict[str, Any], chat: bool, infill: bool
    ) -> None:
        self.lm, self.sampler, self.cache, self.chat, self.infill = lm, sampler, cache, chat, infill
        self.options = {name: value for name, value in options.items() if not (infill and name in _WITHOUT_INFILL)}

    def answer_prompt(self, prompt: str, show: str, picture: Path | None) -> None:
        """Decode one prompt with a display of its canvas; print the answer and statistics."""
        console = Console()
        ids, generated = self._encode([("prompt", prompt)]), self.options.get("gen_length")
        if generated == "auto":
            generated = self.lm.backbone.max_length - len(ids[0])
        view = CanvasView(self.lm.tokenizer, generated)
        frames: list[Text] = []
        if show == "auto":
            show = "live" if console.is_terminal else "lines"
        display, draw = live(view, console) if show == "live" else (nullcontext(), plain(view, print))
        heading = [prompt]

        def callback(step: Step) -> None:
            while heading:  # printed at the first step, after all checks
                console.print(Text(terminal(heading.pop()), "bold"), soft_wrap=True)
            if show != "none":
                draw(step)
            if picture:
                frames.append(view.draw(step))

        with display, _naming(["prompt"]):
            fill = dllm.infill if self.infill else dllm.generate
            result = fill(self.lm, ids, self.sampler, self.cache, callback=callback, **self.options)
        try:
            if picture:
                own.check("picture", str(picture), {picture: own.PICTURE})
                save_picture(frames, f"{self.lm.name} · {prompt}", picture)
        finally:
            _print_answer(console, result, self.options.get("eos_suppression"))

    def answer_file(
        self, questions: Sequence[PromptLine], answers: AnswerFile, show: str, read: Sequence[identity.Stamp]
    ) -> None:
        """Decode the questions without an answer, writing each answer when finished."""
        left = _left(questions, answers)
        ids = self._encode([(question.place, question.prompt) for question in left])
        # Each question has its own seed, so that a resumed run gives the same answers as an uninterrupted one.
        options = self.options | {"seed": [self.options["seed"] + question.seed for question in left]}
        measured: list[Measurement] = []
        busy: list[float] = []
        costs: list[tuple[int, int]] = []  # tokens and forwards of each answer
        empty = 0

        def callback(step: Step) -> None:
            measured.extend(step.drift)
            busy.append(len(step) / step.slots)

        with _naming([question.place for question in left]):
            finished = dllm.as_completed(
                self.lm, ids, self.sampler, self.cache, callback=callback, infill=self.infill, **options
            )
        with _progress(show, len(questions), len(answers.ids)) as advance:
            for answer in finished:
                name = left[answer.index].id
                if answer.error is not None:
                    why = renamed(answer.error, {"dtype": "model.dtype"})
                    print(f"{left[answer.index].place} has no answer: {why}", file=sys.stderr)
                    continue
                identity.check_weights(self.lm, read)
                shown = ("text", "tokens", "nfe", "guide_nfe")
                answers.add({"id": name, **{field: getattr(answer, field) for field in shown}})
                costs.append((answer.tokens, answer.nfe))
                empty += not (answer.text or "").strip()
                advance(name)
        answers.verify()
        new = "new " if len(left) < len(questions) else ""
        if empty:
            print(f"{empty} of {len(costs)} {new}answers are empty: {_why_empty(self.options.get('eos_suppression'))}")
        if (drift := summarise(measured, seconds=0.0)) is not None:
            print(_summary(drift))
        if costs:
            tokens, forwards = map(sum, zip(*costs, strict=True))
            print(f"NFE {forwards / len(costs):.1f} per {new}answer, {tokens / forwards:.2f} tokens per forward (TPF)")
        print(f"{len(busy)} steps, row slots busy {sum(busy) / len(busy):.1%}")

    def _encode(self, prompts: Sequence[tuple[str, str | list[Mapping[str, Any]]]]) -> list[list[int]]:
        """Token ids of (place, prompt) pairs; an error names the place."""
        ids = []
        for place, prompt in prompts:
            message = [{"role": "user", "content": prompt}] if self.chat and isinstance(prompt, str) else prompt
            with _naming([place]):
                ids += encode(message, self.lm.tokenizer)
        return ids


def _check(cfg: DictConfig) -> None:
    if cfg.show not in ("auto", "live", "lines", "none"):
        raise ValueError(f"unknown show={cfg.show!r}; expected one of auto, live, lines, none")
    if (cfg.input is None) != (cfg.output is None):
        raise ValueError(f"input={cfg.input!r} and output={cfg.output!r} belong together; give both or neither")
    for name in ("prompt", "picture"):
        if cfg.input is not None and cfg[name] is not None:
            raise ValueError(f"{name} and input are mutually exclusive; give one of them")
    if cfg.input is not None and _is_same(cfg.input, cfg.output):
        raise ValueError(f"output={cfg.output!r} is the input itself; give another file")
    choice("resume", cfg.resume, (None, "mixed"))
    if cfg.resume is not None and cfg.output is None:
        raise ValueError(f"resume={cfg.resume} needs input and output; give both, or leave it out")
    if cfg.picture is not None and Path(cfg.picture).suffix != ".svg":
        raise ValueError(f"picture={cfg.picture!r} is not an SVG file; give a name that ends in .svg")
    if cfg.infill:
        if cfg.prompt is None and cfg.input is None:
            raise ValueError("infill=true needs a text with masks; give prompt or input")
        given = app.given()
        for name in _WITHOUT_INFILL:
            if name in given:
                raise ValueError(f"{name}={cfg[name]} has no effect on infill; leave it out")
    _check_job(cfg)
    for name in ("output", "picture"):
        if cfg[name] is not None and not (name == "output" and _is_job(cfg)):
            app.check_writable(name, cfg[name])
    if cfg.picture is not None:
        own.check("picture", cfg.picture, {Path(cfg.picture): own.PICTURE})
    if cfg.seed is not None:
        seed("seed", cfg.seed, use=", or null for any")


def _check_job(cfg: DictConfig) -> None:
    """Reject options without effect on a job, or on anything else, and an output within the input."""
    if not _is_job(cfg):
        if cfg.input is not None and (is_folder(Path(cfg.input)) or Path(cfg.input).suffix == ".parquet"):
            raise ValueError(f"input={cfg.input!r} cannot be read as a JSONL file; give a folder as output, for a job")
        given = app.given()
        for name in ("column", "split", "engine"):
            if any(each == name or each.startswith(f"{name}.") for each in given) and cfg[name] is not None:
                value = HydraConfig.get().runtime.choices["engine"] if name == "engine" else cfg[name]
                raise ValueError(
                    f"{name}={value} has no effect without a job; give input, and a folder as output, or leave it out"
                )
        return
    if cfg.resume is not None:
        raise ValueError(f"resume={cfg.resume} has no effect on a job, whose rows are of one setting; leave it out")
    if cfg.cache.get("measure_every") is not None and cfg.cache.get("refresh_above") is None:
        raise ValueError(
            f"cache.measure_every={cfg.cache.measure_every} has no effect on a job without cache.refresh_above; leave "
            "it out"
        )
    source, output = (os.path.realpath(path) for path in (cfg.input, cfg.output))
    if Path(source).is_dir() and Path(output).is_relative_to(source):
        raise ValueError(f"output={cfg.output!r} is within input={cfg.input!r}; give a folder outside it")


def _left(questions: Sequence[PromptLine], answers: AnswerFile) -> list[PromptLine]:
    """The questions without an answer."""
    if strange := answers.ids - {question.id for question in questions}:
        name = min(strange, key=str)
        raise ValueError(f"output={str(answers.path)!r} answers {name!r}, which is not in input; give another file")
    return [question for question in questions if question.id not in answers.ids]


def _summary(drift: Drift) -> str:
    return (
        f"drift in {drift.measured} forwards: KV error {drift.kv_error:.1%}, KL {drift.kl:.3f}, flips {drift.flips:.1%}"
    )


def _done(questions: Sequence[PromptLine], answers: AnswerFile) -> str:
    return f"{len(answers.ids)} of {len(questions)} answers are in {answers.path}"


def _is_same(one: str, other: str) -> bool:
    """Whether two paths are the same file, also through links."""
    with suppress(OSError):
        return os.path.realpath(one) == os.path.realpath(other) or Path(one).samefile(other)
    return False


@contextmanager
def _naming(places: Sequence[str]) -> Iterator[None]:
    """Replace prompts[i] in errors by the source of the prompt."""
    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub(r"^prompts\[(\d+)\]", lambda match: places[int(match[1])], str(error))) from None


@contextmanager
def _progress(show: str, total: int, done: int) -> Iterator[Callable[[str | int], object]]:
    """A progress bar on a terminal or in a notebook, a line for each answer elsewhere."""
    console = Console(stderr=True)
    if show == "live" or (show == "auto" and watched(console)):
        with progress_bar("answering", total, done, console=console) as update:
            yield lambda name: update(advance=1)
    else:
        count = iter(range(done + 1, total + 1))
        yield (
            lambda name: (
                print(f"{next(count)}/{total}  id {terminal(name, one_line=True)}", file=sys.stderr)
                if show != "none"
                else None
            )
        )
