"""What the routes work with: one object, built once by `serve`, on the event loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from mlx_lm_server.config import Config
from mlx_lm_server.errors import EngineUnavailableError
from mlx_lm_server.server.answers.cache_explanation import (
    CacheExplanation,
    CacheFacts,
    CacheKeys,
    CacheReports,
    explain,
)
from mlx_lm_server.server.answers.generate_request import GenerateRequest
from mlx_lm_server.server.engines.admission import Admission
from mlx_lm_server.server.engines.engine_client import EngineClient
from mlx_lm_server.server.engines.generation import Generation
from mlx_lm_server.server.engines.metrics import Metrics
from mlx_lm_server.server.engines.supervisor import Supervisor
from mlx_lm_server.server.models.request_templates import RequestTemplates
from mlx_lm_server.server.models.served_model import ModelNames, ServedModel

log = logging.getLogger(__name__)


class Services:
    """Everything that routes share, complete but for the model, which `serve` sets once it is
    loaded."""

    def __init__(
        self, config: Config, metrics: Metrics, client: EngineClient, admission: Admission
    ) -> None:
        self.config = config
        self.metrics = metrics
        self.client = client
        self.admission = admission
        self.supervisor: Supervisor | None = None
        self.names = ModelNames.of(config)
        self.created_s = int(time.time())
        self.open_generations: set[Generation] = set()
        self.cache_reports = CacheReports()
        self._cache_keys = CacheKeys()
        self._model: ServedModel | None = None
        self._templates = RequestTemplates(config.model)

    @property
    def is_ready(self) -> bool:
        """Tells whether a request that came now would be taken."""
        is_up = self.supervisor is not None and self.supervisor.state == "ready"
        return is_up and self._model is not None and not self.admission.is_draining

    @property
    def has_model(self) -> bool:
        return self._model is not None

    @property
    def served_tokens(self) -> int | None:
        """The most tokens of prompt and answer together; None while the model loads."""
        return self._model.bounds.served_tokens if self._model else None

    def model(self) -> ServedModel:
        """Raises EngineUnavailableError while it loads."""
        if self._model is None:
            raise EngineUnavailableError("the model is loading; try again in a moment")
        return self._model

    async def model_with(self, template: str | None) -> ServedModel:
        """Returns the model with the template that a request brings, if any. Raises RequestError,
        and EngineUnavailableError while it loads."""
        return await self._templates.applied(self.model(), template)

    def set_model(self, model: ServedModel) -> None:
        self._model = model
        self.names = model.names

    def generate(
        self, id: str, sequences: Sequence[GenerateRequest], arrival_s: float
    ) -> Generation:
        """Submits to the engine. Raises EngineUnavailableError."""
        generation = Generation(
            id,
            sequences,
            client=self.client,
            tokenizer=self.model().tokenizer,
            metrics=self.metrics,
            arrival_s=arrival_s,
            on_done=self._forget,
        )
        self.open_generations.add(generation)
        if (key := sequences[0].prompt_cache_key) is not None:
            generation.num_with_key = self._cache_keys.count(generation.client_key, key)
        return generation

    def explain(self, facts: CacheFacts) -> list[CacheExplanation]:
        """What the prefix cache did. With several keys, cached text may be anybody's."""
        decode = self.model().tokenizer.decode_few
        shows_text = self.config.server.api_key_file is None
        return explain(facts, decode, shows_text=shows_text)

    def _forget(self, generation: Generation) -> None:
        self.open_generations.discard(generation)
        self.cache_reports.remember(
            generation.request_id, generation.client_key, generation.cache_facts
        )
        if log.isEnabledFor(logging.INFO):
            log.info(generation.summary())
