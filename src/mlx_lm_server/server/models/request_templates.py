"""Chat templates that requests bring, where the server's owner trusts whoever sends them."""

from __future__ import annotations

import asyncio
import copy
from collections import OrderedDict
from dataclasses import replace

from mlx_lm_server.config import ModelConfig
from mlx_lm_server.errors import InvalidRequestError, ModelError
from mlx_lm_server.server.models.model_formats import ModelFormats
from mlx_lm_server.server.models.served_model import ServedModel
from mlx_lm_server.server.models.thinking import ThinkingMarks

MAX_KEPT = 8


class RequestTemplates:
    """Makes the served model with another template, and keeps the last few. Lives on the event
    loop; a template that is new is tried on a thread."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._kept: OrderedDict[str, ServedModel] = OrderedDict()

    async def applied(self, model: ServedModel, source: str | None) -> ServedModel:
        """Returns the model as it is where a request brings no template.

        Raises InvalidRequestError for one that is not allowed or cannot be compiled.
        """
        if source is None:
            return model
        if not self._config.trust_request_chat_template:
            raise InvalidRequestError(
                "`chat_template` is not allowed here; the server's owner allows it with "
                "--trust-request-chat-template",
                param="chat_template",
                code="unsupported_parameter",
            )
        if source not in self._kept:
            self._kept[source] = await asyncio.to_thread(self._made, model, source)
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(source)
        return self._kept[source]

    def _made(self, model: ServedModel, source: str) -> ServedModel:
        tokenizer = copy.copy(model.tokenizer)
        try:
            tokenizer.set_template(source)
        except ModelError as error:
            raise InvalidRequestError(f"chat_template: {error}", param="chat_template") from error
        formats = ModelFormats.of(self._config, tokenizer.template, tokenizer.special_tokens)
        return replace(
            model,
            tokenizer=tokenizer,
            formats=formats,
            marker_ids=tokenizer.special_ids_of(formats.markers()),
            thinking=ThinkingMarks.of(formats, tokenizer),
        )
