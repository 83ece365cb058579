"""Judges behind the contract: any vision-language model, and UnifiedReward with its published questions."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import PIL
from PIL import Image

from rewards.contract import API_VERSION, ItemError, RewardInfo, Sample, UnavailableError
from rewards.judge.answers import AnswerFormat, UnreadableError
from rewards.judge.chat import Chat, Connection, JudgeRefusedError, QuestionRefusedError, TransientError
from rewards.judge.unified import LICENCE, SOURCE, VERSIONS

Outcome = dict[str, float] | Exception

_SLOT = "{prompt}"
_PREPROCESSING = 1  # raise it whenever the same picture or prompt would reach the judge differently
#: Chat templates put prompts between such tokens, and servers read them as tokens wherever they stand.
_CONTROL = re.compile(r"<\|[^<>|\s]{1,64}\|>|</?s>|</?image>", re.IGNORECASE)


class _NoAnswerError(ItemError):
    """The server is at fault, or the network, and not the question."""


class VLMJudge:
    """Scores that a vision-language model writes down, read by regular expressions.

    Checkpoint, licence and range: those of the model that the server at ``base_url`` serves. Preprocessing: the picture
    as a PNG, unchanged, in front of the question; the server resizes it. Decoding is greedy; a server that computes in
    batches may still answer a question differently in other company, how often was not measured.

    An answer without exactly one number in range for every metric is a missing score, never 0. So is a question that
    got no answer in time, and a prompt with a control token such as ``<|im_end|>``, which would end the question and
    begin the answer. Only passing failures are tried again.

    Args:
        template: the question, with ``{prompt}`` once. Other braces mean nothing.
        metrics: metric -> regular expression with exactly one group, around the number. The first is the reward proper.
            ``{number}`` stands for a group that takes a number, and none from a range, a fraction or a percentage.
        value_range: least and greatest score of every metric.
        max_batch: most pictures at once.
        connection: everything else is a setting of `Connection`; ``base_url`` and ``model`` are needed.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    api_version: ClassVar[int] = API_VERSION

    def __init__(
        self,
        *,
        template: str,
        metrics: Mapping[str, str],
        value_range: Sequence[float],
        max_batch: int = 64,
        **connection: Any,
    ) -> None:
        if template.count(_SLOT) != 1:
            raise ValueError(f"template: must contain {_SLOT} once, not {template.count(_SLOT)} times")
        if len(value_range) != 2:
            raise ValueError(f"value_range={list(value_range)}: give the least and the greatest score")
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch}: must be at least 1")
        self._connection = Connection(**connection)
        self._format = AnswerFormat(metrics, (value_range[0], value_range[1]))
        self._template, self._max_batch = template, max_batch
        self._question_hash = hashlib.sha256(
            json.dumps([template, dict(metrics), list(value_range)]).encode()
        ).hexdigest()
        self._name, self._source, self._licence = (
            "vlm_judge",
            f"{self._connection.model}, served elsewhere",
            "the model's",
        )
        self._key: str | None = None
        self._fingerprint = ""
        self._kept: dict[int, tuple[Sample, Outcome]] = {}

    @property
    def info(self) -> RewardInfo:
        low, high = self._format.value_range
        return RewardInfo(
            name=self._name,
            metrics=self._format.metrics,
            value_range=self._format.value_range,
            max_batch=self._max_batch,
            tolerance=(high - low) / 10,
            source=self._source,
            licence=self._licence,
        )

    def load(self, device: str) -> None:
        """Look for the model on the server; the device is the server's business.

        Raises:
            JudgeRefusedError: no server, another model, or a wrong key; the message names the setting.
        """
        logging.getLogger("stamina").setLevel(logging.ERROR)  # a line per retry, without a reason, helps nobody
        self._key = self._connection.read_key()
        served = asyncio.run(self._served_as())
        # What the server loaded cannot be hashed from here: the fingerprint names it as the server does.
        self._fingerprint = (
            f"{self._name}@{served}/question {self._question_hash}/preprocessing {_PREPROCESSING}"
            f"/greedy, {self._connection.max_tokens} tokens/pillow {PIL.__version__}"
        )

    def score(self, batch: Sequence[Sample]) -> Sequence[Mapping[str, float]]:
        """Every metric of every sample.

        Raises:
            ItemError: a sample has no score. Whoever then scores the samples one by one, as the contract says, gets
                what the judge already said: nothing is asked twice.
            JudgeRefusedError: the server no longer takes any question.
            UnavailableError: none of several questions got an answer.
        """
        outcomes = self._outcomes(batch)
        if len(batch) > 1 and all(isinstance(outcome, _NoAnswerError) for outcome in outcomes):
            raise UnavailableError(f"no answer to any of {len(batch)} questions: {outcomes[0]}")
        error = next((outcome for outcome in outcomes if isinstance(outcome, Exception)), None)
        if error is None:
            return [outcome for outcome in outcomes if not isinstance(outcome, Exception)]
        if len(batch) > 1:
            self._kept |= {id(sample): (sample, outcome) for sample, outcome in zip(batch, outcomes, strict=True)}
        raise error

    def fingerprint(self) -> str:
        """Name of the reward, model as its server calls it, sha256 of the question, and how pictures are sent.

        Raises:
            RuntimeError: nothing is loaded yet.
        """
        if not self._fingerprint:
            raise RuntimeError(f"{self._name} has no fingerprint before its server was asked")
        return self._fingerprint

    def close(self) -> None:
        """Forget the key."""
        self._key, self._kept = None, {}

    def _outcomes(self, batch: Sequence[Sample]) -> list[Outcome]:
        """Kept ones if all are kept, each of them once; else new ones."""
        # By identity: the same picture in a later request is a new question. `_kept` keeps the objects alive.
        if self._kept and all(id(sample) in self._kept for sample in batch):
            return [self._kept.pop(id(sample))[1] for sample in batch]
        self._kept = {}
        return asyncio.run(self._judge(batch))

    async def _served_as(self) -> str:
        async with Chat(self._connection, self._key) as chat:
            return await chat.served_as()

    async def _judge(self, batch: Sequence[Sample]) -> list[Outcome]:
        room = asyncio.Semaphore(self._connection.concurrency)
        deadline = asyncio.get_running_loop().time() + self._connection.deadline_seconds
        async with Chat(self._connection, self._key) as chat:
            return list(await asyncio.gather(*(self._outcome(chat, room, deadline, sample) for sample in batch)))

    async def _outcome(self, chat: Chat, room: asyncio.Semaphore, deadline: float, sample: Sample) -> Outcome:
        held = _CONTROL.search(sample.prompt)
        if held is not None:
            return ItemError(f"the prompt contains the control token {held[0]}")
        try:
            async with asyncio.timeout_at(deadline), room:
                png = await asyncio.to_thread(_png, sample.image)
                answer = await chat.answer(self._template.replace(_SLOT, sample.prompt), png)
            return self._format.read(answer)
        except TimeoutError:
            return _NoAnswerError(f"no answer before the deadline of {self._connection.deadline_seconds:g} s")
        except TransientError as error:
            return _NoAnswerError(str(error))
        except (QuestionRefusedError, UnreadableError) as error:
            return ItemError(str(error))
        except JudgeRefusedError as error:
            return error


class UnifiedReward(VLMJudge):
    """UnifiedReward (arXiv:2503.05236): a judge finetuned to score pictures, asked in the words of its repository.

    Version 1 scores once: metric ``score``. Version 2 scores ``alignment`` with the prompt, ``coherence`` and ``style``
    separately: metrics of these names, to be weighted by whoever trains. Range 1 to 5, in fractions.

    Checkpoints, MIT: version 1 CodeGoat24/UnifiedReward-7b (LLaVA) and UnifiedReward-qwen-7b (Qwen2.5-VL); version 2
    CodeGoat24/UnifiedReward-2.0-qwen-7b and UnifiedReward-2.0-qwen3vl-8b. Their repository serves them by ``vllm serve
    CodeGoat24/UnifiedReward-2.0-qwen3vl-8b --served-model-name UnifiedReward --port 8000``. Which checkpoint a server
    has loaded cannot be seen from here: asking version 1 with the question of version 2 is not noticed unless answers
    cannot be read.

    Preprocessing: PNG, where the repository's client sends JPEG of quality 95. Decoding: greedy, as in the repository's
    scripts for transformers; its client for vLLM leaves the temperature to the server. Reference implementation:
    `unified.SOURCE`. The repository has no parser; a score is read from where its question puts one.

    Args:
        version: 1 or 2, as the checkpoint.
        max_batch: most pictures at once.
        connection: everything else is a setting of `Connection`; ``base_url`` is needed, ``model`` is
            ``"UnifiedReward"`` unless given.

    Raises:
        ValueError: a setting is out of range; the message names it.
    """

    def __init__(self, *, version: int = 2, max_batch: int = 64, **connection: Any) -> None:
        if version not in VERSIONS:
            raise ValueError(f"version={version}: must be one of {', '.join(map(str, VERSIONS))}")
        template, patterns, value_range = VERSIONS[version]
        super().__init__(
            template=template,
            metrics=patterns,
            value_range=value_range,
            max_batch=max_batch,
            **{"model": "UnifiedReward"} | connection,
        )
        self._name, self._source, self._licence = "unified_reward", f"UnifiedReward {version}, {SOURCE}", LICENCE


def _png(image: np.ndarray) -> str:
    file = io.BytesIO()
    # Level 1 of 9: little larger, and several times as fast.
    Image.fromarray(image).save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")
