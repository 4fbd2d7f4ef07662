"""Rows to token ids and the mask of trained tokens, through the tokenizer and its chat template.

The turn-end token of an assistant turn is trained, white space after it is not: nobody generates that. Tokens are
those of inference: a prompt is never merged with the answer's first characters.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from rayft.data.chat import ChatTemplate, Document, LossOn, Message, Tools
from rayft.data.comparisons import Comparison
from rayft.data.formats import Row
from rayft.errors import DataError, JobError


@dataclass(frozen=True)
class Sample:
    """One document: `ids` int32[T], `trained` bool[T] (token t is a target; never the first one)."""

    ids: np.ndarray
    trained: np.ndarray


class ChatTokenizer:
    """A fast tokenizer with its chat template and the rule for what carries loss."""

    def __init__(self, tokenizer: Any, loss_on: LossOn = "assistant") -> None:
        """`tokenizer`: a transformers tokenizer backed by the `tokenizers` library. Raises JobError if it is not."""
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise JobError(
                f"The tokenizer {type(tokenizer).__name__} has no fast version (tokenizer.json).",
                "Convert it with transformers' AutoTokenizer and save it, or set model.tokenizer to a converted one.",
            )
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self.template = ChatTemplate(tokenizer, loss_on)
        self._backend = _exact_backend(tokenizer.backend_tokenizer)
        self._bos: int | None = tokenizer.bos_token_id
        self._eos: int | None = tokenizer.eos_token_id
        self._adds_bos = self._bos is not None and tokenizer("a")["input_ids"][:1] == [self._bos]
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = special | ({self._eos} if self._eos is not None else set())

    def __reduce__(self) -> tuple[Any, ...]:
        # Many small tasks get the same tokenizer, and building one takes as long as tokenising a thousand rows.
        return _restored, (self.identity, pickle.dumps(self.tokenizer), self.loss_on)

    @cached_property
    def identity(self) -> str:
        """Digest of everything that decides which ids and which mask a row gets."""
        parts = [
            self._backend.to_str(),
            json.dumps(self.tokenizer.chat_template),
            json.dumps({k: str(v) for k, v in self.tokenizer.special_tokens_map.items()}, sort_keys=True),
            str(self._adds_bos),
            self.loss_on,
        ]
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()

    def prompt_ids(self, messages: Sequence[Message], tools: Tools = None) -> list[int]:
        """Token ids that inference starts from: the messages and the generation prompt. Raises jinja2's TemplateError."""
        return self._backend.encode(self.template.prompt(messages, tools), add_special_tokens=False).ids

    def encode(self, row: Row | Comparison, where: str = "the row") -> list[Sample]:
        """The documents of one row. Raises DataError naming `where`."""
        result = self.encode_batch([row], [where])[0]
        if isinstance(result, DataError):
            raise result
        return result

    def encode_batch(
        self, rows: Sequence[Row | Comparison], wheres: Sequence[str]
    ) -> list[list[Sample] | DataError]:
        """The documents of each row, or what is wrong with it; all texts are tokenised together.

        A comparison has one document per answer, in their order, each ending with the last token of its answer.
        """
        flat = [
            (answer, where)
            for row, where in zip(rows, wheres, strict=True)
            for answer in (row.answers if isinstance(row, Comparison) else (row,))
        ]
        encoded = iter(self._encode(flat))
        return [
            _answers([next(encoded) for _ in row.answers], where)
            if isinstance(row, Comparison)
            else next(encoded)
            for row, where in zip(rows, wheres, strict=True)
        ]

    def _encode(self, rows: list[tuple[Row, str]]) -> list[list[Sample] | DataError]:
        documents = [_or_error(self.template.documents, row, where) for row, where in rows]
        texts = [document.text for own in documents if isinstance(own, list) for document in own]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        results: list[list[Sample] | DataError] = []
        for own, (_, where) in zip(documents, rows, strict=True):
            if isinstance(own, list):
                pairs = [(document, next(encodings)) for document in own]
                results.append(_or_error(self._samples, pairs, where))
            else:
                results.append(own)
        return results

    def _samples(self, pairs: list[tuple[Document, Any]], where: str) -> list[Sample]:
        return [self._sample(document, encoding, where) for document, encoding in pairs]

    def _sample(self, document: Document, encoding: Any, where: str) -> Sample:
        ids, starts = self._tokens(document, encoding)
        trained = np.zeros(len(ids), dtype=np.bool_)
        for start, end in document.spans:
            first, stop = np.searchsorted(starts, [start, end])
            trained[first:stop] = True
            if document.turns and (stop <= first or int(ids[stop - 1]) not in self._special):
                last = self.tokenizer.decode(ids[max(stop - 1, 0) : stop])
                raise DataError(
                    f"{where}: the chat template ends an assistant turn without a turn-end token (with {last!r}), "
                    "so the model would never learn to stop.",
                    "Set model.chat_template to one that ends turns with the tokenizer's end token.",
                )
        if document.plain:
            ids, trained = self._with_ends(ids, trained)
        if self._bos is not None and len(ids) > 1 and ids[0] == ids[1] == self._bos:
            raise DataError(
                f"{where}: the row begins with two {self.tokenizer.bos_token} tokens.",
                "One comes from the tokenizer or its chat template; remove the other from the data.",
            )
        trained[:1] = False  # nothing comes before the first token that could predict it
        return Sample(ids, trained)

    def _tokens(self, document: Document, encoding: Any) -> tuple[np.ndarray, np.ndarray]:
        """ids int32[T] and the character at which each token starts; no token crosses the start of a span.

        A token that merges the prompt's last characters with the answer's first ones never occurs at inference, where
        the prompt is tokenised alone: such a text is tokenised in pieces.
        """
        ids, starts, ends = _arrays(encoding)
        cuts = []
        for start, _ in document.spans:
            before = int(np.searchsorted(starts, start)) - 1
            # Special tokens may take in the white space after them, at inference too.
            if before >= 0 and ends[before] > start and int(ids[before]) not in self._special:
                cuts.append(start)
        if not cuts:
            return ids, starts
        pieces = []
        for start, end in itertools.pairwise([0, *cuts, len(document.text)]):
            piece = self._backend.encode(document.text[start:end], add_special_tokens=False)
            if start and piece.tokens[0][0] in "▁Ġ" and not document.text[start].isspace():
                return ids, starts  # the tokenizer puts a space before every text: pieces would be wrong
            piece_ids, piece_starts, _ = _arrays(piece)
            pieces.append((piece_ids, piece_starts + start))
        ids, starts = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return ids, starts

    def _with_ends(self, ids: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Plain text gets the begin token if the tokenizer gives one to any text, and always the end token."""
        if self._eos is None:
            raise JobError(
                "The tokenizer has no end-of-text token, which text and prompt/completion rows end with.",
                "Set model.tokenizer to one that has an eos_token.",
            )
        if self._adds_bos and ids[0] != self._bos:
            ids, trained = np.insert(ids, 0, np.int32(self._bos or 0)), np.insert(trained, 0, False)
        if ids[-1] != self._eos:
            ids, trained = np.append(ids, np.int32(self._eos)), np.append(trained, True)
        return ids, trained


@lru_cache(maxsize=4)
def _restored(identity: str, pickled: bytes, loss_on: LossOn) -> ChatTokenizer:
    return ChatTokenizer(pickle.loads(pickled), loss_on)


def _answers(encoded: list[list[Sample] | DataError], where: str) -> list[Sample] | DataError:
    """One document per answer, or what is wrong with the first that has none."""
    answers = []
    for documents in encoded:
        if isinstance(documents, DataError):
            return documents
        if len(documents) > 1:
            return DataError(
                f"{where}: the chat template renders the answer's earlier turns differently once later ones follow, so no "
                "single text shows the whole answer.",
                "Compare answers of one assistant turn, or set model.chat_template to one that leaves history as it was.",
            )
        (sample,) = documents
        end = (
            int(np.flatnonzero(sample.trained)[-1]) + 1
        )  # the template's white space after the turn is nobody's
        answers.append(Sample(sample.ids[:end], sample.trained[:end]))
    return answers


def _or_error(function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except DataError as error:
        return error


def _exact_backend(backend: Any) -> Any:
    """A copy whose offsets cover every character: byte-level post-processing would leave out leading spaces."""
    from tokenizers import processors

    backend = copy.deepcopy(backend)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _arrays(encoding: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids int32[T], and the characters [start, end) of each token, int64[T]."""
    offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    return np.asarray(encoding.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1]
