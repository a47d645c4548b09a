"""What is served, under which names, and how much of it one request may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mlx_lm_server.config import Config
from mlx_lm_server.errors import ContextLengthError, ModelUnknownError, RequestTooLargeError
from mlx_lm_server.protocol import Ready
from mlx_lm_server.server.models.model_files import ModelFacts, SamplingDefaults
from mlx_lm_server.server.models.model_formats import ModelFormats
from mlx_lm_server.server.models.thinking import ThinkingMarks
from mlx_lm_server.server.models.tokenizer import Tokenizer

T = TypeVar("T")

# Where neither the model's files nor the engine say it.
DEFAULT_CONTEXT_TOKENS = 32768


@dataclass(frozen=True)
class ModelNames:
    """Names that a request may use. `shown` are those that clients are told, the first of them
    where a request names none."""

    shown: tuple[str, ...]
    accepted: frozenset[str]

    @classmethod
    def of(cls, config: Config, folder: Path | None = None) -> ModelNames:
        shown = config.model.served_model_name or (config.model.model,)
        paths = () if folder is None else (str(folder),)
        return cls(shown, frozenset((*shown, config.model.model, *paths)))

    def resolve(self, name: str | None) -> str:
        """The name to answer with. Raises ModelUnknownError."""
        if name is None or name == "default":
            return self.shown[0]
        if name in self.accepted:
            return name
        raise ModelUnknownError(
            f"the model `{name}` does not exist here; this server has {', '.join(self.shown)}",
            param="model",
        )


@dataclass(frozen=True)
class Bounds:
    """Token limits of one request, in the order in which they are checked."""

    max_prompt_tokens: int
    max_generation_tokens: int | None
    context_tokens: int
    kv_tokens: int
    default_max_tokens: int | None

    @property
    def served_tokens(self) -> int:
        """The most tokens that prompt and answer of one request may have together."""
        limits = [self.context_tokens, self.kv_tokens]
        if self.max_generation_tokens is not None:
            limits.append(self.max_prompt_tokens + self.max_generation_tokens)
        return min(limits)

    def longest_prompt(self, wanted: int | None) -> int:
        """Returns how many tokens a prompt may have beside so many to generate; at least one."""
        left = min(self.context_tokens, self.kv_tokens) - max(wanted or 1, 1)
        return max(min(left, self.max_prompt_tokens), 1)

    def max_tokens(
        self,
        num_prompt_tokens: int,
        wanted: int | None,
        prompt: str = "prompt",
        name: str = "max_tokens",
    ) -> int:
        """Returns how many tokens the request may generate. `prompt` and `name` are the fields that
        the prompt and `wanted` come from.

        Raises ContextLengthError for what is over a limit, RequestTooLargeError for what the KV
        memory can never hold.
        """
        self._check_prompt(num_prompt_tokens, prompt)
        if wanted is None:
            return self._default(num_prompt_tokens)
        if self.max_generation_tokens is not None and wanted > self.max_generation_tokens:
            raise ContextLengthError(
                f"{name} is {wanted}, the limit is {self.max_generation_tokens} "
                "(--max-generation-tokens)",
                param=name,
            )
        total = num_prompt_tokens + wanted
        if total > self.context_tokens:
            raise ContextLengthError(
                f"the model's context is {self.context_tokens} tokens; the prompt has "
                f"{num_prompt_tokens} and {name} asks for {wanted}: {total} in all",
                param=name,
            )
        if total > self.kv_tokens:
            sum_ = f"{num_prompt_tokens} prompt + {wanted} {name} = {total}"
            raise self._too_large(sum_, name)
        return wanted

    def _check_prompt(self, num_tokens: int, name: str) -> None:
        if num_tokens >= self.context_tokens:
            raise ContextLengthError(
                f"the prompt has {num_tokens} tokens; the model's context is "
                f"{self.context_tokens} and must hold an answer too",
                param=name,
            )
        if num_tokens > self.max_prompt_tokens:
            raise ContextLengthError(
                f"the prompt has {num_tokens} tokens, the limit is {self.max_prompt_tokens} "
                "(--max-prompt-tokens)",
                param=name,
            )
        if num_tokens >= self.kv_tokens:
            raise self._too_large(f"the prompt's {num_tokens} + 1", name)

    def _default(self, num_prompt_tokens: int) -> int:
        left = min(self.context_tokens, self.kv_tokens) - num_prompt_tokens
        return min(left, self.max_generation_tokens or left, self.default_max_tokens or left)

    def _too_large(self, sum_: str, param: str) -> RequestTooLargeError:
        return RequestTooLargeError(
            f"{sum_} tokens can never fit the KV memory, which holds {self.kv_tokens}",
            param=param,
        )


@dataclass(frozen=True)
class ServedModel:
    """All that turning a request into ids needs to know."""

    names: ModelNames
    tokenizer: Tokenizer
    bounds: Bounds
    defaults: SamplingDefaults
    vocab_size: int
    created_s: int
    formats: ModelFormats
    marker_ids: frozenset[int]
    thinking: ThinkingMarks | None = None


def bounds_of(config: Config, facts: ModelFacts, ready: Ready) -> Bounds:
    contexts = [c for c in (facts.context_tokens, ready.context_tokens) if c]
    max_prompt_tokens = config.generation.max_prompt_tokens
    context = min(contexts, default=max_prompt_tokens or DEFAULT_CONTEXT_TOKENS)
    kv_tokens = ready.kv_limit_tokens or context
    if config.kv.max_kv_size is not None:
        kv_tokens = min(kv_tokens, config.kv.max_kv_size)
    return Bounds(
        max_prompt_tokens=min(max_prompt_tokens or context, context),
        max_generation_tokens=config.generation.max_generation_tokens,
        context_tokens=context,
        kv_tokens=kv_tokens,
        default_max_tokens=config.generation.default_max_tokens,
    )


def defaults_of(config: Config, model: SamplingDefaults) -> SamplingDefaults:
    """Returns the defaults of sampling: the flags', else the model's own, else OpenAI's."""
    flags = config.generation
    return SamplingDefaults(
        temperature=_first(flags.default_temperature, model.temperature, 1.0),
        top_p=_first(flags.default_top_p, model.top_p, 1.0),
        top_k=_first(flags.default_top_k, model.top_k, 0),
        min_p=_first(flags.default_min_p, model.min_p, 0.0),
        repetition_penalty=_first(flags.default_repetition_penalty, model.repetition_penalty, 1.0),
    )


def _first(*values: T | None) -> T:
    return next(value for value in values if value is not None)
