"""The reference of the Python API: which objects stand on which page; mkdocstrings reads their docstrings."""

from __future__ import annotations

# Title, what the page is about, and the objects.
PAGES = {
    "decoding": (
        "Decoding",
        "Load a model, and decode prompts with any policy and cache.",
        ["dllm.load", "dllm.generate", "dllm.stream", "dllm.as_completed", "dllm.infill", "dllm.Options"],
    ),
    "engine": (
        "Engine",
        "Requests that come at any time, decoded together, one denoising step at a time.",
        ["dllm.Engine", "dllm.Answer", "dllm.Event", "dllm.Frame", "dllm.Step"],
    ),
    "results": ("Results", "What a decode returns, and what it cost.", ["dllm.Generation", "dllm.Stats"]),
    "models": (
        "Models",
        "A loaded model, and the base class of the families.",
        ["dllm.LanguageModel", "dllm.models.loading.load", "dllm.models.base.MaskedDiffusionModel"],
    ),
    "samplers": (
        "Samplers",
        "The protocol of policies, and what a step sees and returns.",
        [
            "dllm.samplers.base", "dllm.decoding.window.Window", "dllm.decoding.window.Edit",
            "dllm.decoding.prediction.Prediction", "dllm.decoding.request.Request", "dllm.decoding.setup.Setup",
        ],
    ),
    "caches": (
        "Caches",
        "The protocol of caches, and the store that most of them share.",
        ["dllm.cache.base", "dllm.cache.store", "dllm.cache.selection"],
    ),
    "calibration": (
        "Calibration",
        "Policies whose setting `dllm calibrate` certified.",
        ["dllm.calibration", "dllm.samplers.calibrated"],
    ),
    "structure": (
        "Structured answers",
        "The formats that an answer can be held to.",
        ["dllm.structure.ResponseFormat", "dllm.structure.read_format", "dllm.structure.read_format_file"],
    ),
    "tasks": ("Tasks", "What an evaluation asks of a task.", ["dllm.tasks.base", "dllm.evaluation.trace.Trace"]),
    "names": ("Names", "Names of objects, and of classes of your own.", ["dllm.register", "dllm.resolve"]),
}  # fmt: skip


def page(name: str) -> str:
    """A page of the reference."""
    title, lead, objects = PAGES[name]
    return "\n\n".join([f"# {title}", lead, *(f"::: {each}" for each in objects)]) + "\n"


def index() -> str:
    """The page that lists them."""
    lines = [f"- [{title}]({name}.md): {lead}" for name, (title, lead, _) in PAGES.items()]
    return "# Python API\n\n" + "\n".join(lines) + "\n"
