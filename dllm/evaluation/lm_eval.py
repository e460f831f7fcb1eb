"""lm-evaluation-harness: the model class `dllm`, for `lm_eval.simple_evaluate` and the harness's command line.

    dllm lm-eval --model dllm --model_args pretrained=tiny-llada,sampler=localleap,cache=freecache --tasks gsm8k

Importing this module registers it. lm-eval after 0.4.13 discovers it through the package's entry point.
Options of sampler, cache and likelihood estimate are written sampler.threshold=0.95, cache.interval=8,
estimate.samples=32; fields of `dllm.Options` and arguments of `dllm.load` by name. The task provides the defaults.
"""

from __future__ import annotations

import warnings
from dataclasses import fields
from hashlib import sha256
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from dllm import identity
from dllm.cache.base import Cache
from dllm.checks import Notice, known, naming
from dllm.decoding import compatibility
from dllm.decoding.chats import write_chat
from dllm.decoding.options import parse_options
from dllm.escape import terminal
from dllm.evaluation import lm_eval_options as harness_options
from dllm.evaluation.journal import Journal
from dllm.evaluation.likelihood import Estimate
from dllm.evaluation.records import Query, sample_of
from dllm.evaluation.runner import Runner, Setting
from dllm.models.loading import load
from dllm.models.tokenizers import tokens_of
from dllm.resolve import TARGET, build, options_of, resolve, with_option
from dllm.samplers.base import Sampler

_LOADING = ("device", "dtype", "device_map", "attn_implementation", "revision", "pack", "adapter")


class ChatText(str):
    """A chat that the template wrote, special tokens included; it stays one in lm-eval's cache of requests."""


@register_model("dllm")
class DLLM(TemplateLM):
    """A diffusion language model, decoded by any sampler with any cache.

    Args:
        runner: answers the requests.
        seed: request i of an evaluation uses seed + i; None for 0, with a warning where answers are sampled.
        greedy: check whether greedy decoding gives a scored continuation, for metrics such as LAMBADA's.
        overruled: warn where an option of the runner goes before another value of the task or of `--gen_kwargs`.
    """

    def __init__(self, runner: Runner, seed: int | None = None, greedy: bool = True, overruled: bool = True) -> None:
        super().__init__()
        if runner.lm.tokenizer is None:
            raise ValueError(f"{runner.lm.name} has no tokenizer, which tasks of lm-eval need; add one")
        self.runner, self.tokenizer = runner, runner.lm.tokenizer
        self._cut: set[str] = set()  # documents
        self._seed, self._greedy, self._count = seed, greedy, 0
        self._special = True  # special tokens before a text
        self._template: str | None = None  # None for the tokenizer's default
        self._overruled = overruled
        self._seen: dict[str, int] = {}
        self._told: set[str] = set()
        self._device = runner.lm.device

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> DLLM:
        """Create from `--model_args`; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> DLLM:
        """Create from a dictionary of arguments.

        Args:
            arg_dict: `pretrained`, `sampler`, `cache`, their options with a prefix, `estimate.*`, fields of
                `dllm.Options`, arguments of `dllm.load`, and `greedy`; `dllm.evaluation.lm_eval_options` translates
                arguments of other model classes.
            additional_config: separate options of the command line: batch_size, max_batch_size and device.

        Raises:
            ValueError: an unknown name, or a value out of range.
        """
        given = harness_options.model_arguments(arg_dict, additional_config or {}, _tell)
        greedy, seed = harness_options.flag("greedy", given.pop("greedy", True)), given.pop("seed", None)
        sampler = _from_parts("sampler", given, "vanilla", Sampler)
        cache = _from_parts("cache", given, "none", Cache)
        estimated = _parts("estimate", given)
        known(estimated, [each.name for each in fields(Estimate)], "estimate.")
        shared = {"seed": seed or 0} if estimated.get("order", "random") == "random" else {}
        with naming({name: f"estimate.{name}" for name in estimated}):
            estimate = Estimate(**{"cfg_scale": given.get("cfg_scale", 0.0)} | shared | estimated)
        loading = {"pack": "auto"} | {name: given.pop(name) for name in _LOADING if name in given}
        pretrained = given.pop("pretrained", "tiny-llada")
        compatibility.check(sampler, cache, parse_options(given).cfg_scale)
        runner = Runner(Setting(load(pretrained, **loading), sampler, cache, given, estimate), Journal(None))
        return cls(runner, seed, greedy)

    @property
    def truncated(self) -> int:
        """Number of documents of which some prompt was truncated on the left to fit the model."""
        return len(self._cut)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which is also the prefix of texts without a context."""
        return self.runner.lm.backbone.eos_token_ids[0]

    @property
    def max_length(self) -> int:
        """Context length of the model."""
        return self.runner.lm.backbone.max_length

    @property
    def tokenizer_name(self) -> str:
        """Key of the request cache."""
        lm = self.runner.lm
        written = sha256((self._template or "").encode()).hexdigest()[:8]
        return f"{lm.name.replace('/', '__')}-{identity.model(lm)['tokenizer_and_config']}-ChatText-{written}"

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Reject `use_cache`, whose file does not record model and options."""
        name = cache_hook.dbdict.filename
        raise ValueError(f"use_cache: {name} may contain answers of other models and options; leave it out")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Choose the tokenizer's chat template, by its name if it has several; None if not used.

        Raises:
            ValueError: it has none, none of this name, or several without a default.
        """
        self._template = None
        if chat_template is not False and chat_template is not None:
            self._check_chats()
            self._template = super().chat_template(chat_template)
        return self._template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat in the model's format.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        self._check_chats()
        text = write_chat(
            self.tokenizer,
            chat_history,
            "a chat of the task",
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **({} if self._template is None else {"chat_template": self._template}),
        )
        return ChatText(text)

    def _check_chats(self) -> None:
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{self.runner.lm.name} has no chat template; leave it out")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; without special tokens before a chat, whose template writes them."""
        special = (
            self._special and not isinstance(string, ChatText) if add_special_tokens is None else add_special_tokens
        )
        return tokens_of(self.tokenizer, string, "a text of the task", special=special)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate for each request up to its first stop string."""
        asked = [self._request(instance, number) for number, instance in enumerate(requests)]
        groups: dict[tuple[tuple[str, Any], ...], list[Query]] = {}
        for request, options in asked:
            groups.setdefault(tuple(sorted(options.items())), []).append(request)
        texts = {}
        for shared, group in groups.items():
            for record in self.runner.answer(group, **dict(shared)):
                texts[record.id] = record.text or ""
        return [texts[request.id] for request, _ in asked]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, in nats, and whether it is the greedy one."""
        found = []
        for instance in requests:
            context, continuation = instance.args
            if context:
                self._special = not isinstance(context, ChatText)  # of the context with the continuation, too
                try:
                    prefix, target = self._encode_pair(context, continuation)
                finally:
                    self._special = True
            else:
                prefix, target = [self.eot_token_id], self.tok_encode(continuation, add_special_tokens=False)
            found.append(self._score(self._name(instance), prefix, target, self._greedy))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the context length, each token scored once."""
        found = []
        for instance in requests:
            name, tokens = self._name(instance), self.tok_encode(instance.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.eot_token_id, self.max_length - 1, context_len=1)
            disjoint = map(make_disjoint_window, windows)
            scores = [
                self._score(f"{name}/{number}", prefix, target, greedy=False)[0]
                for number, (prefix, target) in enumerate(disjoint)
            ]
            found.append(sum(scores))
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """As `loglikelihood`, of token ids."""
        found = []
        for _, prefix, target in requests:
            found.append(self._score(f"tokens/{self._count}", prefix, target, self._greedy))
            self._count += 1
        return found

    def _score(self, name: str, prefix: list[int], target: list[int], greedy: bool) -> tuple[float, bool]:
        room = max(0, self.max_length - len(target))
        self._note_cut(name, len(prefix) > room)
        return self.runner.score(name, prefix[len(prefix) - room :] if len(prefix) > room else prefix, target, greedy)

    def _request(self, instance: Instance, number: int) -> tuple[Query, dict[str, Any]]:
        """The query, and the task's options that the user did not set."""
        context, asked = instance.args
        mine = self.runner.setting.options
        prompt = self.tok_encode(context)
        options, stops = harness_options.generation(asked, len(prompt), self._warn)
        own = options["gen_length"]
        if len(prompt) + own > self.max_length and own > (half := self.max_length // 2):
            own = options["gen_length"] = half
            if "gen_length" not in mine:
                self._warn(
                    f"some answers have {half} tokens, as prompt and answer exceed the context of {self.max_length}"
                )
        for name in options:
            differs = name in mine and mine[name] != options[name]
            if self._overruled and differs and harness_options.asks(asked, name):
                self._warn(f"{name}={mine[name]} of the model arguments is used, not {options[name]} of the task")
        options = {name: value for name, value in options.items() if name not in mine}
        if self._seed is None and (options | dict(mine))["temperature"] > 0:
            self._warn("answers are sampled with seed=0, whatever --seed says; use --model_args seed=N for others")
        length = (options | dict(mine))["gen_length"]
        room = self.max_length - (1 if length == "auto" else int(length))
        name = self._name(instance)
        self._note_cut(name, len(prompt) > room > 0)
        prompt = prompt[-room:] if room > 0 else prompt
        return Query(name, prompt, stops, (self._seed or 0) + number, own), options

    def _note_cut(self, name: str, was: bool) -> None:
        if was:
            self._warn(f"some prompts exceed the model's context of {self.max_length}; they are truncated on the left")
            self._cut.add(sample_of(name))

    def _warn(self, message: str) -> None:
        """Warn once."""
        if message not in self._told:
            self._told.add(message)
            _tell(message)

    def _name(self, instance: Instance) -> str:
        """Unique among the requests of a run; repeats of a document are numbered."""
        name = f"{instance.task_name}/{instance.doc_id}#{instance.idx}"
        number = self._seen[name] = self._seen.get(name, -1) + 1
        return f"{name}.{number}" if number else name


def _tell(message: str) -> None:
    warnings.warn(terminal(message, one_line=True), Notice, stacklevel=1)


def _parts(group: str, given: dict[str, Any]) -> dict[str, Any]:
    """Pop the options with a group's prefix."""
    names = [name for name in given if name.startswith(f"{group}.")]
    return {name.removeprefix(f"{group}."): given.pop(name) for name in names}


def _from_parts(group: str, given: dict[str, Any], default: str, protocol: type) -> Any:
    name = given.pop(group, default)
    own = _parts(group, given)
    if not own:
        return resolve(group, name, protocol)
    options = options_of(group, name)
    named, choices = ([each.partition(".")[0] for each in part if each != TARGET] for part in (own, options))
    known(named, choices, f"{group}.")
    with naming({choice: f"{group}.{choice}" for choice in choices}):
        for option, value in sorted(own.items(), key=lambda each: each[0].count(".")):  # `base` before its options
            options = with_option(group, options, option, value)
    return build(group, options, protocol)
